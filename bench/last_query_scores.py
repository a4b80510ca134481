"""Stage 2 scores: one query row over cached keys.

data="gaussian": FlashAttention's layout (B, S, Hkv, D). data="cache": the same numbers in Hugging Face's layout
(B, Hkv, S, D), passed as `.transpose(1, 2)`. Two providers are yardsticks and compute no scores. "sdpa, one query" also
reads the values. "largest key" takes the max over the keys, the cheapest way to read all keys.
"""

from functools import partial

import torch
from torch.nn.functional import scaled_dot_product_attention

from .harness import Bench, Case, Cost, Provider

HEADS = {"LLaVA-1.5-7B": (32, 32), "Qwen2.5-VL-7B": (28, 4), "Llama-3-8B": (32, 8)}  # (query, key) heads of size 128
MATRIX_BYTES = {"cuda": 40 << 30, "cpu": 1 << 30}  # max memory of the full attention matrix


def _case(group, batch, keys, heads, dtype=torch.bfloat16, data="gaussian", **options):
    shape = {"B": batch, "S": keys, "Hq": heads[0], "Hkv": heads[1], "D": 128}
    return Case(group, shape, dtype, data, **options)


def _cases():
    for keys in (320, 2880, 8192, 32768, 131072):
        for heads in HEADS.values():
            yield _case("main", 1, keys, heads, cuda_only=keys > 8192)
    for keys in (320, 8192, 32768):
        yield _case("float32", 1, keys, HEADS["Llama-3-8B"], torch.float32, cuda_only=keys > 8192)
        yield _case("cache", 1, keys, HEADS["Llama-3-8B"], data="cache", cuda_only=keys > 8192)
    yield _case("cache", 1, 8192, HEADS["Llama-3-8B"], torch.float32, "cache")
    yield _case("batch", 16, 320, HEADS["LLaVA-1.5-7B"])
    yield _case("batch", 8, 2880, HEADS["Qwen2.5-VL-7B"])
    for keys in (16, 32, 64, 128, 192, 256, 384, 512):
        yield _case("sweep-S", 1, keys, HEADS["Qwen2.5-VL-7B"])


def make_inputs(case, device):
    rng = torch.Generator(device=device).manual_seed(0)
    shape = case["B"], case["S"], case["Hkv"], case["D"]
    query = torch.randn(case["B"], case["Hq"], case["D"], generator=rng, device=device).to(case.dtype)
    key = torch.empty(shape, dtype=case.dtype, device=device)
    if case.data == "cache":
        key = key.transpose(1, 2).contiguous().transpose(1, 2)
    for item in key:
        item.copy_(torch.randn(shape[1:], generator=rng, device=device))
    return {"query": query, "key": key}


def cost(case):
    rows = case["B"] * case["S"]
    return Cost(
        bytes=(rows * case["Hkv"] + case["B"] * case["Hq"]) * case["D"] * case.dtype.itemsize + 4 * rows,
        flops=2 * rows * case["Hq"] * case["D"],
    )


def check(case, given, scores):
    """Against float64, one head at a time. Baselines may round logits to the input's dtype."""
    if scores.ndim != 2:  # a yardstick
        assert scores.isfinite().all()
        return
    query, key = given["query"].double(), given["key"]
    want = torch.zeros(key.shape[:2], dtype=torch.float64, device=key.device)
    group = case["Hq"] // case["Hkv"]
    for head in range(case["Hq"]):
        logits = (key[:, :, head // group].double() @ query[:, head, :, None])[..., 0] * case["D"] ** -0.5
        want += logits.softmax(-1) / case["Hq"]
    torch.testing.assert_close(scores.double(), want, rtol=0.05, atol=1e-7)


def eager(query, key):
    """Eager attention as in transformers: repeated key heads, softmax in float32."""
    keys = key.transpose(1, 2).repeat_interleave(query.shape[1] // key.shape[2], 1)
    logits = query[:, :, None] @ keys.mT * query.shape[-1] ** -0.5
    return logits.softmax(-1, dtype=torch.float32).mean(1)[:, 0]


def full_matrix(query, key):
    """The full attention matrix, then its last row, as in common pruning code."""
    keys = key.transpose(1, 2).repeat_interleave(query.shape[1] // key.shape[2], 1)
    logits = query @ keys.mT * query.shape[-1] ** -0.5
    return logits.softmax(-1, dtype=torch.float32).to(query.dtype).mean(1, dtype=torch.float32)[:, -1]


def _bind_full_matrix(case, given):
    queries = given["query"][:, :, None].expand(-1, -1, case["S"], -1).contiguous()
    return partial(full_matrix, queries, given["key"])


def _bind_sdpa(case, given):
    key = given["key"].transpose(1, 2)
    value = torch.randn_like(key)
    query = given["query"][:, :, None]
    return partial(scaled_dot_product_attention, query, key, value, enable_gqa=case["Hq"] != case["Hkv"])


def _matrix_fits(case, device):
    # bytes per weight: softmax in float32; logits and rounded softmax in the input's dtype
    return case["B"] * case["Hq"] * case["S"] ** 2 * (4 + 2 * case.dtype.itemsize) <= MATRIX_BYTES[device.type]


BENCH = Bench(
    op="last_query_scores",
    cases=list(_cases()),
    make_inputs=make_inputs,
    cost=cost,
    check=check,
    baselines=[
        Provider("eager softmax", lambda case, given: partial(eager, **given)),
        Provider(
            "eager softmax (compiled)",
            lambda case, given: partial(torch.compile(eager, fullgraph=True, dynamic=False), **given),
            compiles=True,
        ),
        Provider("full matrix", _bind_full_matrix, _matrix_fits),
        Provider("sdpa, one query", _bind_sdpa),
        Provider("largest key", lambda case, given: given["key"].amax),
    ],
)
