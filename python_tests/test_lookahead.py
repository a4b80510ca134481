"""Drafts of several picks never change a pick: against the plain loop, bit for bit."""

import functools
import itertools
from dataclasses import replace
from pathlib import Path

import cases
import numpy as np
import pytest
import torch
from emulator import build, calls, operations

import sts_kernels

LOOKAHEADS = ("2", "3", "8", "16")


def plain_and_ahead(monkeypatch, select):
    """(picks of the plain loop, picks with a lookahead), for each of LOOKAHEADS and for the planned lookahead."""
    monkeypatch.setenv("STS_KERNELS_LOOKAHEAD", "1")
    plain = select()
    for lookahead in LOOKAHEADS:
        monkeypatch.setenv("STS_KERNELS_LOOKAHEAD", lookahead)
        yield plain, select()
    monkeypatch.delenv("STS_KERNELS_LOOKAHEAD")
    yield plain, select()


def uniform(g, *shape):
    return torch.randn(shape, generator=g)


def grid(g, *shape):  # sums of equal weights: ties everywhere
    return torch.randint(0, 2, shape, generator=g).float()


def repeated(g, batch, tokens, channels):
    x = uniform(g, batch, tokens, channels)
    return x[:, torch.randint(0, max(1, tokens // 3), (tokens,), generator=g)]


def equal(g, batch, tokens, channels):
    return uniform(g, batch, 1, channels).expand(batch, tokens, channels)


def not_finite(g, *shape):
    x = uniform(g, *shape)
    x[:, ::3, 0] = float("nan")
    x[:, 1::5, -1] = float("inf")
    return x


def far_away(g, *shape):
    return 20 + 0.01 * uniform(g, *shape)


def adversary(g, batch, tokens, channels):
    """Pairs of near-duplicates: half of the best candidates are repelled by the other half."""
    x = uniform(g, batch, tokens, channels)
    x[:, 1::2] = x[:, : tokens - 1 : 2] + 1e-3 * x[:, 1::2]
    return x


@pytest.fixture(scope="module")
def emulated():
    """Calls the emulated selection and returns its arrays; by default the streaming kernel, without stored weights."""
    if reason := build.missing_tool():
        pytest.skip(reason)

    def run(x, k, lookahead, matrix_tokens=0, **rest):
        call = operations.repulsion_select("any", x, k, 1e-6, matrix_tokens=matrix_tokens, lookahead=lookahead, **rest)
        return outcome(call)

    return run


emulator = functools.cache(build.module)


def outcome(call):
    """The arrays of an emulated call, unjudged."""
    return calls.run_in(emulator(), replace(call, judge=lambda *_: None))


MAKES = [uniform, grid, repeated, equal, not_finite, far_away, adversary]


@pytest.mark.parametrize("make", MAKES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_picks_are_those_of_the_plain_loop(make, dtype, monkeypatch):
    g = torch.Generator().manual_seed(5)
    for tokens, channels, k in [
        (1, 3, 1),
        (2, 1, 2),
        (7, 2, 7),
        (33, 5, 20),
        (64, 17, 64),
        (150, 8, 40),
        (301, 33, 120),
    ]:
        for _ in range(20):
            x = make(g, 2, tokens, channels).to(dtype)
            for plain, ahead in plain_and_ahead(monkeypatch, lambda x=x, k=k: sts_kernels.repulsion_select(x, k)):
                assert torch.equal(ahead, plain)


@pytest.mark.parametrize("make", MAKES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_farthest_picks_are_those_of_the_plain_loop(make, metric, monkeypatch):
    """Without options, when only the anchor is known at first, and with quality and start, by which tokens differ."""
    g = torch.Generator().manual_seed(12)
    for tokens, channels, k in [(1, 3, 1), (7, 2, 7), (64, 17, 64), (150, 8, 40), (301, 33, 120)]:
        for _ in range(5):
            x = make(g, 2, tokens, channels)
            quality, start = torch.rand(2, tokens, generator=g), torch.rand(2, tokens, generator=g) * channels
            for q, s in ((None, None), (quality, None), (quality, start)):
                for plain, ahead in plain_and_ahead(
                    monkeypatch,
                    lambda x=x, k=k, q=q, s=s: sts_kernels.farthest_select(x, k, quality=q, start=s, metric=metric),
                ):
                    assert torch.equal(ahead, plain)


def test_packed_ragged_and_anchored_items(monkeypatch):
    g = torch.Generator().manual_seed(6)
    x = uniform(g, 300, 12)
    lengths, budgets = torch.tensor([0, 0, 120, 121, 300]), torch.tensor([0, 0, 60, 61, 200])
    anchor = torch.tensor([0, 3, 0, 17])
    for plain, ahead in plain_and_ahead(
        monkeypatch, lambda: sts_kernels.repulsion_select_varlen(x, lengths, budgets, 200, anchor=anchor)
    ):
        assert torch.equal(ahead, plain)
    padded = uniform(g, 3, 90, 12)
    counts = torch.tensor([0, 31, 90])
    for plain, ahead in plain_and_ahead(
        monkeypatch, lambda: sts_kernels.repulsion_select(padded, 70, num_tokens=counts)
    ):
        assert torch.equal(ahead, plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_all_tokens_of_large_items_on_several_threads(monkeypatch, dtype):
    """Threads share the rows of one item, or whole items; picked tokens are dropped from the passes many times."""
    threads = torch.get_num_threads()
    for batch in (1, 7):
        x = uniform(torch.Generator().manual_seed(8), batch, 500, 96).to(dtype)
        monkeypatch.setenv("STS_KERNELS_LOOKAHEAD", "1")
        try:
            torch.set_num_threads(1)
            plain = sts_kernels.repulsion_select(x, 500)
            torch.set_num_threads(3)
            for lookahead in LOOKAHEADS:
                monkeypatch.setenv("STS_KERNELS_LOOKAHEAD", lookahead)
                assert torch.equal(sts_kernels.repulsion_select(x, 500), plain)
            monkeypatch.delenv("STS_KERNELS_LOOKAHEAD")  # stored weights
            assert torch.equal(sts_kernels.repulsion_select(x, 500), plain)
        finally:
            torch.set_num_threads(threads)


@pytest.mark.parametrize("make", MAKES, ids=lambda f: f.__name__)
def test_emulated_cuda_kernel_with_stored_weights(emulated, make):
    """Every number of warps and of tokens per thread; the streaming kernel makes the same picks."""
    g = torch.Generator().manual_seed(11)
    shapes = [(1, 3, 1), (2, 1, 2), (7, 2, 7), (40, 8, 40), (301, 8, 100), (602, 3, 100)]
    if make is uniform:
        shapes += [(1100, 2, 50), (2051, 1, 50), (4150, 1, 30)]
    for tokens, channels, k in shapes:
        x = make(g, 2 if tokens < 1000 else 1, tokens, channels)
        picks = emulated(x, k, 1, matrix_tokens=tokens, wgmma=0)[-1]  # by differences, as the plain loop
        assert (picks == plain_loop(x, picks[:, 0], k)).all()
        if tokens < 100:
            assert (emulated(x, k, 16, wgmma=0)[-1] == picks).all()


LAST_RESORT = np.finfo(np.float32).max


def plain_loop(x, anchor, k, eps=1e-6):
    """STS Algorithm 1 with the float32 operations in the order of the kernels: equal bits."""
    sqdist = outcome(operations.pairwise_sqdist("any", x))[-1]
    weight = np.where(np.isnan(sqdist), np.float32(0), np.float32(1) / (sqdist + np.float32(eps)))
    potential = np.where(torch.isfinite(x).all(-1).numpy(), np.float32(0), LAST_RESORT)
    return greedy(potential, anchor, k, lambda b, potential, pick: potential + weight[b, pick])


def greedy(potential, anchor, k, add):
    """(B, k) greedy picks from `potential` (B, N). add(b, potentials of b, pick): potentials after the pick."""
    picks = np.full((len(potential), k), -1)
    for b, pick in enumerate(anchor):
        mine = potential[b]
        for step in range(k):
            picks[b, step] = pick
            mine = add(b, mine, pick)
            mine[picks[b, : step + 1]] = np.inf
            pick = mine.argmin()
    return picks


def distances(x, metric):
    """(B, N, N) by the kernels that take differences: squared distances, or 2 - 2 cosine."""
    if metric == "euclidean":
        return outcome(operations.pairwise_sqdist("any", x))[-1]
    unit = outcome(operations.unit_rows("any", x))[-1]
    sqdist = outcome(operations.pairwise_sqdist("any", torch.from_numpy(unit)))[-1]
    return np.where(sqdist > 5, np.float32(2), sqdist)


def plain_farthest(x, k, quality, start, metric):
    finite = torch.isfinite(x).all(-1).numpy()
    quality, sqdist = quality.numpy(), distances(x, metric)

    def weight(d, q):
        value = np.where(d < LAST_RESORT, d, LAST_RESORT) * q
        return np.where(value > 0, -value, np.float32(0))

    def add(b, potential, pick):
        return np.maximum(potential, weight(sqdist[b, pick], quality[b]))

    kept = np.full_like(quality, LAST_RESORT) if start is None else start.numpy()
    usable = finite & (kept >= 0)
    potential = np.where(usable, weight(kept, quality), LAST_RESORT)
    key = potential if start is not None else np.where(usable, -quality, LAST_RESORT)
    return greedy(potential, key.argmin(1), k, add)


def plain_suppress(x, k, rank, tau):
    finite, sqdist = torch.isfinite(x).all(-1).numpy(), distances(x, "cosine")
    potential = np.where(finite, rank.numpy().astype(np.float32), LAST_RESORT)
    suppressed, tau = np.float32(2**23), tau.numpy()

    def add(b, potential, pick):
        near = (sqdist[b, pick] < 2 * tau[b, pick]) & (potential < suppressed)
        return np.where(near, potential + suppressed, potential)

    return greedy(potential, potential.argmin(1), k, add)


RULE_WAYS = (
    {"matrix_tokens": 8192, "lookahead": 1},
    {"matrix_tokens": 8192, "item_blocks": 4, "lookahead": 8},
    {"matrix_tokens": 8192, "item_blocks": 8, "lookahead": 3},
    {"matrix_tokens": 0, "lookahead": 1},
    {"matrix_tokens": 0, "lookahead": 3},
    {"matrix_tokens": 0, "lookahead": 16},
)
RULE_SHAPES = [(1, 3, 1), (7, 2, 7), (20, 8, 20), (100, 5, 60)]
GIVEN = "nothing", "quality", "start", "quality", "start", "nothing"


@pytest.mark.parametrize("make", MAKES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_emulated_cuda_kernels_pick_the_farthest(emulated, monkeypatch, make, metric):
    """Every kernel makes the picks of the plain loop, bit for bit."""
    monkeypatch.setenv("STS_EMULATE_SMS", "3")
    g = torch.Generator().manual_seed(16)
    for (tokens, channels, k), given in zip((*RULE_SHAPES, *RULE_SHAPES[-2:]), itertools.cycle(GIVEN), strict=False):
        x = make(g, 2, tokens, channels)
        quality = torch.randint(0, 4, (2, tokens), generator=g) / 3 if given != "nothing" else None
        start = torch.randint(-1, 5, (2, tokens), generator=g).float() if given == "start" else None
        expected = plain_farthest(x, k, torch.ones(2, tokens) if quality is None else quality, start, metric)
        for way in RULE_WAYS:
            call = operations.farthest_select("any", x, k, None, quality, start, metric, **way)
            assert (outcome(call)[-1] == expected).all(), way


@pytest.mark.parametrize("make", MAKES, ids=lambda f: f.__name__)
def test_emulated_cuda_kernels_suppress(emulated, monkeypatch, make):
    monkeypatch.setenv("STS_EMULATE_SMS", "3")
    g = torch.Generator().manual_seed(17)
    for tokens, channels, k in RULE_SHAPES:
        x = make(g, 2, tokens, channels).clone()
        x[:, ::7] = 0
        rank = torch.randint(0, tokens, (2, tokens), generator=g)  # not distinct
        tau = torch.tensor([0.0, 0.1, 0.5, 1.1])[torch.randint(4, (2, tokens), generator=g)]
        expected = plain_suppress(x, k, rank, tau)
        for way in RULE_WAYS:
            assert (outcome(operations.suppress_select("any", x, rank, tau, k, **way))[-1] == expected).all(), way


@pytest.mark.parametrize("rule", ["farthest", "suppress"])
def test_emulated_cuda_kernels_of_many_tokens(emulated, rule):
    """Every number of warps and of tokens per thread."""
    g = torch.Generator().manual_seed(18)
    for tokens, k, blocks in ((1100, 40, 8), (2051, 40, 4), (4150, 30, 8)):
        x = uniform(g, 1, tokens, 2)
        quality, rank = torch.rand(1, tokens, generator=g), torch.rand(1, tokens, generator=g).argsort(-1)
        if rule == "farthest":
            expected = plain_farthest(x, k, quality, None, "euclidean")
        else:
            expected = plain_suppress(x, k, rank, quality / 9)
        for way in ({"lookahead": 1}, {"lookahead": 8, "item_blocks": blocks}):
            if rule == "farthest":
                call = operations.farthest_select("any", x, k, None, quality, **way)
            else:
                call = operations.suppress_select("any", x, rank, quality / 9, k, **way)
            assert (outcome(call)[-1] == expected).all(), way


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "way",
    [
        {"matrix_tokens": 8192},
        {"matrix_tokens": 8192, "wave_floats": 1, "max_seqlen": 130},
        {"matrix_tokens": 8192, "item_blocks": 4},
        {"matrix_tokens": 40, "wave_floats": 1},
        {"matrix_tokens": 0},
    ],
    ids=str,
)
def test_emulated_cuda_kernel_of_packed_items(emulated, dtype, way):
    """Picks of each item alone, bit for bit: its own length decides between stored weights and streaming."""
    g = torch.Generator().manual_seed(15)
    lengths = [1, 34, 0, 130, 33, 2, 61, 8]
    budgets = [1, 20, 0, 64, 33, 1, 0, 5]
    x = torch.cat([cases.near_duplicates(g, 1, n, 24)[0] for n in lengths if n]).to(dtype)
    ends, out_ends = np.cumsum([0, *lengths]), np.cumsum([0, *budgets])
    args = x, torch.from_numpy(ends), torch.from_numpy(out_ends), sum(budgets), 1e-6
    packed = outcome(operations.repulsion_select_varlen("any", *args, **way))[-1]
    for begin, end, out, out_end in zip(ends, ends[1:], out_ends, out_ends[1:], strict=False):
        if out_end > out:
            alone = emulated(x[None, begin:end], int(out_end - out), 16, matrix_tokens=way["matrix_tokens"])[-1]
            assert (packed[out:out_end] == alone[0]).all()


@pytest.mark.parametrize(
    ("multiprocessors", "blocks", "shared"), [(132, 8, (0, 3)), (16, 4, (0, 3)), (9, 4, (3,)), (5, 1, ())], ids=str
)
def test_emulated_cuda_kernel_shares_the_long_items_of_a_packed_batch(
    emulated, monkeypatch, multiprocessors, blocks, shared
):
    """Clusters share items above 1024 tokens; above 2048 if a wave has more blocks than SMs; none of many items."""
    monkeypatch.setenv("STS_EMULATE_SMS", str(multiprocessors))
    lengths, budgets = (1030, 40, 1024, 2060), (14, 40, 9, 12)
    g = torch.Generator().manual_seed(19)
    items = [uniform(g, 1, n, 2) for n in lengths]
    ends, out_ends = (torch.tensor([0, *sizes]).cumsum(0) for sizes in (lengths, budgets))

    def counted(run):
        before = build.module().run("phases_begun")
        return run()[-1], build.module().run("phases_begun") - before

    args = torch.cat([x[0] for x in items]), ends, out_ends, sum(budgets), 1e-6
    picks, phases = counted(lambda: outcome(operations.repulsion_select_varlen("any", *args, wgmma=0)))
    plain = operations.repulsion_select_varlen("any", *args, wgmma=0, lookahead=1)  # a block for each item
    assert (outcome(plain)[-1] == picks).all()
    expected = 0
    for i, (x, k) in enumerate(zip(items, budgets, strict=True)):
        item_blocks = blocks if i in shared else 1
        alone, exchanges = counted(
            lambda x=x, k=k, n=item_blocks: emulated(x, k, 16, matrix_tokens=8192, item_blocks=n, wgmma=0)
        )
        assert (picks[out_ends[i] : out_ends[i + 1]] == alone[0]).all()
        assert bool(exchanges) == (i in shared)
        expected += exchanges
    assert phases == expected


@pytest.mark.timeout(900)  # up to eight blocks on threads of their own
@pytest.mark.parametrize("make", MAKES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_emulated_cuda_kernel_by_clusters(emulated, make, dtype):
    """Blocks that share an item, with 1 to 8 tokens per thread; few or all of the tokens are candidates."""
    g = torch.Generator().manual_seed(13)
    both = (4, 16), (8, 3)  # blocks and lookahead
    shapes = [(8, 1, 3, 1, both), (8, 2, 1, 2, both), (24, 7, 2, 7, both), (24, 19, 5, 15, both), (24, 40, 8, 40, both)]
    shapes += [(4, 150, 8, 80, both), (1, 600, 3, 100, both)]
    if make is uniform and dtype == torch.float32:
        shapes += [(1, 2100, 1, 60, both[:1]), (1, 4200, 1, 60, both[1:])]
    for batch, tokens, channels, k, ways in shapes:
        x = make(g, batch, tokens, channels).to(dtype)
        plain = emulated(x, k, 1, matrix_tokens=tokens)[-1]
        for blocks, lookahead in ways:
            assert (emulated(x, k, lookahead, matrix_tokens=tokens, item_blocks=blocks)[-1] == plain).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_emulated_cuda_kernel_by_clusters_makes_several_picks_an_exchange(emulated, dtype, monkeypatch):
    """As many as bench/NOTES.md computes: a weaker bound would make the same picks, but fewer per exchange."""
    monkeypatch.syspath_prepend(Path(__file__).parents[1])
    from bench.lookahead import replay

    x = uniform(torch.Generator().manual_seed(10), 1, 1000, 64).to(dtype)
    before = build.module().run("phases_begun")
    emulated(x, 161, 16, matrix_tokens=1000, item_blocks=8, wgmma=0)
    exchanges = (build.module().run("phases_begun") - before) / 8  # blocks
    picks, _ = replay(x[0].float(), 161)
    assert picks > 5
    assert abs(exchanges - 161 / picks) < 3  # roundings of distances differ


@pytest.mark.parametrize("make", MAKES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_emulated_cuda_kernel_by_drafts(emulated, make, dtype):
    """Every length of an item in a batch that is drafted, down to one token; with anchors; to the last token."""
    g = torch.Generator().manual_seed(21)
    counts = torch.tensor([0, 1, 2, 3, 4, 7, 8, 30, 65, 130, 257, 300])
    for tokens, channels, k, num_tokens in ((300, 8, 100, counts), (257, 3, 257, None), (640, 2, 90, None)):
        batch = 1 if num_tokens is None else len(num_tokens)
        x = make(g, batch, tokens, channels).to(dtype)
        anchor = None if num_tokens is None else (num_tokens - 1).clamp(min=0)
        if make is uniform:
            anchor = None
        plain = emulated(x, k, 1, matrix_tokens=tokens, num_tokens=num_tokens, anchor=anchor)[-1]
        for lookahead in (3, 16):
            ahead = emulated(x, k, lookahead, matrix_tokens=tokens, num_tokens=num_tokens, anchor=anchor)[-1]
            assert (ahead == plain).all()


def test_emulated_cuda_kernel_by_drafts_of_packed_items(emulated):
    lengths, budgets = [1, 34, 0, 300, 33, 257, 2, 290], [1, 20, 3, 130, 40, 257, 1, 70]
    g = torch.Generator().manual_seed(23)
    items = [uniform(g, 1, n, 5) for n in lengths]
    ends, out_ends = (torch.tensor([0, *sizes]).cumsum(0) for sizes in (lengths, budgets))
    args = torch.cat([x[0] for x in items]), ends, out_ends, sum(budgets), 1e-6
    for way in ({"max_seqlen": 300}, {"max_seqlen": 300, "wave_floats": 1}):
        call = operations.repulsion_select_varlen("any", *args, **way)
        assert "drafted" in call.way
        packed = outcome(call)[-1]
        for x, k, end in zip(items, budgets, out_ends.tolist()[1:], strict=True):
            picks = packed[end - k : end]
            if x.shape[1]:
                assert (picks[: x.shape[1]] == emulated(x, min(k, x.shape[1]), 1, matrix_tokens=300)[-1][0]).all()
            assert (picks[x.shape[1] :] == -1).all()


@pytest.mark.parametrize("make", [uniform, grid, repeated, far_away, adversary], ids=lambda f: f.__name__)
def test_emulated_cuda_kernel_accepts_as_many_drafts_as_simulated(emulated, make, monkeypatch):
    """Codes that are wrong, of other pairs for one, would make the same picks, but fewer in a batch of drafts."""
    monkeypatch.syspath_prepend(Path(__file__).parents[1])
    from bench.lookahead import drafts

    x = make(torch.Generator().manual_seed(22), 1, 576, 64)

    def barriers(lookahead):
        before = build.module().run("barriers_passed")
        emulated(x, 192, lookahead, matrix_tokens=576, wgmma=0)
        return build.module().run("barriers_passed") - before

    others = barriers(1) - (192 + 1)  # of the kernels before; the plain loop has one a pick, and one at the end
    batches = (barriers(16) - others - 4) / 2
    expected = 192 / drafts(x[0], 192)
    assert abs(batches - expected) < 0.2 * expected, (batches, expected)


@pytest.mark.parametrize("make", [uniform, repeated, far_away, adversary], ids=lambda f: f.__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_emulated_cuda_kernels_note_the_smallest_weight_of_every_row(emulated, make, dtype):
    """Row minima from large and small tiles, from tensor cores and differences, and with recomputed pairs."""
    for batch, tokens in ((1, 90), (3, 140)):
        x = make(torch.Generator().manual_seed(14), batch, tokens, 24).to(dtype)
        notes = np.zeros((batch, tokens), np.uint32)
        *_, notes, _ = emulated(x, 10, 8, matrix_tokens=tokens, item_blocks=4, notes=notes)
        np.testing.assert_allclose(smallest_weights(notes), weights(x).min(-1).values, rtol=1e-3)


@pytest.mark.parametrize("multiprocessors", [4, 132])
@pytest.mark.parametrize("wgmma", [1, 0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_emulated_cuda_kernels_note_the_smallest_weight_within_an_item(
    emulated, dtype, wgmma, multiprocessors, monkeypatch
):
    """Rows past its tokens, here far away, would lower the row minima. Then clusters make fewer picks an exchange."""
    monkeypatch.setenv("STS_EMULATE_SMS", str(multiprocessors))  # large tiles, small tiles
    counts = torch.tensor([0, 3, 64, 90, 140])
    x = uniform(torch.Generator().manual_seed(14), 5, 140, 24).to(dtype)
    for b, count in enumerate(counts):
        x[b, count:] = 50
    notes = np.zeros((5, 140), np.uint32)
    *_, notes, _ = emulated(x, 10, 8, matrix_tokens=140, item_blocks=4, notes=notes, num_tokens=counts, wgmma=wgmma)
    for b, count in enumerate(counts.tolist()):
        if count:
            own = weights(x[b : b + 1, :count])[0].min(-1).values
            np.testing.assert_allclose(smallest_weights(notes[b, :count]), own, rtol=1e-3)


def smallest_weights(notes):
    return (notes & 0x7FFFFFFF).view(np.float32)  # ordered bits of positive numbers


def weights(x):
    """Of all pairs of tokens; infinite on the diagonal."""
    sqdist = torch.cdist(x.double(), x.double(), compute_mode="donot_use_mm_for_euclid_dist") ** 2
    return (1 / (sqdist + 1e-6)).diagonal_scatter(torch.full(x.shape[:2], torch.inf), dim1=1, dim2=2)


@pytest.mark.parametrize("make", MAKES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_emulated_cuda_kernel_in_sweeps(emulated, make, dtype, monkeypatch):
    """The streaming kernel, on as many blocks as its items fill."""
    monkeypatch.setenv("STS_EMULATE_SMS", "1")
    g = torch.Generator().manual_seed(9)

    def picks(x, k, lookahead):
        return emulated(x, k, lookahead)[-1]

    shapes = [
        (1, 3, 1, 2),
        (2, 1, 2, 4),
        (7, 2, 7, 10),
        (19, 5, 15, 4),
        (40, 8, 40, 1),
        (300, 8, 40, 1),
        (140, 72, 40, 1),
    ]
    for tokens, channels, k, times in shapes:
        for _ in range(times):
            x = make(g, 2, tokens, channels).to(dtype)
            plain = picks(x, k, 1)
            for lookahead in (*LOOKAHEADS, "32") if tokens < 100 else ("3", "32"):  # many candidates are slow
                assert (picks(x, k, int(lookahead)) == plain).all()


@pytest.mark.parametrize(("dtype", "tile", "picks"), [(torch.float32, 256, 13), (torch.bfloat16, 128, 20)], ids=str)
def test_emulated_cuda_kernel_in_sweeps_makes_several_picks_a_sweep(emulated, dtype, tile, picks, monkeypatch):
    """A sweep takes three barriers; the plain loop takes two per pick."""
    monkeypatch.setenv("STS_EMULATE_SMS", "16")
    monkeypatch.setenv("STS_EMULATE_BLOCKS_PER_SM", "2")
    x = uniform(torch.Generator().manual_seed(10), 1, 4096, 64).to(dtype)
    barriers, made = {}, {}
    for lookahead in (1, 32):
        *_, notes, made[lookahead] = emulated(x, 161, lookahead, notes=np.zeros(1, np.uint32))
        barriers[lookahead] = notes[0] / (4096 / tile)  # of a block
    assert (made[1] == made[32]).all()
    assert barriers[1] == 1 + 2 * 160
    assert barriers[32] <= 1 + 3 * 160 / picks, (barriers[32] - 1) / 3


@pytest.mark.parametrize(
    ("tokens", "k"),
    [
        (257, 64),
        (576, 192),
        (640, 640),
        (1500, 400),
        (1500, 1500),
        (2880, 480),
        (8192, 100),
        (8192, 300),
        (20_000, 300),
    ],
)
@pytest.mark.parametrize("make", MAKES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_cuda_kernels(cuda, tokens, k, make, dtype, monkeypatch):
    x = make(torch.Generator().manual_seed(7), 2, tokens, 64).to("cuda", dtype)
    for plain, ahead in plain_and_ahead(monkeypatch, lambda: sts_kernels.repulsion_select(x, k)):
        assert torch.equal(ahead, plain)


@pytest.mark.parametrize("make", MAKES, ids=lambda f: f.__name__)
def test_cuda_kernels_of_packed_items(cuda, make, monkeypatch):
    lengths, budgets = [576, 300, 0, 1, 640, 258], [192, 100, 0, 1, 300, 258]
    g = torch.Generator().manual_seed(24)
    x = torch.cat([make(g, 1, n, 64)[0] for n in lengths if n]).to("cuda", torch.bfloat16)
    ends, out_ends = (torch.tensor([0, *sizes]).cumsum(0).cuda() for sizes in (lengths, budgets))
    for plain, ahead in plain_and_ahead(
        monkeypatch,
        lambda: sts_kernels.repulsion_select_varlen(x, ends, out_ends, sum(budgets), max_seqlen=max(lengths)),
    ):
        assert torch.equal(ahead, plain)


@pytest.mark.parametrize(("tokens", "k"), [(576, 192), (1500, 1500), (2880, 480), (8192, 100), (20_000, 300)])
@pytest.mark.parametrize("make", [uniform, repeated, not_finite, adversary], ids=lambda f: f.__name__)
@pytest.mark.parametrize("rule", ["euclidean", "cosine", "suppress"])
def test_cuda_kernels_of_other_rules(cuda, tokens, k, make, rule, monkeypatch):
    g = torch.Generator().manual_seed(19)
    x = make(g, 2, tokens, 64).to("cuda", torch.bfloat16)
    quality, rank = torch.rand(2, tokens, generator=g).cuda(), torch.rand(2, tokens, generator=g).argsort(-1).cuda()

    def select():
        if rule == "suppress":
            return sts_kernels.suppress_select(x, rank, quality, k)
        return sts_kernels.farthest_select(x, k, quality=quality, metric=rule)

    for plain, ahead in plain_and_ahead(monkeypatch, select):
        assert torch.equal(ahead, plain)


def test_cuda_kernels_make_the_same_picks(cuda):
    """A small k in float32 uses another kernel than a large k; the picks are equal."""
    x = uniform(torch.Generator().manual_seed(12), 2, 8192, 40).cuda()
    many = sts_kernels.repulsion_select(x, 400)
    for k in (1, 100, 127, 128):
        assert torch.equal(sts_kernels.repulsion_select(x, k), many[:, :k])
