"""Encoders of fixed shapes: they hand on what the model's own encoder hands on, and read no value."""

import pytest
import torch

from sts_kernels.integrations.transformers import attention_capture, prompt, prune, vision_attention, vision_pruning
from sts_kernels.integrations.transformers.adapters import EncodeCall, adapter_of

from . import models

# Pictures of the rows of a batch; the families that have several take other sizes for each of a row.
BATCHES = {"one": (1,), "several": (3, 1), "many": (4, 2, 1)}
CLIPS = ("video_llava", "qwen2_vl", "qwen2_5_vl", "qwen3_vl")
KINDS = [(family, "image") for family in models.FAMILIES] + [(family, "video") for family in CLIPS]


def prompts_of(family: str, kind: str, counts: tuple) -> list[models.Prompt]:
    given = {"image": "pictures", "video": "clips"}[kind]
    return [
        models.prompt_of(family, **{"pictures": 0, given: n}, seed=7 + i, after=9 - 2 * i) for i, n in enumerate(counts)
    ]


def call_of(model, inputs: dict, kind: str) -> EncodeCall:
    token = prompt.token_ids(model.model.config)
    return EncodeCall(kind, inputs, lambda which: prompt.runs(inputs["input_ids"], token[which]))


def pixels_of(inputs: dict, kind: str) -> torch.Tensor:
    names = {"image": ("pixel_values", "pixel_values_images"), "video": ("pixel_values_videos",)}[kind]
    return next(inputs[name] for name in names if name in inputs)


def plain(model, inputs: dict):
    """What the projector gets in the model's own forward, and what its deepstack projectors give."""
    seen, base = {}, model.model

    def before_text(module, args, kwargs):
        seen["deepstack"] = kwargs.get("deepstack_visual_embeds") or []

    hooks = [
        adapter_of(base.config.model_type).projector(base).register_forward_pre_hook(
            lambda module, args: seen.update(rows=args[0])
        ),
        base.language_model.register_forward_pre_hook(before_text, with_kwargs=True),
    ]
    try:
        model(**inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return seen["rows"], seen["deepstack"]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("counts", BATCHES.values(), ids=BATCHES)
@pytest.mark.parametrize(("family", "kind"), KINDS)
@torch.no_grad()
def test_rows_are_the_models_own(family, kind, counts, attention, device):
    model = models.shared(family, attention, device)
    inputs = models.batch(model, prompts_of(family, kind, counts))
    wanted, deep = plain(model, inputs)
    adapter, base = adapter_of(model.model.config.model_type), model.model
    encoder, call = adapter.fixed_encoder, call_of(model, inputs, kind)
    shape = encoder.shape(base, call)
    tables = {name: table.to(device) for name, table in encoder.tables(base, shape).items()}
    found = encoder.run(base, tables, pixels_of(inputs, kind))
    torch.testing.assert_close(found.rows, wanted, rtol=0, atol=1e-5)
    features = adapter.features(adapter.projector(base), found.rows)
    assert features.shape[:-1] == shape.features
    assert len(found.deepstack) == len(deep) == (2 if family == "qwen3_vl" else 0)
    for (projector, rows), own in zip(found.deepstack, deep, strict=True):
        torch.testing.assert_close(projector(rows), own, rtol=0, atol=1e-5)
