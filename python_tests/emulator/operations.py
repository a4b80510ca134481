"""Calls of every kernel, made from the one table of cases and judged by the float64 oracle."""

import math
from dataclasses import replace

import cases
import numpy as np
import oracle
import selection_inputs
import torch
from cases import Case, VarlenCase

from .calls import At, Call

SUFFIX = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}
PAD = -7  # in output arrays before the call, and in gaps that must stay


def channels_contiguous(features: torch.Tensor) -> torch.Tensor:
    """Features as the host code passes them to the kernels: contiguous channels."""
    return features if features.stride(-1) == 1 or features.shape[-1] == 1 else features.contiguous()


def as_array(view: torch.Tensor) -> At:
    """The storage of a view up to its last element, so alignment and neighbouring elements are kept."""
    offset = view.storage_offset()
    extent = 1 + sum((n - 1) * s for n, s in zip(view.shape, view.stride(), strict=True)) if view.numel() else 0
    flat = torch.as_strided(view, (offset + extent,), (1,), 0)
    return At((flat.view(torch.int16) if flat.dtype == torch.bfloat16 else flat).numpy(), offset)


def index(values) -> np.ndarray | None:
    return None if values is None else values.to(torch.int64).numpy()


def strides(features):
    return features.stride()[-3:-1] if features.ndim == 3 else (0, features.stride(0))


# ---- One function per op: its arguments -> a call ----------------------------------------------------------------


def pairwise_sqdist(name, features):
    rows = channels_contiguous(features)
    batch, tokens, channels = rows.shape
    out = np.full((batch, tokens, tokens), PAD, np.float32)
    return Call(
        name,
        f"pairwise_sqdist_{SUFFIX[features.dtype]}",
        (as_array(rows), batch, tokens, channels, *strides(rows), out),
        lambda _, got: oracle.check_sqdist(torch.from_numpy(got), features),
    )


def repulsion_step(name, features, picked, eps, gap=0):
    """`gap`: unused elements between two potentials."""
    rows = channels_contiguous(features)
    batch, tokens, channels = rows.shape
    before = 3 * torch.rand(batch, tokens, generator=torch.Generator().manual_seed(3))
    before[:, ::7] = math.inf
    before[:, 0] = 0.0
    stored = torch.full((batch, tokens, gap + 1), float(PAD))
    stored[..., 0] = before

    def judge(potential, _, picked_after, following):
        potential = torch.from_numpy(potential)
        assert (potential[..., 1:] == PAD).all(), "written between the potentials"
        assert np.array_equal(picked_after, index(picked)), "picked was written"
        acts = torch.where((picked >= 0) & (picked < tokens), picked, -1)  # out of range counts as -1
        oracle.check_step(potential[..., 0], torch.from_numpy(following), before, features, acts, eps)

    return Call(
        name,
        f"repulsion_step_{SUFFIX[features.dtype]}",
        (
            stored.numpy(),
            tokens * (gap + 1),
            gap + 1,
            as_array(rows),
            batch,
            tokens,
            channels,
            *strides(rows),
            index(picked),
            eps,
            np.full(batch, -7, np.int64),
        ),
        judge,
    )


def unit_rows(name, features):
    """The float32 copy that metric="cosine" selects from."""
    rows = channels_contiguous(features)
    batch, tokens, channels = rows.shape
    out = np.full((batch, tokens, channels + -channels % 4), PAD, np.float32)

    def judge(_, got):
        got, x = torch.from_numpy(got), features.double()
        assert (got[..., channels:] == 0).all(), "the last channels are not zero"
        got, finite, zero = got[..., :channels], oracle.finite_rows(features), (features == 0).all(-1)
        assert got[~finite].isnan().all(), "a row that is not finite"
        mark = torch.zeros(batch, tokens, channels)
        mark[..., 0] = 16.0 * (1 + torch.arange(tokens))
        assert torch.equal(got[zero], mark[zero]), "the mark of a zero row"
        good = finite & ~zero
        x = x[good] / x[good].abs().amax(-1, keepdim=True)
        torch.testing.assert_close(got[good].double(), x / x.norm(dim=-1, keepdim=True), rtol=1e-6, atol=1e-37)

    return Call(
        name,
        f"unit_rows_{SUFFIX[features.dtype]}",
        (as_array(rows), batch, tokens, channels, *strides(rows), out),
        judge,
    )


