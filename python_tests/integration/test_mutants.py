"""Mutation tests: the comparison with the oracle must catch each of these mistakes."""

import contextlib
import importlib
import inspect
import types

import pytest
import torch

from sts_kernels import STSConfig
from sts_kernels.integrations.transformers import (
    apply_sts,
    cache,
    cut_selection,
    dropped,
    layer_pruning,
    masks,
    prompt,
    vision_pruning,
    visual_item,
)
from sts_kernels.integrations.transformers.adapters import llava_next
from sts_kernels.methods import base, sts

from . import flash, models
from .models import CACHE, output_cache
from .oracle import expect

BUDGET, KEEP, AFTER, LAYER = 7, 10, 4, 3  # 7 = (3 * 10 + 3 * 4) / 6 with rho = 0.4
CONFIG = STSConfig(budget=BUDGET, rho=0.4, prune_layer=LAYER)
ANSWER = [5, 17]


@contextlib.contextmanager
def mutated(module: types.ModuleType, old: str, new: str):
    """Runs with `old` replaced in the module's source. Objects keep their identity; their code changes."""
    source = inspect.getsource(module)
    assert source.count(old) >= 1, f"{module.__name__} has no {old!r} any more: write this mutant anew"
    twin = types.ModuleType(module.__name__)
    twin.__dict__.update(__package__=module.__package__, __file__=module.__file__)
    exec(compile(source.replace(old, new), module.__file__, "exec"), twin.__dict__)
    undo = []
    for name, value in list(vars(module).items()):
        if getattr(value, "__module__", None) != module.__name__:
            continue
        fresh = getattr(twin, name)
        if inspect.isfunction(value):
            undo.append((value, "__code__", value.__code__))
            value.__code__ = fresh.__code__
        elif inspect.isclass(value):
            for attribute, method in vars(value).items():
                method = getattr(method, "__func__", method)
                method = method.fget if isinstance(method, property) else method
                if inspect.isfunction(method) and method.__code__.co_filename == module.__file__:
                    other = vars(fresh)[attribute]
                    other = getattr(other, "__func__", other)
                    other = other.fget if isinstance(other, property) else other
                    undo.append((method, "__code__", method.__code__))
                    method.__code__ = other.__code__
    try:
        yield
    finally:
        for target, attribute, value in undo:
            setattr(target, attribute, value)


def prompts_of(family: str) -> list[models.Prompt]:
    return [models.prompt_of(family, 1, seed=1), models.prompt_of(family, 2, seed=2, before=7)]


def forced(model, prompts: list[models.Prompt]) -> torch.Tensor:
    """Teacher-forced logits (B, steps, V): after the prompt and each token of ANSWER but the last. Left padding."""
    logits, seen = [], []
    inputs = models.batch(model, prompts)
    mask = inputs["attention_mask"]
    if "image_grid_thw" not in inputs:
        inputs["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    hook = model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs.get("position_ids")), with_kwargs=True
    )
    with apply_sts(model, CONFIG), torch.no_grad():
        try:
            out = model(**inputs, use_cache=True)
        finally:
            hook.remove()
        logits.append(out.logits[:, -1])
        for index, token in enumerate(ANSWER[:-1]):
            mask = torch.cat([mask, mask.new_ones(len(prompts), 1)], dim=1)
            step = {"input_ids": torch.full((len(prompts), 1), token), "attention_mask": mask}
            step["position_ids"] = seen[0][..., -1:] + 1 + index
            out = model(**step, **{CACHE: output_cache(out)}, use_cache=True)
            logits.append(out.logits[:, -1])
    return torch.stack(logits, dim=1)


EXPECTED: dict[str, list[torch.Tensor]] = {}


def disagreement(family: str, model=None) -> float:
    """Largest difference to the oracle, relative to the largest logit."""
    model = model or models.shared(family)
    prompts = prompts_of(family)
    if family not in EXPECTED:
        # K' of a row is the sum over its images.
        EXPECTED[family] = [expect(model, p, ANSWER, KEEP, AFTER * len(p.images), LAYER).logits for p in prompts]
    actual = forced(model, prompts)
    return max(
        ((a.double() - e).abs().max() / e.abs().max()).nan_to_num(torch.inf).item()
        for a, e in zip(actual, EXPECTED[family], strict=True)
    )


