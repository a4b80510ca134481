"""SparseVLM: vectors of the official code, its tables and their true averages, solved budgets, raters, recycling."""

import math

import pytest
import torch

from sts_kernels import methods
from sts_kernels.methods import Budget
from sts_kernels.methods.base import Inside

from . import recipe
from .density import clusters_of

CASES = [case for case in recipe.cases("sparsevlm") if "raters" in case]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case['seed']}-{case['keep']}")
def test_the_official_code(case, device):
    """The raters, and the visual tokens with the largest attention from the raters."""
    (start, stop), text, rs = case["visual"], case["text"], recipe.start(case)
    arrays = recipe.attention(rs, case["heads"], stop + text), recipe.normal(rs, stop - start, 16)
    attention, visual, words = (x.to(device) for x in recipe.tensors(case, *arrays, recipe.normal(rs, text, 16)))
    method = methods.create("sparsevlm", recycle=0.0)
    weights = method.raters(visual[None], words[None])
    assert weights[0].nonzero()[:, 0].tolist() == case["raters"]
    assert weights[0, case["raters"]].unique().numel() == 1
    assert float(weights.sum()) == pytest.approx(1)
    scores = (weights[0].double() @ attention.double().mean(0)[stop:, start:stop]).float()[None]
    order = method.select_inside(inside(scores=scores, visual=visual[None], k=case["keep"])).order
    assert sorted(order[0].tolist()) == case["kept"]


def inside(prompts=1, visual=None, scores=None, tokens=60, k=20, recycled=0, seed=0):
    rng = torch.Generator().manual_seed(seed)
    visual = torch.randn(prompts, tokens, 16, generator=rng) if visual is None else visual
    scores = torch.rand(visual.shape[:2], generator=rng) if scores is None else scores
    text = torch.zeros(len(visual), 1, visual.shape[2], device=visual.device)
    return Inside(k, recycled, visual, text, torch.ones_like(text[..., 0], dtype=torch.bool), scores)


# --- token counts ---


@pytest.mark.parametrize(
    ("table", "kept", "average"),
    [
        (192, (300, 200, 110), 206.5),
        (128, (303, 110, 36), 145.4),
        (96, (238, 48, 26), 114.1),
        (64, (66, 30, 17), 82.3),
    ],
)
def test_the_official_tables(table, kept, average):
    plan = methods.create("sparsevlm", retained_tokens=table).plan(Budget(), 32)
    assert [(c.layer, c.queries, c.score_from) for c in plan.cuts] == [(n, "raters", "layer") for n in (3, 7, 16)]
    own = [cut.keep([576]) - cut.recycled([576]) for cut in plan.cuts]
    assert tuple(own) == kept
    assert plan.average([576]) == pytest.approx(average, abs=0.05)
    tokens = 576
    for cut, stays in zip(plan.cuts, kept, strict=True):
        assert cut.recycled([576]) == (int((tokens - stays) * 0.3) + 1) // 10 + 1
        tokens = cut.keep([576])
    twice = [cut.keep([576, 576]) - cut.recycled([576, 576]) for cut in plan.cuts]
    assert twice == [2 * n for n in kept]  # clusters are counted once, for the prompt
    bare = methods.create("sparsevlm", retained_tokens=table, recycle=0.0).plan(Budget(), 40)
    assert [cut.keep([576]) for cut in bare.cuts] == list(kept)
    assert [cut.recycled([576]) for cut in bare.cuts] == [0, 0, 0]