def nearest(
    name, query, key, metric, query_rank=None, key_rank=None, exclude_self=False, num_keys=None, strip_entries=0
):
    """`strip_entries`: if the queries are the keys, entries whose distances are stored at a time; 0: as planned."""
    queries, keys = channels_contiguous(query), channels_contiguous(key)
    (batch, rows, channels), count = queries.shape, keys.shape[1]
    ranks = [None if rank is None else rank.double().numpy() for rank in (query_rank, key_rank)]

    def judge(*arrays):
        options = (metric, query_rank, key_rank, exclude_self, num_keys)
        oracle.check_nearest(*map(torch.from_numpy, arrays[-2:]), query, key, *options)

    kind = f"{metric}-own" if key is query else metric
    return Call(
        f"{name}-{kind}" + (f"-strip{strip_entries}" if strip_entries else ""),
        f"nearest_{SUFFIX[query.dtype]}",
        (
            *(as_array(queries), None if key is query else as_array(keys)),
            *(batch, rows, count, channels, *strides(queries), *strides(keys)),
            *(int(metric == "cosine"), *ranks, int(exclude_self), index(num_keys), strip_entries),
            np.full((batch, rows), PAD, np.int64),
            np.full((batch, rows), PAD, np.float32),
        ),
        judge,
        kind,
    )


def scatter_mean(name, features, assignment, count, weight=None):
    rows = channels_contiguous(features)
    batch, tokens, channels = rows.shape
    bits = np.int16 if features.dtype == torch.bfloat16 else torch.empty(0, dtype=features.dtype).numpy().dtype

    def judge(*arrays):
        mean, mass = map(torch.from_numpy, arrays[-2:])
        oracle.check_scatter_mean(mean.view(features.dtype), mass, features, assignment, count, weight)

    return Call(
        name,
        f"scatter_mean_{SUFFIX[features.dtype]}",
        (
            *(as_array(rows), batch, tokens, channels, *strides(rows), index(assignment), count),
            None if weight is None else weight.float().numpy(),
            np.full((batch, tokens), PAD, np.int32),
            np.full((batch, count, channels), PAD, bits),
            np.full((batch, count), PAD, np.float32),
        ),
        judge,
    )


def knn_density(name, features, k, num_tokens=None, strip_rows=0, wgmma=1):
    """`strip_rows`: rows whose distances are stored at a time; 0: as planned. `wgmma`: 0: distances by differences."""
    rows = channels_contiguous(features)
    batch, tokens, channels = rows.shape
    return Call(
        f"{name}-k{k}" + (f"-strip{strip_rows}" if strip_rows else "") + ("" if wgmma else "-differences"),
        f"knn_density_{SUFFIX[features.dtype]}",
        (
            *(as_array(rows), batch, tokens, channels, *strides(rows), k, index(num_tokens), strip_rows, wgmma),
            np.full((batch, tokens), PAD, np.float32),
        ),
        lambda *arrays: oracle.check_knn_density(torch.from_numpy(arrays[-1]), features, k, num_tokens),
    )


def dpp_select(name, features, quality, k, floor=1e-7, num_tokens=None):
    rows = channels_contiguous(features)
    batch, tokens, channels = rows.shape

    def judge(*arrays):
        order, gain = map(torch.from_numpy, arrays[-2:])
        counts = num_tokens
        if counts is not None:  # out of range counts as 0
            counts = torch.where((num_tokens >= 0) & (num_tokens <= tokens), num_tokens, 0)
        oracle.check_dpp(order, gain, features, quality, k, floor, counts)

    return Call(
        name,
        f"dpp_select_{SUFFIX[features.dtype]}",
        (
            as_array(rows),
            batch,
            tokens,
            channels,
            *strides(rows),
            quality.numpy(),
            k,
            floor,
            index(num_tokens),
            np.full((batch, k), PAD, np.int64),
            np.full((batch, k), PAD, np.float32),
        ),
        judge,
    )