# name: family, module, source text, mutated text
MUTANTS = {
    "wrong query token": ("llava", layer_pruning, "key.shape[2] - run.trailing", "key.shape[2] - run.trailing - 1"),
    "acausal scores": ("llava", layer_pruning, "seen = slots &", "seen = ~slots |"),
    "scores over visual tokens only": ("llava", layer_pruning, "seen = slots &", "seen = run.candidates &"),
    "contiguous positions after stage 1": (
        "llava",
        masks,
        "positions.gather(-1, columns.expand(positions.shape[:-1] + columns.shape[-1:]))",
        "positions[..., : columns.shape[-1]]",
    ),
    "contiguous positions of mrope": (
        "qwen2_5_vl",
        masks,
        "positions.gather(-1, columns.expand(positions.shape[:-1] + columns.shape[-1:]))",
        "positions[..., : columns.shape[-1]]",
    ),
    "rotary tables not gathered": (
        "llava",
        masks,
        "take(table.expand(columns.shape[0], -1, -1), columns)",
        "table[:, : columns.shape[1]]",
    ),
    "mask of stage 1 after stage 2": (
        "llava",
        layer_pruning,
        "mask = run.masks[segment]",
        "mask = run.masks[0]",
    ),
    "stale mask while decoding": (
        "llava",
        layer_pruning,
        "segment.length + behind, like",
        "segment.length + behind - 1, like",  # of the step before
    ),
    "pads not masked while decoding": ("llava", layer_pruning, "valid = _joined(", "valid = None and _joined("),
    "pads not masked in the prompt": ("llava", layer_pruning, "None if all(length", "None if True or all(length"),
    "pads not zeroed": ("llava", layer_pruning, ".masked_fill(~slots[..., None], 0)", ""),
    "scores of an earlier layer": ("llava", base, "else self.layer - 1", "else self.layer - 2"),
    "cut one layer early": (
        "llava",
        layer_pruning,
        "index == run.cuts[made].cut.layer",
        "index == run.cuts[made].cut.layer - 1",
    ),
    "cut one layer late": (
        "llava",
        layer_pruning,
        "index == run.cuts[made].cut.layer",
        "index == run.cuts[made].cut.layer + 1",
    ),
    "one token too many before": ("llava", sts, "round_half_up(budget", "1 + round_half_up(budget"),
    "one token too few after": ("llava", sts, "round_half_up(left)", "round_half_up(left) - 1"),
    "budget of one image for all": (
        "llava",
        sts,
        "sum(map(self._share_after, images, kept))",
        "kept[0] * 4 // 10",
    ),
    "least important tokens": ("llava", cut_selection, "best_of(scores, candidates", "best_of(-scores, candidates"),
    "images of a batch as one": ("llava", vision_pruning, "pool + start for pool", "pool for pool"),
    "rows restored in order": (
        "qwen2_5_vl",
        dropped,
        "full[rows.to(full.device)] = projected",
        "full[: len(rows)] = projected",
    ),
    "first token as anchor": (
        "llava",
        sts,
        'if self.anchor == "mean":\n            return None\n        if self.anchor == "first":',
        'if self.anchor == "first":\n            return None\n        if self.anchor == "mean":',
    ),
    "newlines pruned by stage 2": ("llava_next", prompt, "item.feature_of_token < 0", "item.feature_of_token < -1"),
    "tokens lost to unpadding": ("llava_next", llava_next, "packed[0][:, 0].long())", "None)"),
    "interpolated half a row off": ("llava_onevision", visual_item, "size / to - 0.5", "size / to"),
    "features of all images as one": ("llava_onevision", dropped, "(feature + start)", "feature"),
    "deepstack not shrunk": (
        "qwen3_vl",
        layer_pruning,
        "where.gather(1, columns.to(where.device))",
        "where[:, -columns.shape[1] :]",
    ),
}


@pytest.mark.parametrize("family", sorted({family for family, *_ in MUTANTS.values()}))
def test_without_a_mutation_it_agrees(family):
    assert disagreement(family) < 2e-5


@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_is_caught(name):
    family, module, old, new = MUTANTS[name]
    disagreement(family)  # the oracle's answer comes from code without the mistake
    with mutated(module, old, new):
        try:
            found = disagreement(family)
        except (AssertionError, AttributeError, IndexError, RuntimeError, ValueError):
            found = float("inf")  # an error is not silently wrong
    assert found > 1e-3, f"nobody noticed: {found:.1e}"
    assert disagreement(family) < 2e-5, "the mutation stayed"


def test_positions_given_to_flash_attention_are_caught():
    """FlashAttention takes gaps in the positions of a single prompt for packed sequences."""
    model = flash.use(models.build("llava"))
    row = [models.prompt_of("llava", 1, seed=1)]
    with mutated(layer_pruning, "dict(kwargs, position_ids=None)", "dict(kwargs)"), flash.counting() as packed:
        with apply_sts(model, STSConfig(keep=KEEP, keep_after=1.0)):
            models.generate(model, row, 1)
        assert packed() > 0


def test_a_cache_that_tells_its_physical_length_is_caught():
    """generate() slices the next turn's ids by the cache's length."""
    model, row = models.shared("llava"), models.prompt_of("llava", 1, seed=1)

    def second_turn() -> torch.Tensor:
        with apply_sts(model, CONFIG):
            first = models.generate(model, [row])
            talk = models.Prompt([*first.sequences[0].tolist(), 5, 6])
            return models.logits_of(models.generate(model, [talk], **{CACHE: output_cache(first)}))

    right = second_turn()
    with mutated(cache, "length + self._sts_prompt.hidden if length else 0", "length"):
        try:
            assert (second_turn() - right).abs().max() > 1e-2
        except (RuntimeError, ValueError) as error:  # not silently wrong
            assert "must match" in str(error) or "must cover" in str(error)  # noqa: PT017


def test_the_mutation_tool_reaches_the_code():
    assert importlib.import_module(layer_pruning.__name__) is layer_pruning
    with mutated(masks, "return columns, keep.gather(1, columns)", "return columns, None"):
        assert masks.compact(torch.ones(1, 2, dtype=torch.bool), 2)[1] is None
    assert masks.compact(torch.ones(1, 2, dtype=torch.bool), 2)[1] is not None
