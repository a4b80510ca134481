"""Every way of running a pruned model gives the logits of the oracle, or of plain greedy decoding."""

import copy

import pytest
import torch

from sts_kernels import STSConfig
from sts_kernels.integrations.transformers import apply_sts, prune

from . import models
from .models import CACHE, output_cache
from .oracle import expect

KEEP, AFTER, LAYER = 10, 4, 3
CONFIG = STSConfig(keep=KEEP, keep_after=AFTER, prune_layer=LAYER)
MOST = ("llava", "qwen2_5_vl", "qwen3_vl")


def close(actual, expected, tolerance: float = 2e-5) -> None:
    expected = expected.double().cpu()
    torch.testing.assert_close(actual.double().cpu(), expected, rtol=0, atol=tolerance * expected.abs().max().item())


def batches(family: str) -> list[models.Prompt]:
    """Prompts with one image, with two images and a longer text, and without an image."""
    return [
        models.prompt_of(family, 1, seed=1),
        models.prompt_of(family, 2, seed=6, before=7),
        models.prompt_of(family, 0, seed=3),
    ]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", models.FAMILIES)
def test_a_row_does_not_depend_on_its_batch(family, attention, device):
    model = models.shared(family, attention, device)
    prompts = batches(family)
    with apply_sts(model, CONFIG):
        together = models.generate(model, prompts)
        for row, prompt in enumerate(prompts):
            alone = models.generate(model, [prompt])
            close(models.logits_of(together)[row], models.logits_of(alone)[0])


@pytest.mark.parametrize("family", MOST)
def test_beam_search(family, device):
    """A batch of beams answers as each prompt alone; the best beam's score is the oracle's."""
    model = models.shared(family, "sdpa", device)
    # Before transformers 5, generate() mixes up the images of a prompt that has several when it repeats them for beams.
    prompts = [models.prompt_of(family, 1 + (family != "llava"), seed=2, before=7), models.prompt_of(family, 1, seed=1)]
    options = {"num_beams": 3, "num_return_sequences": 2, "output_logits": False, "output_scores": True}
    with apply_sts(model, CONFIG):
        together = models.generate(model, prompts, **options)
        for row, prompt in enumerate(prompts):
            alone = models.generate(model, [prompt], **options)
            close(together.sequences_scores[2 * row : 2 * row + 2], alone.sequences_scores)
            new = together.sequences[2 * row : 2 * row + 2, -4:]
            assert torch.equal(new, alone.sequences[:, -4:])
    answer = new[0].tolist()
    expected = expect(model, prompt, answer, KEEP, AFTER, LAYER).logits.log_softmax(-1)
    score = expected[torch.arange(4), torch.tensor(answer)].sum() / 4
    close(alone.sequences_scores[0], score)


@pytest.mark.parametrize("family", MOST)
def test_sampling_returns_several_sequences(family, device):
    """Every sample's logits are those of its own tokens."""
    model = models.shared(family, "sdpa", device)
    prompt = batches(family)[0]
    with apply_sts(model, CONFIG):
        torch.manual_seed(0)
        out = models.generate(model, [prompt], 3, do_sample=True, num_return_sequences=3)
    answers = out.sequences[:, len(prompt.ids) :].tolist()
    assert len({tuple(a) for a in answers}) > 1
    for row, answer in enumerate(answers):
        close(models.logits_of(out)[row], expect(model, prompt, answer, KEEP, AFTER, LAYER).logits)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", MOST)
def test_prompt_lookup(family, attention, device):
    """Drafts share forwards with the prompt, and rejected drafts leave the cache; the answer is the greedy one."""
    model = models.shared(family, attention, device)
    prompt = models.prompt_of(family, 1, seed=5)
    prompt.ids += models.words(3, 7) * 4  # something to look up
    with apply_sts(model, CONFIG):
        plain = models.generate(model, [prompt], 10, eos_token_id=[99])
        drafted = models.generate(model, [prompt], 10, eos_token_id=[99], prompt_lookup_num_tokens=3)
    steps = min(len(plain.logits), len(drafted.logits))
    length = len(prompt.ids) + steps
    assert torch.equal(plain.sequences[:, :length], drafted.sequences[:, :length])
    close(models.logits_of(drafted)[:, :steps], models.logits_of(plain)[:, :steps])


