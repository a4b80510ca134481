"""PolyMorphic: vectors of the float64 reference, its split and its schedule, both stages by hand, budgets."""

import json
import math

import numpy as np
import pytest
import torch

from sts_kernels import methods
from sts_kernels.methods import Budget
from sts_kernels.methods._raters import alignment, raters
from sts_kernels.methods.base import Inside

from . import recipe
from .density import clusters_of
from .judge import best_first

SCHEDULES = json.loads((recipe.VECTORS / "polymorphic.json").read_text())["schedules"]


@pytest.mark.parametrize("case", recipe.cases("polymorphic"), ids=lambda case: str(case["seed"]))
def test_the_reference(case, device):
    """All of stage 1; the raters and the best aligned tokens of stage 2."""
    rs = recipe.start(case)
    arrays = recipe.clustered(rs, 1, case["N"], case["C"])[0], recipe.positive(rs, case["N"])
    given = recipe.tensors(case, *arrays, recipe.normal(rs, 40, 16), recipe.normal(rs, 12, 16))
    x, scores, visual, text = (v[None].to(device) for v in given)
    method, retained = methods.create("polymorphic"), len(case["retained"])
    picked = method.select(k=case["budget"] * case["K"], features=x, scores=scores)
    order, others = picked.order[0].tolist(), [i for i in range(case["N"]) if i not in case["retained"]]
    assert sorted(order[:retained]) == case["retained"]
    assert order[retained:] == case["centers"]
    assert (picked.assignment[0, others] - retained).tolist() == case["cluster"]
    assert picked.assignment[0, order].tolist() == list(range(len(order)))
    rows = methods.merge(x, picked)[0].cpu()
    stored = np.load(recipe.VECTORS / "polymorphic.npz")[f"means_{case['seed']}"]
    torch.testing.assert_close(rows[retained:], torch.from_numpy(stored), rtol=0, atol=1e-5)
    assert torch.equal(rows[:retained], given[0][order[:retained]])

    mask = torch.ones(1, 12, dtype=torch.bool, device=device)
    weights = raters(alignment(visual, text, mask, 16**-0.5), mask)
    assert weights[0].nonzero()[:, 0].tolist() == case["raters"]
    keeping = methods.create("polymorphic", merged=0.0)
    left = keeping.select_inside(Inside(case["stage2_keep"], 0, visual, text, mask))
    assert sorted(left.order[0].tolist()) == case["stage2_kept"]


def test_the_split_of_the_paper():
    """54 : 10, as in VisionZip."""
    method = methods.create("polymorphic")
    assert [(method.split(k), k - method.split(k)) for k in (128, 256, 384, 320)] == [
        (108, 20),
        (216, 40),
        (324, 60),
        (270, 50),
    ]
    assert [method.split(k) for k in range(5)] == [0, 1, 2, 3, 3]
    assert [methods.create("polymorphic", merged=0.0).split(k) for k in (1, 9)] == [1, 9]
    assert [methods.create("polymorphic", retained=0.0).split(k) for k in (1, 9)] == [0, 0]


# --- token counts ---


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda schedule: str(schedule["layers"]))
def test_the_geometric_schedule(schedule):
    layers, places, counts = (schedule[name] for name in ("layers", "places", "counts"))
    plan = methods.create("polymorphic").plan(Budget(budget=64), layers, 14)
    assert [(c.layer, c.queries, c.recycled) for c in plan.cuts] == [(place, "text", None) for place in places]
    assert [plan.keep(576), *(cut.keep([576]) for cut in plan.cuts)] == [round(n) for n in counts]
    assert abs(plan.average([576]) - 64) <= 0.5
    assert [cut.keep([576, 576]) for cut in plan.cuts] == [2 * round(n) for n in counts[1:]]


@pytest.mark.parametrize("factor", [1.0, 1.5, 2.0, 2.5, 3.0])
@pytest.mark.parametrize(("tokens", "budget"), [(576, 192), (576, 64), (2880, 640), (2880, 160), (100, 0.7), (50, 1.0)])
def test_the_budget_is_the_average_over_the_layers(tokens, budget, factor):
    plan = methods.create("polymorphic", factor=factor).plan(Budget(budget=budget), 32)
    wanted = budget if isinstance(budget, int) else round(budget * tokens)
    assert plan.keep(tokens) == min(tokens, math.floor(factor * wanted + 0.5))
    assert abs(plan.average([tokens]) - wanted) <= 0.5
    left = [plan.keep(tokens), *(cut.keep([tokens]) for cut in plan.cuts)]
    assert left == sorted(left, reverse=True)
    assert (left[-1] == left[0]) == (factor == 1 or wanted == tokens)