def dedup_select(name, features, order, keep, step=8, held=0, exact=True):
    """`held`: items whose distances are held at a time (0: as planned)."""
    rows = channels_contiguous(features)
    batch, tokens, channels = rows.shape

    def judge(*arrays):
        kept, listed = torch.from_numpy(arrays[-1]), order
        bad = ((order < -1) | (order >= tokens)).any(1, keepdim=True)
        listed = torch.where(bad, -1, order)  # an index out of range counts as an empty list
        oracle.check_dedup(kept, features, listed, keep, step, exact)

    return Call(
        name,
        f"dedup_select_{SUFFIX[features.dtype]}",
        (
            as_array(rows),
            batch,
            tokens,
            channels,
            *strides(rows),
            index(order),
            order.shape[1],
            keep,
            step,
            held,
            np.full((batch, keep), PAD, np.int64),
        ),
        judge,
    )


def listed(case) -> torch.Tensor:
    """(B, N): the tokens of each item in random order; a ragged item ends early."""
    rng = torch.Generator().manual_seed(case.tokens)
    order = torch.stack([torch.randperm(case.tokens, generator=rng) for _ in range(case.batch)])
    if case.num_tokens is not None:
        order[torch.arange(case.tokens) >= torch.tensor(case.num_tokens)[:, None]] = -1
    return order


