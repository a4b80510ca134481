"""The best plain PyTorch implementations of token selection that we found.

The three loops below are batched, stay on the device (no .item()), and run few and small operations per pick. Features
are centred first: with a large common offset, |a|^2 + |b|^2 - 2ab would cancel. Cost per pick:

    direct_loop   differences to the picked token: two passes over the features
    matvec_loop   a matrix-vector product with the picked token: one pass over the features
    gram_loop     one row of N numbers, after one matrix product for all distances

`compiled=True` runs each step (and the Gram-matrix epilogue) through torch.compile. The K-step loop itself stays in
Python: unrolled, it takes minutes to compile.
"""

import functools
import math

import torch


@functools.cache
def _compile(function):
    return torch.compile(function, fullgraph=True, dynamic=False)


def _start(features, num_tokens):
    """Centred float32 tokens, their squared norms, potentials, and the first pick: the token nearest the mean."""
    x = features.float()
    if num_tokens is None:
        x = torch.sub(x, x.mean(1, keepdim=True), out=None if x is features else x)
        norms = torch.linalg.vector_norm(x, dim=-1).square_()
        return x, norms, torch.zeros_like(norms), norms.argmin(1)
    padding = torch.arange(x.shape[1], device=x.device) >= num_tokens[:, None]
    x = x.masked_fill(padding[..., None], 0.0)
    x = (x - x.sum(1, keepdim=True) / num_tokens[:, None, None]).masked_fill_(padding[..., None], 0.0)
    norms = torch.linalg.vector_norm(x, dim=-1).square_()
    potential = torch.zeros_like(norms).masked_fill_(padding, math.inf)
    return x, norms, potential, (norms + potential).argmin(1)


def _row(matrix, token):
    """Row token[b] of each matrix[b]: (B, N, M) -> (B, 1, M)."""
    if matrix.shape[0] == 1:
        return matrix.index_select(1, token)
    return matrix.gather(1, token[:, None, None].expand(-1, 1, matrix.shape[2]))


def _loop(step, k, potential, token):
    picks = [token]
    for _ in range(k - 1):
        picks.append(step(potential, picks[-1]))
    return torch.stack(picks, dim=1)


def _direct_step(x, scratch, potential, token, eps):
    difference = torch.sub(x, _row(x, token), out=scratch)
    sqdist = torch.linalg.vector_norm(difference, dim=-1).square_()
    potential.add_(sqdist.add_(eps).reciprocal_()).scatter_(1, token[:, None], math.inf)
    return potential.argmin(1)


def direct_loop(features, k, eps=1e-6, num_tokens=None, compiled=False):
    x, _, potential, token = _start(features, num_tokens)
    # Scratch is allocated once: an allocation per step would cost more than the step. Compiled code needs no scratch.
    step, scratch = (_compile(_direct_step), None) if compiled else (_direct_step, torch.empty_like(x))
    return _loop(lambda u, t: step(x, scratch, u, t, eps), k, potential, token)


def _matvec_step(x, norms, potential, token, eps):
    dot = torch.bmm(x, _row(x, token).mT)[..., 0]
    sqdist = (norms + norms.gather(1, token[:, None])).sub_(dot, alpha=2).clamp_(min=0)
    potential.add_(sqdist.add_(eps).reciprocal_()).scatter_(1, token[:, None], math.inf)
    return potential.argmin(1)


def matvec_loop(features, k, eps=1e-6, num_tokens=None, compiled=False):
    x, norms, potential, token = _start(features, num_tokens)
    step = _compile(_matvec_step) if compiled else _matvec_step
    return _loop(lambda u, t: step(x, norms, u, t, eps), k, potential, token)


def gram(features, centred=None):
    """x x^T in float32 of the centred tokens.

    On a GPU, 16-bit features are multiplied uncentred on the tensor cores: products are exact in float32, but a common
    offset is not removed.
    """
    if features.is_cuda and features.dtype != torch.float32:
        return torch.bmm(features, features.mT, out_dtype=torch.float32)
    if centred is None:
        centred = _start(features, None)[0]
    return torch.bmm(centred, centred.mT)


