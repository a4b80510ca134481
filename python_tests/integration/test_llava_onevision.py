"""LLaVA-OneVision: features that the model interpolates between projector and LLM."""

import pytest
import torch

from sts_kernels import STSConfig, generate
from sts_kernels.integrations.transformers import apply_sts, prune, random_models
from sts_kernels.integrations.transformers.visual_item import Blend
from sts_kernels.integrations.transformers.visualize import draw

from . import models

FAMILY = "llava_onevision"
CONFIG = STSConfig(keep=10, keep_after=4, prune_layer=3)
OLD = models.transformers.__version__.startswith("4.")


@pytest.mark.parametrize("size", [(3, 3), (5, 9), (6, 6), (1, 1), (4, 7)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_bilinear_is_torchs(size, dtype):
    """Down, up, and each by one side; rows of the grid are in any order."""
    rows = torch.randperm(40, generator=torch.Generator().manual_seed(0))[:36].view(6, 6)
    values = models.noise(40, 5, seed=1).to(dtype)
    grid = values[rows].permute(2, 0, 1)[None]
    want = torch.nn.functional.interpolate(grid, size, mode="bilinear")[0].flatten(1).T
    found = Blend.bilinear(rows, size, 40)(values)
    assert found.dtype == dtype
    torch.testing.assert_close(found, want, rtol=1e-2 if dtype == torch.bfloat16 else 1e-6, atol=1e-6)


def test_images_that_are_not_interpolated_stand_beside_others():
    """A prompt with one image has a mosaic, one with two has none: each row as alone."""
    model = models.shared(FAMILY)
    prompts = [models.prompt_of(FAMILY, count, seed=count) for count in (1, 2, 3)]
    for rows in (prompts, prompts[1:]):
        with apply_sts(model, CONFIG) as sts:
            together = models.generate(model, rows, 3)
            crops = [[len(image.grids) for image in row.images] for row in sts.report.rows]
            alone = [models.generate(model, [row], 3) for row in rows]
        assert crops == [[2]] * (rows is prompts) + [[1, 1], [1, 1, 1]]
        for row, one in enumerate(alone):
            got = models.logits_of(together)[row]
            torch.testing.assert_close(got, models.logits_of(one)[0], rtol=0, atol=1e-5)


def test_marks_in_the_output_of_the_encoder():
    """Kept features and newlines have the bits of the plain model; all other tokens are marks."""
    model, prompt = models.shared(FAMILY), models.prompt_of(FAMILY, 1, seed=2)
    inputs = models.batch(model, [prompt])
    given = {name: inputs[name] for name in ("pixel_values", "image_sizes", "batch_num_images")}
    plain = features_of(model, given)
    with prune(model, "random", keep=5):
        marked = features_of(model, given)
    newline, dropped = (plain == model.model.image_newline).all(1), marked.isnan().all(1)
    assert int(newline.sum()) == 6
    assert int((~dropped).sum()) == 5 + 6
    assert not (dropped & newline).any()
    assert torch.equal(marked[~dropped], plain[~dropped])


@torch.no_grad()
def features_of(model, given: dict) -> torch.Tensor:
    out = model.model.get_image_features(**given)
    return torch.cat(list(getattr(out, "pooler_output", out)))


@pytest.mark.skipif(not OLD, reason="from transformers 5 on, features of a clip hold its newline")
def test_clips_encoded_by_the_caller_without_their_newline():
    model, prompt = models.shared(FAMILY), models.prompt_of(FAMILY, 0, 1, seed=2)
    pixels = models.batch(model, [prompt])["pixel_values_videos"]
    with (
        apply_sts(model, CONFIG),
        torch.no_grad(),
        pytest.raises(NotImplementedError, match="features of a clip without its newline"),
    ):
        model.model.get_video_features(pixels, vision_feature_layer=-1, vision_feature_select_strategy="full")


@pytest.mark.parametrize("sizes", [[(60, 40)], [(41, 40), (90, 20)]], ids=["a mosaic", "base crops"])
def test_with_the_real_processor(sizes):
    """Prompts as users make them: graphs serve them, and keep what the hooks keep."""
    pil = pytest.importorskip("PIL.Image")
    config = models.CONFIGS[FAMILY]()
    config.text_config.vocab_size = 512
    model = models.class_of(FAMILY)._from_config(config).eval()
    pictures = [pil.effect_noise(size, 80).convert("RGB") for size in sizes]
    inputs = generate.prepare(random_models._onevision_processor(config), pictures, "What?")
    options = {"max_new_tokens": 3, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    with prune(model, "sts", keep=10, keep_after=1.0) as pruning:
        hooks = model.generate(**inputs, **options)
        row = pruning.report.rows[0]
        pruning.compile(max_new_tokens=3, strict=True)
        graphs = model.generate(**inputs, **options)
    assert [len(image.kept[0]) for image in row.images] == [10] * len(sizes)
    assert [len(image.grids) for image in row.images] == [2] if len(sizes) == 1 else [1, 1]
    assert torch.equal(hooks.sequences, graphs.sequences)
    torch.testing.assert_close(models.logits_of(graphs), models.logits_of(hooks), rtol=0, atol=1e-5)


class Processor:
    class image_processor:
        image_mean = image_std = (0.5, 0.5, 0.5)


@pytest.mark.parametrize(("seed", "picture"), [(0, "shrunk"), (1, "whole")])
def test_pictures_of_what_is_kept(seed, picture):
    """The second panel is the picture itself: the mosaic is one grid over all of it."""
    image = pytest.importorskip("PIL.Image")
    model, prompt = models.shared(FAMILY), models.prompt_of(FAMILY, 1, seed=seed)
    inputs = models.batch(model, [prompt])
    height, width = prompt.image_sizes[0]
    red = image.new("RGB", (width, height), (255, 0, 0))
    with apply_sts(model, CONFIG) as sts:
        models.generate(model, [prompt], 1)
        report = sts.report
    sheet = draw(report, inputs, [red], Processor)
    colours = {colour for _, colour in sheet.getcolors(1 << 20)}
    assert {(255, 0, 0), (64, 0, 0)} <= colours or {(255, 0, 0), (63, 0, 0)} <= colours