@pytest.mark.parametrize("tokens", [576, 2880, 300, 64])
@pytest.mark.parametrize("share", [0.11, 0.2, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("layers", [32, 28, 6])
def test_the_budget_is_the_average_over_the_layers(layers, share, tokens):
    """The average counts recycled tokens. Without them, each prune layer keeps the same share of its tokens."""
    method = methods.create("sparsevlm")
    if share <= method.plan(Budget(budget=1.0), layers).cuts[0].layer / layers:
        with pytest.raises(ValueError, match="sparsevlm: budget must be above"):
            method.plan(Budget(budget=share), layers)
        return
    budget = round(share * tokens)
    for amount in (share, budget):
        plan = method.plan(Budget(budget=amount), layers)
        if share == 0.11:  # with recycling, the smallest possible average may exceed the budget
            try:
                plan.average([tokens])
            except ValueError as e:
                assert "budget must be at least" in str(e)  # noqa: PT017
                continue
        assert plan.keep(tokens) == tokens
        assert abs(plan.average([tokens]) - budget) <= 1
        left = [tokens, *(cut.keep([tokens]) for cut in plan.cuts)]
        assert left == sorted(left, reverse=True)
        own = [cut.keep([tokens]) - cut.recycled([tokens]) for cut in plan.cuts]
        ratio = own[0] / tokens
        assert all(abs(n - max(1, ratio ** (i + 1) * tokens)) <= 2 for i, n in enumerate(own))


def test_the_least_budget():
    """Layers 0 to 2 alone average 54 tokens, and each prune layer leaves at least a token and a cluster."""
    method = methods.create("sparsevlm")
    match = r"sparsevlm: budget must be at least \d+ of a prompt's 576 tokens, 3 of 32 layers"
    with pytest.raises(ValueError, match=match) as e:
        method.plan(Budget(budget=50), 32).cuts[0].keep([576])
    least = int(str(e.value).split("at least ")[1].split()[0])
    plan = method.plan(Budget(budget=least), 32)
    assert plan.cuts[-1].keep([576]) >= 1
    assert abs(plan.average([576]) - least) <= 1


def test_ratios_and_numbers():
    plan = methods.create("sparsevlm").plan(Budget(layers=[2, 9], ratios=[0.5, 30]), 32)
    assert [(c.layer, c.keep([200]), c.recycled([200])) for c in plan.cuts] == [(2, 104, 4), (9, 33, 3)]
    plan = methods.create("sparsevlm", recycle=1.0, per_cluster=1).plan(Budget(layers=[2], ratios=[0.5]), 32)
    assert (plan.cuts[0].keep([200]), plan.cuts[0].recycled([200])) == (200, 100)  # every token is its own cluster
    plan = methods.create("sparsevlm").plan(Budget(layers=[2], ratios=[0]), 32)
    assert (plan.cuts[0].keep([200]), plan.cuts[0].recycled([200])) == (0, 0)
    plan = methods.create("sparsevlm", retained_tokens=192).plan(Budget(), 32)
    assert [cut.keep([100]) - cut.recycled([100]) for cut in plan.cuts] == [52, 35, 19]


@pytest.mark.parametrize(
    ("options", "budget", "match"),
    [
        ({}, Budget(), "sparsevlm: give budget, ratios or retained_tokens, for example budget=192"),
        ({}, Budget(keep=9), "sparsevlm: keep is not an option of this method, give budget or layers or ratios"),
        ({}, Budget(budget=0.09), "sparsevlm: budget must be above 0.0938 of the tokens, 3 of 32 layers"),
        (
            {},
            Budget(ratios=[0.5]),
            r"sparsevlm: ratios must have one number for each of the layers \[3, 7, 16\], got 1",
        ),
        ({"retained_tokens": 64}, Budget(budget=64), "sparsevlm: give either retained_tokens or budget"),
        ({"retained_tokens": 64}, Budget(ratios=[0.5, 0.2, 0.1]), "sparsevlm: give either retained_tokens or ratios"),
        ({"retained_tokens": 64}, Budget(layers=[3]), "sparsevlm: retained_tokens must have one number for each of"),
    ],
)
def test_refusals(options, budget, match):
    with pytest.raises(ValueError, match=match):
        methods.create("sparsevlm", **options).plan(budget, 32)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"retained_tokens": 100}, ValueError, "sparsevlm: retained_tokens must be one of 192, 128, 96, 64, got 100"),
        ({"recycle": "some"}, TypeError, "sparsevlm: recycle must be a float, got str"),
        ({"recycle": 1.5}, ValueError, "sparsevlm: recycle must be between 0 and 1, got 1.5"),
        ({"recycle": math.nan}, ValueError, "sparsevlm: recycle must be between 0 and 1, got nan"),
        ({"per_cluster": 0}, ValueError, "sparsevlm: per_cluster must be at least 1, got 0"),
    ],
)
def test_bad_options(options, error, match):
    with pytest.raises(error, match=match):
        methods.create("sparsevlm", **options)
    with pytest.raises(ValueError, match="sparsevlm: prunes inside the LLM only"):
        methods.create("sparsevlm").select(k=1, features=torch.zeros(1, 2, 3))


# --- raters ---


def raters_by_hand(visual, text):
    aligned = (visual.double() @ text.double().T).softmax(1).mean(0)
    above = [j for j in range(len(text)) if aligned[j] > 1 / len(text)]
    weight = torch.zeros(len(text))
    weight[above] = 1 / len(above)
    return weight


