"""sts.report against the tokens that the layers ran on, and against the paper's Table 3."""

import copy
import itertools

import pytest
import torch

from sts_kernels import STSConfig
from sts_kernels.flops import CONVENTIONS, LLMSize
from sts_kernels.integrations.transformers import apply_sts, timer

from . import models
from .models import output_cache

KEEP, AFTER, LAYER = 10, 4, 3
CONFIG = STSConfig(keep=KEEP, keep_after=AFTER, prune_layer=LAYER)


@pytest.mark.parametrize("family", models.FAMILIES)
def test_counts(family, device):
    model = models.shared(family, "sdpa", device)
    clips = int(family in ("video_llava", "qwen2_vl", "qwen3_vl", "llava_onevision"))
    prompts = [models.prompt_of(family, 2, clips, seed=1), models.prompt_of(family, 0, seed=2)]
    with apply_sts(model, CONFIG) as sts:
        assert sts.report is None
        out = models.generate(model, prompts, 1)
        picture, text = sts.report.rows
        assert sts.report == sts.report != copy.copy(sts.report)  # by identity: tensors have no truth value
        assert picture != copy.copy(picture)
    lengths = [layer.keys.shape[2] for layer in output_cache(out).layers]
    assert picture.prompt - picture.tokens + picture.after_stage1 == lengths[0]
    assert picture.prompt - picture.tokens + picture.after_stage2 == lengths[-1]
    assert picture.average == pytest.approx((LAYER * picture.after_stage1 + 3 * AFTER) / models.LAYERS)
    assert picture.after_stage2 == AFTER
    assert (text.tokens, text.after_stage1, text.after_stage2, text.images) == (0, 0, 0, [])
    assert text.kv_mb[0] == text.kv_mb[1]
    assert text.visual_tflops == (0, 0)
    assert text.prefill_tflops[0] == text.prefill_tflops[1] > 0
    for name, convention in CONVENTIONS.items():
        size, other = LLMSize.of(model.config, model.dtype), picture.prompt - picture.tokens if convention.text else 0
        layers = [picture.after_stage1 + other] * LAYER + [AFTER + other] * 3
        assert picture.tflops[name] == pytest.approx(
            [sum(size.layer_flops(n, convention) for n in row) / 1e12 for row in ([picture.tokens + other] * 6, layers)]
        )
    bytes_held = sum(2 * layer.keys[0].nbytes for layer in output_cache(out).layers)
    assert picture.kv_mb[1] == pytest.approx(bytes_held / 2**20)
    assert [image.kind for image in picture.images] == ["image"] * 2 + ["video"] * clips
    assert sum(len(image.after_stage2) for image in picture.images) == AFTER
    for image in picture.images:
        assert len(image.after_stage1) == min(KEEP, image.tokens)
        first, second = ({tuple(p) for p in kept.tolist()} for kept in (image.after_stage1, image.after_stage2))
        assert len(first) == len(image.after_stage1)
        assert second <= first
        for part, row, column in first:
            height, width = image.grids[part]
            assert row < height
            assert column < width


def test_positions_are_those_of_the_features():
    """In an image of equal patches but a few, the few are kept, and reported at their row and column."""
    model = models.build("llava")
    vision = model.model.vision_tower
    getattr(vision, "vision_model", vision).embeddings.position_embedding.weight.data.zero_()
    special = [(0, 5), (2, 3), (4, 1)]
    prompt = models.prompt_of("llava", 1, seed=1)
    noise = models.noise(3, 4, 4, seed=9)
    picture = noise.repeat(1, 6, 6)
    for index, (row, column) in enumerate(special):
        picture[:, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4] = models.noise(3, 4, 4, seed=20 + index)
    prompt.images = [picture[None]]
    with apply_sts(model, STSConfig(keep=4, keep_after=1.0)) as sts:
        models.generate(model, [prompt], 1)
        kept = {tuple(p[1:]) for p in sts.report.rows[0].images[0].after_stage1.tolist()}
    assert set(special) < kept


def test_the_papers_table_3():
    """LLaVA-NeXT-7B, 2880 visual tokens pruned to an average of 320: 1440.0 MB of cache become 160.0."""
    vicuna = models.transformers.LlamaConfig(
        hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=32
    )
    size = LLMSize.of(vicuna, torch.float16)
    plan = STSConfig(budget=320).plan(32, 16)
    keep, after = plan.keep(2880), plan.keep_after([2880])
    assert size.kv_mb(32 * 2880) == 1440.0
    assert size.kv_mb(16 * keep + 16 * after) == 160.0
    segments = [(16, keep), (16, after)]
    for name in ("sts", "vispruner"):
        full, pruned = (size.prefill_flops(s, 40, CONVENTIONS[name]) for s in ([(32, 2880)], segments))
        assert round(full / pruned, 1) == 9.9
    assert round(size.prefill_flops([(32, 2880)], 40) / size.prefill_flops(segments, 40), 1) == 8.9  # with a prompt


def test_it_prints_a_table(device):
    model = models.shared("llava", "sdpa", device)
    with apply_sts(model, CONFIG, measure=True) as sts:
        models.generate(model, [models.prompt_of("llava", 2, seed=1)], 2)
        lines = str(sts.report).splitlines()
        assert sts.report.encode_ms > 0
        assert sts.report.prefill_ms > 0
    assert len(lines) == 3
    assert lines[0].split()[:2] == ["row", "images"]
    assert lines[1].split()[:6] == ["0", "2", "72", "20", "4", "12.0"]
    assert lines[0].split()[-4:] == ["visual", "GFLOPs", "visual", "alone"]
    assert lines[1].endswith("x)")
    assert "layer 3 of 6" in lines[2]
    assert "prefill" in lines[2]


def test_times_are_those_of_one_prompt(monkeypatch):
    """A clock that gains one second a reading: every phase takes one second."""
    seconds = itertools.count()
    monkeypatch.setattr(timer.Timer, "_now", lambda self: float(next(seconds)))
    model = models.shared("qwen2_vl")
    with apply_sts(model, CONFIG, measure=True) as sts:
        for pictures, clips in ((1, 1), (1, 0), (0, 1)):
            models.generate(model, [models.prompt_of("qwen2_vl", pictures, clips)], 1)
            assert sts.report.encode_ms == 1000 * (pictures + clips)
            assert sts.report.prefill_ms == 1000


def test_without_measure_there_are_no_times():
    model = models.shared("llava")
    with apply_sts(model, CONFIG) as sts:
        models.generate(model, [models.prompt_of("llava", 1, seed=1)], 1)
        assert sts.report.encode_ms is None
        assert sts.report.prefill_ms is None


@pytest.mark.parametrize(
    "options", [{"use_cache": False}, {"prompt_lookup_num_tokens": 3, "eos_token_id": [99]}], ids=str
)
def test_what_follows_the_prompt_does_not_count(options):
    model = models.shared("llava")
    prompt = models.prompt_of("llava", 1, seed=5)
    prompt.ids += models.words(3, 7) * 4
    with apply_sts(model, CONFIG) as sts:
        models.generate(model, [prompt], 4)
        plain = sts.report.rows[0]
        models.generate(model, [prompt], 4, **options)
        row = sts.report.rows[0]
    assert row.prompt == len(prompt.ids) == plain.prompt
    assert row.kv_mb == plain.kv_mb
    assert row.prefill_tflops == plain.prefill_tflops
    assert torch.equal(row.images[0].after_stage2, plain.images[0].after_stage2)