@pytest.mark.parametrize("family", models.FAMILIES)
def test_without_a_cache(family, device):
    """With use_cache=False every step encodes and selects again, with the same prompt."""
    model = models.shared(family, "sdpa", device)
    prompts = batches(family)[:2]
    with apply_sts(model, CONFIG):
        cached = models.generate(model, prompts, 3)
        fresh = models.generate(model, prompts, 3, use_cache=False)
    close(models.logits_of(fresh), models.logits_of(cached))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", MOST)
def test_a_second_turn_on_the_returned_cache(family, attention, device):
    model = models.shared(family, attention, device)
    prompt = batches(family)[0]
    more = models.words(5, 77)
    with apply_sts(model, CONFIG):
        first = models.generate(model, [prompt], 3)
        talk = copy.copy(prompt)
        talk.ids = first.sequences[0].tolist() + more
        inputs = models.batch(model, [talk])
        inputs = {k: v for k, v in inputs.items() if k in ("input_ids", "attention_mask", "mm_token_type_ids")}
        second = model.generate(
            **inputs,
            **{CACHE: output_cache(first)},
            max_new_tokens=3,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
    answer = second.sequences[0, len(prompt.ids) :].tolist()
    close(models.logits_of(second)[0], expect(model, prompt, answer, KEEP, AFTER, LAYER).logits[-3:])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", models.FAMILIES)
def test_a_manual_loop(family, attention, device):
    """forward() by hand, without masks or positions after the prompt."""
    model = models.shared(family, attention, device)
    prompt, answer = batches(family)[1], []
    logits = []
    with apply_sts(model, CONFIG), torch.no_grad():
        inputs = models.batch(model, [prompt])
        inputs.pop("attention_mask")
        out = model(**inputs, use_cache=True)
        for _ in range(3):
            logits.append(out.logits[0, -1])
            answer.append(int(logits[-1].argmax()))
            step = {"input_ids": torch.tensor([answer[-1:]], device=device), CACHE: output_cache(out)}
            if "cache_position" in models.model_arguments(model):  # before 5.x Qwen has no positions without it
                step["cache_position"] = torch.tensor([len(prompt.ids) + len(answer) - 1], device=device)
            out = model(**step, use_cache=True)
        assert output_cache(out).get_seq_length() == len(prompt.ids) + 3
    close(torch.stack(logits), expect(model, prompt, answer, KEEP, AFTER, LAYER).logits)


@pytest.mark.parametrize("config", [CONFIG, STSConfig(keep_after=AFTER, prune_layer=LAYER)], ids=["both", "semantics"])
@pytest.mark.parametrize("family", models.FAMILIES)
def test_right_padding(family, config, device):
    """A plain forward over rows padded on the right: each row's last token answers as alone, in its own column."""
    model = models.shared(family, "sdpa", device)
    prompts = batches(family)
    with apply_sts(model, config), torch.no_grad():
        padded = model(**models.batch(model, prompts, side="right")).logits
        assert padded.shape[1] == max(len(p.ids) for p in prompts)
        for row, prompt in enumerate(prompts):
            alone = model(**models.batch(model, [prompt])).logits
            close(padded[row, len(prompt.ids) - 1], alone[0, -1])


def test_a_ragged_second_turn(device):
    """The new tokens of a later turn may be padded."""
    model = models.shared("llava", "sdpa", device)
    prompts = batches("llava")[:2]
    turns = [models.words(2, 5), models.words(4, 6)]
    logits = []
    with apply_sts(model, CONFIG), torch.no_grad():
        inputs = models.batch(model, prompts)
        out = model(**inputs, use_cache=True)
        ids = torch.tensor([[models.PAD] * 2 + turns[0], turns[1]], device=device)
        new = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]], device=device)
        mask = torch.cat([inputs["attention_mask"], new], dim=1)
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -4:]
        shift = (1 - inputs["attention_mask"]).sum(1, keepdim=True)  # forward() counted the padding in the first turn
        out = model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions + shift,
            **{CACHE: output_cache(out)},
            use_cache=True,
        )
        logits.append(out.logits[:, -1])
        step = torch.tensor([[5], [6]], device=device)
        mask = torch.cat([mask, mask.new_ones(2, 1)], dim=1)
        out = model(
            input_ids=step,
            attention_mask=mask,
            position_ids=positions[:, -1:] + 1 + shift,
            **{CACHE: output_cache(out)},
        )
        logits.append(out.logits[:, -1])
    for row, (prompt, turn) in enumerate(zip(prompts, turns, strict=True)):
        answer = [*turn, 5 + row, 0]
        expected = expect(model, prompt, answer, KEEP, AFTER, LAYER).logits
        close(torch.stack(logits)[:, row], expected[-2:])


