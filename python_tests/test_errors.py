"""Bad arguments: public functions raise an error that names the fault; raw ops raise, and never crash."""

import math
import re

import numpy as np
import pytest
import torch

import sts_kernels
from sts_kernels import _registry

NAN, INF, DOUBLE = math.nan, math.inf, torch.float64


def good(op, device="cpu"):
    """Valid arguments of `op`, with all optional ones."""
    features = torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(0)).to(device)
    index = lambda *values, dtype=torch.int64: torch.tensor(values, dtype=dtype, device=device)  # noqa: E731
    return {
        "pairwise_sqdist": lambda: {"features": features},
        "repulsion_step_": lambda: {
            "potential": torch.zeros(2, 6, device=device),
            "features": features,
            "picked": index(0, 5),
            "eps": 1e-6,
        },
        "repulsion_select": lambda: {
            "features": features,
            "k": 3,
            "eps": 1e-6,
            "anchor": index(0, 4),
            "num_tokens": index(6, 5),
        },
        "repulsion_select_varlen": lambda: {
            "features": features.reshape(12, 4),
            "cu_seqlens": index(0, 7, 12, dtype=torch.int32),
            "cu_budgets": index(0, 3, 5, dtype=torch.int32),
            "total_k": 5,
            "eps": 1e-6,
            "anchor": index(6, 4),
            "max_seqlen": 7,
        },
        "farthest_select": lambda: {
            "features": features,
            "k": 3,
            "anchor": index(0, 4),
            "quality": torch.ones(2, 6, device=device),
            "start": torch.ones(2, 6, device=device),
            "metric": "cosine",
            "num_tokens": index(6, 5),
        },
        "farthest_select_varlen": lambda: {
            "features": features.reshape(12, 4),
            "cu_seqlens": index(0, 7, 12, dtype=torch.int32),
            "cu_budgets": index(0, 3, 5, dtype=torch.int32),
            "total_k": 5,
            "anchor": index(6, 4),
            "quality": torch.ones(12, device=device),
            "start": torch.ones(12, device=device),
            "metric": "cosine",
            "max_seqlen": 7,
        },
        "suppress_select": lambda: {
            "features": features,
            "rank": index(*range(12)).reshape(2, 6),
            "tau": torch.ones(2, 6, device=device),
            "k": 3,
            "num_tokens": index(6, 5),
        },
        "suppress_select_varlen": lambda: {
            "features": features.reshape(12, 4),
            "rank": index(*range(12)),
            "tau": torch.ones(12, device=device),
            "cu_seqlens": index(0, 7, 12, dtype=torch.int32),
            "cu_budgets": index(0, 3, 5, dtype=torch.int32),
            "total_k": 5,
            "max_seqlen": 7,
        },
    }[op]()


SELECTING = ["repulsion_select", "farthest_select", "suppress_select"]
VARLEN = [f"{op}_varlen" for op in SELECTING]
FARTHEST = ["farthest_select", "farthest_select_varlen"]
SUPPRESS = ["suppress_select", "suppress_select_varlen"]
ANCHORED = ["repulsion_select", "farthest_select"]
ANCHORED_VARLEN = [f"{op}_varlen" for op in ANCHORED]
OPS = ["pairwise_sqdist", "repulsion_step_", *SELECTING, *VARLEN]
DENSE = ["pairwise_sqdist", "repulsion_step_", *SELECTING]
INTS = [*((op, "k") for op in SELECTING), *((op, name) for op in VARLEN for name in ("total_k", "max_seqlen"))]
# Per-token values: (op, argument).
FLOATS = [
    *((op, name) for op in FARTHEST for name in ("quality", "start")),
    *((op, "tau") for op in SUPPRESS),
]
NUMBERS = [*FLOATS, *((op, "rank") for op in SUPPRESS)]
EPS = ["repulsion_step_", "repulsion_select", "repulsion_select_varlen"]


def t(*values, dtype=torch.int64):
    return torch.tensor(values, dtype=dtype)


