"""Cuts with their own selection: nothing is read back, 16 bits and autocast work, rows go to the right columns."""

import contextlib
import functools
import itertools

import pytest
import torch

from sts_kernels import _checks, methods
from sts_kernels.integrations.transformers import cut_selection, layer_pruning, masks, prune
from sts_kernels.methods import Cut, Selection

from . import models
from .test_attention import Readbacks

FAMILIES = tuple(f for f in models.FAMILIES if f != "qwen3_vl")  # its own layers look up their deepstack features
# options with which every cut drops something
METHODS = {
    "dart": {"layers": [2], "ratios": [9]},
    "polymorphic": {"llm_only": True, "layers": [2, 4], "ratios": [9, 6]},
    "sparsevlm": {"layers": [2, 4], "ratios": [9, 5], "recycle": 0.5, "per_cluster": 4},
}


@contextlib.contextmanager
def while_inside(model, enter, leave):
    """Calls `enter` before the LLM's second layer and `leave` after its last."""
    layers = model.model.language_model.layers
    hooks = [
        layers[1].register_forward_pre_hook(lambda *_: enter()),
        layers[-1].register_forward_hook(lambda *_: leave()),
    ]
    try:
        yield
    finally:
        leave()
        for hook in hooks:
            hook.remove()


def batches(family: str):
    return [models.prompt_of(family, 1, seed=1)], [models.prompt_of(family, n, seed=n) for n in (1, 2, 0)]


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
def test_cuts_read_nothing_back(family, name, monkeypatch):
    """As on a GPU: the CPU's checks of values are off, and a stand-in replaces the reference of attention_received."""
    model = models.shared(family)
    monkeypatch.setattr(_checks, "values_readable", lambda value: False)
    monkeypatch.setattr(layer_pruning, "attention_received", lambda query, key, *rest: key.norm(dim=-1).mean(-1))
    for prompts in batches(family):
        inputs, found, seen = models.batch(model, prompts), [], Readbacks()
        note = functools.partial(_copy, seen.found, found)
        with prune(model, name, **METHODS[name]) as pruning, torch.no_grad():
            with seen, while_inside(model, seen.found.clear, note):
                model(**inputs)
            assert len(pruning.report.rows[0].kept) == len(METHODS[name]["layers"]) + 1
        assert found[0] == []


def _copy(source: list, target: list) -> None:
    target.append(list(source))


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
def test_cuts_do_not_sync(family, name, cuda):
    """Under CUDA's sync debug mode, the cuts do not synchronise."""
    model = models.shared(family, "sdpa", cuda)
    for prompts in batches(family):
        inputs = models.batch(model, prompts)
        with prune(model, name, **METHODS[name]), torch.no_grad():
            model(**inputs)
            torch.cuda.synchronize()
            mode = torch.cuda.set_sync_debug_mode
            with while_inside(model, functools.partial(mode, "error"), functools.partial(mode, "default")):
                model(**inputs)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("autocast", [False, True])
def test_16_bits_and_autocast(name, autocast, device):
    """A 16-bit model, and a model under autocast, keep the counts asked for and give finite logits."""
    dtype = torch.float32 if autocast else torch.bfloat16
    model = models.build("llava", "sdpa", device, dtype)
    inputs = models.batch(model, [models.prompt_of("llava", n, seed=n) for n in (1, 2)])
    with prune(model, name, **METHODS[name]) as pruning, torch.no_grad():
        with torch.autocast(model.device.type, torch.bfloat16, enabled=autocast):
            logits = model(**inputs).logits
        left = [row.kept[-1] for row in pruning.report.rows]
    assert logits[:, -1].isfinite().all()
    own = METHODS[name]["ratios"][-1]
    assert all(own * images <= n <= own * images + 3 for images, n in zip((1, 2), left, strict=True))


def test_kept_columns_by_place():
    keep = torch.tensor([[1, 1, 0, 1, 1, 1], [0, 1, 1, 0, 0, 1]]).bool()
    place = torch.tensor([[0, 40, 0, 30, 31, 50], [0, 10, 5, 0, 0, 20]])
    columns, kept = masks.compact(keep, 5, place=place)
    assert columns[0].tolist() == [0, 3, 4, 1, 5]
    assert columns[1, 2:].tolist() == [2, 1, 5]
    assert kept.tolist() == [[True] * 5, [False] * 2 + [True] * 3]
    columns, kept = masks.compact(keep, 6, trailing=2, place=place + 1000 * (torch.arange(6) > 3))
    assert columns[0].tolist()[1:] == [0, 3, 1, 4, 5]


class Run:
    """The attributes of a Prefill that a selection reads."""

    def __init__(self, text, scores=None):
        self.text, self.text_width, self.scores = text, int(text.sum(1).max()), scores


def test_rows_of_any_numbers(device):
    """A ragged batch: rows that keep all, lose all, or are equal. Recycled tokens follow the last kept token."""
    rng, width = torch.Generator().manual_seed(0), 20
    hidden = torch.randn(5, width, 6, generator=rng).to(device)
    candidates = torch.zeros(5, width, dtype=torch.bool, device=device)
    before, left, recycled = [8, 5, 8, 3, 0], [5, 5, 5, 0, 0], [2, 0, 2, 0, 0]
    for row, count in enumerate(before):
        candidates[row, 2 + row : 2 + row + count] = True
    text = (torch.arange(width, device=device) > 16).expand(5, -1)
    calls = []

    def select(inside):
        calls.append((inside.k, inside.recycled, tuple(inside.visual.shape), tuple(inside.text.shape)))
        order = torch.tensor([[4, 0, 6, 7, 1]], device=device).expand(len(inside.visual), -1)
        assignment = torch.full(inside.visual.shape[:2], -1, device=device).scatter(
            1, order, torch.arange(5, device=device).expand_as(order)
        )
        assignment[:, 2] = 3  # merged into the token 7, the first recycled one
        return Selection(order, assignment)

    planned = cut_selection.PlannedCut(Cut(3, len, "text", select=select), before, left, recycled, [])
    out, chosen, place = cut_selection.select(Run(text), planned, hidden, candidates, lambda x: x)
    assert calls == [(5, 2, (2, 8, 6), (2, 3, 6))]
    for row in range(5):
        start = 2 + row
        if row in (0, 2):
            assert chosen[row].nonzero()[:, 0].tolist() == [start + i for i in (0, 1, 4, 6, 7)]
            ranked = sorted(range(width), key=place[row].tolist().__getitem__)
            assert ranked.index(start + 7) == ranked.index(start + 6) + 1
            assert ranked.index(start + 1) == ranked.index(start + 6) + 2
            want = hidden[row].clone()
            want[start + 7] = (hidden[row, start + 7] + hidden[row, start + 2]) / 2
            torch.testing.assert_close(out[row], want)
        else:
            assert torch.equal(out[row], hidden[row])
            assert torch.equal(chosen[row], candidates[row] & bool(left[row]))
            assert all(a < b for a, b in itertools.pairwise(place[row].tolist()))


@pytest.mark.parametrize("name", METHODS)
def test_the_method_is_told_by_its_cuts(name):
    """A method's cuts say which input they need: the raters' attention, the norms of keys, or hidden states alone."""
    plan = methods.create(name).plan(methods.Budget(budget=0.5), 32)
    assert {cut.queries for cut in plan.cuts} == {{"dart": "keys", "polymorphic": "text", "sparsevlm": "raters"}[name]}
    assert all(cut.select is not None for cut in plan.cuts)
    assert all((cut.recycled is not None) == (name == "sparsevlm") for cut in plan.cuts)
