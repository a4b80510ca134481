"""Arguments of farthest_select, suppress_select and their varlen forms: from the shared cases, and random."""

import math

import cases
import torch


def zero_rows(rng, batch, tokens, channels):
    x = cases.normal(rng, batch, tokens, channels)
    x[:, ::3] = 0
    return x


def directions(rng, batch, tokens, channels):
    """Few directions, many norms: tokens with equal cosines have large distances."""
    few = cases.normal(rng, batch, 1 + tokens // 4, channels)
    pick = torch.randint(few.shape[1], (tokens,), generator=rng)
    return few[:, pick] * 2.0 ** torch.randint(-20, 20, (batch, tokens, 1), generator=rng)


def adversary(rng, batch, tokens, channels):
    """Pairs of near-duplicates: half of the best candidates are near the other half."""
    x = cases.normal(rng, batch, tokens, channels)
    x[:, 1::2] = x[:, : tokens - 1 : 2] + 1e-3 * x[:, 1::2]
    return x


MAKES = (
    cases.normal,
    cases.wide,
    cases.common_offset,
    cases.far_off,
    cases.equal,
    cases.zeros,
    cases.duplicates,
    cases.near_duplicates,
    cases.nearer_duplicates,
    cases.clusters,
    cases.grid,
    cases.line,
    cases.not_finite,
    cases.none_finite,
    cases.huge,
    cases.tiny,
    zero_rows,
    directions,
    adversary,
)


def _wild(rng, x, values):
    """Replaces about one number in eight by one of `values`."""
    at = torch.rand(x.shape, generator=rng) < 1 / 8
    return torch.where(at, torch.tensor(values)[torch.randint(len(values), x.shape, generator=rng)], x)


def qualities(rng, *shape, wild=False):
    q = torch.rand(shape, generator=rng)
    q = torch.where(torch.rand(shape, generator=rng) < 0.1, 0.0, q)
    return _wild(rng, q, [math.nan, math.inf, -math.inf, -1.0, -0.0, 1e30]) if wild else q


def starts(rng, *shape, wild=False):
    """`start` distances to already kept tokens; a tenth of the tokens are kept."""
    d = 3 * torch.rand(shape, generator=rng)
    d = torch.where(torch.rand(shape, generator=rng) < 0.1, -1.0, d)
    return _wild(rng, d, [math.nan, math.inf, -math.inf, 0.0, -0.0, 1e38]) if wild else d


def ranks(rng, *shape, wild=False, dtype=torch.int64):
    rank = torch.rand(shape, generator=rng).argsort(-1)
    if wild:
        rank = torch.where(torch.rand(shape, generator=rng) < 0.3, rank // 2, rank)
        strange = torch.tensor([-1, 2**23, 2**31 - 1, -(2**31), 2**23 - 1])
        at = torch.rand(shape, generator=rng) < 1 / 8
        rank = torch.where(at, strange[torch.randint(len(strange), shape, generator=rng)], rank)
    return rank.to(dtype)


def taus(rng, *shape, wild=False):
    tau = torch.rand(shape, generator=rng) * torch.tensor([0.01, 0.3, 1.2])[torch.randint(3, shape, generator=rng)]
    return _wild(rng, tau, [math.nan, math.inf, -math.inf, -1.0, 0.0, 2.5]) if wild else tau


def of_case(op: str, case, variant: str = "plain", seed=0, dtype=torch.float32, device="cpu") -> dict:
    """Arguments of `op` from a `cases.Case`. Variants of farthest_select: plain, cosine, quality, start, all."""
    given = case.inputs(seed, dtype, device)
    del given["eps"]
    rng = torch.Generator().manual_seed(seed)
    shape = given["features"].shape[:-1]
    if op.startswith("suppress"):
        del given["anchor"]
        features = given.pop("features")
        values = {"rank": ranks(rng, *shape).to(device), "tau": taus(rng, *shape).to(device)}
        return {"features": features, **values, **given}
    if variant in ("quality", "all"):
        given["quality"] = qualities(rng, *shape).to(device)
    if variant in ("start", "all"):
        given["start"] = starts(rng, *shape).to(device)
    given["metric"] = "cosine" if variant in ("cosine", "all") else "euclidean"
    return given


def random_inputs(op: str, seed: int, device="cpu") -> dict:
    """Random arguments of `op`: all kinds of values, sizes, dtypes and options occur."""
    rng = torch.Generator().manual_seed(seed)

    def below(high, low=0):
        return int(torch.randint(low, high, (), generator=rng))

    def one_of(*values):
        return values[below(len(values))]

    batch, tokens, channels = below(4, 1), one_of(1, 2, 3, below(20, 1), below(70, 1), below(150, 1)), below(40, 1)
    k = one_of(1, tokens, below(tokens + 1, 1), below(tokens + 1, 1))
    make = one_of(*MAKES)
    x = make(rng, batch, tokens, channels).to(one_of(*cases.FLOATING))
    wild, index = one_of(False, False, True), one_of(torch.int64, torch.int32)
    packed = op.endswith("varlen")
    given = {}
    if packed:
        lengths = torch.tensor([below(tokens + 1) for _ in range(batch)])
        lengths[below(batch)] = tokens
        x = torch.cat([x[b, :n] for b, n in enumerate(lengths.tolist())])
        budgets = torch.tensor([below(n + 1) for n in lengths.tolist()])
        offsets = [torch.cat([torch.zeros(1, dtype=torch.int64), n.cumsum(0)]).to(index) for n in (lengths, budgets)]
        given = {"cu_seqlens": offsets[0], "cu_budgets": offsets[1], "total_k": int(budgets.sum())}
        counts = lengths
    else:
        counts = torch.tensor([tokens] * batch)
        given["k"] = k
        if one_of(False, True):
            counts = torch.randint(tokens + 1, (batch,), generator=rng)
            given["num_tokens"] = counts.to(index)
    shape = x.shape[:-1]
    layout = one_of(cases.contiguous, cases.contiguous, cases.token_slice, cases.channel_slice, cases.channel_major)
    given["features"] = layout(x)
    floats = one_of(*cases.FLOATING)
    if op.startswith("suppress"):
        given["rank"] = ranks(rng, *shape, wild=wild, dtype=index)
        given["tau"] = taus(rng, *shape, wild=wild).to(floats)
    else:
        given["metric"] = one_of("euclidean", "cosine")
        if one_of(False, True):
            given["quality"] = qualities(rng, *shape, wild=wild).to(floats)
        if one_of(False, True):
            given["start"] = starts(rng, *shape, wild=wild).to(floats)
        if one_of(False, True):
            given["anchor"] = torch.stack([torch.randint(max(1, n), (), generator=rng) for n in counts.tolist()])
    return {name: v.to(device) if isinstance(v, torch.Tensor) else v for name, v in given.items()}