# (op, argument, bad value, exception, how the message describes the value)
BAD = [
    *((op, "features", value, TypeError, "list") for op in OPS for value in ([[[1.0]]],)),
    *((op, "features", None, TypeError, "NoneType") for op in OPS),
    *((op, "features", torch.zeros(2, 6, 4, dtype=torch.float64), TypeError, "float64") for op in OPS),
    *((op, "features", torch.zeros(2, 6, 4, dtype=torch.int32), TypeError, "int32") for op in OPS),
    *((op, "features", torch.zeros(2, 6, 4, dtype=torch.complex64), TypeError, "complex64") for op in OPS),
    *((op, "features", torch.zeros(2, 6, 4, dtype=torch.bool), TypeError, "bool") for op in OPS),
    *((op, "features", torch.zeros(2, 6), ValueError, "(2, 6)") for op in DENSE),
    *((op, "features", torch.zeros(6), ValueError, "(6,)") for op in OPS),
    *((op, "features", torch.zeros(()), ValueError, "()") for op in OPS),
    *((op, "features", torch.zeros(1, 2, 6, 4), ValueError, "(1, 2, 6, 4)") for op in OPS),
    *((op, "features", torch.zeros(2, 0, 4), ValueError, "(2, 0, 4)") for op in DENSE),
    *((op, "features", torch.zeros(2, 6, 0), ValueError, "(2, 6, 0)") for op in DENSE),
    *((op, "features", torch.zeros(2, 6, 4), ValueError, "(2, 6, 4)") for op in VARLEN),
    *((op, "features", torch.zeros(12, 0), ValueError, "(12, 0)") for op in VARLEN),
    *(
        (op, "eps", value, ValueError, str(value))
        for op in EPS
        for value in (0.0, -1e-6, 1e-31, 1.1e30, 3.4e38, 1e300, 0, -1, 10**31, INF, -INF, NAN)
    ),
    *((op, "eps", 10**5000, ValueError, "an int of more than 400 digits") for op in EPS),
    *((op, name, 10**5000, ValueError, "an int of more than 400 digits") for op, name in INTS),
    *((op, "eps", "small", TypeError, "str") for op in EPS),
    *((op, "eps", None, TypeError, "NoneType") for op in EPS),
    *((op, "eps", torch.tensor(1e-6), TypeError, "Tensor") for op in EPS),
    ("repulsion_step_", "potential", torch.zeros(2, 6, dtype=torch.float16), TypeError, "float16"),
    ("repulsion_step_", "potential", torch.zeros(2, 6, dtype=torch.float64), TypeError, "float64"),
    ("repulsion_step_", "potential", [0.0], TypeError, "list"),
    ("repulsion_step_", "potential", torch.zeros(2, 7), ValueError, "(2, 7)"),
    ("repulsion_step_", "potential", torch.zeros(1, 6), ValueError, "(1, 6)"),
    ("repulsion_step_", "potential", torch.zeros(6), ValueError, "(6,)"),
    ("repulsion_step_", "picked", t(0, 6), ValueError, "6"),
    ("repulsion_step_", "picked", t(-2, 0), ValueError, "-2"),
    ("repulsion_step_", "picked", t(2**40, 0), ValueError, str(2**40)),
    ("repulsion_step_", "picked", t(0), ValueError, "(1,)"),
    ("repulsion_step_", "picked", t(0, 1, 2), ValueError, "(3,)"),
    ("repulsion_step_", "picked", torch.zeros(2, 1, dtype=torch.int64), ValueError, "(2, 1)"),
    ("repulsion_step_", "picked", torch.zeros(2), TypeError, "float32"),
    ("repulsion_step_", "picked", t(0, 1, dtype=torch.int16), TypeError, "int16"),
    ("repulsion_step_", "picked", 0, TypeError, "int"),
    *((op, "k", value, ValueError, str(value)) for op in SELECTING for value in (0, -1, 7, 2**40)),
    *((op, "k", value, TypeError, type(value).__name__) for op in SELECTING for value in (2.0, "3", None, True)),
    *((op, "anchor", t(0, 5), ValueError, "5") for op in ANCHORED),  # item 1 has 5 tokens
    *((op, "anchor", t(-1, 0), ValueError, "-1") for op in ANCHORED),
    *((op, "anchor", t(2**40, 0), ValueError, str(2**40)) for op in ANCHORED),
    *((op, "anchor", t(0), ValueError, "(1,)") for op in ANCHORED),
    *((op, "anchor", torch.tensor(0), ValueError, "()") for op in ANCHORED),
    *((op, "anchor", torch.zeros(2), TypeError, "float32") for op in ANCHORED),
    *((op, "anchor", t(0, 1, dtype=torch.uint8), TypeError, "uint8") for op in ANCHORED),
    *((op, "anchor", 3, TypeError, "int") for op in ANCHORED),
    *((op, "num_tokens", t(6, 7), ValueError, "7") for op in SELECTING),
    *((op, "num_tokens", t(-1, 5), ValueError, "-1") for op in SELECTING),
    *((op, "num_tokens", t(6), ValueError, "(1,)") for op in SELECTING),
    *((op, "num_tokens", torch.zeros(2, 2, dtype=torch.int64), ValueError, "(2, 2)") for op in SELECTING),
    *((op, "num_tokens", torch.tensor([6.0, 5.0]), TypeError, "float32") for op in SELECTING),
    *((op, "num_tokens", [6, 5], TypeError, "list") for op in SELECTING),
    *((op, "cu_seqlens", t(0, 7, 11), ValueError, "[0, 7, 11]") for op in VARLEN),
    *((op, "cu_seqlens", t(0, 7, 13), ValueError, "[0, 7, 13]") for op in VARLEN),
    *((op, "cu_seqlens", t(1, 7, 12), ValueError, "[1, 7, 12]") for op in VARLEN),
    *((op, "cu_seqlens", t(0, 13, 12), ValueError, "[0, 13, 12]") for op in VARLEN),
    *((op, "cu_seqlens", t(0, -5, 12), ValueError, "[0, -5, 12]") for op in VARLEN),
    *((op, "cu_seqlens", t(0, -(2**63), 12), ValueError, str(-(2**63))) for op in VARLEN),
    *((op, "cu_budgets", t(0, -(2**63), 5), ValueError, str(-(2**63))) for op in VARLEN),
    *((op, "cu_seqlens", torch.zeros(0, dtype=torch.int32), ValueError, "(0,)") for op in VARLEN),
    *((op, "cu_seqlens", torch.zeros(1, 3, dtype=torch.int32), ValueError, "(1, 3)") for op in VARLEN),
    *((op, "cu_seqlens", torch.tensor([0.0, 7.0, 12.0]), TypeError, "float32") for op in VARLEN),
    *((op, "cu_seqlens", [0, 7, 12], TypeError, "list") for op in VARLEN),
    *((op, "cu_budgets", t(0, 5), ValueError, "(2,)") for op in VARLEN),
    *((op, "cu_budgets", t(0, 3, 6), ValueError, "[0, 3, 6]") for op in VARLEN),
    *((op, "cu_budgets", t(1, 3, 5), ValueError, "[1, 3, 5]") for op in VARLEN),
    *((op, "cu_budgets", t(0, 6, 5), ValueError, "[0, 6, 5]") for op in VARLEN),
    *((op, "cu_budgets", t(0, 3, 5, dtype=torch.int8), TypeError, "int8") for op in VARLEN),
    *((op, "total_k", 4, ValueError, "[0, 3, 5]") for op in VARLEN),
    *((op, "total_k", -1, ValueError, "-1") for op in VARLEN),
    *((op, "total_k", 13, ValueError, "13") for op in VARLEN),
    *((op, "total_k", 5.0, TypeError, "float") for op in VARLEN),
    *((op, "total_k", False, TypeError, "bool") for op in VARLEN),
    *(
        (op, "max_seqlen", value, ValueError, str(value)) for op in VARLEN for value in (6, 0, -1)
    ),  # item 0 has 7 tokens
    *((op, "max_seqlen", value, TypeError, type(value).__name__) for op in VARLEN for value in (7.0, "7", True)),
    *((op, "anchor", t(7, 0), ValueError, "7") for op in ANCHORED_VARLEN),
    *((op, "anchor", t(0, -1), ValueError, "-1") for op in ANCHORED_VARLEN),
    *((op, "anchor", t(0), ValueError, "(1,)") for op in ANCHORED_VARLEN),
    *((op, "anchor", torch.zeros(2), TypeError, "float32") for op in ANCHORED_VARLEN),
    *(
        (op, name, value, TypeError, str(value.dtype)[6:])
        for op, name in FLOATS
        for value in (t(1), t(1.0, dtype=DOUBLE))
    ),
    *((op, "rank", torch.zeros(2, 6), TypeError, "float32") for op in SUPPRESS),
    *((op, "rank", t(1, dtype=torch.int16), TypeError, "int16") for op in SUPPRESS),
    *((op, name, [1.0], TypeError, "list") for op, name in NUMBERS),
    *((op, name, good(op)[name][:-1], ValueError, "(1, 6)") for op, name in NUMBERS if op in SELECTING),
    *((op, name, good(op)[name][:-1], ValueError, "(11,)") for op, name in NUMBERS if op in VARLEN),
    *((op, name, good(op)[name][None], ValueError, "(1, ") for op, name in NUMBERS),
    *((op, "metric", "l2", ValueError, "l2") for op in FARTHEST),
    *((op, "metric", 2, TypeError, "int") for op in FARTHEST),
    *((op, "metric", None, TypeError, "NoneType") for op in FARTHEST),
]