def sqdist_from_gram(product):
    """In place: |a|^2 + |b|^2 - 2ab, never negative."""
    norms = product.diagonal(dim1=1, dim2=2).clone()
    return product.mul_(-2).add_(norms[:, :, None]).add_(norms[:, None, :]).clamp_(min=0)


def _weights_from_gram(product, eps):
    weights = sqdist_from_gram(product).add_(eps).reciprocal_()
    weights.diagonal(dim1=1, dim2=2).fill_(math.inf)  # adding a token's own row also marks it as picked
    return weights


def _gram_step(weights, potential, token):
    potential.add_(_row(weights, token)[:, 0])
    return potential.argmin(1)


def gram_loop(features, k, eps=1e-6, num_tokens=None, compiled=False):
    x, _, potential, token = _start(features, num_tokens)
    epilogue, step = _weights_from_gram, _gram_step
    if compiled:
        epilogue, step = _compile(epilogue), _compile(step)
    weights = epilogue(gram(features, x), eps)
    return _loop(lambda u, t: step(weights, u, t), k, potential, token)


LOOPS = {"direct loop": direct_loop, "matvec loop": matvec_loop, "gram loop": gram_loop}


def per_item(loop, features, lengths, budgets, eps=1e-6):
    """Packed items, one loop per item; lengths and budgets are host ints."""
    items = zip(features.split(list(lengths)), budgets, strict=True)
    return torch.cat([loop(item[None], budget, eps)[0] for item, budget in items if budget])


def padded(loop, features, lengths, budgets, num_tokens, eps=1e-6, compiled=False):
    """Packed items as one padded batch: every item runs to the largest budget, then is truncated.

    num_tokens: `lengths` as a tensor on the device of the features.
    """
    batch = torch.nn.utils.rnn.pad_sequence(features.split(list(lengths)), batch_first=True)
    picks = loop(batch, max(budgets), eps, num_tokens=num_tokens, compiled=compiled)
    return torch.cat([picks[item, :budget] for item, budget in enumerate(budgets)])


# ---- Max-min: first token 0, then the token whose nearest pick is farthest -----------------------------------------


def unit(x):
    return torch.nn.functional.normalize(x, dim=-1)


def _farthest_start(features, metric):
    """float32 tokens (centred or unit rows), their squared norms, initial nearest distances, and the first pick 0."""
    if metric == "cosine":
        x = unit(features.float())
    else:
        x = features.float()
        x = torch.sub(x, x.mean(1, keepdim=True), out=None if x is features else x)
    norms = torch.linalg.vector_norm(x, dim=-1).square_()
    token = torch.zeros(x.shape[0], dtype=torch.int64, device=x.device)
    return x, norms, torch.full_like(norms, math.inf), token


def _farthest_direct_step(x, scratch, nearest, token):
    difference = torch.sub(x, _row(x, token), out=scratch)
    sqdist = torch.linalg.vector_norm(difference, dim=-1).square_()
    torch.minimum(nearest, sqdist, out=nearest).scatter_(1, token[:, None], -1.0)
    return nearest.argmax(1)


def farthest_direct_loop(features, k, metric="euclidean", compiled=False):
    x, _, nearest, token = _farthest_start(features, metric)
    step, scratch = (
        (_compile(_farthest_direct_step), None) if compiled else (_farthest_direct_step, torch.empty_like(x))
    )
    return _loop(lambda u, t: step(x, scratch, u, t), k, nearest, token)


def _farthest_matvec_step(x, norms, nearest, token):
    dot = torch.bmm(x, _row(x, token).mT)[..., 0]
    sqdist = (norms + norms.gather(1, token[:, None])).sub_(dot, alpha=2)
    torch.minimum(nearest, sqdist, out=nearest).scatter_(1, token[:, None], -1.0)
    return nearest.argmax(1)


