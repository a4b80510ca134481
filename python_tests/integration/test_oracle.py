"""Pruned generation against the oracle, for every family: prompt and decode, alone and in ragged batches."""

import pytest
import torch

from sts_kernels import STSConfig
from sts_kernels.integrations.transformers import apply_sts

from . import models
from .models import output_cache
from .oracle import expect

CONFIGS = {
    "both": (10, 4, 3),
    "structure": (10, 10**6, 3),
    "semantics": (10**6, 6, 4),
}
# family: (pictures, clips) of each prompt
PROMPTS = {
    "llava": [(1, 0), (2, 0)],
    "llava_next": [(1, 0), (2, 0)],
    "video_llava": [(1, 0), (0, 1), (1, 1)],
    "qwen2_vl": [(1, 0), (2, 1)],
    "qwen2_5_vl": [(1, 0), (2, 1), (0, 1)],
    "qwen3_vl": [(1, 0), (2, 1), (0, 1)],
    "qwen3_vl_moe": [(1, 0), (2, 1), (0, 1)],
    "internvl": [(1, 0), (2, 0)],
    "llava_next_video": [(1, 0), (1, 1), (0, 1)],
    "llava_onevision": [(1, 0), (2, 1), (0, 1)],
}
STEPS = 3
SEED = 4  # of prompts without near-ties


def prompts_of(family: str) -> list[models.Prompt]:
    return [
        models.prompt_of(family, pictures, clips, seed=SEED + i, before=4 + 3 * i, after=9 - 2 * i)
        for i, (pictures, clips) in enumerate(PROMPTS[family])
    ]


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    scale = expected.abs().max().item()
    torch.testing.assert_close(actual.double().cpu(), expected, rtol=0, atol=2e-5 * scale)


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("family", models.CONFIGS)
def test_generation_is_the_oracles(family, config, device):
    keep, after, layer = CONFIGS[config]
    attention = {"both": "eager", "structure": "sdpa", "semantics": "sdpa"}[config]
    model = models.shared(family, attention, device)
    prompts = prompts_of(family)
    with apply_sts(model, STSConfig(keep=keep, keep_after=after, prune_layer=layer)) as sts:
        alone = [models.generate(model, [prompt], STEPS) for prompt in prompts]
        together = models.generate(model, prompts, STEPS)
        rows = sts.report.rows
    for row, (prompt, one) in enumerate(zip(prompts, alone, strict=True)):
        answer = one.sequences[0, len(prompt.ids) :].tolist()
        expected = expect(model, prompt, answer, keep, after, layer)
        close(models.logits_of(one)[0], expected.logits)
        close(models.logits_of(together)[row], expected.logits)
        held = [layer.keys.shape[2] for layer in output_cache(one).layers]
        lengths = [len(expected.kept[0]), len(expected.kept[1])]
        assert held == [n + STEPS - 1 for n in [lengths[0]] * layer_count(layer) + [lengths[1]] * layer_count(-layer)]
        assert rows[row].tokens - rows[row].after_stage1 == len(expected.dropped)
        assert rows[row].after_stage1 - rows[row].after_stage2 == lengths[0] - lengths[1]


def layer_count(prune_layer: int) -> int:
    return prune_layer if prune_layer > 0 else models.LAYERS + prune_layer