def describe(value):
    if isinstance(value, int) and value > 10**400:
        return "huge"
    if isinstance(value, torch.Tensor):
        small = value.dtype in (torch.int64, torch.int32) and value.ndim == 1
        return str(value.tolist()) if small else f"{value.dtype}{tuple(value.shape)}"
    return repr(value)


BAD_IDS = [f"{op}-{name}-{describe(value)}" for op, name, value, _, _ in BAD]


@pytest.mark.parametrize("op", OPS)
def test_the_good_arguments_are_good(device, op):
    getattr(sts_kernels, op)(**good(op, device))
    getattr(torch.ops.sts_kernels, op)(**good(op, device))


@pytest.mark.parametrize(("op", "name", "value", "error", "came"), BAD, ids=BAD_IDS)
def test_message_names_op_argument_and_what_came(op, name, value, error, came):
    for call in (getattr(sts_kernels, op), _registry.OPS[op].reference):
        with pytest.raises(error) as caught:
            call(**{**good(op), name: value})
        message = str(caught.value)
        assert caught.type is error
        assert message.startswith(f"{op}: ")
        # If total_k and cu_budgets disagree, the message is about cu_budgets: it must rise to total_k.
        assert re.search(rf"\b{name}\b", message), message
        assert came in message
        assert "\n" not in message


