"""Features that a caller encodes and merges by hand: their marks are found, or refused, and no NaN enters the LLM."""

import pytest
import torch

from sts_kernels import STSConfig
from sts_kernels.integrations.transformers import VisualItem, apply_sts, dropped, prune

from . import models
from .test_refusals import one_sentence

CONFIG = STSConfig(keep=10, keep_after=4, prune_layer=3)


def merged(model, prompts) -> dict:
    """Inputs of a caller that encodes the images and merges the features into the embeddings.

    The embeddings are those that the base model merges; encoded again, features have the same bits.
    """
    inputs, seen = models.batch(model, prompts), []
    text = model.model.language_model

    def see(module, args, kwargs):
        seen.append(kwargs)
        raise StopIteration

    sizes = ("image_sizes", "batch_num_images")
    pictures = {name: inputs[name] for name in inputs if "pixel" in name or "grid" in name or name in sizes}
    pixels = next(name for name in pictures if "pixel" in name)
    with torch.no_grad():
        hook = text.register_forward_pre_hook(see, with_kwargs=True)
        text._forward_pre_hooks.move_to_end(hook.id, last=False)
        with pytest.raises(StopIteration):
            model(**inputs)
        hook.remove()
        model.model.get_image_features(pictures.pop(pixels), **pictures)
    out = {"inputs_embeds": seen[0]["inputs_embeds"], "attention_mask": inputs["attention_mask"]}
    if seen[0].get("position_ids") is not None:
        out["position_ids"] = seen[0]["position_ids"]
    return out


@pytest.mark.parametrize("family", models.FAMILIES)
def test_merged_embeddings_are_pruned(family):
    model = models.shared(family)
    prompts = [models.prompt_of(family, 1, seed=2), models.prompt_of(family, 0, seed=3)]  # one tile an image
    prompts += [models.prompt_of(family, 1 + (family != "internvl"), seed=4)]
    with apply_sts(model, CONFIG) as sts, torch.no_grad():
        want = model(**models.batch(model, prompts)).logits
        counts = [(row.tokens, row.after_stage1, row.after_stage2) for row in sts.report.rows]
        inputs = merged(model, prompts)
        assert inputs["inputs_embeds"].isnan().any()
        got = model(**inputs).logits
        assert [(row.tokens, row.after_stage1, row.after_stage2) for row in sts.report.rows] == counts
        assert got.isfinite().all()
        if family != "qwen3_vl":  # deepstack features do not go in by embeddings
            assert torch.equal(got[:, -1], want[:, -1])
            direct = model.lm_head(model.model.language_model(**inputs)[0])  # bypasses the base model
            assert torch.equal(direct[:, -1], want[:, -1])
        beams = model.generate(**inputs, num_beams=2, max_new_tokens=3) if family.startswith("llava") else None
        assert beams is None or beams.shape[0] == len(prompts)


def test_marks_of_other_images_are_refused():
    model = models.shared("llava")
    one, two = models.prompt_of("llava", 1, seed=1), models.prompt_of("llava", 2, seed=2)
    with apply_sts(model, CONFIG), torch.no_grad():
        inputs = merged(model, [two])
        for change in ("another batch encoded since", "part of an image", "a NaN of the caller's", "an image left out"):
            given = dict(inputs)
            if change == "another batch encoded since":
                model.model.get_image_features(models.batch(model, [one])["pixel_values"])
            else:
                model.model.get_image_features(models.batch(model, [two])["pixel_values"])
            if change == "part of an image":
                given = {name: value[:, 20:] for name, value in inputs.items()}
            if change == "a NaN of the caller's":
                given["inputs_embeds"] = inputs["inputs_embeds"].clone()
                given["inputs_embeds"][0, -1] = torch.nan
            if change == "an image left out":
                marked = dropped.is_dropped(inputs["inputs_embeds"])[0].nonzero()[:, 0]
                given = {name: value[:, : marked[20]] for name, value in inputs.items()}
            with pytest.raises(ValueError, match="NaN rows, which mark the visual tokens that were dropped") as e:
                model(**given)
            one_sentence(e)


def test_other_embeddings_run_as_they_are():
    model = models.shared("llava")
    text = models.batch(model, [models.prompt_of("llava", 0, seed=1)])
    embeds = model.get_input_embeddings()(text["input_ids"]).detach()
    with torch.no_grad():
        want = model(inputs_embeds=embeds).logits
        with apply_sts(model, CONFIG):
            model.model.get_image_features(models.batch(model, [models.prompt_of("llava", 1)])["pixel_values"])
            assert torch.equal(model(inputs_embeds=embeds).logits, want)


@pytest.mark.parametrize("method", ["fastv", "divprune"])
def test_merged_embeddings_of_images_that_lose_nothing_before_the_llm(method):
    """fastv drops tokens inside the LLM; a budget of 6 leaves the small one of two pictures as it is."""
    family = "qwen2_5_vl"
    model, prompt = models.shared(family), models.Prompt([1, 5, 6])
    for image, words in ((0, 2), (3, 3)):
        models.picture(family, prompt, image, 1 + image // 3)
        prompt.ids += models.words(3 + image, words)
    options = {"ratios": [0.5]} if method == "fastv" else {"budget": 6}
    with prune(model, method, **options) as handle, torch.no_grad():
        want = model(**models.batch(model, [prompt])).logits[:, -1]
        kept = handle.report.rows[0].kept
        got = model(**merged(model, [prompt])).logits[:, -1]
        assert handle.report.rows[0].kept == kept
    assert torch.equal(got, want)


def test_find_by_hand():
    """Two items of 3 and 4 tokens, one with a newline, in three rows."""
    items = [VisualItem("image", [3], [(1, 3)]), VisualItem("image", [3], [(1, 3)], torch.tensor([0, 1, -1, 2]))]
    values = torch.tensor([torch.nan, 1, torch.nan, torch.nan, 2, 3, 4])  # tokens 0 and 2 of the first are dropped
    embeds = torch.zeros(3, 6, 2)
    embeds[0, 1:4, 0] = values[:3]
    embeds[2, 2:, 0] = values[3:]
    found = dropped.find(embeds, {"image": (items, values)})
    assert found.tolist() == [[0, 1, 1, 1, 0, 0], [0] * 6, [0, 0, 1, 1, 1, 1]]
    assert dropped.find(torch.zeros(1, 2, 2), {"image": (items, values)}) is None
    assert dropped.find(embeds.repeat_interleave(2, 0), {"image": (items, values)}).tolist() == [
        row for row in found.tolist() for _ in range(2)
    ]
    other = embeds.repeat_interleave(2, 0)
    other[1, 1:4, 0] = torch.tensor([1, torch.nan, torch.nan])  # not the row before it, as a beam would be
    with pytest.raises(ValueError, match="inputs_embeds hold NaN rows"):
        dropped.find(other, {"image": (items, values)})
