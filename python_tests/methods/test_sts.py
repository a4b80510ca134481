"""STS: a float64 reference's picks, the ops it runs on, its plan against STSConfig's, its ablations."""

import itertools

import pytest
import torch

from sts_kernels import STSConfig, methods, repulsion_select, repulsion_select_varlen
from sts_kernels.methods import Budget, sts

from . import recipe


@pytest.mark.parametrize("anchor", sts.ANCHORS)
@pytest.mark.parametrize("case", recipe.cases("sts"), ids=recipe.label)
def test_the_reference(case, anchor):
    rs = recipe.start(case)
    x, scores = recipe.tensors(case, recipe.features(case, rs), recipe.positive(rs, case["N"]))
    method = methods.create("sts", anchor=anchor)
    order = method.select(k=case["keep"], features=x[None], scores=scores[None]).order[0]
    assert order.tolist() == case[f"sts_{anchor}"]
    packed = method.select_packed([case["N"]], [case["keep"]], features=x, scores=scores)
    assert packed.order.tolist() == case[f"sts_{anchor}"]


@pytest.fixture
def calls(monkeypatch):
    """Names of the ops that are called, in order."""
    called = []
    for op in (repulsion_select, repulsion_select_varlen):

        def record(*args, op=op, **options):
            called.append(op.__name__)
            return op(*args, **options)

        monkeypatch.setattr(sts, op.__name__, record)
    return called


@pytest.mark.parametrize("anchor", sts.ANCHORS)
def test_one_launch_for_all_items(calls, device, anchor):
    rng = torch.Generator().manual_seed(0)
    x, scores = torch.randn(60, 8, generator=rng).to(device), torch.rand(60, generator=rng).to(device)
    method = methods.create("sts", anchor=anchor, eps=100.0)
    anchors = {"mean": lambda lengths: None, "first": lambda lengths: [0] * len(lengths)}
    anchors["saliency"] = lambda lengths: [int(part.argmax()) if len(part) else 0 for part in scores.split(lengths)]
    for lengths, budgets in (([20, 20, 20], [7, 7, 7]), ([20, 20, 20], [7, 7, 6]), ([33, 0, 27], [5, 0, 27])):
        first = anchors[anchor](lengths)
        first = None if first is None else torch.tensor(first, device=device)
        order = method.select_packed(lengths, budgets, features=x, scores=scores).order
        cu = [torch.tensor([0, *itertools.accumulate(v)], dtype=torch.int32, device=device) for v in (lengths, budgets)]
        assert torch.equal(order, repulsion_select_varlen(x, *cu, sum(budgets), 100.0, first))
        if len({*lengths}) == len({*budgets}) == 1:
            batched = repulsion_select(x.unflatten(0, (3, 20)), 7, 100.0, first)
            assert torch.equal(order, batched.flatten())
            padded = method.select(k=7, features=x.unflatten(0, (3, 20)), scores=scores.unflatten(0, (3, 20)))
            assert torch.equal(order, padded.order.flatten())
            default = methods.create("sts", anchor=anchor).select_packed(lengths, budgets, features=x, scores=scores)
            assert not torch.equal(order, default.order)
            calls[:] = ["repulsion_select"]
    assert calls == ["repulsion_select", "repulsion_select_varlen", "repulsion_select_varlen"]
    assert method.select_packed([3], [0], features=x[:3], scores=scores[:3]).order.shape == (0,)


CONFIGS = [
    {"budget": 128},
    {"budget": 0.1, "rho": 0.2},
    {"budget": 128, "prune_layer": 3},
    {"budget": 1.0},
    {"budget": 64, "rho": 1.0},
    {"keep": 100},
    {"keep": 0.5, "keep_after": 0.1, "prune_layer": 2},
    {"keep": 192, "keep_after": 64},
    {"keep": 100, "keep_after": 1.0},
    {"keep_after": 64, "prune_layer": 2},
]


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_its_plan_is_that_of_the_configuration(config):
    config = STSConfig(**config)
    method, budget = sts.STS.of(config)
    for layers, default in ((32, 16), (28, 14), (6, None)):
        want, got = config.plan(layers, default), method.plan(budget, layers, default)
        for images in ([576], [1], [576, 40], [2880, 7, 36], []):
            kept = [want.keep(tokens) for tokens in images]
            assert [got.keep(tokens) for tokens in images] == kept
            after = want.keep_after(images)
            assert [cut.keep(images) for cut in got.cuts] in ([after], [])
            assert got.cuts or sum(kept) == after
            assert got.average(images) == pytest.approx(want.average(sum(kept), after))
        assert all(cut.layer == want.prune_layer for cut in got.cuts)