@pytest.mark.parametrize(("op", "name", "value", "error", "came"), BAD, ids=BAD_IDS)
def test_raw_op_raises_too(op, name, value, error, came):
    """The raw op repeats the checks of the public function; the dispatcher rejects values outside the schema."""
    if isinstance(value, torch.Tensor) and value.ndim == 0 and name == "eps":
        pytest.skip("a 0-d tensor is a number to the dispatcher")
    if value is True or value is False:
        pytest.skip("a bool is a number to the dispatcher")
    arguments = {**good(op), name: value}
    with pytest.raises((RuntimeError, ValueError, TypeError)):
        getattr(torch.ops.sts_kernels, op)(**arguments)


@pytest.mark.parametrize("number", [np.int64, np.int32, np.uint8, np.float32, np.float64], ids=lambda t: t.__name__)
@pytest.mark.parametrize("op", OPS)
def test_numpy_numbers_are_numbers(device, op, number):
    """As in torch's own functions."""
    of_type = int if issubclass(number, np.integer) else float
    plain = good(op, device)
    numpy = {n: number(v) if type(v) is of_type else v for n, v in plain.items()}
    if of_type is float:
        plain = {n: float(v) if isinstance(v, np.floating) else v for n, v in numpy.items()}
    got, want = (getattr(sts_kernels, op)(**arguments) for arguments in (numpy, plain))
    assert torch.equal(got, want)


