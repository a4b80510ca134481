"""Float64 brute-force checks of the ops' results. Shares no code with the package."""

import math

import torch
from cases import REGRET, UNIT_ROUNDING, VALUE_ATOL, VALUE_RTOL

FLOAT32_MAX = torch.finfo(torch.float32).max


def sqdist(rows: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Squared distances (K, C), (N, C) -> (K, N), float64, by differences; values beyond float32's range become inf."""
    d = torch.cdist(rows.double(), x.double(), compute_mode="donot_use_mm_for_euclid_dist").square()
    return torch.where(d > FLOAT32_MAX, math.inf, d)


def finite_rows(x: torch.Tensor) -> torch.Tensor:
    return x.isfinite().all(-1)


def weights(rows: torch.Tensor, x: torch.Tensor, eps: float) -> torch.Tensor:
    """(K, N) float64 1 / (d + eps); 0 if either token is non-finite."""
    usable = finite_rows(rows)[:, None] & finite_rows(x)
    d = sqdist(torch.nan_to_num(rows.double(), 0, 0, 0), torch.nan_to_num(x.double(), 0, 0, 0))
    return torch.where(usable, 1 / (d + eps), 0.0)


def greedy(x: torch.Tensor, k: int, eps: float, anchor: int) -> list[int]:
    """STS Algorithm 1 on x (N, C) in float64, step by step. Ties go to the lowest index."""
    finite = finite_rows(x).tolist()
    picks, potential = [anchor], [0.0] * len(x)
    while len(picks) < k:
        row = weights(x[picks[-1], None], x, eps)[0].tolist()
        potential = [p + w for p, w in zip(potential, row, strict=True)]
        left = [i for i in range(len(x)) if i not in picks]
        picks.append(min(left, key=lambda i: (not finite[i], potential[i] if finite[i] else 0.0, i)))
    return picks


def anchor_error(x: torch.Tensor, pick: int) -> str:
    """Why `pick` is not the token of x (N, C) nearest the mean of its finite tokens; "" if it is."""
    finite = finite_rows(x)
    if not finite.any():
        return "" if pick == 0 else f"anchor {pick}: no token is finite, so the first is the anchor"
    if not finite[pick]:
        return f"anchor {pick} is not finite while others are"
    y = x[finite].double()
    d = sqdist(y.mean(0, keepdim=True), x)[0]
    # The mean is a float32 sum, with an error of up to about 2^-20 of the largest entry in each channel.
    slack = x.shape[1] * (2**-20 * y.abs().max().item()) ** 2
    least, got = d[finite].min().item(), d[pick].item()
    if got <= (1 + REGRET) * least + slack:
        return ""
    return f"anchor {pick} is {got:.9g} from the mean, the nearest token {least:.9g}"


def index_error(picks: torch.Tensor, tokens: int) -> str:
    """Why `picks` (K,) are not distinct token indices; "" if they are."""
    if picks.dtype != torch.int64:
        return f"picks are {picks.dtype}"
    if picks.min() < 0 or picks.max() >= tokens:
        return f"picks outside [0, {tokens}): {picks.tolist()}"
    if picks.unique().numel() != picks.numel():
        return f"picks repeat: {picks.tolist()}"
    return ""


def greedy_error(x: torch.Tensor, picks: torch.Tensor, eps: float, anchor: int | None = None) -> str:
    """Why `picks` (K,) are not a greedy selection of x (N, C); "" if they are. N >= K >= 1."""
    x, picks = x.detach().cpu(), picks.detach().cpu()
    tokens, k = x.shape[0], picks.shape[0]
    if error := index_error(picks, tokens):
        return error
    first = picks[0].item()
    if anchor is None:
        if error := anchor_error(x, first):
            return error
    elif first != anchor:
        return f"the first pick is {first}, the anchor {anchor}"

    finite = finite_rows(x)
    taken_at = torch.full((tokens,), k).scatter_(0, picks, torch.arange(k))
    step = torch.arange(1, k)
    left = taken_at >= step[:, None]  # (K-1, N): pickable at step t
    potential = weights(x[picks[:-1]], x, eps).cumsum(0)
    # Finite tokens by potential, then non-finite tokens by index.
    lowest = potential.masked_fill(~(left & finite), math.inf).min(1).values
    chosen = potential.gather(1, picks[1:, None])[:, 0]
    some_finite = (left & finite).any(1)
    chosen_finite = finite[picks[1:]]
    first_left = left.int().argmax(1)
    good = torch.where(
        some_finite, chosen_finite & (chosen <= (1 + REGRET) * lowest + VALUE_ATOL), picks[1:] == first_left
    )
    if good.all():
        return ""
    t = (~good).int().argmax().item()
    pick = picks[t + 1].item()
    if not some_finite[t]:
        return f"step {t + 1} picked {pick}; no finite token is left, so {first_left[t].item()} is next"
    if not chosen_finite[t]:
        return f"step {t + 1} picked {pick}, which is not finite, while finite tokens are left"
    return f"step {t + 1} picked {pick} of potential {chosen[t]:.9g}; the smallest is {lowest[t]:.9g}"


def unit_sqdist(rows: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """2 - 2 cosine, (K, C), (N, C) -> (K, N), float64, by differences; the cosine of a zero row is 0."""

    def unit(x):
        x = x.double()
        x = x / x.abs().amax(-1, keepdim=True).clamp(min=1e-300)
        return x / x.norm(dim=-1, keepdim=True).clamp(min=0.5)  # the norm is at least 1 unless the row is zero

    zero = (rows == 0).all(-1)[:, None] | (x == 0).all(-1)
    return torch.where(zero, 2.0, sqdist(unit(rows), unit(x)))


def measured(rows: torch.Tensor, x: torch.Tensor, metric: str) -> torch.Tensor:
    """(K, N) float64 squared distances under `metric`; NaN if either token is non-finite."""
    usable = finite_rows(rows)[:, None] & finite_rows(x)
    rows, x = (torch.nan_to_num(t.double(), 0, 0, 0) for t in (rows, x))
    return torch.where(usable, sqdist(rows, x) if metric == "euclidean" else unit_sqdist(rows, x), math.nan)


def farthest_error(x, picks, anchor=None, quality=None, start=None, metric="euclidean") -> str:
    """Why `picks` (K,) are no max-min selection of x (N, C); "" if they are. N >= K >= 1.

    Each pick's quality * distance, in float64, must be at least the maximum / (1 + REGRET). With metric="cosine",
    distances (not squared) may be off by UNIT_ROUNDING.
    """
    x, picks = x.detach().cpu(), picks.detach().cpu()
    tokens, k = x.shape[0], picks.shape[0]
    if error := index_error(picks, tokens):
        return error
    usable = finite_rows(x)
    q = torch.ones(tokens).double() if quality is None else quality.detach().cpu().double()
    usable &= q.isfinite() & (q >= 0)
    kept = torch.full((tokens,), FLOAT32_MAX).double() if start is None else start.detach().cpu().double()
    usable &= kept >= 0
    q, kept = torch.where(usable, q, 0.0), torch.where(usable, kept, 0.0)
    d = measured(x[picks], x, metric).nan_to_num(FLOAT32_MAX, FLOAT32_MAX)
    nearest = torch.cat([kept.clamp(max=FLOAT32_MAX)[None], d[:-1]]).cummin(0).values  # (K, N): before each pick
    if start is None:
        nearest[0] = 1.0  # the first pick depends on the quality only
    slack = UNIT_ROUNDING if metric == "cosine" else 0.0
    at_least = (q * (nearest.sqrt() - slack).clamp(min=0).square()).clamp(max=FLOAT32_MAX)
    at_most = (q * (nearest.sqrt() + slack).square()).clamp(max=FLOAT32_MAX)
    step = torch.arange(k)[:, None]
    left = torch.full((tokens,), k).scatter_(0, picks, step[:, 0]) >= step  # (K, N): pickable at each step
    best = at_least.masked_fill(~(left & usable), -1.0)
    got = at_most.gather(1, picks[:, None])[:, 0] * (1 + REGRET) + VALUE_ATOL
    first_left = left.int().argmax(1)
    some_usable = (left & usable).any(1)
    good = torch.where(some_usable, usable[picks] & (got >= best.max(1).values), picks == first_left)
    # Without rounding in its value, the first pick must be exact.
    if some_usable[0] and (start is None or (quality is None and slack == 0.0)):
        good[0] = picks[0] == best[0].argmax()
    if anchor is not None:
        good[0] = picks[0] == anchor
    if good.all():
        return ""
    t = (~good).int().argmax().item()
    pick = picks[t].item()
    if t == 0 and anchor is not None:
        return f"the first pick is {pick}, the anchor {anchor}"
    if not some_usable[t]:
        return f"step {t} picked {pick}; no usable token is left, so {first_left[t].item()} is next"
    if not usable[pick]:
        return f"step {t} picked {pick}, which is not usable, while usable tokens are left"
    largest = best[t].argmax().item()
    return f"step {t} picked {pick} of value {at_most[t, pick]:.9g}; {largest} has {best[t, largest]:.9g}"


def suppress_error(x, rank, tau, picks) -> str:
    """Why `picks` (K,) are no selection of x (N, C) by rank with suppression; "" if they are. N >= K >= 1.

    A token whose distance to a pick is within rounding of the threshold may be suppressed or not.
    """
    x, picks, rank, tau = (t.detach().cpu() for t in (x, picks, rank, tau))
    tokens = x.shape[0]
    if error := index_error(picks, tokens):
        return error
    usable = finite_rows(x) & (rank >= 0) & (rank < 2**23)
    key = torch.where(usable, rank.long() * tokens + torch.arange(tokens), 2**62)  # order by rank, then index
    d = measured(x[picks], x, "cosine")
    limit = 2 * tau[picks].double()[:, None]
    limit = torch.where(limit > 0, limit, 0.0)  # NaN: suppresses nothing
    low, high = ((d.sqrt() + sign * UNIT_ROUNDING).clamp(min=0).square() for sign in (-1, 1))
    # (K, N): suppressed by the picks before each step.
    none = torch.zeros(1, tokens, dtype=torch.bool)
    surely = torch.cat([none, high < limit * (1 - REGRET)])[:-1].cummax(0).values
    maybe = torch.cat([none, low < limit * (1 + REGRET)])[:-1].cummax(0).values
    decided = torch.zeros(tokens, dtype=torch.bool)  # known to be suppressed: skipped in favour of a later token
    left = torch.ones(tokens, dtype=torch.bool)
    for step, pick in enumerate(picks.tolist()):
        suppressed, possibly, here = surely[step] | decided, maybe[step] | decided, left & usable
        free = here & ~possibly
        first = key.masked_fill(~here, 2**62).argmin().item()
        first_free = key.masked_fill(~free, 2**62).argmin().item()
        if not here.any():
            first = left.int().argmax().item()
            if pick != first:
                return f"step {step} picked {pick}; no usable token is left, so {first} is next"
        elif not usable[pick]:
            return f"step {step} picked {pick}, which is not usable, while usable tokens are left"
        elif free.any() and suppressed[pick]:
            return f"step {step} picked {pick}, which is suppressed, while {first_free} is not"
        elif free.any() and key[pick] > key[first_free]:
            return f"step {step} picked {pick}; {first_free} comes before it"
        elif not free.any() and suppressed[pick] and pick != first:
            return f"step {step} picked {pick} of the suppressed; {first} comes before it"
        if not suppressed[pick]:
            decided |= here & possibly & (key < key[pick])
        left[pick] = False
    return ""


def check_padded(picks, features, k, num_tokens, error_of):
    """Asserts that `picks` (B, k) are well-formed and that error_of(item, rows of the item, its picks) is "".

    Well-formed: int64, contiguous, on the device of `features`, -1 past each item's tokens.
    """
    batch, tokens, _ = features.shape
    assert picks.dtype == torch.int64
    assert picks.device == features.device
    assert picks.shape == (batch, k)
    assert picks.is_contiguous()
    picks = picks.cpu()
    counts = [tokens] * batch if num_tokens is None else num_tokens.tolist()
    for b, count in enumerate(counts):
        kept = min(count, k)
        assert (picks[b, kept:] == -1).all(), f"item {b}: no -1 past its {count} tokens: {picks[b].tolist()}"
        if kept:
            error = error_of(b, slice(count), picks[b, :kept])
            assert not error, f"item {b}: {error}"


def check_packed(picks, features, cu_seqlens, cu_budgets, total_k, error_of):
    """`check_padded` for packed `picks` (total_k,); error_of(item, rows of the item, picks of the item)."""
    assert picks.dtype == torch.int64
    assert picks.device == features.device
    assert picks.shape == (total_k,)
    starts, budgets = cu_seqlens.tolist(), cu_budgets.tolist()
    for b in range(len(starts) - 1):
        part = picks[budgets[b] : budgets[b + 1]].cpu()
        if len(part):
            error = error_of(b, slice(starts[b], starts[b + 1]), part)
            assert not error, f"item {b}: {error}"


def _first(anchor, item):
    return None if anchor is None else anchor[item].item()


def _of(value, *index):
    return None if value is None else value[index]


def check_select(picks, features, k, eps=1e-6, anchor=None, num_tokens=None):
    """Asserts that `picks` (B, k) fulfil the contract of `repulsion_select` for these arguments."""

    def error(b, rows, part):
        return greedy_error(features[b, rows], part, eps, _first(anchor, b))

    check_padded(picks, features, k, num_tokens, error)


def check_select_varlen(picks, features, cu_seqlens, cu_budgets, total_k, eps=1e-6, anchor=None):
    """Asserts that `picks` (total_k,) fulfil the contract of `repulsion_select_varlen` for these arguments."""

    def error(b, rows, part):
        return greedy_error(features[rows], part, eps, _first(anchor, b))

    check_packed(picks, features, cu_seqlens, cu_budgets, total_k, error)


def check_farthest(picks, features, k, anchor=None, quality=None, start=None, metric="euclidean", num_tokens=None):
    """Asserts that `picks` (B, k) fulfil the contract of `farthest_select` for these arguments."""

    def error(b, rows, part):
        values = _of(quality, b, rows), _of(start, b, rows)
        return farthest_error(features[b, rows], part, _first(anchor, b), *values, metric)

    check_padded(picks, features, k, num_tokens, error)


def check_farthest_varlen(
    picks, features, cu_seqlens, cu_budgets, total_k, anchor=None, quality=None, start=None, metric="euclidean"
):
    """Asserts that `picks` (total_k,) fulfil the contract of `farthest_select_varlen` for these arguments."""

    def error(b, rows, part):
        return farthest_error(features[rows], part, _first(anchor, b), _of(quality, rows), _of(start, rows), metric)

    check_packed(picks, features, cu_seqlens, cu_budgets, total_k, error)


def check_suppress(picks, features, rank, tau, k, num_tokens=None):
    """Asserts that `picks` (B, k) fulfil the contract of `suppress_select` for these arguments."""

    def error(b, rows, part):
        return suppress_error(features[b, rows], rank[b, rows], tau[b, rows], part)

    check_padded(picks, features, k, num_tokens, error)


def check_suppress_varlen(picks, features, rank, tau, cu_seqlens, cu_budgets, total_k):
    """Asserts that `picks` (total_k,) fulfil the contract of `suppress_select_varlen` for these arguments."""

    def error(b, rows, part):
        return suppress_error(features[rows], rank[rows], tau[rows], part)

    check_packed(picks, features, cu_seqlens, cu_budgets, total_k, error)


def check_sqdist(got, features):
    """Asserts that `got` (B, N, N) fulfils the contract of `pairwise_sqdist` for these features."""
    batch, tokens, _ = features.shape
    assert got.dtype == torch.float32
    assert got.device == features.device
    assert got.shape == (batch, tokens, tokens)
    assert got.is_contiguous()
    got, features = got.cpu(), features.cpu()
    for b in range(batch):
        d, finite = got[b], finite_rows(features[b])
        assert (d.diagonal() == 0).all(), "the diagonal is not 0"
        off = ~torch.eye(tokens, dtype=torch.bool)
        spoiled = ~(finite[:, None] & finite) & off
        assert not d[spoiled].isfinite().any(), "a token that is not finite has a finite distance"
        d, good = d.masked_fill(spoiled, 0.0), features[b][finite]
        assert (d >= 0).all(), "a distance is negative or NaN"
        assert torch.equal(d, d.T), "not symmetric"
        want, part = sqdist(good, good), d[finite][:, finite].double()
        torch.testing.assert_close(part, want, rtol=VALUE_RTOL, atol=VALUE_ATOL)
        assert (part[want == 0] == 0).all(), "equal tokens are not at distance 0"


def check_step(after, nxt, before, features, picked, eps=1e-6):
    """Asserts that one `repulsion_step_` changes the potentials from `before` to `after` and returns `nxt`."""
    batch = features.shape[0]
    assert nxt.dtype == torch.int64
    assert nxt.device == features.device
    assert nxt.shape == (batch,)
    after, nxt, before, features, picked = (t.cpu() for t in (after, nxt, before, features, picked))
    for b in range(batch):
        x, row, p = features[b], after[b], picked[b].item()
        finite = finite_rows(x)
        if p < 0:
            assert torch.equal(row[finite], before[b][finite]), f"item {b}: changed although nothing was picked"
        want = before[b].double()
        if p >= 0:
            want = want + weights(x[p, None], x, eps)[0]
            assert row[p] == math.inf, f"item {b}: the picked token does not hold +inf"
            want[p] = math.inf
        torch.testing.assert_close(row[finite].double(), want[finite], rtol=VALUE_RTOL, atol=VALUE_ATOL)
        left = row != math.inf
        if not left.any():
            assert nxt[b] == -1, f"item {b}: every token is picked, yet {nxt[b]} is next"
            continue
        # The next pick must be the exact argmin of the returned potentials; ties go to the lowest index.
        candidates = left & finite if (left & finite).any() else left
        least = row[candidates].min()
        first = (candidates & (row == least)).int().argmax() if finite[candidates].any() else left.int().argmax()
        assert nxt[b] == first, f"item {b}: {nxt[b]} is next, not {first}"


NEAREST_TOL = 1e-5  # absolute for cosines, relative for squared distances


def pair_values(query, key, metric):
    """Cosines or squared distances of the rows of (M, C) and (K, C): (M, K) float64."""
    if metric == "euclidean":
        return sqdist(query, key)
    q, k = (torch.nn.functional.normalize(x.double(), dim=1, eps=1e-300) for x in (query, key))
    return q @ k.T


def check_nearest(
    index, value, query, key, metric="cosine", query_rank=None, key_rank=None, exclude_self=False, num_keys=None
):
    """Asserts that `index` and `value` (B, M) fulfil the contract of `nearest` for these arguments."""
    (batch, rows, _), keys = query.shape, key.shape[1]
    assert (index.dtype, value.dtype) == (torch.int64, torch.float32)
    assert index.device == value.device == query.device
    assert index.shape == value.shape == (batch, rows)
    assert index.is_contiguous()
    assert value.is_contiguous()
    index, value, query, key = (t.detach().cpu() for t in (index, value, query, key))
    for b in range(batch):
        finite = finite_rows(key[b])
        allowed = finite_rows(query[b])[:, None] & finite
        if num_keys is not None:
            allowed &= torch.arange(keys) < num_keys[b].item()
        if query_rank is not None:
            allowed &= key_rank[b].cpu().double() < query_rank[b].cpu().double()[:, None]
        if exclude_self:
            allowed &= torch.arange(rows)[:, None] != torch.arange(keys)
        some = allowed.any(1)
        nothing = -math.inf if metric == "cosine" else math.inf
        assert (index[b][~some] == -1).all(), f"item {b}: a match where none is allowed"
        assert (value[b][~some] == nothing).all(), f"item {b}: a value where nothing is allowed"
        found, got = index[b][some], value[b][some].double()
        assert ((found >= 0) & (found < keys)).all(), f"item {b}: {found.tolist()} of {keys} keys"
        x, y = (torch.nan_to_num(t[b].double(), 0, 0, 0) for t in (query, key))
        true, allowed = pair_values(x[some], y, metric), allowed[some]
        assert allowed.gather(1, found[:, None]).all(), f"item {b}: a match that is not allowed"
        chosen = true.gather(1, found[:, None])[:, 0]
        if metric == "cosine":
            best = true.masked_fill(~allowed, -math.inf).amax(1)
            assert (got.abs() <= 1).all()
            torch.testing.assert_close(got, chosen, rtol=0, atol=NEAREST_TOL)
            assert (chosen >= best - NEAREST_TOL).all(), f"item {b}: {(best - chosen).max():.3g} below the best"
        else:
            best = true.masked_fill(~allowed, math.inf).amin(1)
            torch.testing.assert_close(got, chosen, rtol=NEAREST_TOL, atol=VALUE_ATOL)
            assert (chosen <= best * (1 + NEAREST_TOL) + VALUE_ATOL).all(), f"item {b}: not the nearest"
        _, same = torch.unique(torch.where(finite[:, None], y, 0.0), dim=0, return_inverse=True)
        equal = allowed & (same == same[found][:, None])
        assert torch.equal(found, equal.int().argmax(1)), f"item {b}: an equal key of lower index is passed over"


def check_scatter_mean(mean, mass, features, assignment, count, weight=None):
    """Asserts that `mean` (B, count, C) and `mass` (B, count) fulfil the contract of `scatter_mean`."""
    batch, _, channels = features.shape
    assert (mean.dtype, mass.dtype) == (features.dtype, torch.float32)
    assert mean.device == mass.device == features.device
    assert (mean.shape, mass.shape) == ((batch, count, channels), (batch, count))
    assert mean.is_contiguous()
    assert mass.is_contiguous()
    mean, mass, features, assignment = (t.detach().cpu() for t in (mean, mass, features, assignment))
    weight = torch.ones(assignment.shape) if weight is None else weight.detach().cpu()
    rounding = {torch.float32: 1e-6, torch.float16: 2**-11, torch.bfloat16: 2**-8}[features.dtype]
    smallest = {torch.float32: VALUE_ATOL, torch.float16: 2**-24, torch.bfloat16: VALUE_ATOL}[features.dtype]
    for b in range(batch):
        x, w, slot = features[b].double(), weight[b].double(), assignment[b]
        member = (slot == torch.arange(count)[:, None]) & finite_rows(features[b]) & w.isfinite()
        share = torch.where(member, w, 0.0)
        x = torch.nan_to_num(x, 0, 0, 0)
        want_mass = share.sum(1)
        torch.testing.assert_close(mass[b].double(), want_mass, rtol=1e-6, atol=VALUE_ATOL)
        per_mass = torch.where(want_mass > 0, 1 / want_mass, 0.0)[:, None]
        want, size = share @ x * per_mass, share.abs() @ x.abs() * per_mass
        error = (mean[b].double() - want).abs()
        assert (error <= rounding * want.abs() + 1e-12 * size + smallest).all(), f"item {b}: {error.max():.3g} off"
        assert (mean[b][want_mass <= 0] == 0).all(), f"item {b}: a slot of no mass is not 0"


def check_knn_density(got, features, k, num_tokens=None):
    """Asserts that `got` (B, N) fulfils the contract of `knn_density` for these arguments."""
    batch, tokens, channels = features.shape
    assert got.dtype == torch.float32
    assert got.device == features.device
    assert got.shape == (batch, tokens)
    assert got.is_contiguous()
    got, features = got.detach().cpu(), features.detach().cpu()
    for b in range(batch):
        usable = finite_rows(features[b])
        if num_tokens is not None:
            usable = usable & (torch.arange(tokens) < num_tokens[b].item())
        assert (got[b][~usable] == 0).all(), f"item {b}: a density where there is no token"
        x = features[b][usable].double()
        distance = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist").square()
        mean = distance.sort(1).values[:, :k].sum(1) / max(1, min(k, len(x))) / channels
        error = (got[b][usable].double() - (-mean).exp()).abs()
        bound = (1e-6 + 1e-5 * mean) * (-mean).exp() + VALUE_ATOL
        assert (error <= bound).all(), f"item {b}: off by {(error / bound).max():.3g} of what is allowed"


def unit_rows64(x):
    """L2-normalised rows (N, C), float64; zero rows stay zero."""
    x = x.double()
    x = x / torch.where(x.abs().amax(1, keepdim=True) > 0, x.abs().amax(1, keepdim=True), 1.0)
    return torch.nn.functional.normalize(x, dim=1)


GAIN_ATOL = 1e-6  # relative to the first gain: float32 accuracy of a squared distance to a span


def dpp_error(order, gain, x, quality, floor):
    """Why `order` and `gain` (K,) are no greedy MAP of x (N, C) and quality (N,); "" if they are. N >= K >= 1."""
    tokens = len(x)
    if order.min() < 0 or order.max() >= tokens or order.unique().numel() != len(order):
        return f"picks repeat, or are outside [0, {tokens}): {order.tolist()}"
    if (gain.diff() > 0).any() or (gain < 0).any():
        return f"gains rise, or are negative: {gain.tolist()}"
    usable = finite_rows(x) & quality.isfinite()
    u = unit_rows64(torch.where(usable[:, None], x.double(), 0.0))
    q = torch.where(usable, quality.double(), 0.0)
    distance = (u != 0).any(1).double()
    first = (q.square() * distance).max()
    left = torch.ones(tokens, dtype=torch.bool)
    rows = torch.zeros(0, tokens, dtype=torch.float64)
    rest = sorted(range(tokens), key=lambda i: (not usable[i], -q[i].item() if usable[i] else 0.0, i))
    for step, (pick, got) in enumerate(zip(order.tolist(), gain.double().tolist(), strict=True)):
        gains = torch.where(left & usable, q.square() * distance, 0.0)
        best, own, slack = gains.max(), gains[pick], GAIN_ATOL * first
        if got == 0:  # rank exhausted: the remaining picks are by quality
            if best > floor * first * (1 + REGRET) + slack:
                return f"step {step} goes by quality, but a gain of {best:.6g} is left; the first was {first:.6g}"
            want = [i for i in rest if left[i]][: len(order) - step]
            if order[step:].tolist() != want or (gain[step:] != 0).any():
                return f"from step {step} on {order[step:].tolist()}, by quality {want}"
            return ""
        if not usable[pick] or own * (1 + REGRET) + slack < best:
            return f"step {step} picked {pick} of gain {own:.9g}; the largest is {best:.9g}"
        if own * (1 + REGRET) + slack < floor * first:
            return f"step {step} picked {pick} of gain {own:.9g} below the floor"
        if abs(min(own, FLOAT32_MAX) - min(got, FLOAT32_MAX)) > REGRET * own + slack:
            return f"step {step} says that {pick} has gain {got:.9g}, which is {own:.9g}"
        left[pick] = False
        row = (u @ u[pick] - rows.T @ rows[:, pick]) / distance[pick].clamp(min=1e-300).sqrt()
        rows = torch.cat([rows, row[None]])
        distance = (distance - row.square()).clamp(min=0)
    return ""


def check_dpp(order, gain, features, quality, k, floor=1e-7, num_tokens=None):
    """Asserts that `order` and `gain` (B, k) fulfil the contract of `dpp_select` for these arguments."""
    batch, tokens, _ = features.shape
    assert (order.dtype, gain.dtype) == (torch.int64, torch.float32)
    assert order.device == gain.device == features.device
    assert order.shape == gain.shape == (batch, k)
    assert order.is_contiguous()
    assert gain.is_contiguous()
    order, gain, features, quality = (t.detach().cpu() for t in (order, gain, features, quality))
    for b in range(batch):
        count = tokens if num_tokens is None else num_tokens[b].item()
        kept = min(count, k)
        assert (order[b, kept:] == -1).all(), f"item {b}: no -1 past its {count} tokens: {order[b].tolist()}"
        assert (gain[b, kept:] == 0).all(), f"item {b}: a gain past its {count} tokens"
        if kept:
            error = dpp_error(order[b, :kept], gain[b, :kept], features[b, :count], quality[b, :count], floor)
            assert not error, f"item {b}: {error}"


def dedup_rounds(sqdist, rest, keep, step):
    """VisPruner's rounds over the list `rest`. sqdist: (N, N), must be exact."""
    while len(rest) > keep:
        even, odd = rest[::2], rest[1::2]
        closest = sqdist[even][:, odd].min(1).values.tolist()
        by_closest = sorted(range(len(even)), key=lambda i: (closest[i], i))
        rest = [even[i] for i in by_closest[min(step, len(rest) - keep, len(even)) :]] + odd
    return rest


def check_dedup(kept, features, order, keep, step=8, exact=True):
    """Asserts that `kept` (B, keep) fulfils the contract of `dedup_select` for these arguments.

    exact: whether the squared distances of unit rows are exact in float32. If not, only the properties that do not
    depend on them are checked.
    """
    assert kept.dtype == torch.int64
    assert kept.device == features.device
    assert kept.shape == (features.shape[0], keep)
    assert kept.is_contiguous()
    kept, features, order = kept.cpu(), features.cpu(), order.cpu()
    for b, listed in enumerate(order.tolist()):
        listed = listed[: listed.index(-1)] if -1 in listed else listed
        finite = finite_rows(features[b])
        good, bad = [i for i in listed if finite[i]], [i for i in listed if not finite[i]]
        if len(good) <= keep:
            want = (good + bad)[:keep]
            want += [-1] * (keep - len(want))
            assert kept[b].tolist() == want, f"item {b}"
            continue
        if not exact:
            got = kept[b].tolist()
            assert all(got.count(i) <= good.count(i) for i in got), f"item {b}: {got} of {good}"
            continue
        u = unit_rows64(torch.where(finite[:, None], features[b].double(), 0.0))
        zero = (u == 0).all(1)
        sqdist = (2 - 2 * u @ u.T).masked_fill(zero[:, None] | zero, 2.0)
        sqdist = (sqdist * 2**24).round() / 2**24  # removes float64 rounding
        assert kept[b].tolist() == dedup_rounds(sqdist, good, keep, step), f"item {b}"
