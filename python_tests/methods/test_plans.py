"""Every method's description, and its plan for a budget. A new method is tested by its name alone."""

import pickle

import numpy as np
import pytest
import torch

from sts_kernels import methods
from sts_kernels.methods import Budget

from .contract import ARGUMENTS, NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_plan_is_a_pure_function_of_numbers(name):
    method = methods.create(name)
    for layers, default in ((32, 16), (28, 14), (6, 16), (40, None)):
        for budget in (0.5, 0.75, 1.0, 400):
            plan = method.plan(Budget(budget=budget), layers, default)
            assert plan.layers == layers
            assert [cut.layer for cut in plan.cuts] == sorted({cut.layer for cut in plan.cuts})
            assert all(0 < cut.layer < layers for cut in plan.cuts)
            assert all(cut.queries in ("last", "raters", "keys", "text") for cut in plan.cuts)
            assert all(cut.score_from in ("layer", "next") for cut in plan.cuts)
            for images in ([576], [576, 600], [1000], []):
                kept = [plan.keep(tokens) for tokens in images]
                assert all(type(k) is int and 1 <= k <= tokens for k, tokens in zip(kept, images, strict=True))
                left = [sum(kept), *(cut.keep(images) for cut in plan.cuts)]
                assert left == sorted(left, reverse=True)
                assert all(type(k) is int for k in left)
                wanted = sum(min(n, budget) if isinstance(budget, int) else budget * n for n in images)
                assert abs(plan.average(images) - wanted) <= len(images)
                copied = pickle.loads(pickle.dumps(plan))
                assert copied.average(images) == plan.average(images)
            assert plan.keep(0) == 0


@pytest.mark.parametrize("name", NAMES)
def test_numbers_of_numpy(name):
    method = methods.create(name)
    given = Budget(np.int64(400)), Budget(np.float32(0.5))
    assert [type(budget.budget) for budget in given] == [int, float]
    for budget, same in zip(given, (Budget(400), Budget(0.5)), strict=True):
        assert method.plan(budget, 32).average([576]) == method.plan(same, 32).average([576])
    staged = Budget(layers=[np.int64(4), 9], ratios=(np.int32(96), np.float32(0.25)))
    assert (staged.layers, staged.ratios) == ([4, 9], (96, 0.25))
    assert [type(ratio) for ratio in staged.ratios] == [int, float]


@pytest.mark.parametrize("name", NAMES)
def test_bad_budgets(name):
    method = methods.create(name)
    for budget, error, match in (
        (Budget(budget=0), ValueError, f"{name}: budget must be at least 1 token, got 0"),
        (Budget(budget=1.5), ValueError, f"{name}: budget as a share must be above 0 and at most 1.0, got 1.5"),
        (Budget(budget=np.int64(0)), ValueError, f"{name}: budget must be at least 1 token, got 0"),
        (Budget(budget=np.True_), TypeError, f"{name}: budget must be a number of tokens"),
        (Budget(budget="few"), TypeError, f"{name}: budget must be a number of tokens .*, got 'few'"),
        (128, TypeError, f"{name}: budget must be a Budget, got int"),
    ):
        with pytest.raises(error, match=match):
            method.plan(budget, 32)
    for option, value, error in (
        ("keep", True, TypeError),
        ("layers", 5, TypeError),
        ("layers", [0], ValueError),
        ("layers", [], ValueError),
        ("layers", [5, 5], ValueError),
        ("layers", [32], ValueError),
        ("ratios", [2.0], ValueError),
        ("ratios", "half", TypeError),
        ("ratios", [None], TypeError),
        ("ratios", [], ValueError),
    ):
        refused = error if option in method.takes else ValueError
        with pytest.raises(refused, match=f"{name}: {option} "):
            method.plan(Budget(**{option: value}), 32)


@pytest.mark.parametrize("name", NAMES)
def test_it_describes_itself(name):
    about, method = methods.describe(name), methods.create(name)
    assert about["name"] == method.name == name
    paper = about["paper"]
    assert ", arXiv " in paper or paper.endswith(", ICLR 2026 submission") or paper == "none"  # no arXiv number
    assert about["site"] in ("encoder", "projected", None)
    assert set(about["signals"]) <= set(ARGUMENTS)
    assert (about["scope"] in ("image", "crop"), about["positions"] in ("original", "contiguous")) == (True, True)
    assert method.options() == {option: entry["default"] for option, entry in about["options"].items()}
    assert all(entry["doc"] for entry in about["options"].values())
    assert about["site"] or about["cuts"]  # it prunes somewhere
    assert type(method).__doc__
    with pytest.raises(AttributeError):
        method.name = "other"
    assert pickle.loads(pickle.dumps(method)) == method


@pytest.mark.parametrize("name", NAMES)
def test_unknown_options(name):
    with pytest.raises(TypeError, match=f"{name}: temperature is not an option of this method, it takes "):
        methods.create(name, temperature=1)


@pytest.mark.parametrize("name", NAMES)
def test_values_that_no_option_takes(name):
    """They raise where the method is created, not at the first prompt."""
    for option in methods.create(name).options():
        for value in (object(), "anything", [8]):
            with pytest.raises((TypeError, ValueError), match=f"{name}: {option} must be "):
                methods.create(name, **{option: value})


def test_unknown_names():
    with pytest.raises(ValueError, match=f"methods: name must be one of {', '.join(NAMES)}, got 'magic'"):
        methods.create("magic")
    with pytest.raises(ValueError, match="methods: name must be one of"):
        methods.create("base")
    with pytest.raises(TypeError, match="methods: name must be a str, got int"):
        methods.describe(3)


def test_a_file_is_a_method(tmp_path, monkeypatch):
    (tmp_path / "newest.py").write_text(
        "from dataclasses import dataclass\n"
        "from sts_kernels.methods.base import Method\n"
        "@dataclass(frozen=True)\n"
        "class Newest(Method):\n"
        "    name = 'newest'\n"
    )
    (tmp_path / "_helper.py").write_text("")
    monkeypatch.setattr(methods, "__path__", [*methods.__path__, str(tmp_path)])
    assert methods.names() == sorted([*NAMES, "newest"])
    assert type(methods.create("newest")).__name__ == "Newest"
    with pytest.raises(NotImplementedError, match="newest: a method with a site writes"):
        methods.create("newest").select(k=1, features=torch.zeros(1, 2, 3))


def test_raters_are_refused_where_no_cut_asks_for_them():
    with pytest.raises(NotImplementedError, match="fastv: no cut of this method asks for raters"):
        methods.create("fastv").raters(torch.zeros(1, 2, 3), torch.zeros(1, 2, 3))


@pytest.mark.parametrize("prune_layer", [2, 3])
@pytest.mark.parametrize("name", ["dart", "fastv", "sts"])
def test_one_name_for_the_layer(name, prune_layer):
    method = methods.create(name, prune_layer=prune_layer)
    with pytest.raises(ValueError, match=f"{name}: give either prune_layer or layers"):
        method.plan(methods.Budget(layers=[5], ratios=[0.5]), 32)