def test_prompt_length_names_the_query(device):
    """prompt_length marks the query token in a forward over prompt and answer, as for an answer's likelihood."""
    model = models.shared("llava", "sdpa", device)
    prompt, answer = batches("llava")[1], models.words(4, 9)
    whole = copy.copy(prompt)
    whole.ids = prompt.ids + answer
    expected = expect(model, prompt, [*answer, 0], KEEP, AFTER, LAYER).logits
    with apply_sts(model, CONFIG) as sts, torch.no_grad():
        sts.prompt_length = len(prompt.ids)
        scored = model(**models.batch(model, [whole])).logits[0, len(prompt.ids) - 1 :]
        sts.prompt_length = None
        other = model(**models.batch(model, [whole])).logits[0, len(prompt.ids) - 1 :]
    close(scored, expected)
    assert (other.cpu() - scored.cpu()).abs().max() > 1e-2


@pytest.mark.parametrize("family", ["llava", "video_llava"])
def test_a_prompt_that_ends_with_its_image(family, device):
    """The last kept token speaks for a last token that is dropped, as it does on graphs. One row is shorter."""
    model = models.shared(family, "sdpa", device)
    prompts = [models.prompt_of(family, count, seed=count, after=0) for count in (1, 2)]
    for prompt in prompts:
        del prompt.ids[-3:]  # the words after the picture
    with prune(model, "divprune", budget=8) as handle, torch.no_grad():
        out = models.generate(model, prompts, 3)
        last = model(**models.batch(model, prompts)).logits[:, -1]
        alone = models.logits_of(models.generate(model, prompts[:1], 3))
        if family == "llava":
            handle.compile(max_new_tokens=8, batch_size=2, strict=True)
            close(models.logits_of(models.generate(model, prompts, 3)), models.logits_of(out))
    assert last.abs().amax(-1).min() > 0.1
    close(models.logits_of(out)[:, 0], last)
    close(models.logits_of(out)[:1], alone)


def test_embeddings_instead_of_ids(device):
    model = models.shared("llava", "sdpa", device)
    inputs = models.batch(model, batches("llava")[:2])
    with apply_sts(model, CONFIG), torch.no_grad():
        by_ids = model(**inputs).logits[:, -1]
        embeds = model.get_input_embeddings()(inputs.pop("input_ids"))
        by_embeds = model(inputs_embeds=embeds, **inputs).logits[:, -1]
    assert torch.equal(by_ids, by_embeds)