def test_raters_in_a_padded_batch(device):
    rng, sizes = torch.Generator().manual_seed(4), [(30, 9), (12, 3), (0, 5), (4, 2)]
    visual, text = (torch.randn(4, n, 16, generator=rng) for n in (30, 9))
    seen = torch.arange(30) >= 30 - torch.tensor([n for n, _ in sizes])[:, None]
    said = torch.arange(9) >= 9 - torch.tensor([n for _, n in sizes])[:, None]
    visual[~seen], text[~said] = math.nan, math.inf
    weights = methods.create("sparsevlm").raters(*(x.to(device) for x in (visual, text, seen, said))).cpu()
    for row, (images, words) in enumerate(sizes):
        assert (weights[row, : 9 - words] == 0).all()
        if images:
            want = raters_by_hand(visual[row, 30 - images :], text[row, 9 - words :])
            torch.testing.assert_close(weights[row, 9 - words :], want)


def test_where_no_text_stands_out_all_of_it_rates():
    method, visual = methods.create("sparsevlm"), torch.randn(1, 8, 4, generator=torch.Generator().manual_seed(0))
    assert method.raters(visual, torch.ones(1, 1, 4)).tolist() == [[1.0]]
    assert method.raters(visual, torch.ones(1, 4, 4)).tolist() == [[0.25] * 4]
    masked = torch.tensor([[False, True, True, False]])
    assert method.raters(visual, torch.ones(1, 4, 4), text_mask=masked).tolist() == [[0, 0.5, 0.5, 0]]
    assert method.raters(visual, torch.ones(1, 2, 4), text_mask=masked[:, :1].expand(1, 2)).tolist() == [[0, 0]]


# --- recycling ---


@pytest.mark.parametrize(("share", "per_cluster"), [(0.3, 10), (0.9, 4), (1.0, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_the_best_of_the_rest_is_clustered(share, per_cluster, dtype, device):
    """By hand: kept tokens are unchanged, cluster means follow them, all others are merged nowhere."""
    method, tokens, kept = methods.create("sparsevlm", recycle=share, per_cluster=per_cluster), 60, 17
    best, clusters = method.recycled(tokens - kept)
    compared = 0
    for seed in range(8):
        seen = inside(seed=seed, k=kept + clusters, recycled=clusters)
        visual = seen.visual.to(dtype)
        ranked = sorted(range(tokens), key=lambda i: -float(seen.scores[0, i]))
        spare = ranked[kept : kept + best]
        centers, belongs, margin = clusters_of(visual[0, spare], clusters, clusters)
        if margin < 1e-4:
            continue
        compared += 1
        picked = method.select_inside(
            inside(visual=visual.to(device), scores=seen.scores.to(device), k=seen.k, recycled=clusters)
        )
        assert picked.order[0].tolist() == ranked[:kept] + [spare[i] for i in centers]
        rows = methods.merge(visual.to(device), picked)[0].cpu()
        assert torch.equal(rows[:kept], visual[0, ranked[:kept]])
        for slot in range(clusters):
            members = [token for token, own in zip(spare, belongs, strict=True) if own == slot]
            want = visual[0, members].double().mean(0).float().to(dtype)
            torch.testing.assert_close(rows[kept + slot], want, rtol=1e-6, atol=0)
        assert [i for i in range(tokens) if picked.assignment[0, i] >= 0] == sorted(ranked[: kept + best])
    assert compared > 3


def test_values_that_are_no_numbers_come_last(device):
    seen = inside(seed=2, k=20, recycled=2)
    seen.visual[0, 4], seen.scores[0, 9], seen.scores[0, 11] = math.nan, math.nan, math.inf
    method = methods.create("sparsevlm")
    picked = method.select_inside(
        inside(visual=seen.visual.to(device), scores=seen.scores.to(device), k=20, recycled=2)
    )
    assert not torch.isin(picked.order.cpu(), torch.tensor([4, 9, 11])).any()
    assert methods.merge(seen.visual.to(device), picked).isfinite().all()


def test_a_prompt_does_not_depend_on_its_batch(device):
    method, seen = methods.create("sparsevlm"), inside(prompts=5, k=22, recycled=2)
    visual, scores = seen.visual.to(device), seen.scores.to(device)
    together = method.select_inside(inside(visual=visual, scores=scores, k=22, recycled=2))
    rows = methods.merge(visual, together)
    for row in range(5):
        alone = method.select_inside(inside(visual=visual[[row]], scores=scores[[row]], k=22, recycled=2))
        assert torch.equal(alone.order[0], together.order[row])
        assert torch.equal(alone.assignment[0], together.assignment[row])
        assert torch.equal(methods.merge(visual[[row]], alone)[0], rows[row])