def test_numpy_floats_of_other_ops(device):
    x = good("repulsion_select", device)["features"]
    for number in (np.float32, np.float64):
        got = sts_kernels.last_query_scores(x, x[:, :, None], number(0.5))
        assert torch.equal(got, sts_kernels.last_query_scores(x, x[:, :, None], 0.5))
        quality = torch.ones(x.shape[:2], device=device)
        got = sts_kernels.dpp_select(x, quality, 3, number(0.5))
        assert all(map(torch.equal, got, sts_kernels.dpp_select(x, quality, 3, 0.5)))


@pytest.mark.parametrize(("op", "name"), INTS)
@pytest.mark.parametrize("value", [np.float64(3.0), np.bool_(True), np.array(3)], ids=repr)
def test_numpy_values_that_are_no_ints(op, name, value):
    with pytest.raises(TypeError, match=rf"{op}: {name} must be an int, got {type(value).__name__}"):
        getattr(sts_kernels, op)(**{**good(op), name: value})


@pytest.mark.parametrize("op", EPS)
@pytest.mark.parametrize("value", [1e-30, 1e30, 1, 10**30])
def test_bounds_of_eps(device, op, value):
    """Both bounds are valid and the next float beyond each is not, in the raw op too (torch_glue.h)."""
    for namespace in (sts_kernels, torch.ops.sts_kernels):
        getattr(namespace, op)(**{**good(op, device), "eps": value})
        for beyond in (math.nextafter(1e-30, 0), math.nextafter(1e30, INF)):
            with pytest.raises((ValueError, RuntimeError), match="eps must be between 1e-30 and 1e"):
                getattr(namespace, op)(**{**good(op, device), "eps": beyond})


def test_the_largest_eps_still_tells_distances_apart(device):
    """Above the bound, distance + eps would overflow, and all tokens would tie."""
    x = torch.tensor([0.0, 1e15, 3e15, -2e15], device=device)[None, :, None]
    assert sts_kernels.repulsion_select(x, 3, 1e30, torch.tensor([0], device=device)).tolist() == [[0, 2, 3]]


def budget_over_length():
    return {"cu_seqlens": t(0, 2, 12), "cu_budgets": t(0, 3, 5)}


@pytest.mark.parametrize("op", VARLEN)
@pytest.mark.parametrize("namespace", [sts_kernels, torch.ops.sts_kernels], ids=["public", "raw"])
def test_budget_over_the_length_of_its_item(namespace, op):
    with pytest.raises((ValueError, RuntimeError), match=rf"{op}: .*item 0\b.*") as caught:
        getattr(namespace, op)(**{**good(op), **budget_over_length()})
    if namespace is sts_kernels:
        assert "item 0" in str(caught.value)
        assert caught.type is ValueError


def test_anchor_of_an_item_without_tokens_or_budget_is_ignored(device):
    arguments = good("repulsion_select", device)
    arguments["num_tokens"] = torch.tensor([0, 5], device=device)
    arguments["anchor"] = torch.tensor([99, 4], device=device)
    assert sts_kernels.repulsion_select(**arguments)[0].tolist() == [-1, -1, -1]