def test_one_stage_alone():
    plan = methods.create("polymorphic").plan(Budget(keep=64), 32)
    assert (plan.keep(576), plan.keep(20), plan.cuts) == (64, 20, ())
    plan = methods.create("polymorphic", llm_only=True).plan(Budget(budget=64), 32)
    assert plan.keep(576) == 576
    assert abs(plan.average([576]) - 64) <= 0.5
    plan = methods.create("polymorphic").plan(Budget(keep=0.5, layers=[4, 8], ratios=[0.25, 30]), 32)
    assert (plan.keep(576), [(c.layer, c.keep([576])) for c in plan.cuts]) == (288, [(4, 144), (8, 30)])
    plan = methods.create("polymorphic").plan(Budget(budget=64, layers=[10]), 32)
    assert (plan.keep(576), [(c.layer, c.keep([576])) for c in plan.cuts]) == (128, [(10, 35)])


@pytest.mark.parametrize(
    ("options", "budget", "match"),
    [
        ({}, Budget(), "polymorphic: give budget or keep, for example budget=128"),
        ({}, Budget(layers=[3]), "polymorphic: give budget or keep"),
        ({}, Budget(keep=9, layers=[3]), "polymorphic: layers must come with ratios"),
        (
            {},
            Budget(keep=9, ratios=[0.5]),
            r"polymorphic: ratios must have one number for each of the layers \[3",
        ),
        (
            {},
            Budget(budget=9, layers=[16]),
            "polymorphic: factor must be below 2, 16 of 32 layers run on all",
        ),
        ({"factor": 11.0}, Budget(budget=9), "polymorphic: factor must be below 10.7, 3 of 32 layers"),
        ({"llm_only": True}, Budget(keep=9), "polymorphic: keep must be left out with llm_only"),
        ({"llm_only": True}, Budget(budget=0.09), "polymorphic: budget must be above 0.0938 of the tokens, 3 of 32"),
    ],
)
def test_refusals(options, budget, match):
    with pytest.raises(ValueError, match=match):
        methods.create("polymorphic", **options).plan(budget, 32)


def test_the_least_budget():
    plan = methods.create("polymorphic", llm_only=True).plan(Budget(budget=54), 32)
    with pytest.raises(ValueError, match="polymorphic: budget must be at least 55 of an image's 576 tokens, 3 of 32"):
        plan.cuts[0].keep([576])
    assert methods.create("polymorphic", llm_only=True).plan(Budget(budget=55), 32).cuts[0].keep([576]) >= 1


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"retained": -1.0}, ValueError, "polymorphic: retained must be at least 0 and finite, got -1.0"),
        ({"merged": math.inf}, ValueError, "polymorphic: merged must be at least 0 and finite, got inf"),
        ({"merged": "one"}, TypeError, "polymorphic: merged must be a float, got str"),
        ({"retained": 0.0, "merged": 0.0}, ValueError, "polymorphic: retained or merged must be above 0, got 0 and 0"),
        ({"factor": 0.5}, ValueError, "polymorphic: factor must be at least 1 and finite, got 0.5"),
        ({"factor": math.nan}, ValueError, "polymorphic: factor must be at least 1 and finite, got nan"),
        ({"density_neighbors": 0}, ValueError, "polymorphic: density_neighbors must be at least 1, got 0"),
        ({"llm_only": 1}, TypeError, "polymorphic: llm_only must be True or False, got int"),
    ],
)
def test_bad_options(options, error, match):
    with pytest.raises(error, match=match):
        methods.create("polymorphic", **options)


# --- tokens ---


def by_hand(x, scores, retained, clusters, neighbors):
    """Picks, the slot of each token, and the smallest margin of any decision."""
    picks = best_first(scores, retained)
    others = [i for i in range(len(x)) if i not in picks]
    slots = {pick: slot for slot, pick in enumerate(picks)}
    if not clusters:
        return picks, [slots.get(i, -1) for i in range(len(x))], math.inf
    centers, belongs, margin = clusters_of(x[others], clusters, min(neighbors, len(others)))
    slots |= {i: retained + own for i, own in zip(others, belongs, strict=True)}
    return picks + [others[i] for i in centers], [slots[i] for i in range(len(x))], margin


