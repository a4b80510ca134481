"""Greedy MAP of a DPP: LLaVA image shapes, and batches."""

from functools import partial

import torch

from . import inputs, verify
from .harness import Bench, Case, Cost, Provider

F32, BF16 = torch.float32, torch.bfloat16
MAIN = [(576, 64), (576, 192), (2880, 64), (2880, 192), (2880, 640)]


def _case(group, batch, tokens, k, dtype=F32, data="gaussian", cuda_only=False):
    return Case(group, {"B": batch, "N": tokens, "C": 1024, "K": k}, dtype, data, cuda_only)


CASES = [
    *(_case("main", 1, n, k, dtype) for dtype in (F32, BF16) for n, k in MAIN),
    *(_case("smooth", 1, n, k, BF16, "smooth") for n, k in ((576, 192), (2880, 640))),
    *(_case("batch", 8, 576, 192, dtype) for dtype in (F32, BF16)),
    _case("batch", 64, 576, 192, BF16, cuda_only=True),
]


def make_inputs(case, device):
    x = inputs.features(case["B"], case["N"], case["C"], case.dtype, device, case.data)
    generator = torch.Generator(device=device).manual_seed(1)
    quality = torch.rand(case["B"], case["N"], generator=generator, device=device) + 0.05
    return {"features": x, "quality": quality, "k": case["K"]}


def cost(case):
    """Features read once; each pick needs the cosines of its row, and a sum over the earlier rows."""
    batch, tokens, channels, k = (case[name] for name in "BNCK")
    return Cost(
        bytes=batch * (tokens * (channels * case.dtype.itemsize + 4) + 12 * k),
        flops=batch * tokens * k * (2 * channels + k),
    )


def check(case, given, result):
    for x, quality, order, gain in zip(given["features"], given["quality"], *result, strict=True):
        verify.greedy_map(x, quality, order, gain)


def _unit(features):
    return torch.nn.functional.normalize(features.float(), dim=-1)


def _step(row, gains, rows, step, token):
    """One greedy step, in place. row (B, N): the picked tokens' rows of L. Writes rows[:, step], the Cholesky row, and
    updates the gains. Returns the gains of the picks, (B,).
    """
    own = rows[:, :step].gather(2, token[:, None, None].expand(-1, step, 1))
    pivot = gains.gather(1, token[:, None])
    entry = row.sub_(torch.bmm(own.mT, rows[:, :step])[:, 0]).div_(pivot.sqrt())
    rows[:, step] = entry
    gains.sub_(entry.square_()).scatter_(1, token[:, None], -torch.inf)
    return pivot[:, 0]


def _loop(gains, k, row_of):
    rows = gains.new_empty(*gains.shape[:1], k, gains.shape[1])
    order, gain = [], []
    for step in range(k):
        token = gains.argmax(1)
        order.append(token)
        gain.append(_step(row_of(token), gains, rows, step, token))
    return torch.stack(order, 1), torch.stack(gain, 1)


def _row(matrix, token):
    return matrix.gather(1, token[:, None, None].expand(-1, 1, matrix.shape[2]))


def gram_loop(features, quality, k):
    """Computes the kernel matrix L of all pairs once, by one matrix product, as in CDPruner's code."""
    x = _unit(features) * quality[..., None]
    kernel = torch.bmm(x, x.mT)
    return _loop(kernel.diagonal(dim1=1, dim2=2).clone(), k, lambda token: _row(kernel, token)[:, 0])


def matvec_loop(features, quality, k):
    """One matrix-vector product per pick, for its row of L."""
    x = _unit(features) * quality[..., None]
    return _loop(x.square().sum(-1), k, lambda token: torch.bmm(x, _row(x, token).mT)[..., 0])


BENCH = Bench(
    op="dpp_select",
    cases=CASES,
    make_inputs=make_inputs,
    cost=cost,
    check=check,
    baselines=[
        Provider("gram loop", lambda case, given: partial(gram_loop, **given)),
        Provider("matvec loop", lambda case, given: partial(matvec_loop, **given)),
    ],
)
