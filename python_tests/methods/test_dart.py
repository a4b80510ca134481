"""DART: vectors of the official code, its rule in float64, exact counts, its budget."""

import pytest
import torch

from sts_kernels import methods
from sts_kernels.methods import Budget, _cosine, dart
from sts_kernels.methods.base import Inside

from . import recipe


def by_hand(state, text_state, norms, text_norms, k, pivots=(4, 4)):
    """The exact variant, one token at a time: indices of kept visual tokens, in pick order."""
    rank = lambda values, n: sorted(range(len(values)), key=lambda i: (-values[i], i))[:n]  # noqa: E731
    chosen = rank(norms.tolist(), min(pivots[0], k))
    acting = [state[i] for i in sorted(chosen)] + [text_state[i] for i in sorted(rank(text_norms.tolist(), pivots[1]))]
    left, missing = [i for i in range(len(state)) if i not in chosen], k - len(chosen)
    for n, pivot in enumerate(acting):
        alike = torch.nn.functional.cosine_similarity(state.double(), pivot.double()[None])
        for _ in range(missing // len(acting) + (n < missing % len(acting))):
            least = min(left, key=lambda i: (float(alike[i]), i))
            left.remove(least)
            chosen.append(least)
    return chosen


@pytest.mark.parametrize("case", recipe.cases("dart"), ids=recipe.label)
def test_the_official_code(case, device):
    """Picks with the official counts and pivot orders, and picks of the variant that keeps exactly k tokens."""
    (start, stop), rs = case["visual"], recipe.start(case)
    length = stop + case["text"]
    state = recipe.normal(rs, 1, length, case["D"])
    keys = recipe.normal(rs, 1, case["kv_heads"], length, case["head_dim"])
    state, keys = (x.to(device) for x in recipe.tensors(case, state, keys))
    norms = keys.abs().sum((1, 3))
    visual, text = state[:, start:stop], state[:, stop:]
    exact = Inside(
        k=len(case["kept_exact"]),
        recycled=0,
        visual=visual,
        text=text,
        text_mask=torch.ones_like(text[..., 0], dtype=torch.bool),
        scores=norms[:, start:stop],
        text_scores=norms[:, stop:],
    )
    method = methods.create("dart", pivots_image=case["pivots"][0], pivots_text=case["pivots"][1])
    order = method.select_inside(exact).order[0].cpu()
    assert sorted(order.tolist()) == case["kept_exact"]
    assert order.tolist() == by_hand(visual[0].cpu(), text[0].cpu(), norms[0, start:stop], norms[0, stop:], len(order))
    unit, share = _cosine.unit(state), int(case["wanted"] // 8)
    chosen = norms[:, start:stop].topk(case["pivots"][0]).indices
    for pivots, kept in (
        (case["pivot_order"], case["kept"]),
        (sorted(case["pivot_order"]), case["kept_ascending_pivots"]),
    ):
        rows = unit[:, torch.tensor(pivots, device=device)]
        shares = torch.full((1, len(pivots)), share, device=device)
        got = dart.least_alike(unit[:, start:stop], rows, chosen, shares, len(kept))
        assert sorted(got[0].tolist()) == kept


def inside(prompts=3, visual=30, text=7, k=11, seed=0, **extra):
    rng = torch.Generator().manual_seed(seed)
    given = {
        "k": k,
        "recycled": 0,
        "visual": torch.randn(prompts, visual, 16, generator=rng),
        "text": torch.randn(prompts, text, 16, generator=rng),
        "text_mask": torch.ones(prompts, text, dtype=torch.bool),
        "scores": torch.rand(prompts, visual, generator=rng),
        "text_scores": torch.rand(prompts, text, generator=rng),
    }
    return Inside(**{**given, **extra})


@pytest.mark.parametrize(("image", "text"), [(4, 4), (0, 4), (4, 0), (9, 2), (1, 20)])
@pytest.mark.parametrize("k", [1, 3, 11, 29])
def test_exactly_k_whatever_the_pivots(image, text, k):
    method, seen = methods.create("dart", pivots_image=image, pivots_text=text), inside(k=k)
    order = method.select_inside(seen).order
    assert order.shape == (3, k)
    for row in range(3):
        want = by_hand(seen.visual[row], seen.text[row], seen.scores[row], seen.text_scores[row], k, (image, text))
        assert order[row].tolist() == want


def test_padding_is_no_pivot_and_a_batch_changes_nothing():
    method, seen = methods.create("dart"), inside()
    counts = [7, 2, 4]
    mask = torch.arange(7) >= 7 - torch.tensor(counts)[:, None]  # padded on the left
    padded = inside(text_mask=mask)
    for row, count in enumerate(counts):
        want = by_hand(
            seen.visual[row], seen.text[row, 7 - count :], seen.scores[row], seen.text_scores[row, 7 - count :], 11
        )
        assert method.select_inside(padded).order[row].tolist() == want
        own = Inside(
            11,
            0,
            *(getattr(padded, n)[row : row + 1] for n in ("visual", "text", "text_mask", "scores", "text_scores")),
        )
        assert method.select_inside(own).order[0].tolist() == want


def test_the_final_norm_is_applied_to_what_is_compared():
    seen = inside()
    turned = inside(norm=lambda x: x * torch.linspace(-2, 3, 16))
    want = by_hand(turned.norm(seen.visual[0]), turned.norm(seen.text[0]), seen.scores[0], seen.text_scores[0], 11)
    assert methods.create("dart").select_inside(turned).order[0].tolist() == want
    assert not torch.equal(
        methods.create("dart").select_inside(turned).order, methods.create("dart").select_inside(seen).order
    )


def test_values_that_are_no_numbers_come_last():
    seen = inside()
    seen.visual[:, 3], seen.scores[:, 3], seen.visual[:, 5] = torch.nan, torch.nan, torch.inf
    seen.text_scores[:, 2] = torch.nan
    order = methods.create("dart").select_inside(
        inside(k=28, visual=30, **{n: getattr(seen, n) for n in ("scores", "text_scores")})
    )
    assert all(len(set(row)) == 28 for row in order.order.tolist())
    order = methods.create("dart").select_inside(Inside(**{**vars(seen), "k": 28})).order
    assert not torch.isin(order, torch.tensor([3, 5])).any()
    zero = Inside(**{**vars(seen), "visual": torch.zeros_like(seen.visual)})
    assert all(len(set(row)) == 11 for row in methods.create("dart").select_inside(zero).order.tolist())


def test_the_budget_is_the_average_over_the_layers():
    for tokens, budget in ((576, 192), (576, 64), (2880, 320)):
        plan = methods.create("dart").plan(Budget(budget=budget), 32)
        (cut,) = plan.cuts
        assert (cut.layer, cut.queries, cut.score_from, cut.recycled) == (2, "keys", "layer", None)
        assert abs(plan.average([tokens]) - budget) <= 0.5
    plan = methods.create("dart", prune_layer=5).plan(Budget(ratios=[0.222]), 32)
    assert (plan.cuts[0].layer, plan.cuts[0].keep([576])) == (5, 128)
    assert methods.create("dart").plan(Budget(), 32).cuts[0].keep([576]) == 288


@pytest.mark.parametrize(
    ("options", "budget", "match"),
    [
        ({}, Budget(budget=0.0625), r"dart: budget must be above 0.0625 of the tokens, 2 of 32 layers"),
        ({}, Budget(keep=64), "dart: keep is not an option of this method, give budget or layers or ratios"),
        ({}, Budget(layers=[2, 5]), r"dart: layers must name one layer, got \[2, 5\]"),
        ({"prune_layer": 3}, Budget(layers=[2], ratios=[0.5]), "dart: give either prune_layer or layers"),
        ({"prune_layer": 32}, Budget(), "dart: prune_layer must be at most 31, the LLM has 32 layers, got 32"),
    ],
)
def test_refusals(options, budget, match):
    with pytest.raises(ValueError, match=match):
        methods.create("dart", **options).plan(budget, 32)


def test_the_least_budget():
    with pytest.raises(ValueError, match="dart: budget must be at least 37 of an image's 576 tokens, 2 of 32 layers"):
        methods.create("dart").plan(Budget(budget=36), 32).cuts[0].keep([576])


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"pivots_image": -1}, ValueError, "dart: pivots_image must be at least 0, got -1"),
        ({"pivots_text": 1.5}, TypeError, "dart: pivots_text must be an int, got float"),
        ({"pivots_image": 0, "pivots_text": 0}, ValueError, "dart: pivots_image or pivots_text must be at least 1"),
        ({"ratio": 0.0}, ValueError, "dart: ratio must be above 0"),
        ({"prune_layer": 0}, ValueError, "dart: prune_layer must be at least 1"),
    ],
)
def test_bad_options(options, error, match):
    with pytest.raises(error, match=match):
        methods.create("dart", **options)