@pytest.mark.parametrize(("retained", "merged"), [(5.4, 1.0), (1.0, 1.0), (0.0, 1.0), (1.0, 0.0)])
@pytest.mark.parametrize("neighbors", [None, 5])
def test_both_stages_by_hand(retained, merged, neighbors, device):
    """Picks, slots and means for random prompts."""
    method = methods.create("polymorphic", retained=retained, merged=merged, density_neighbors=neighbors)
    compared = 0
    for seed in range(12):
        rng, k = torch.Generator().manual_seed(seed), (1, 7, 20, 33)[seed % 4]
        x, text = torch.randn(1, 40, 16, generator=rng), torch.randn(1, 6, 16, generator=rng)
        own, mask = method.split(k), torch.tensor([[False, True, True, True, True, False]])
        aligned = (x[0].double() @ text[0, 1:5].double().T / 4).softmax(1)
        above = aligned.mean(0) > 0.25
        scores = torch.rand(1, 40, generator=rng)
        stages = (
            (scores[0].tolist(), method.select(k=k, features=x.to(device), scores=scores.to(device))),
            (
                aligned[:, above].mean(1).tolist(),
                method.select_inside(Inside(k, 0, x.to(device), text.to(device), mask.to(device))),
            ),
        )
        for score, picked in stages:
            order, slots, margin = by_hand(x[0], score, own, k - own, neighbors or k - own)
            if margin < 1e-4:
                continue
            compared += 1
            assert picked.order[0].tolist() == order
            assert picked.assignment[0].tolist() == slots
            rows = methods.merge(x.to(device), picked)[0].cpu()
            for slot in range(k):
                members = [i for i, where in enumerate(slots) if where == slot]
                torch.testing.assert_close(rows[slot], x[0, members].double().mean(0).float(), rtol=1e-6, atol=1e-7)
    assert compared > 8


def test_an_item_of_fewer_tokens_is_split_as_its_own(device):
    """Padded: an item of n < k tokens keeps them all, split as if k were n."""
    rng, counts = torch.Generator().manual_seed(7), [40, 25, 20, 6, 1, 0]
    x, scores = torch.randn(6, 40, 8, generator=rng).to(device), torch.rand(6, 40, generator=rng).to(device)
    method = methods.create("polymorphic", retained=1.0)
    picked = method.select(k=21, features=x, scores=scores, num_tokens=torch.tensor(counts, device=device))
    for item, count in enumerate(counts):
        k = min(21, count)
        assert (picked.order[item, k:] == -1).all()
        if count:
            own = method.select(k=k, features=x[[item], :count], scores=scores[[item], :count])
            assert torch.equal(picked.order[item, :k], own.order[0])
            assert torch.equal(picked.assignment[item, :count], own.assignment[0])
        if 0 < count <= 21:
            assert sorted(picked.order[item, :k].tolist()) == list(range(count))


def test_tokens_that_are_no_numbers_are_merged_into_nothing(device):
    rng = torch.Generator().manual_seed(2)
    x, text = torch.randn(1, 30, 8, generator=rng).to(device), torch.randn(1, 4, 8, generator=rng).to(device)
    scores, mask = torch.rand(1, 30, generator=rng).to(device), torch.ones(1, 4, dtype=torch.bool, device=device)
    x[0, 3], x[0, 8, 2], text[0, 1] = math.nan, math.inf, math.nan
    method = methods.create("polymorphic", retained=1.0)
    for picked in (
        method.select(k=12, features=x, scores=scores),
        method.select_inside(Inside(12, 0, x, text, mask)),
    ):
        assert not torch.isin(picked.order.cpu(), torch.tensor([3, 8])).any()
        assert (picked.assignment[0, [3, 8]] == -1).all()
        assert methods.merge(x, picked).isfinite().all()


def test_a_prompt_does_not_depend_on_its_batch(device):
    rng, method = torch.Generator().manual_seed(5), methods.create("polymorphic")
    x, text = torch.randn(4, 50, 16, generator=rng).to(device), torch.randn(4, 9, 16, generator=rng).to(device)
    mask = torch.arange(9, device=device) >= torch.tensor([0, 4, 2, 8], device=device)[:, None]
    together = method.select_inside(Inside(30, 0, x, text, mask))
    rows = methods.merge(x, together)
    for row in range(4):
        words = text[[row]][:, mask[row]]
        own = method.select_inside(Inside(30, 0, x[[row]], words, torch.ones_like(words[..., 0], dtype=torch.bool)))
        assert torch.equal(own.order[0], together.order[row])
        assert torch.equal(own.assignment[0], together.assignment[row])
        assert torch.equal(methods.merge(x[[row]], own)[0], rows[row])