def farthest_matvec_loop(features, k, metric="euclidean", compiled=False):
    x, norms, nearest, token = _farthest_start(features, metric)
    step = _compile(_farthest_matvec_step) if compiled else _farthest_matvec_step
    return _loop(lambda u, t: step(x, norms, u, t), k, nearest, token)


def _farthest_from_gram(product):
    sqdist = sqdist_from_gram(product)
    sqdist.diagonal(dim1=1, dim2=2).fill_(-1.0)  # the minimum with a token's own row also marks it as picked
    return sqdist


def _farthest_gram_step(sqdist, nearest, token):
    torch.minimum(nearest, _row(sqdist, token)[:, 0], out=nearest)
    return nearest.argmax(1)


def farthest_gram_loop(features, k, metric="euclidean", compiled=False):
    x, _, nearest, token = _farthest_start(features, metric)
    epilogue, step = _farthest_from_gram, _farthest_gram_step
    if compiled:
        epilogue, step = _compile(epilogue), _compile(step)
    product = gram(features, x) if metric == "euclidean" else torch.bmm(x, x.mT)
    sqdist = epilogue(product)
    return _loop(lambda u, t: step(sqdist, u, t), k, nearest, token)


FARTHEST_LOOPS = {
    "direct loop": farthest_direct_loop,
    "matvec loop": farthest_matvec_loop,
    "gram loop": farthest_gram_loop,
}


# ---- Suppression by rank ------------------------------------------------------------------------------------------


def _suppress_step(cosine_rows, tau, potential, token, suppressed):
    """One pick, in place. potential: rank; rank + `suppressed` if the token is suppressed; inf if it is picked."""
    cosine, own = cosine_rows(token), token[:, None]
    hit = (cosine > 1 - tau.gather(1, own)).logical_and_(potential < suppressed)
    potential.add_(hit, alpha=suppressed).scatter_(1, own, math.inf)
    return potential.argmin(1)


def suppress_matvec_loop(features, rank, tau, k):
    x, potential = unit(features.float()), rank.float()
    suppressed = float(rank.shape[1])
    rows = lambda token: torch.bmm(x, _row(x, token).mT)[..., 0]  # noqa: E731
    return _loop(lambda u, t: _suppress_step(rows, tau, u, t, suppressed), k, potential, potential.argmin(1))


def suppress_gram_loop(features, rank, tau, k):
    x, potential = unit(features.float()), rank.float()
    cosine, suppressed = torch.bmm(x, x.mT), float(rank.shape[1])
    rows = lambda token: _row(cosine, token)[:, 0]  # noqa: E731
    return _loop(lambda u, t: _suppress_step(rows, tau, u, t, suppressed), k, potential, potential.argmin(1))


def suppress_best_ranks(features, rank, tau, k):
    """The gram loop on the 2k tokens of lowest rank; on twice as many if a pick is suppressed. One sync per try."""
    order, some = rank.argsort(1), 2 * k
    while True:
        some = min(some, rank.shape[1])
        best = order[:, :some]
        x = features.gather(1, best[..., None].expand(-1, -1, features.shape[2]))
        x, potential = unit(x.float()), rank.gather(1, best).float()
        cosine, suppressed, own_tau = torch.bmm(x, x.mT), float(rank.shape[1]), tau.gather(1, best)
        rows = lambda token, cosine=cosine: _row(cosine, token)[:, 0]  # noqa: E731
        token, picks, last = potential.argmin(1), [], None
        for _ in range(k):
            picks.append(token)
            last = potential.gather(1, token[:, None])
            token = _suppress_step(rows, own_tau, potential, token, suppressed)
        if some == rank.shape[1] or bool((last < suppressed).all()):
            return best.gather(1, torch.stack(picks, 1))
        some *= 2


SUPPRESS_LOOPS = {
    "matvec loop": suppress_matvec_loop,
    "gram loop": suppress_gram_loop,
    "best ranks": suppress_best_ranks,
}