def diverse(case, dtype) -> list[Call]:
    """The calls of dpp_select and dedup_select for a case; those of dedup_select with exact distances of its size."""
    inputs = case.inputs(dtype=dtype)
    rng = torch.Generator().manual_seed(case.k)
    quality = torch.rand(case.batch, case.tokens, generator=rng) + 0.05
    quality[:, 3::5] = math.nan if case.values is cases.not_finite else 0.5
    same_size = replace(case, values=cases.exact, layout=cases.contiguous, num_tokens=None)
    exact = same_size.features(dtype=dtype)
    if case.values is cases.not_finite:
        exact[:, ::4] = math.inf
    exact[:, 1::9] = 0.0
    order = listed(case)[:, :200]  # several blocks, and rounds enough for a sanitizer
    keep = min(case.k, (order.shape[1] + 1) // 2)
    return [
        dpp_select(case.name, inputs["features"], quality, case.k, num_tokens=inputs["num_tokens"]),
        dedup_select(case.name, case.layout(exact), order, keep, step=case.k % 9 + 1, held=case.batch % 2),
    ]


def _select(op, name, features, k, options, judge, packed=None, num_tokens=None, way=None, notes=()):
    """A call of the selection op `op`.

    options: its arguments between k and num_tokens. packed: (cu_seqlens, cu_budgets). way:
    - `max_seqlen`: max length of packed items
    - `matrix_tokens`: max tokens of an item whose weights are stored; longer items are streamed
    - `item_blocks`: blocks that share an item with stored weights (0: as planned)
    - `lookahead`: max picks per exchange (cluster), batch of drafts or sweep
    - `wgmma`: 0 for the tensor cores of devices other than Hopper
    - `wave_floats`: weights of packed items in memory at a time (0: as planned)
    """
    default = {"max_seqlen": 2**63 - 1, "matrix_tokens": 8192, "item_blocks": 0, "lookahead": 32, "wgmma": 1}
    way = {**default, "wave_floats": 0, **(way or {})}
    rows = channels_contiguous(features)
    tokens, channels = rows.shape[-2:]
    batch = len(rows) if packed is None else len(packed[0]) - 1
    args = (
        as_array(rows),
        batch,
        tokens,
        channels,
        *strides(rows),
        k,
        *options,
        index(num_tokens),
        *((None, None) if packed is None else map(index, packed)),
        *way.values(),
        *notes,
        np.full((batch, k) if packed is None else (k,), PAD, np.int64),
    )
    longest = tokens if packed is None else max(0, *packed[0].diff().tolist())
    bound, mean = (tokens, k) if packed is None else (min(tokens, way["max_seqlen"]), -(-k // batch))
    kind = "swept" if longest > way["matrix_tokens"] else "cluster" if way["item_blocks"] > 1 else "stored"
    if op == "repulsion_select" and kind == "stored" and way["lookahead"] > 1 and mean >= max(64, bound / 8):
        kind = "drafted" if 256 < bound <= 640 else kind
    if way["wave_floats"]:
        kind = f"waves-{kind}"
    kind += "" if way["wgmma"] else "_mma"
    return Call(
        f"{name}-{kind}{way['lookahead']}",
        f"{op}_{SUFFIX[rows.dtype]}",
        args,
        lambda *arrays: judge(torch.from_numpy(arrays[-1])),
        f"{'packed-' if packed else ''}{kind.removeprefix('waves-')}",
    )


def repulsion_select(name, features, k, eps, anchor=None, num_tokens=None, notes=None, **way):
    """`notes`: an array for the debug output of run_selection."""

    def judge(picks):
        oracle.check_select(picks, features, k, eps, anchor, num_tokens)

    options = eps, index(anchor)
    return _select("repulsion_select", name, features, k, options, judge, None, num_tokens, way, (notes,))


def repulsion_select_varlen(name, features, cu_seqlens, cu_budgets, total_k, eps, anchor=None, notes=None, **way):
    def judge(picks):
        oracle.check_select_varlen(picks, features, cu_seqlens, cu_budgets, total_k, eps, anchor)

    packed, options = (cu_seqlens, cu_budgets), (eps, index(anchor))
    return _select("repulsion_select", name, features, total_k, options, judge, packed, None, way, (notes,))


def _numbers(values):
    return None if values is None else values.float().contiguous().numpy()


def _farthest_options(anchor, quality, start, metric):
    return index(anchor), _numbers(quality), _numbers(start), int(metric == "cosine")


def farthest_select(
    name, features, k, anchor=None, quality=None, start=None, metric="euclidean", num_tokens=None, **way
):
    def judge(picks):
        oracle.check_farthest(picks, features, k, anchor, quality, start, metric, num_tokens)

    options = _farthest_options(anchor, quality, start, metric)
    return _select("farthest_select", f"{name}-{metric}", features, k, options, judge, None, num_tokens, way)


def farthest_select_varlen(
    name,
    features,
    cu_seqlens,
    cu_budgets,
    total_k,
    anchor=None,
    quality=None,
    start=None,
    metric="euclidean",
    **way,
):
    def judge(picks):
        oracle.check_farthest_varlen(picks, features, cu_seqlens, cu_budgets, total_k, anchor, quality, start, metric)

    packed, options = (cu_seqlens, cu_budgets), _farthest_options(anchor, quality, start, metric)
    return _select("farthest_select", f"{name}-{metric}", features, total_k, options, judge, packed, None, way)


def suppress_select(name, features, rank, tau, k, num_tokens=None, **way):
    def judge(picks):
        oracle.check_suppress(picks, features, rank, tau, k, num_tokens)

    options = _numbers(rank), _numbers(tau)
    return _select("suppress_select", name, features, k, options, judge, None, num_tokens, way)


def suppress_select_varlen(name, features, rank, tau, cu_seqlens, cu_budgets, total_k, **way):
    def judge(picks):
        oracle.check_suppress_varlen(picks, features, rank, tau, cu_seqlens, cu_budgets, total_k)

    packed, options = (cu_seqlens, cu_budgets), (_numbers(rank), _numbers(tau))
    return _select("suppress_select", name, features, total_k, options, judge, packed, None, way)


# ---- Calls from the table of cases -------------------------------------------------------------------------------


def work(case) -> int:
    """Roughly what a case costs to emulate and to judge."""
    if isinstance(case, cases.VarlenCase):
        return sum(case.lengths) ** 2 * case.channels
    return case.batch * case.tokens**2 * case.channels


WAYS = (  # `way` of _select
    {"matrix_tokens": 8192, "lookahead": 32},
    {"matrix_tokens": 8192, "lookahead": 32, "wgmma": 0},
    {"matrix_tokens": 8192, "item_blocks": 4, "lookahead": 8},
    {"matrix_tokens": 0, "lookahead": 32},
    {"matrix_tokens": 0, "lookahead": 1},
)


def ways_of(case, dtype) -> list[dict]:
    """The WAYS that differ on `case`.

    Packed items: on Hopper's tensor cores only, and also in waves of as few items as possible. There the longest item
    is streamed, or max_seqlen makes all items stored.
    """
    if not isinstance(case, cases.VarlenCase):
        return [way for way in WAYS if dtype != torch.float32 or way.get("wgmma", 1)]
    longest = max(case.lengths)
    tight = {"max_seqlen": longest, "wave_floats": 1}
    plain = [way for way in WAYS if way.get("wgmma", 1)]
    return [*plain, {"matrix_tokens": longest - 1, "wave_floats": 1}, tight, {**tight, "item_blocks": 4}]


def of_sets(case, features, num_tokens) -> list[Call]:
    """Calls of kernels that compare rows (all tokens with some of them) or merge them (into random slots)."""
    rng = torch.Generator().manual_seed(5)
    batch, tokens, _ = features.shape
    some = features[:, : tokens // 2 + 1]
    ranks = [torch.randint(0, 4, (batch, n), generator=rng) for n in (some.shape[1], tokens)]
    slots = torch.randint(-1, case.k, (batch, tokens), generator=rng)
    weight = torch.rand(batch, tokens, generator=rng)
    return [
        nearest(case.name, some, features, "cosine", *ranks, False, num_tokens),
        nearest(case.name, features, some, "euclidean", exclude_self=True),
        nearest(case.name, features, features, "euclidean", ranks[1], ranks[1], False, num_tokens, strip_entries=2),
        nearest(case.name, features, features, "euclidean", exclude_self=True),
        scatter_mean(case.name, features, slots, case.k, weight if batch % 2 else None),
        knn_density(case.name, features, case.k, num_tokens),
        knn_density(case.name, features, min(3, tokens), num_tokens, strip_rows=tokens // 3 + 1),
        # One batch entry at a time: the strip still holds the previous entry.
        *([knn_density(case.name, features, case.k, num_tokens, strip_rows=tokens)] if batch > 1 else []),
    ]


def of_case(case, dtype) -> list[Call]:
    """Calls of every kernel that serves `case`, in every way."""
    inputs = case.inputs(dtype=dtype)
    if isinstance(case, cases.VarlenCase):
        ways = [*ways_of(case, dtype), {"wgmma": 0}]
        return [repulsion_select_varlen(case.name, **inputs, **way) for way in ways]
    if case.batch == 0:
        return []  # nothing is launched
    features, anchor = inputs["features"], inputs["anchor"]
    picked = torch.arange(case.batch) % case.tokens - int(case.batch > 2) if anchor is None else anchor  # -1: none
    return [
        pairwise_sqdist(case.name, features),
        repulsion_step(case.name, features, picked, case.eps, gap=case.batch % 2),
        *(repulsion_select(case.name, **inputs, **way) for way in ways_of(case, dtype)),
        *of_sets(case, features, inputs["num_tokens"]),
        *diverse(case, dtype),
    ]


def rules_of_case(case, dtype, turn) -> list[Call]:
    """Calls of the other selection rules on `case`; `turn` selects some of their options and ways."""
    variants, made = ("cosine", "all", "quality", "start", "plain"), []
    packed = isinstance(case, cases.VarlenCase)
    if not packed and case.batch == 0:
        return []
    farthest, suppress = (
        (farthest_select_varlen, suppress_select_varlen) if packed else (farthest_select, suppress_select)
    )
    for i, way in enumerate(ways_of(case, dtype)):
        if (turn + i) % 2 == 0:
            given = selection_inputs.of_case("farthest_select", case, variants[(turn + i) % 5], turn, dtype)
            made.append(farthest(case.name, **given, **way))
        else:
            given = selection_inputs.of_case("suppress_select", case, "plain", turn, dtype)
            made.append(suppress(case.name, **given, **way))
    return made if packed else [unit_rows(case.name, case.features(dtype=dtype)), *made]


def drafted() -> list[Call]:
    """Drafts of short and long items: of tokens alone and in pairs, where all potentials are equal, and packed."""
    made = []
    for dtype, values, k, wgmma in (
        (torch.float32, cases.normal, 100, 1),
        (torch.bfloat16, cases.near_duplicates, 66, 1),
        (torch.float16, cases.none_finite, 64, 1),
        (torch.bfloat16, cases.normal, 64, 0),
        (torch.float16, cases.near_duplicates, 64, 0),
    ):
        case = Case("drafts", 2, 261, 3, k, values, num_tokens=(70, 261), anchor=(0, 260))
        made.append(repulsion_select(case.name, **case.inputs(dtype=dtype), wgmma=wgmma))
    case = VarlenCase("packed_drafts", (300, 1, 0, 70, 264), (100, 1, 0, 70, 264), 4, cases.duplicates)
    return [*made, repulsion_select_varlen(case.name, **case.inputs(dtype=torch.bfloat16), max_seqlen=300)]


def calls(most_work: float) -> list[Call]:
    """Calls of every case of at most `most_work`, in each of its dtypes (rules other than repulsion: in one dtype).

    The cheapest case is first.
    """
    made = drafted()
    for turn, case in enumerate(sorted((*cases.CASES, *cases.VARLEN_CASES), key=work)):
        if work(case) <= most_work:
            for dtype in case.dtypes:
                made += of_case(case, dtype)
            made += rules_of_case(case, case.dtypes[turn % len(case.dtypes)], turn // 3)
    return made


# ---- A few calls that cover all paths of the kernels: for sanitizers and mutants ---------------------------------


def pitched(x):
    """Rows 16 elements (or a multiple) apart."""
    padded = torch.nn.functional.pad(x, (0, -x.shape[-1] % 16), value=math.nan)
    return padded[..., : x.shape[-1]]


PATHS = (
    Case("one", 1, 1, 1, 1),
    Case("tiles", 2, 70, 40, 9, cases.duplicates),  # several tiles, and stages of channels
    # On tensor cores every buffer is reused. Some pairs are recomputed, most tokens are picked.
    Case("stages", 1, 70, 328, 40, cases.near_duplicates),
    Case("large_tiles", 3, 140, 72, 10, cases.near_duplicates),  # on tensor cores, enough of them for the large ones
    Case("offset", 2, 70, 72, 12, cases.common_offset),  # on tensor cores with a centre
    Case("blocks", 1, 700, 3, 12),  # several blocks agree on each pick
    Case("ties", 1, 450, 3, 4, cases.none_finite),  # within a thread, too; the lowest index first
    Case("groups", 3, 300, 5, 7),  # several groups of blocks
    Case("items", 11, 33, 9, 5),  # more items than groups
    Case("odd", 2, 45, 13, 45, cases.not_finite, cases.channel_slice),
    Case("pitched", 2, 9, 13, 9, layout=pitched),  # aligned rows whose end is not
    Case("ragged", 3, 40, 8, 20, num_tokens=(40, 7, 0), anchor=(39, 6, 0)),
    VarlenCase("packed", (31, 0, 70, 9), (15, 0, 20, 1), 16, cases.common_offset),  # each with a centre of its own
    # As "large_tiles".
    VarlenCase("packed_tiles", (150, 70, 1, 300, 140), (120, 12, 1, 5, 40), 72, cases.near_duplicates),
)


def quick() -> list[Call]:
    calls = drafted()
    for i, case in enumerate(PATHS):
        all_dtypes = case.name in ("stages", "large_tiles", "offset", "packed", "packed_tiles")
        for dtype in cases.FLOATING if all_dtypes else (cases.FLOATING[i % 3],):
            calls += of_case(case, dtype)
        calls += rules_of_case(case, cases.FLOATING[i % 3], i)
        calls += rules_of_case(case, cases.FLOATING[i % 3], i + 1)
    # More stages of tiles, large and small, than a block of a few has buffers.
    for dtype, batch, tokens, values in (
        (torch.bfloat16, 2, 200, cases.near_duplicates),
        (torch.float16, 1, 140, cases.common_offset),
        (torch.float32, 1, 140, cases.near_duplicates),
    ):
        case = Case(f"ring_{tokens}", batch, tokens, 456, 9, values)
        calls.append(pairwise_sqdist(case.name, case.features(dtype=dtype)))
        calls.append(repulsion_select(case.name, **case.inputs(dtype=dtype)))
    # Streaming: enough candidates for more drafts than half of the points of a pass.
    points = Case("points", 1, 700, 40, 48)
    calls.append(repulsion_select(points.name, **points.inputs(dtype=torch.bfloat16), matrix_tokens=0))
    # In a launch of clusters each item has one block: clusters for both would take more blocks than there are SMs.
    long = VarlenCase("packed_long", (1300, 24), (24, 24), 4)
    calls.append(repulsion_select_varlen(long.name, **long.inputs(dtype=torch.float32), wgmma=0))
    # More items than the planning block has threads.
    many = VarlenCase("packed_many", ((0,) * 14 + (5,)) * 18, ((0,) * 14 + (3,)) * 18, 4)
    for way in ({}, {"max_seqlen": 5, "wave_floats": 1}, {"matrix_tokens": 4, "wave_floats": 1}):
        calls.append(repulsion_select_varlen(many.name, **many.inputs(dtype=torch.bfloat16), **way))
    # Distances that fit in float32, of rows whose norms do not.
    norms = Case("large_norms", 1, 70, 40, 12, cases.large_norms)
    given = selection_inputs.of_case("farthest_select", norms, "plain", 0, torch.bfloat16)
    calls += [farthest_select(norms.name, **given, **way) for way in ways_of(norms, torch.bfloat16)]
    # Products of rows that underflow without scaling.
    tiny = Case("tiny", 1, 70, 40, 1, cases.tiny).features(dtype=torch.bfloat16)
    return [*calls, nearest("tiny", tiny, tiny, "cosine", exclude_self=True)]


def own_items(cu_seqlens, cu_budgets, anchor, tokens, total, max_seqlen) -> list:
    """(item, rows, output slots) of the packed items that have picks.

    Their numbers are valid, and their rows and slots begin after those of all previous items.
    """
    starts, budgets = cu_seqlens.tolist(), cu_budgets.tolist()
    own, row_end, place_end = [], 0, 0
    for item in range(len(starts) - 1):
        (first, end), (out, out_end) = starts[item : item + 2], budgets[item : item + 2]
        if not 0 <= out <= out_end <= total:
            out = out_end = 0
        fits = 0 <= first <= end <= tokens and (max_seqlen is None or end - first <= max_seqlen)
        if fits and anchor is not None and first < end and out < out_end:
            fits = 0 <= anchor[item] < end - first
        if fits and first >= row_end and out >= place_end and out < out_end:
            own.append((item, slice(first, end), slice(out, out_end)))
        row_end, place_end = max(row_end, end if fits else 0), max(place_end, out_end)
    return own


def nonsense() -> list[Call]:
    """Invalid numbers in device memory: kernels stay in bounds, and the affected items give -1."""
    batch, tokens, k = 6, 40, 12
    features = cases.Case("nonsense", batch, tokens, 8, k).features()
    wild = torch.tensor([-1, 40, -(2**63), 2**63 - 1, 2**32, 3])
    everything = torch.tensor([40] * batch)
    made = [repulsion_step("picked", features, wild, 1e-6)]
    made.append(dpp_select("counts", features, torch.ones(batch, tokens), k, num_tokens=wild))
    order = torch.arange(tokens).repeat(batch, 1)
    order[torch.arange(batch), 7 * torch.arange(batch)] = wild
    made.append(dedup_select("listed", features, order, k, exact=False))

    def selected(name, valid, anchor, num_tokens, way):
        call = repulsion_select(name, features, k, 1e-6, anchor, num_tokens, **way)

        def judge(*arrays):
            picks = torch.from_numpy(arrays[-1])
            assert (picks[~valid] == -1).all(), f"picks for items that make no sense: {picks}"
            oracle.check_select(picks[valid], features[valid], k, 1e-6, anchor[valid], num_tokens[valid])

        return replace(call, judge=judge)

    def packed(name, cu_seqlens, cu_budgets, anchor, way):
        x, total = features.reshape(-1, 8), 30
        call = repulsion_select_varlen(name, x, cu_seqlens, cu_budgets, total, 1e-6, anchor, **way)
        own = own_items(cu_seqlens, cu_budgets, anchor, len(x), total, way.get("max_seqlen"))

        def judge(*arrays):
            picks, free = torch.from_numpy(arrays[-1]), torch.ones(total, dtype=torch.bool)
            for item, rows, places in own:
                free[places] = False
                kept = min(places.stop - places.start, rows.stop - rows.start)
                part = picks[places]
                assert (part[kept:] == -1).all(), f"item {item}: no -1 past its tokens: {part}"
                first = None if anchor is None else anchor[item].item()
                error = oracle.greedy_error(x[rows], part[:kept], 1e-6, first) if kept else ""
                assert not error, f"item {item}: {error}"
            assert (picks[free] == -1).all(), f"picks for items that make no sense: {picks}"

        return replace(call, judge=judge)

    counts = torch.where(wild == tokens, tokens + 1, wild)
    none = torch.where(counts == 3, counts, 0)  # the valid counts of equal effect
    for call, array in (
        (nearest("num_keys", features, features, "cosine", num_keys=none), 1),
        (nearest("num_keys", features, features, "euclidean", num_keys=none), 1),
        (knn_density("num_tokens", features, 2, none), 1),
    ):
        arrays = [i for i, argument in enumerate(call.args) if isinstance(argument, np.ndarray | At)]
        args = list(call.args)
        args[arrays[array]] = index(counts)
        made.append(replace(call, args=tuple(args)))
    slots = wild.repeat(tokens)[: batch * tokens].reshape(batch, tokens)
    call = scatter_mean("assignment", features, torch.where((slots >= 0) & (slots < k), slots, -1), k)
    made.append(replace(call, args=(*call.args[:6], index(slots), *call.args[7:])))

    top, far = 2**63 - 1, 2**62
    for way in WAYS:
        made.append(selected("anchor", wild == 3, wild, everything, way))
        counts = torch.where(wild == tokens, tokens + 1, wild)
        made.append(selected("num_tokens", wild == 3, torch.zeros_like(wild), counts, way))
    bounded = {"max_seqlen": 60, "wave_floats": 1}
    for way in (*WAYS, {"matrix_tokens": 40, "wave_floats": 1}, bounded, {**bounded, "item_blocks": 4}):
        for name, seqlens, budgets in (
            ("offsets", [0, -5, 300, 20, -top - 1, top, 240], [0, 5, 10, 15, 20, 25, 30]),
            ("wrap", [top, -top - 1, far, -far, 0, top, 1], [0, 5, 10, 15, 20, 25, 30]),
            ("budgets", [0, 40, 80, 120, 160, 200, 240], [0, 99, -7, top, -top - 1, far, 30]),
            ("past", [0, 40, 80, 120, 160, 200, 241], [0, 5, 10, 15, 20, 25, 31]),
            ("overlap", [0, 60, 30, 90, 150, 0, 240], [0, 5, 10, 15, 20, 25, 30]),
            ("places", [0, 40, 80, 120, 160, 200, 240], [0, 10, 5, 15, 20, 25, 30]),
            ("long", [0, 60, 120, 181, 182, 182, 240], [0, 5, 10, 15, 20, 25, 30]),
            ("late", [40, 80, 120, 160, 200, 220, 240], [2, 5, 10, 15, 20, 25, 29]),
        ):
            made.append(packed(name, torch.tensor(seqlens), torch.tensor(budgets), None, way))
            made.append(packed(f"{name}-anchor", torch.tensor(seqlens), torch.tensor(budgets), wild, way))
    return made