def test_the_wrong_item_is_named():
    arguments = good("repulsion_select")
    with pytest.raises(ValueError, match=r"repulsion_select: anchor\[1\] must be between 0 and 4, got 5"):
        sts_kernels.repulsion_select(**{**arguments, "anchor": t(0, 5)})
    with pytest.raises(ValueError, match=r"repulsion_select: num_tokens\[0\] must be between 0 and 6, .*, got 9"):
        sts_kernels.repulsion_select(**{**arguments, "num_tokens": t(9, 5)})
    with pytest.raises(ValueError, match=r"repulsion_step_: picked\[1\] must be between -1 and 5, got 6"):
        sts_kernels.repulsion_step_(**{**good("repulsion_step_"), "picked": t(0, 6)})


@pytest.mark.parametrize(
    ("op", "name", "value", "said"),
    [
        ("repulsion_select", "anchor", t(0, 5), r"anchor\[1\] must be between 0 and 4, got 5"),
        ("farthest_select", "anchor", t(-1, 0), r"anchor\[0\] must be between 0 and 5, got -1"),
        ("suppress_select", "num_tokens", t(6, 9), r"num_tokens\[1\] must be between 0 and 6,.* got 9"),
        ("repulsion_select_varlen", "anchor", t(6, 5), r"anchor\[1\] must be between 0 and 4, got 5"),
        ("farthest_select_varlen", "cu_seqlens", t(0, 13, 12), r"cu_seqlens must rise from 0 to 12,.* got .*13"),
        ("farthest_select_varlen", "cu_seqlens", t(0, -5, 12), r"cu_seqlens must rise from 0 to 12,.* got .*-5"),
    ],
)
def test_the_raw_op_names_the_value_too(op, name, value, said):
    for call in (getattr(torch.ops.sts_kernels, op), _registry.OPS[op].reference):
        with pytest.raises((RuntimeError, ValueError), match=f"{op}: {said}"):
            call(**{**good(op), name: value})


OTHERS = [(op, name) for op in OPS for name, value in good(op).items() if isinstance(value, torch.Tensor)]
OTHERS = [(op, name) for op, name in OTHERS if name != "features"]


@pytest.mark.parametrize("namespace", [sts_kernels, torch.ops.sts_kernels], ids=["public", "raw"])
@pytest.mark.parametrize(("op", "name"), OTHERS, ids=["-".join(pair) for pair in OTHERS])
def test_tensors_on_different_devices(device, namespace, op, name):
    arguments = good(op, device)
    # Without a GPU the meta device stands in for another one.
    arguments[name] = arguments[name].to("meta" if device.type == "cpu" else "cpu")
    with pytest.raises((ValueError, RuntimeError, TypeError, NotImplementedError)) as caught:
        getattr(namespace, op)(**arguments)
    if namespace is sts_kernels:
        message = str(caught.value)
        assert caught.type is ValueError
        assert message.startswith(f"{op}: ")
        assert name in message
        assert str(arguments[name].device) in message


def test_potential_is_untouched_when_a_step_fails(device):
    arguments = good("repulsion_step_", device)
    with pytest.raises(ValueError, match="eps"):
        sts_kernels.repulsion_step_(**{**arguments, "eps": 0.0})
    if device.type == "cpu":
        with pytest.raises(ValueError, match="picked"):
            sts_kernels.repulsion_step_(**{**arguments, "picked": t(0, 6)})
        with pytest.raises((ValueError, RuntimeError)):
            torch.ops.sts_kernels.repulsion_step_(**{**arguments, "picked": t(0, 6)})
    assert (arguments["potential"] == 0).all()


@pytest.mark.parametrize("op", OPS)
def test_shape_errors_on_cuda_too(cuda, op):
    """Shapes and dtypes are checked on every device."""
    arguments = good(op, cuda)
    for value in (torch.zeros(6, device=cuda), torch.zeros(2, 6, 4, dtype=torch.float64, device=cuda)):
        with pytest.raises((ValueError, TypeError), match=rf"{op}: features"):
            getattr(sts_kernels, op)(**{**arguments, "features": value})
        with pytest.raises((RuntimeError, ValueError, TypeError)):
            getattr(torch.ops.sts_kernels, op)(**{**arguments, "features": value})
