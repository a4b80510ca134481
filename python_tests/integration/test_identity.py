"""Where nothing is to be pruned, outputs stay bit-equal; removing the handle restores the model."""

import functools

import pytest
import torch

from sts_kernels import STSConfig
from sts_kernels.integrations.transformers import ADAPTERS, apply_sts

from . import models

EVERYTHING = {
    "numbers": STSConfig(keep=10**6, keep_after=10**6),
    "shares": STSConfig(keep=1.0, keep_after=1.0),
    "budget": STSConfig(budget=1.0),
    "large_budget": STSConfig(budget=10**6),
}


def forward(model, prompts) -> torch.Tensor:
    with torch.no_grad():
        return model(**models.batch(model, prompts)).logits


@pytest.mark.parametrize("config", EVERYTHING)
@pytest.mark.parametrize("family", models.FAMILIES)
def test_full_budgets_are_bit_equal(family, config, device):
    model = models.shared(family, "sdpa" if config != "shares" else "eager", device)
    prompts = [models.prompt_of(family, 1, seed=1), models.prompt_of(family, 2, seed=2)]
    plain, plain_logits = models.generate(model, prompts), forward(model, prompts)
    with apply_sts(model, EVERYTHING[config]) as sts:
        same, same_logits = models.generate(model, prompts), forward(model, prompts)
        row = sts.report.rows[1]
    assert torch.equal(models.logits_of(plain), models.logits_of(same))
    assert torch.equal(plain.sequences, same.sequences)
    assert torch.equal(plain_logits, same_logits)
    assert row.tokens == row.after_stage1 == row.after_stage2 == row.average
    assert row.kv_mb[0] == row.kv_mb[1]


@pytest.mark.parametrize("family", models.FAMILIES)
def test_text_only_prompts_are_bit_equal(family, device):
    model = models.shared(family, "sdpa", device)
    prompts = [models.prompt_of(family, 0, seed=1), models.prompt_of(family, 0, seed=2, after=4)]
    plain = models.generate(model, prompts)
    with apply_sts(model, STSConfig(keep=6, keep_after=3)) as sts:
        same = models.generate(model, prompts)
        assert sts.report is None
    assert torch.equal(models.logits_of(plain), models.logits_of(same))


def footprint(model) -> dict:
    """Hook counts, attribute names and the config's identity of every module: possible traces of pruning."""
    tables = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs")
    out = {}
    for name, module in model.named_modules():
        hooks = tuple(len(getattr(module, table)) for table in (*tables, "_forward_hooks_always_called"))
        out[name] = (hooks, sorted(module.__dict__), id(module.__dict__.get("config")))
    return out


@pytest.mark.parametrize("family", models.FAMILIES)
def test_remove_restores_the_model(family):
    model = models.shared(family)
    prompts = [models.prompt_of(family, 1, seed=1)]
    plain = models.generate(model, prompts)  # the library installs hooks of its own on first use
    before = footprint(model)
    handle = apply_sts(model, STSConfig(keep=6, keep_after=3, anchor="saliency"))
    assert footprint(model) != before
    models.generate(model, prompts)
    handle.remove()
    handle.remove()
    assert footprint(model) == before
    assert torch.equal(models.logits_of(plain), models.logits_of(models.generate(model, prompts)))


@pytest.mark.parametrize("name", ["generate", "get_image_features"])
def test_another_override_survives(name):
    model = models.build("llava")
    target = model if name == "generate" else model.model
    original, calls = getattr(target, name), []

    @functools.wraps(original)
    def mine(*args, **kwargs):
        calls.append(name)
        return original(*args, **kwargs)

    setattr(target, name, mine)
    with apply_sts(model, STSConfig(keep=6)) as sts:
        models.generate(model, [models.prompt_of("llava", 1)])
        assert calls
        assert sts.report.rows[0].after_stage1 == 6
    assert getattr(target, name) is mine


def test_an_error_in_a_forward_leaves_nothing_behind():
    model = models.shared("llava")
    prompt = models.prompt_of("llava", 1, seed=1)
    with apply_sts(model, STSConfig(keep=8, keep_after=3, prune_layer=3)):
        good = models.logits_of(models.generate(model, [prompt]))
        before = footprint(model)
        broken = models.batch(model, [prompt])
        broken["input_ids"][0, 1] = models.IMAGE  # one placeholder too many
        with pytest.raises(ValueError, match="do not match"):
            model(**broken)

        def explode(module, args, kwargs):
            raise RuntimeError("boom")

        for layer in (2, 4):
            hook = model.model.language_model.layers[layer].self_attn.q_proj.register_forward_pre_hook(
                explode, with_kwargs=True
            )
            with pytest.raises(RuntimeError, match="boom"):
                models.generate(model, [prompt])
            hook.remove()
        assert footprint(model) == before
        assert torch.equal(models.logits_of(models.generate(model, [prompt])), good)


def test_default_layers():
    """Default prune layer: the paper's 16 for LLaVA models and 14 for Qwen2.5-VL.

    Half the layers for other families, and for LLMs too shallow for the paper's number.
    """
    of_32 = {family.name: STSConfig(budget=8).plan(32, family.prune_layer).prune_layer for family in ADAPTERS}
    assert of_32 == dict.fromkeys(
        (
            "LLaVA-1.5",
            "LLaVA-NeXT",
            "LLaVA-NeXT-Video",
            "LLaVA-OneVision",
            "Video-LLaVA",
            "Qwen2-VL",
            "Qwen3-VL",
            "InternVL",
        ),
        16,
    ) | {"Qwen2.5-VL": 14}
    of_40 = {family.name: STSConfig(budget=8).plan(40, family.prune_layer).prune_layer for family in ADAPTERS}
    assert {name for name, layer in of_40.items() if layer == 20} == {
        "Qwen2-VL",
        "Qwen3-VL",
        "InternVL",
        "LLaVA-OneVision",
    }
    with apply_sts(models.shared("llava"), STSConfig(budget=8)) as sts:
        assert sts.plan.cuts[0].layer == models.LAYERS // 2


def test_every_family_is_tested():
    assert {name for family in ADAPTERS for name in family.model_types} == set(models.CONFIGS)