def test_features_encoded_beforehand(device):
    model = models.shared("llava", "sdpa", device)
    if "mm_encoder_outputs" not in models.model_arguments(model):
        pytest.skip(f"transformers {models.transformers.__version__} takes no mm_encoder_outputs")
    prompts = batches("llava")[:2]
    with apply_sts(model, CONFIG):
        usual = models.generate(model, prompts)
        inputs = models.batch(model, prompts)
        encoded = model.model.get_image_features(inputs.pop("pixel_values"), return_dict=True)
        out = model.generate(
            **inputs,
            mm_encoder_outputs={"image": encoded},
            max_new_tokens=4,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
    assert torch.equal(models.logits_of(usual), models.logits_of(out))


def test_a_reset_cache_starts_over():
    model = models.shared("llava")
    prompts = batches("llava")[:2]
    cache = models.transformers.DynamicCache()
    with apply_sts(model, CONFIG):
        fresh = models.logits_of(models.generate(model, prompts[1:]))
        models.generate(model, prompts[:1], **{CACHE: cache})
        cache.reset()
        if cache.layers and cache.layers[0].get_seq_length():
            pytest.skip("this version's reset() keeps the length of the tensors")
        again = models.logits_of(models.generate(model, prompts[1:], **{CACHE: cache}))
    assert torch.equal(fresh, again)


def test_a_copied_cache_continues():
    """A deep copy of a pruned cache continues with the same logits as the original."""
    model = models.shared("llava")
    prompts = batches("llava")[:2]
    with apply_sts(model, CONFIG), torch.no_grad():
        inputs = models.batch(model, prompts)
        cache = output_cache(model(**inputs, use_cache=True))
        twin = copy.deepcopy(cache)
        mask = torch.cat([inputs["attention_mask"], torch.ones(2, 1, dtype=torch.long)], dim=1)
        step = {"input_ids": torch.tensor([[5], [6]]), "attention_mask": mask, "use_cache": True}
        one = model(**step, **{CACHE: cache}).logits
        assert torch.equal(one, model(**step, **{CACHE: twin}).logits)


@pytest.mark.parametrize("change", [("batch_repeat_interleave", 2), ("batch_select_indices", torch.tensor([1, 0, 1]))])
def test_rows_of_a_cache_are_repeated_and_selected(change, device):
    """One prefill, several answers: rows of the cache go on as their prompts would alone."""
    model, (how, argument) = models.shared("llava", "sdpa", device), change
    with apply_sts(model, CONFIG), torch.no_grad():
        inputs = models.batch(model, batches("llava")[:2])  # padded
        cache = output_cache(model(**inputs, use_cache=True))
        twin = copy.deepcopy(cache)
        getattr(twin, how)(argument)
        rows = torch.arange(2).repeat_interleave(2) if how == "batch_repeat_interleave" else argument
        mask, ids = torch.nn.functional.pad(inputs["attention_mask"], (0, 2), value=1), inputs["input_ids"][:, -2:]
        want = model(input_ids=ids, attention_mask=mask, **{CACHE: cache}).logits
        rows = rows.to(device)
        got = model(input_ids=ids[rows], attention_mask=mask[rows], **{CACHE: twin}).logits
    close(got, want[rows])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", models.FAMILIES)
def test_half_precision(family, dtype, device):
    """The budget is met and the answer is near that of float32 on the same weights."""
    model = models.build(family, "sdpa", device, dtype)
    exact = copy.deepcopy(model).float()
    prompts = batches(family)[:2]
    with apply_sts(model, STSConfig(keep=KEEP, keep_after=1.0)) as sts:
        out = models.generate(model, prompts, 1)
        rows = sts.report.rows
    with apply_sts(exact, STSConfig(keep=KEEP, keep_after=1.0)) as reference:
        near = models.generate(exact, prompts, 1)
        assert [row.after_stage1 for row in rows] == [row.after_stage1 for row in reference.report.rows]
        same = all(
            torch.equal(a.after_stage1, b.after_stage1)
            for mine, theirs in zip(rows, reference.report.rows, strict=True)
            for a, b in zip(mine.images, theirs.images, strict=True)
        )
    assert models.logits_of(out).isfinite().all()
    if same:  # features rounded differently may pick other tokens
        close(models.logits_of(out), models.logits_of(near), 0.2 if dtype is torch.bfloat16 else 0.03)


@pytest.mark.parametrize("anchor", ["first", "saliency"])
@pytest.mark.parametrize("scope", ["image", "crop"])
@pytest.mark.parametrize("family", ["llava_next", "qwen2_5_vl", "internvl", "video_llava", "llava_onevision"])
def test_anchors_and_scopes(family, scope, anchor, device):
    model = models.shared(family, "eager", device)
    clips = int(family in ("video_llava", "qwen2_5_vl", "llava_onevision"))
    prompt = models.prompt_of(family, 2, clips, seed=4)
    config = STSConfig(keep=KEEP, keep_after=1.0, prune_layer=LAYER, anchor=anchor, scope=scope)
    with apply_sts(model, config) as sts:
        out = models.generate(model, [prompt], 2)
        images = sts.report.rows[0].images
    assert [len(image.after_stage1) for image in images] == [KEEP] * (2 + clips)
    if scope == "crop":
        for image in images:
            counts = image.after_stage1[:, 0].bincount(minlength=len(image.grids))
            assert counts.max() - counts.min() <= 1
    if anchor == "first":
        answer = out.sequences[0, len(prompt.ids) :].tolist()
        expected = expect(model, prompt, answer, KEEP, 10**6, LAYER, anchor="first", scope=scope)
        close(models.logits_of(out)[0], expected.logits)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_saliency_is_the_attention_of_the_class_token(attention):
    """The anchor is the token with the largest [CLS] attention, as the library returns it under eager attention."""
    model = models.shared("llava", attention)
    inputs = models.batch(model, [models.prompt_of("llava", 1, seed=1)])
    with torch.no_grad():
        tower = models.shared("llava", "eager").model.vision_tower
        weights = tower(inputs["pixel_values"], output_attentions=True, output_hidden_states=True).attentions[-2]
    best = int(weights[0, :, 0, 1:].mean(0).argmax())
    with apply_sts(model, STSConfig(keep=1, keep_after=1.0, anchor="saliency")) as sts:
        models.generate(model, [models.prompt_of("llava", 1, seed=1)], 1)
        assert sts.report.rows[0].images[0].after_stage1.tolist() == [[0, best // 6, best % 6]]


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_answers_of_different_lengths(family, device):
    """Prompt and answer in one forward, padded on the right: a row's query and logits are those of the row alone."""
    model = models.shared(family, "sdpa", device)
    prompt, answers = models.prompt_of(family, 1, seed=4), [models.words(6, 9), models.words(2, 10)]
    rows = [copy.copy(prompt) for _ in answers]
    for row, answer in zip(rows, answers, strict=True):
        row.ids = prompt.ids + answer
    start, reports = len(prompt.ids) - 1, []
    with apply_sts(model, CONFIG) as sts, torch.no_grad():
        sts.prompt_length = len(prompt.ids)
        together = model(**models.batch(model, rows, side="right")).logits
        reports += [(row.kept, row.prompt) for row in sts.report.rows]
        alone = []
        for row in rows:
            alone.append(model(**models.batch(model, [row])).logits[0])
            reports.append((sts.report.rows[0].kept, sts.report.rows[0].prompt))
    assert reports == [([KEEP, AFTER], len(prompt.ids))] * 4
    for index, answer in enumerate(answers):
        end = start + 1 + len(answer)
        close(together[index, start:end], alone[index][start:])
        close(alone[index][start:end], expect(model, prompt, [*answer, 0], KEEP, AFTER, LAYER).logits)


def test_a_ragged_second_turn_token_by_token(device):
    """A manual decoding loop whose mask excludes a new column."""
    model = models.shared("llava", "sdpa", device)
    prompt = batches("llava")[0]
    inputs = models.batch(model, [prompt])
    length = len(prompt.ids)
    with apply_sts(model, CONFIG), torch.no_grad():
        cache, mask = output_cache(model(**inputs, use_cache=True)), inputs["attention_mask"]
        for index, (token, valid) in enumerate([(7, 0), (8, 1), (9, 1)]):
            mask = torch.cat([mask, mask.new_full((1, 1), valid)], 1)
            step = {"input_ids": torch.tensor([[token]], device=device), "attention_mask": mask}
            step["position_ids"] = torch.tensor([[length + max(0, index - 1)]], device=device)
            logits = model(**step, **{CACHE: cache}, use_cache=True).logits[0, -1]
    close(logits, expect(model, prompt, [8, 9, 0], KEEP, AFTER, LAYER).logits[-1])