def test_ablations():
    stage1 = methods.create("sts", rho=1.0).plan(Budget(budget=128), 32, 16)
    assert (stage1.keep(576), stage1.cuts, stage1.average([576])) == (128, (), 128)
    stage2 = methods.create("sts", llm_only=True).plan(Budget(budget=320), 32, 16)
    assert (stage2.keep(576), stage2.cuts[0].layer, stage2.cuts[0].keep([576])) == (576, 16, 64)
    assert stage2.average([576]) == 320
    with pytest.raises(ValueError, match="sts: budget must be at least 289 of an image's 576 tokens, 16 of 32 layers"):
        methods.create("sts", llm_only=True).plan(Budget(budget=128), 32, 16).cuts[0].keep([576])


def test_a_set_of_prune_layers():
    """Algorithm 1, line 12: no cut leaves more tokens than the cut before."""
    plan = methods.create("sts").plan(Budget(keep=0.5, layers=[8, 16, 24], ratios=[0.25, 100, 200]), 32, 16)
    assert (plan.keep(576), [(c.layer, c.keep([576])) for c in plan.cuts]) == (288, [(8, 144), (16, 100), (24, 100)])
    assert plan.average([576]) == (288 + 144 + 100 + 100) / 4
    plan = methods.create("sts").plan(Budget(layers=[8], ratios=[0]), 32)
    assert (plan.keep(576), plan.cuts[0].keep([576]), plan.average([576])) == (576, 0, 144)
    plan = methods.create("sts").plan(Budget(budget=128, layers=[8]), 32, 16)
    assert [c.layer for c in plan.cuts] == [8]
    assert abs(plan.average([576]) - 128) < 0.5


@pytest.mark.parametrize(
    ("options", "budget", "match"),
    [
        ({}, Budget(), "sts: give budget or keep, for example budget=128"),
        ({"llm_only": True}, Budget(), "sts: give budget or layers and ratios"),
        ({"llm_only": True}, Budget(keep=5), "sts: keep must be left out with llm_only"),
        ({}, Budget(budget=8, layers=[2, 4]), "sts: layers must come with ratios"),
        ({}, Budget(keep=8, ratios=[0.5, 0.1]), "sts: ratios must have one number without layers, got 2"),
        ({"keep_after": 9}, Budget(budget=8), "sts: give either budget, or keep and keep_after"),
        ({"keep_after": 9}, Budget(ratios=[0.1]), "sts: give either ratios or keep_after"),
        ({"prune_layer": 32}, Budget(budget=8), "sts: prune_layer must be at most 31, the LLM has 32 layers, got 32"),
    ],
)
def test_refusals(options, budget, match):
    with pytest.raises(ValueError, match=match):
        methods.create("sts", **options).plan(budget, 32)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"rho": 0}, ValueError, "sts: rho must be above 0"),
        ({"eps": "small"}, TypeError, "sts: eps must be a float"),
        ({"anchor": "best"}, ValueError, "sts: anchor must be one of mean, first, saliency"),
        ({"prune_layer": 0}, ValueError, "sts: prune_layer must be at least 1"),
        ({"keep_after": 1.5}, ValueError, "sts: keep_after as a share"),
        ({"llm_only": 1}, TypeError, "sts: llm_only must be True or False"),
    ],
)
def test_bad_options(options, error, match):
    with pytest.raises(error, match=match):
        methods.create("sts", **options)


def test_signals_follow_the_anchor():
    assert methods.create("sts").signals == {"features"}
    assert methods.create("sts", anchor="saliency").signals == {"features", "attention"}
    with pytest.raises(ValueError, match=r"sts: scores must be a tensor of shape \(B, N\), got None"):
        methods.create("sts", anchor="saliency").select(k=1, features=torch.ones(1, 2, 3))
    scores = torch.tensor([[0.1, torch.nan, 0.7, torch.inf]])
    order = methods.create("sts", anchor="saliency").select(k=1, features=torch.ones(1, 4, 3), scores=scores).order
    assert order.tolist() == [[2]]
