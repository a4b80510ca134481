"""Attention received by every key: column means of the attention matrix.

data="gaussian": a vision encoder. Every row has the same weight and attends to all keys. data="raters": an LLM's causal
prefill. Only the last RATERS rows have weight. The provider "sdpa" is a yardstick: it computes the attention output,
and no column means.
"""

from functools import partial

import torch
from torch.nn.functional import scaled_dot_product_attention

from .harness import Bench, Case, Cost, Provider

RATERS = 64
CHUNK = 1 << 24  # max attention weights held at once by the chunked baseline
MATRIX_BYTES = {"cuda": 40 << 30, "cpu": 2 << 30}  # max memory of the full attention matrix


def _case(group, batch, tokens, heads, dim, dtype=torch.bfloat16, kv_heads=None, **options):
    shape = {"B": batch, "S": tokens, "Hq": heads, "Hkv": kv_heads or heads, "D": dim}
    return Case(group, shape, dtype, **options)


def _cases():
    for dtype in (torch.float32, torch.bfloat16):
        yield _case("main", 1, 576, 16, 64, dtype)  # CLIP-L/14 at 336
        yield _case("main", 1, 1225, 16, 80, dtype)  # Qwen2.5-VL
        yield _case("main", 1, 4096, 16, 64, dtype)
        yield _case("batch", 5, 729, 16, 72, dtype)  # SigLIP-so400m, a picture in five crops
    yield _case("main", 1, 16384, 16, 80, cuda_only=True)
    yield _case("batch", 32, 576, 16, 64, cuda_only=True)
    for tokens in (2880, 8192):
        yield _case("raters", 1, tokens, 32, 128, data="raters", cuda_only=tokens > 2880)
        yield _case("raters", 1, tokens, 28, 128, kv_heads=4, data="raters", cuda_only=tokens > 2880)


def make_inputs(case, device):
    rng = torch.Generator(device=device).manual_seed(0)

    def normal(heads):
        shape = case["B"], case["S"], heads, case["D"]
        return torch.randn(shape, generator=rng, device=device).to(case.dtype)

    given = {"query": normal(case["Hq"]), "key": normal(case["Hkv"])}
    if case.data == "raters":
        position = torch.arange(case["S"], device=device).expand(case["B"], -1)
        given["row_weight"] = (position >= case["S"] - RATERS).float()
        given["row_position"] = position
    return given


def cost(case):
    rows, counted = case["S"], case["S"] if case.data == "gaussian" else min(RATERS, case["S"])
    options = 0 if case.data == "gaussian" else 12 * rows
    return Cost(
        bytes=case["B"] * (rows * (case["Hq"] + case["Hkv"]) * case["D"] * case.dtype.itemsize + 4 * rows + options),
        flops=2 * case["B"] * counted * case["S"] * case["Hq"] * case["D"],
    )


def check(case, given, received):
    """Against float64, one head at a time. Baselines may round logits to the input's dtype."""
    if received.ndim != 2:  # the yardstick
        assert received.isfinite().all()
        return
    group, row_weight, row_position = case["Hq"] // case["Hkv"], given.get("row_weight"), given.get("row_position")
    want = torch.zeros(case["B"], case["S"], dtype=torch.float64, device=received.device)
    column = torch.arange(case["S"], device=received.device)
    for item in range(case["B"]):
        rows = column if row_weight is None else row_weight[item].nonzero()[:, 0]
        for head in range(case["Hq"]):
            logits = given["query"][item, rows, head].double() @ given["key"][item, :, head // group].double().T
            logits *= case["D"] ** -0.5
            if row_position is not None:
                logits.masked_fill_(column > row_position[item, rows, None], -torch.inf)
            want[item] += logits.softmax(-1).mean(0) / case["Hq"]
    torch.testing.assert_close(received.double(), want, rtol=0.02, atol=1e-6)


def _logits(query, key, row_position):
    keys = key.transpose(1, 2).repeat_interleave(query.shape[2] // key.shape[2], 1)
    logits = query.transpose(1, 2) @ keys.mT * query.shape[-1] ** -0.5
    if row_position is not None:
        column = torch.arange(key.shape[1], device=key.device)
        logits = logits.masked_fill((column > row_position[..., None])[:, None], -torch.inf)
    return logits


def eager(query, key, row_weight=None, row_position=None):
    """Eager attention as in transformers, softmax in float32, then column means."""
    matrix = _logits(query, key, row_position).softmax(-1, dtype=torch.float32)
    if row_weight is None:
        return matrix.mean((1, 2))
    return torch.einsum("br,bhrs->bs", row_weight / row_weight.sum(1, keepdim=True), matrix) / query.shape[2]


def chunked(query, key, row_weight=None, row_position=None):
    """`eager` in float32, over chunks of rows that hold max CHUNK attention weights."""
    batch, rows, heads, _ = query.shape
    if row_weight is None:
        row_weight = query.new_ones(batch, rows, dtype=torch.float32)
    row_weight = row_weight / (row_weight.sum(1, keepdim=True) * heads)
    keys = key.float()
    size = max(1, CHUNK // (batch * heads * key.shape[1]))
    received = torch.zeros(key.shape[:2], device=key.device)
    for start in range(0, rows, size):
        part = slice(start, start + size)
        position = None if row_position is None else row_position[:, part]
        matrix = _logits(query[:, part].float(), keys, position).softmax(-1)
        received += torch.einsum("br,bhrs->bs", row_weight[:, part], matrix)
    return received


def _bind_sdpa(case, given):
    query, key = (given[name].transpose(1, 2).contiguous() for name in ("query", "key"))
    options = {"is_causal": case.data == "raters", "enable_gqa": case["Hq"] != case["Hkv"]}
    return partial(scaled_dot_product_attention, query, key, torch.randn_like(key), **options)


def _matrix_fits(case, device):
    # bytes per weight: softmax in float32; logits and masked logits in the input's dtype
    return case["B"] * case["Hq"] * case["S"] ** 2 * (4 + 2 * case.dtype.itemsize) <= MATRIX_BYTES[device.type]


BENCH = Bench(
    op="attention_received",
    cases=list(_cases()),
    make_inputs=make_inputs,
    cost=cost,
    check=check,
    baselines=[
        Provider("eager softmax", lambda case, given: partial(eager, **given), _matrix_fits),
        Provider(
            "eager softmax (compiled)",
            lambda case, given: partial(torch.compile(eager, fullgraph=True, dynamic=False), **given),
            _matrix_fits,
            compiles=True,
        ),
        Provider("chunked softmax", lambda case, given: partial(chunked, **given)),
        Provider("sdpa", _bind_sdpa),
    ],
    reference_syncs=True,
)
