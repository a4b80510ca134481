"""generate() on graphs of fixed shapes equals generate() through the hooks, and the float64 oracle."""

import contextlib
import dataclasses
import functools
import threading
import types
import warnings

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sts_kernels import STSConfig, repulsion_select
from sts_kernels.integrations.transformers import apply_sts, prune
from sts_kernels.integrations.transformers.captured import encoder, graphs, layout, runner
from sts_kernels.integrations.transformers.random_models import RANDOM
from sts_kernels.methods import _keep_top, _packed

from . import models
from .models import CACHE, output_cache, transformers
from .oracle import expect
from .test_fixed_encoders import FAMILIES
from .test_mutants import mutated

KEEP, AFTER, LAYER = 10, 4, 3
CONFIG = STSConfig(keep=KEEP, keep_after=AFTER, prune_layer=LAYER)
COUNTS = {  # images of each row
    "one": (1,),
    "ragged": (1, 2),
    "none among them": (2, 0, 1),
}
# Options with which every part of a method drops something.
METHODS = {
    "adavtp": {"budget": 12, "complexity": "participation"},  # erank synchronises
    "dart": {"layers": [2], "ratios": [9]},
    "divprune": {"budget": 12},
    "fastervlm": {"budget": 12},
    "fastervlm_divprune": {"budget": 12},
    "fastv": {"ratios": [0.3]},
    "fps": {"budget": 12},
    "polymorphic": {"budget": 12},
    "prumerge": {"budget": 12},
    "pyramiddrop": {"layers": [2, 4], "ratios": [9, 5]},
    "random": {"budget": 12},
    "sparsevlm": {"layers": [2, 4], "ratios": [9, 5], "recycle": 0.5, "per_cluster": 4},
    "sts": {"keep": 10, "anchor": "saliency", "scope": "crop"},
    "tome": {"budget": 12},
    "uniform": {"budget": 12},
    "visionzip": {"budget": 12},
    "vispruner": {"budget": 12},
}


def close(actual, expected, tolerance: float = 1e-5) -> None:
    expected = expected.double().cpu()
    torch.testing.assert_close(actual.double().cpu(), expected, rtol=0, atol=tolerance * expected.abs().max().item())


def prompts_of(family: str, counts=(1,), seed: int = 1, after: int = 9) -> list[models.Prompt]:
    return [models.prompt_of(family, n, seed=seed + i, after=after + 3 * i) for i, n in enumerate(counts)]


@contextlib.contextmanager
def compiled(model, *arguments, options=None, method=None, **compile_options):
    """A handle with compile(strict=True): a call that the graphs cannot serve raises."""
    start = apply_sts(model, *arguments) if method is None else prune(model, method, **options)
    with start as handle:
        handle.compile(**{"max_new_tokens": 8, "batch_size": (1, 2, 4), "strict": True, **compile_options})
        yield handle


def same(got, want) -> None:
    assert torch.equal(got.sequences, want.sequences)
    close(models.logits_of(got), models.logits_of(want))


# --- equality with the hooks and the oracle ---


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_as_through_the_hooks(family, attention, counts, device):
    """Graphs and hooks give the same logits and report, for rows without images and with several.

    A batch is padded with empty rows to a compiled batch size. Repeating the batches builds no new graphs.
    """
    model = models.shared(family, attention, device)
    prompts = [prompts_of(family, counts), prompts_of(family, counts, seed=11, after=13)]
    with apply_sts(model, CONFIG) as hooked:
        want = [(models.generate(model, batch), str(hooked.report)) for batch in prompts]
    with compiled(model, CONFIG) as handle:
        made = []
        for _ in range(3):  # models with images of any size: not prepared, then prepared, then reused
            for batch, (out, report) in zip(prompts, want, strict=True):
                same(models.generate(model, batch), out)
                assert str(handle.report) == report
            made.append(handle._graphs.built)
        assert made[2] == made[1] != []


@pytest.mark.parametrize(
    "family", ["llava", "llava_next", "llava_next_video", "llava_onevision", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe"]
)
def test_as_the_oracle(family, device):
    model, prompt = models.shared(family, "sdpa", device), prompts_of(family, (2,), seed=6)[0]
    with compiled(model, CONFIG):
        out = models.generate(model, [prompt], 3)
    answer = out.sequences[0, len(prompt.ids) :].tolist()
    close(models.logits_of(out)[0], expect(model, prompt, answer, KEEP, AFTER, LAYER).logits, 2e-5)


@pytest.mark.parametrize("name", METHODS)
def test_methods(name, device):
    model = models.shared("llava", "sdpa", device)
    batches = (
        ((1,), 1),
        ((1, 2), 3),
        ((2, 0, 1), 5),
        ((1, 4), 7),
    )  # last batch: a cut leaves fewer slots than the text could fill
    for prompts in (prompts_of("llava", counts, seed) for counts, seed in batches):
        with prune(model, name, **METHODS[name]) as hooked:
            want, report = models.generate(model, prompts), str(hooked.report)
        with compiled(model, method=name, options=METHODS[name]) as handle:
            same(models.generate(model, prompts), want)
            assert str(handle.report) == report


@pytest.mark.parametrize("name", ["dart", "fastv", "sparsevlm", "visionzip", "divprune"])
@pytest.mark.parametrize("family", ["llava_next", "qwen2_5_vl", "internvl"])
def test_methods_of_families(family, name):
    """Methods run on newlines that no cut may drop, on windows, on tiles and on groups of patches."""
    model, prompts = models.shared(family), prompts_of(family, (1, 2), seed=8)
    options = METHODS[name] | (
        {"positions": "original"} if family == "qwen2_5_vl" and "layers" in METHODS[name] else {}
    )
    with prune(model, name, **options):
        want = models.generate(model, prompts)
    with compiled(model, method=name, options=options):
        same(models.generate(model, prompts), want)


@pytest.mark.parametrize("config", [STSConfig(budget=1.0), STSConfig(keep=0.5, keep_after=1.0), STSConfig(budget=0.3)])
def test_budgets(config, device):
    """Budgets: all tokens; the first stage alone; a share, by which rows with more images keep more tokens."""
    model, prompts = models.shared("llava", "sdpa", device), prompts_of("llava", (3, 1))
    with apply_sts(model, config):
        want = models.generate(model, prompts)
    with compiled(model, config):
        same(models.generate(model, prompts), want)


def test_no_visual_token_left(device):
    model, prompts = models.shared("llava", "sdpa", device), prompts_of("llava", (1, 2))
    options = {"keep": 8, "layers": [2], "ratios": [0]}
    with prune(model, "sts", **options):
        want = models.generate(model, prompts)
    with compiled(model, method="sts", options=options) as handle:
        same(models.generate(model, prompts), want)
        assert handle.report.rows[1].kept == [16, 0]


def test_one_slot_behind_a_cut(device):
    """The prompt is an image and one text token; the cut leaves the text token alone."""
    model, prompt = models.shared("llava", "sdpa", device), models.Prompt([])
    models.picture("llava", prompt, 0, 4)
    prompt.ids.append(7)
    options = {"keep": 8, "layers": [2], "ratios": [0]}
    with prune(model, "sts", **options):
        want = models.generate(model, [prompt])
    with compiled(model, method="sts", options=options, prompt_tokens=9, batch_size=1):
        same(models.generate(model, [prompt]), want)


def test_a_bucket_to_its_last_slot(device):
    """Prompts that leave one slot of a bucket free, fill it, and need one more: 5 + 10 + 3 tokens, then the text."""
    model = models.shared("llava", "sdpa", device)
    texts = (13, 14, 15, 21, 22)
    with apply_sts(model, CONFIG):
        wants = [models.generate(model, prompts_of("llava", after=after)) for after in texts]
    with compiled(model, CONFIG, prompt_tokens=(32, 40), batch_size=1) as handle:
        for after, want in zip(texts, wants, strict=True):
            prompts = prompts_of("llava", after=after)
            same(models.generate(model, prompts), want)
            assert [bucket.prompt_tokens for bucket in handle._graphs.built][-1] == (32 if after < 15 else 40)
            assert len(handle._graphs.built) == 2
        with pytest.raises(ValueError, match=r"takes 41 slots, .* is 40; give .*prompt_tokens=\(32, 40, 41"):
            models.generate(model, prompts_of("llava", after=23))
        same(models.generate(model, prompts), want)


def test_as_many_tokens_as_compiled_for(device):
    model, prompts = models.shared("llava", "sdpa", device), prompts_of("llava")
    with apply_sts(model, CONFIG):
        want = models.generate(model, prompts, 30)
    with compiled(model, CONFIG, max_new_tokens=30) as handle:
        same(models.generate(model, prompts, 30), want)
        for options in ({"tokens": 31}, {"tokens": None, "max_length": len(prompts[0].ids) + 31}):
            with pytest.raises(ValueError, match=r"max_new_tokens is 31, .* is 30; give compile\(max_new_tokens=31"):
                models.generate(model, prompts, **options)
        assert len(handle._graphs.built) == 1


def test_two_buckets_in_turns(device):
    """Buckets share memory: used alternately, neither sees the other's data."""
    model = models.shared("llava", "sdpa", device)
    prompts = [prompts_of("llava", after=9), prompts_of("llava", after=80, seed=4)]
    with apply_sts(model, CONFIG):
        want = [models.generate(model, batch, 6) for batch in prompts]
    with compiled(model, CONFIG) as handle:
        for index in (0, 1, 0, 1, 1, 0):
            same(models.generate(model, prompts[index], 6), want[index])
        assert sorted(bucket.prompt_tokens for bucket in handle._graphs.built) == [64, 128]


def test_shapes_of_any_size_are_prepared_when_they_come_again():
    """A shape is prepared on its second use: an image size that comes only once would not repay a capture.

    The budget is a share of the tokens.
    """
    model = models.shared("qwen2_5_vl")
    one, other = prompts_of("qwen2_5_vl", seed=1), prompts_of("qwen2_5_vl", (2,), seed=2)
    with compiled(model, STSConfig(budget=0.3), batch_size=1) as handle:
        for prompts, prepared in ((one, 0), (other, 1), (one, 2), (other, 3), (one, 3)):
            models.generate(model, prompts, 1)
            encoders = [graph.prepared for _, graph, _ in handle._graphs._encoders.values()]
            runners = [ready.prefill.prepared for ready in handle._graphs._runners.values()]
            assert len(runners) == 1  # slots after the cut are rounded up
            assert sum(encoders) + sum(runners) == prepared


def test_no_more_than_eight_buckets():
    model = models.shared("llava")
    with compiled(model, CONFIG, batch_size=1) as handle:
        for size in range(10):
            models.generate(model, prompts_of("llava", after=9 + 64 * size), 1)
        assert [bucket.prompt_tokens for bucket in handle._graphs.built] == [64 * n for n in range(3, 11)]
        models.generate(model, prompts_of("llava", after=9 + 64 * 2), 1)
        models.generate(model, prompts_of("llava"), 1)
        sizes = [bucket.prompt_tokens for bucket in handle._graphs.built]
        assert sizes == [64 * n for n in (*range(5, 11), 3, 1)]


def test_what_is_built_at_once():
    model = models.shared("llava")
    with apply_sts(model, CONFIG) as handle:
        buckets = handle.compile(prompt_tokens=(64, 32), max_new_tokens=8, batch_size=(1, 2))
        assert [(b.batch_size, b.prompt_tokens, b.max_new_tokens) for b in buckets] == [
            (2, 64, 8),
            (2, 32, 8),
            (1, 64, 8),
            (1, 32, 8),
        ]
        assert buckets[-1].slots == (48, 48)  # 32 + 8 and 26 + 8, rounded up to multiples of 16
        assert buckets[-1].bytes == 2 * 6 * 2 * 48 * 64 * 4  # keys and values, layers, heads, slots, D, float32
        models.generate(model, prompts_of("llava"), 4)
        models.generate(model, prompts_of("llava", (1, 1)), 4)
        assert len(handle._graphs.built) == 4
        assert handle.compile() == []
        assert not handle._graphs._encoders
    with apply_sts(models.shared("qwen2_5_vl"), CONFIG) as handle:
        assert handle.compile(prompt_tokens=64) == []  # images of any size


# --- features of generate() ---


def test_sampling_and_stopping(device):
    """Sampling draws the same tokens, EOS ends one row before the other, and a streamer gets each token."""
    model, prompts = models.shared("llava", "sdpa", device), prompts_of("llava", (1, 2))
    with apply_sts(model, CONFIG):
        free = models.generate(model, prompts, 8)
        ends = int(free.sequences[0, -5])
        want = models.generate(model, prompts, 8, eos_token_id=ends)
        torch.manual_seed(3)
        drawn = models.generate(model, prompts, 8, do_sample=True, temperature=1.5, top_k=20)
    streamed = []

    class Streamer(transformers.generation.streamers.BaseStreamer):
        def put(self, value):
            streamed.append(value.tolist())

        def end(self):
            streamed.append("end")

    with compiled(model, CONFIG, batch_size=2):
        same(models.generate(model, prompts, 8, eos_token_id=ends), want)
        torch.manual_seed(3)
        same(models.generate(model, prompts, 8, do_sample=True, temperature=1.5, top_k=20), drawn)
        models.generate(model, prompts[:1], 3, streamer=Streamer())
    assert [*map(len, streamed[1:-1])] == [1, 1, 1]
    assert streamed[-1] == "end"


def test_without_a_mask_and_with_ids_by_position(device):
    model, prompts = models.shared("llava", "sdpa", device), prompts_of("llava")
    inputs = models.batch(model, prompts)
    inputs.pop("attention_mask")
    ids = inputs.pop("input_ids")
    options = {"max_new_tokens": 4, "do_sample": False}
    with apply_sts(model, CONFIG):
        want = model.generate(ids, **inputs, **options)
    with compiled(model, CONFIG):
        assert torch.equal(model.generate(ids, **inputs, **options), want)


def test_padding_on_the_right(device):
    model, prompts = models.shared("llava", "sdpa", device), prompts_of("llava", (1, 2))
    inputs = models.batch(model, prompts, side="right")
    options = {"max_new_tokens": 1, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    with compiled(model, CONFIG):
        left, right = models.generate(model, prompts, 1), model.generate(**inputs, **options)
        close(models.logits_of(right), models.logits_of(left))


def test_inference_mode_and_plain_forwards(device):
    """Buffers made in inference mode are usable outside of it; forwards without generate() run through the hooks."""
    model, prompts = models.shared("llava", "sdpa", device), prompts_of("llava")
    with apply_sts(model, CONFIG), torch.no_grad():
        want, plain = models.generate(model, prompts), model(**models.batch(model, prompts)).logits
    with compiled(model, CONFIG):
        with torch.inference_mode():
            same(models.generate(model, prompts), want)
        same(models.generate(model, prompts), want)
        with torch.no_grad():
            close(model(**models.batch(model, prompts)).logits, plain)


def test_times_of_a_prompt(device):
    model = models.shared("llava", "sdpa", device)
    with apply_sts(model, CONFIG, measure=True) as handle:
        handle.compile(strict=True)
        models.generate(model, prompts_of("llava"), 1)
        assert handle.report.encode_ms > 0
        assert handle.report.prefill_ms > 0
        models.generate(model, [models.prompt_of("llava", 0)], 1)
        assert not handle._sessions.now.clock


def test_threads_wait_for_each_other():
    model = models.shared("llava")
    prompts = [prompts_of("llava", seed=seed) for seed in range(4)]
    with apply_sts(model, CONFIG):
        want = [models.generate(model, batch) for batch in prompts]
    got = [None] * len(prompts)

    def run(index):
        got[index] = models.generate(model, prompts[index])

    with compiled(model, CONFIG):
        threads = [threading.Thread(target=run, args=(index,)) for index in range(len(prompts))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for mine, other in zip(got, want, strict=True):
        same(mine, other)


def test_removal_leaves_nothing(device):
    model, prompts = models.build("llava", device=device), prompts_of("llava")
    before = [dict(module.__dict__) for module in model.modules()]
    plain = models.generate(model, prompts)
    with compiled(model, CONFIG):
        models.generate(model, prompts)
    for module, attributes in zip(model.modules(), before, strict=True):
        assert module.__dict__.keys() - attributes.keys() <= {"_output_capturing_hooks_installed"}
        assert module.__dict__.get("config") is attributes.get("config")
    assert torch.equal(models.generate(model, prompts).sequences, plain.sequences)


def test_an_error_inside_leaves_the_handle_usable():
    model, prompts = models.shared("llava"), prompts_of("llava")
    inputs = models.batch(model, prompts)
    with compiled(model, CONFIG):
        want = models.generate(model, prompts)
        with pytest.raises(RuntimeError, match="placeholders"):
            model.generate(**inputs | {"pixel_values": torch.cat([inputs["pixel_values"]] * 2)}, max_new_tokens=2)
        same(models.generate(model, prompts), want)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_bad_pixels_harm_their_prompt_alone(bad, device):
    """Logits are NaN in the steps and rows where the hooks' are; the next prompt on the same buffers is clean."""
    model, prompts = models.shared("llava", "sdpa", device), prompts_of("llava", (1, 1))
    inputs = models.batch(model, prompts)
    spoiled = inputs["pixel_values"].clone()
    spoiled[1, :, 3, 5] = bad
    options = {"max_new_tokens": 5, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    with apply_sts(model, CONFIG):
        want = models.generate(model, prompts, 5), models.generate(model, prompts[:1], 5)
        broken = model.generate(**inputs | {"pixel_values": spoiled}, **options)
    with compiled(model, CONFIG, batch_size=2):
        got = model.generate(**inputs | {"pixel_values": spoiled}, **options)
        assert torch.equal(models.logits_of(got).isnan().any(-1), models.logits_of(broken).isnan().any(-1))
        close(models.logits_of(got)[0], models.logits_of(want[0])[0])
        same(models.generate(model, prompts, 5), want[0])
        same(models.generate(model, prompts[:1], 5), want[1])


def test_scores_that_are_nan_are_the_worst():
    """`best_of`, with counts on the device, chooses as `keep_top` does with a number: NaN scores are the worst."""
    scores = torch.tensor([[0.5, torch.nan, 0.1, torch.inf, 0.1, -torch.inf, 0.7]] * 3)
    candidates = torch.tensor([[True] * 7, [True, True, False, True, True, True, False], [False, True] + [False] * 5])
    for count in range(1, 7):
        positions, valid = _keep_top.keep_top(scores, candidates, count)
        spare = torch.zeros(3, 8, dtype=torch.bool)  # the last column takes invalid positions
        want = spare.scatter(1, torch.where(valid, positions, 7), True)[:, :7]
        got = _keep_top.best_of(scores, candidates, torch.full((3,), count))
        assert torch.equal(got, want)
    assert _keep_top.best_of(scores, candidates, torch.tensor([2, 0, 5])).sum(1).tolist() == [2, 0, 1]


# --- calls that graphs cannot serve ---

UNSERVED = {
    "num_beams": {"num_beams": 2, "output_logits": False},
    "num_return_sequences": {"num_return_sequences": 2, "do_sample": True},
    "use_cache": {"use_cache": False},
    "output_attentions": {"output_attentions": True},
    "output_hidden_states": {"output_hidden_states": True},
    "prompt_lookup_num_tokens": {"prompt_lookup_num_tokens": 2, "output_logits": False},
    "guidance_scale": {"guidance_scale": 1.5},
}


@pytest.mark.parametrize("name", UNSERVED)
def test_other_calls_run_through_the_hooks(name):
    """A warning gives the reason, once; with strict=True the call raises."""
    model, prompts = models.shared("llava", "eager"), prompts_of("llava")
    with apply_sts(model, CONFIG) as handle:
        torch.manual_seed(1)
        want = models.generate(model, prompts, 3, **UNSERVED[name])
        handle.compile()
        torch.manual_seed(1)
        with pytest.warns(UserWarning, match=f"runs through the hooks, not through compiled graphs: {name}"):
            got = models.generate(model, prompts, 3, **UNSERVED[name])
        assert torch.equal(got.sequences, want.sequences)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="sts_kernels")
            models.generate(model, prompts, 3, **UNSERVED[name])
            models.generate(model, prompts, 3)
        assert len(handle._graphs.built) == 1
        handle.compile(strict=True)
        with pytest.raises(NotImplementedError, match=f"compiled graphs cannot serve this call: {name}"):
            models.generate(model, prompts, 3, **UNSERVED[name])


def test_settings_of_a_generation_config_count():
    model, prompts = models.shared("llava"), prompts_of("llava")
    settings = transformers.GenerationConfig(num_beams=2, max_new_tokens=2, pad_token_id=0)
    with apply_sts(model, CONFIG) as handle:
        handle.compile()
        with pytest.warns(UserWarning, match="num_beams"):
            model.generate(**models.batch(model, prompts), generation_config=settings)


@pytest.mark.parametrize("what", ["hooks", "autocast", "videos", "embeddings", "cache", "training", "positional"])
def test_other_inputs_run_through_the_hooks(what):
    family = "video_llava" if what == "videos" else "llava"
    model, prompts = models.shared(family), prompts_of(family)
    inputs, around = models.batch(model, prompts), contextlib.nullcontext()
    reason = {
        "hooks": "there are hooks on LlamaDecoderLayer",
        "videos": "pixel_values_videos",
        "embeddings": "inputs_emb",
        "training": "the model is in training mode",
        "positional": "arguments of generate\\(\\) by position",
        "cache": CACHE,
    }
    if what == "videos":
        inputs = models.batch(model, [models.prompt_of(family, 0, 1)])
    if what == "autocast":
        around = torch.autocast("cpu", torch.bfloat16)
    if what == "cache":
        inputs[CACHE] = transformers.DynamicCache()
    given, hook = [], None
    if what == "positional":
        given = [inputs.pop("input_ids"), transformers.GenerationConfig(max_new_tokens=2, pad_token_id=0)]
    with apply_sts(model, CONFIG) as handle, around:
        handle.compile()
        model.train(what == "training")
        if what == "hooks":
            hook = model.model.language_model.layers[2].register_forward_hook(lambda *_: None)
        if what == "embeddings":
            inputs = {"inputs_embeds": model.get_input_embeddings()(inputs["input_ids"] % 80)}
        try:
            with pytest.warns(UserWarning, match=reason.get(what, what)):
                model.generate(*given, **inputs, max_new_tokens=2)
        finally:
            model.eval()
            if hook is not None:
                hook.remove()
        assert handle._graphs.built == []


@pytest.mark.parametrize("family", ["llava", "llava_next", "qwen3_vl"])
def test_a_prompt_that_turns_out_not_to_be_served(family, monkeypatch):
    """The refusal comes inside generate(), which may have requested the image features already."""
    model, prompts = models.shared(family), prompts_of(family)
    with apply_sts(model, CONFIG) as handle:
        want, report = models.generate(model, prompts), str(handle.report)
        handle.compile()

        def shape(encoder, base, call):
            raise NotImplementedError("pictures of cats")

        monkeypatch.setattr(type(handle.adapter.fixed_encoder), "shape", shape)
        with pytest.warns(UserWarning, match="not through compiled graphs: pictures of cats"):
            got = models.generate(model, prompts)
        assert torch.equal(models.logits_of(got), models.logits_of(want))
        assert str(handle.report) == report
        handle.compile(strict=True)
        with pytest.raises(NotImplementedError, match="cannot serve this call: pictures of cats"):
            models.generate(model, prompts)
        monkeypatch.undo()
        same(models.generate(model, prompts), want)


@pytest.mark.parametrize("family", ["llava", "llava_next", "internvl"])
def test_another_feature_layer_runs_through_the_hooks(family):
    """An argument of the model that equals its configuration changes nothing."""
    models.skip_unless_layers_are_chosen(family)
    model, prompts = models.shared(family), prompts_of(family)
    own = model.config.vision_feature_layer
    with apply_sts(model, CONFIG) as handle:
        want = {layer: models.generate(model, prompts, vision_feature_layer=layer) for layer in (own, own - 1)}
        assert not torch.equal(models.logits_of(want[own]), models.logits_of(want[own - 1]))
        handle.compile()
        with pytest.warns(UserWarning, match="the argument vision_feature_layer of the model"):
            same(models.generate(model, prompts, vision_feature_layer=own - 1), want[own - 1])
        handle.compile(strict=True)
        same(models.generate(model, prompts, vision_feature_layer=own), want[own])


def test_generate_inside_generate_runs_through_the_hooks():
    """A logits processor calls generate(). The outer call gives the answer that it gives without it."""
    model, prompts, other = models.shared("llava"), prompts_of("llava"), prompts_of("llava", seed=9)
    inner = []

    class Asks(transformers.LogitsProcessor):
        def __call__(self, ids, scores):
            if not inner:
                inner.append(models.generate(model, other))
            return scores

    with compiled(model, CONFIG):
        want = [models.generate(model, batch) for batch in (prompts, other)]
    with compiled(model, CONFIG, strict=False), pytest.warns(UserWarning, match="called inside another one"):
        got = models.generate(model, prompts, logits_processor=[Asks()])
    same(got, want[0])
    same(inner[0], want[1])


def test_a_call_of_the_model_inside_generate_is_checked():
    """The cache that a served generate() passes on takes one token of each prompt, as many as were compiled for."""
    model, prompts, called = models.shared("llava"), prompts_of("llava"), []

    class Calls(transformers.LogitsProcessor):
        def __call__(self, ids, scores):
            cache = {CACHE: handle._graphs._serving.answer.cache}
            with pytest.raises(RuntimeError, match=r"one token of each of the 1 prompts .* ids of shape \(1, 2\)"):
                model(input_ids=ids[:, :2], **cache)
            for _ in range(8):
                model(input_ids=ids[:, :1], **cache)
            with pytest.raises(ValueError, match="longer than the 8 tokens that were compiled"):
                model(input_ids=ids[:, :1], **cache)
            called.append(True)
            return scores

    with compiled(model, CONFIG) as handle:
        models.generate(model, prompts, 1, logits_processor=[Calls()])
    assert called


def test_a_budget_that_large_images_cannot_meet(device):
    """20 tokens on average, all tokens in the first 2 of 6 layers: at most 60 tokens an image."""
    model, prompts = models.shared("llava", "sdpa", device), prompts_of("llava", (1, 2))
    with prune(model, "fastv", budget=20):
        want = models.generate(model, prompts)
    with compiled(model, method="fastv", options={"budget": 20}):
        same(models.generate(model, prompts), want)


def test_encoders_of_eight_shapes_are_kept():
    model = models.shared("qwen2_5_vl")
    grids = [(1, 4, 2 * width) for width in range(2, 12)]

    def asked(grid):
        prompt = models.Prompt(models.words(4, 1))
        models.qwen_picture(prompt, "image", grid, 3)
        prompt.ids += models.words(5, 2)
        return [prompt]

    with apply_sts(model, CONFIG):
        want = [models.generate(model, asked(grid), 2) for grid in grids]
    with compiled(model, CONFIG, batch_size=1) as handle:
        for index in (*range(len(grids)), 0, 9):
            same(models.generate(model, asked(grids[index]), 2), want[index])
        kept = [tuple(encoder.pixels.shape) for encoder, _, _ in handle._graphs._encoders.values()]
    assert kept == [(4 * 2 * width, 96) for width in (*range(5, 11), 2, 11)]


def test_a_prompt_that_ends_with_an_image():
    """Where positions have several axes, it runs through the hooks."""
    for family in ("llava", "qwen2_5_vl"):
        model, prompt = models.shared(family), models.Prompt(models.words(4, 1))
        models.picture(family, prompt, 0, 3)
        if family == "qwen2_5_vl":
            prompt.ids.pop()  # the token after the image
        with apply_sts(model, CONFIG) as handle:
            want = models.generate(model, [prompt])
            handle.compile(strict=family == "llava")
            refused = pytest.warns(UserWarning, match="ends with an image")
            with contextlib.nullcontext() if family == "llava" else refused:
                same(models.generate(model, [prompt]), want)


@pytest.mark.parametrize("family", ["llava", "llava_next"])
def test_a_token_among_the_placeholders_of_an_image(family):
    model, (prompt,) = models.shared(family), prompts_of(family)
    prompt.ids.insert(20, 7)
    with apply_sts(model, CONFIG) as handle:
        want = models.generate(model, [prompt])
        handle.compile()
        with pytest.warns(UserWarning, match="placeholders do not follow one another"):
            same(models.generate(model, [prompt]), want)


def test_a_returned_cache_is_not_continued():
    model, prompts = models.shared("llava"), prompts_of("llava")
    with compiled(model, CONFIG) as handle:
        out = models.generate(model, prompts)
        assert output_cache(out).get_seq_length() == out.sequences.shape[1] - 1
        handle.compile()
        talk = models.Prompt([*out.sequences[0].tolist(), 5, 6])
        with pytest.warns(UserWarning, match=CACHE), pytest.raises(RuntimeError, match="cannot be continued"):
            models.generate(model, [talk], **{CACHE: output_cache(out)})


def test_a_forward_of_the_callers_runs_through_the_hooks():
    class Banned(transformers.LlavaForConditionalGeneration):
        def forward(self, input_ids=None, pixel_values=None, attention_mask=None, logits_to_keep=0, **rest):
            rest.update(attention_mask=attention_mask, logits_to_keep=logits_to_keep)
            out = super().forward(input_ids, pixel_values, **rest)
            out.logits[..., 5:50] = -1e4
            return out

    model, prompts = models.build("llava"), prompts_of("llava")
    for change in ("class", "attribute"):
        if change == "class":
            model.__class__ = Banned
        else:
            model.__class__ = transformers.LlavaForConditionalGeneration
            text = model.model.language_model
            text.forward = functools.partial(type(text).forward, text)
        with apply_sts(model, CONFIG) as handle:
            want = models.generate(model, prompts).sequences
            handle.compile()
            with pytest.warns(UserWarning, match="a forward of its own"):
                assert torch.equal(models.generate(model, prompts).sequences, want)
            handle.compile(strict=True)
            with pytest.raises(NotImplementedError, match="a forward of its own"):
                models.generate(model, prompts)


def test_a_compile_that_fails_leaves_the_graphs_before_it(monkeypatch):
    model, prompts = models.build("llava"), prompts_of("llava")
    with apply_sts(model, CONFIG) as handle:
        handle.compile(prompt_tokens=128, max_new_tokens=8)
        want = models.generate(model, prompts, 3).sequences
        with monkeypatch.context() as patch:
            patch.setattr(runner.Runner, "ready", lambda *_: (_ for _ in ()).throw(MemoryError("none left")))
            with pytest.raises(MemoryError):
                handle.compile(prompt_tokens=256)
        assert torch.equal(models.generate(model, prompts, 3).sequences, want)


def offloaded(model):
    model.model.language_model._hf_hook = object()


def quantised(model):
    model.hf_quantizer = types.SimpleNamespace(is_compileable=False)


def with_rotary_embeddings_that_grow(model):
    model.model.language_model.rotary_emb.rope_type = "dynamic"


def without_output_embeddings(model):
    model.get_output_embeddings = lambda: None


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (offloaded, "offloaded"),
        (quantised, "the model is quantised"),
        (with_rotary_embeddings_that_grow, "type dynamic follow the length of the prompt"),
        (without_output_embeddings, "no output embeddings"),
    ],
)
def test_models_that_run_through_the_hooks(change, why):
    model, prompts = models.build("llava"), prompts_of("llava")
    with apply_sts(model, CONFIG):
        want = models.generate(model, prompts)
    change(model)
    with apply_sts(model, CONFIG) as handle:
        with pytest.warns(UserWarning, match=f"runs through the hooks, .*{why}"):
            assert handle.compile(prompt_tokens=64) == []
        assert torch.equal(models.generate(model, prompts).sequences, want.sequences)
        with pytest.raises(NotImplementedError, match=why):
            handle.compile(strict=True)


def with_other_weights(model):
    head = model.lm_head
    head.weight = torch.nn.Parameter(-head.weight.detach())


def with_another_module(model):
    layers = model.model.language_model.layers
    layers[0].mlp.act_fn = torch.nn.Sequential(
        layers[0].mlp.act_fn, torch.nn.LayerNorm(layers[0].mlp.down_proj.in_features)
    )


def with_other_weights_of_the_encoder(model):
    model.model.multi_modal_projector.half().float()


def with_features_of_another_layer(model):
    model.config.vision_feature_layer = -1


def with_another_attention_of_the_llm(model):
    model.config.text_config._attn_implementation = "eager"


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (with_other_weights, "weights or modules of the model were replaced; call compile"),
        (with_another_module, "weights or modules of the model were replaced; call compile"),
        (with_other_weights_of_the_encoder, "weights or modules of the model were replaced; call compile"),
        (with_features_of_another_layer, "vision_feature_layer of the model's configuration has changed; call compile"),
        (
            with_another_attention_of_the_llm,
            "text_config._attn_implementation_internal of the model's configuration has changed; call compile",
        ),
    ],
)
def test_a_model_that_was_changed_after_compile(change, why):
    model, prompts = models.build("llava"), prompts_of("llava")
    with apply_sts(model, CONFIG) as handle:
        handle.compile()
        models.generate(model, prompts)
        change(model)
        with pytest.warns(UserWarning, match=f"runs through the hooks, .*{why}"):
            got = models.generate(model, prompts)
    with apply_sts(model, CONFIG) as handle:
        want = models.generate(model, prompts)
        assert torch.equal(models.logits_of(got), models.logits_of(want))
        handle.compile(strict=True)
        same(models.generate(model, prompts), want)


def test_weights_that_change_in_place():
    model, prompts = models.build("llava"), prompts_of("llava")
    with apply_sts(model, CONFIG) as handle:
        handle.compile(strict=True)
        models.generate(model, prompts)
        with torch.no_grad():
            model.lm_head.weight.neg_()
        got = models.generate(model, prompts)
    with apply_sts(model, CONFIG):
        same(got, models.generate(model, prompts))


def test_a_model_on_several_devices_runs_through_the_hooks():
    model = models.build("llava")
    model.lm_head.to("meta")
    with apply_sts(model, CONFIG) as handle, pytest.warns(UserWarning, match="on several devices, cpu, meta"):
        assert handle.compile(prompt_tokens=64) == []


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"prompt_tokens": 1}, ValueError, "prompt_tokens must be at least 2, got 1"),
        ({"prompt_tokens": "64"}, TypeError, "prompt_tokens must be an int, got str"),
        ({"prompt_tokens": (64, 2.5)}, TypeError, "prompt_tokens must be an int, got float"),
        ({"batch_size": ()}, ValueError, "batch_size must have at least one number"),
        ({"batch_size": True}, TypeError, "batch_size must be an int, got bool"),
        ({"max_new_tokens": 0}, ValueError, "max_new_tokens must be at least 1"),
        ({"backend": "aot"}, ValueError, "backend must be None or \"inductor\", got 'aot'"),
    ],
)
def test_wrong_options(options, error, message):
    with apply_sts(models.shared("llava"), CONFIG) as handle, pytest.raises(error, match=f"compile: {message}"):
        handle.compile(**options)


@pytest.mark.parametrize(
    ("name", "options", "why"),
    [
        ("adavtp", {"count": "adaptive"}, "follows from the tokens"),
        ("cdpruner", {"relevance": torch.zeros(36)}, "numbers of the caller's"),
    ],
)
def test_methods_that_cannot_be_compiled(name, options, why):
    wrong = pytest.raises(NotImplementedError, match=f"{name} cannot be compiled: .*{why}")
    with prune(models.shared("llava"), name, budget=9, **options) as handle, wrong:
        handle.compile()


def test_experts_that_the_host_calls(monkeypatch):
    model = models.shared("qwen3_vl_moe")
    if not hasattr(type(model.config), "_experts_implementation"):
        pytest.skip("experts of transformers 4 have one implementation")
    monkeypatch.setattr(model.model.language_model.config, "_experts_implementation_internal", "eager")
    wrong = pytest.raises(NotImplementedError, match=r"^compile: experts that the host calls one by one cannot[^\n]*$")
    with apply_sts(model, CONFIG) as handle, wrong:
        handle.compile()


def test_models_that_cannot_be_compiled(monkeypatch):
    model = models.shared("llava")
    with apply_sts(model.model, CONFIG) as handle, pytest.raises(ValueError, match="must have a generate"):
        handle.compile()
    text = model.model.language_model
    with apply_sts(model, CONFIG) as handle:
        with monkeypatch.context() as patch:
            patch.setattr(text.config, "_attn_implementation_internal", "flash_attention_2")
            with pytest.raises(NotImplementedError, match="attention 'flash_attention_2'"):
                handle.compile()
        with monkeypatch.context() as patch:
            patch.setattr(text, "__class__", type("OtherModel", (type(text),), {}))
            with pytest.raises(NotImplementedError, match="LLM of class OtherModel"):
                handle.compile()
        with monkeypatch.context() as patch:
            patch.setattr(handle, "adapter", dataclasses.replace(handle.adapter, fixed_encoder=None))
            with pytest.raises(NotImplementedError, match=r"vision encoder of LLaVA-1\.5"):
                handle.compile()


def test_more_prompts_than_compiled_for():
    model = models.shared("llava")
    with compiled(model, CONFIG, batch_size=2):
        models.generate(model, prompts_of("llava"), 2)
        with pytest.raises(ValueError, match=r"the batch has 3 prompts, .* is 2; give compile\(batch_size=\(2, 3\)"):
            models.generate(model, prompts_of("llava", (1, 1, 1)), 2)


# --- torch.compile without graph breaks ---


def traced(backend: str):
    from torch._dynamo.utils import counters

    model = models.build("llava")
    prompts = [prompts_of("llava"), prompts_of("llava", seed=5, after=21)]
    with apply_sts(model, CONFIG):
        want = [models.generate(model, batch) for batch in prompts]
    torch.compiler.reset()
    counters.clear()
    with compiled(model, CONFIG, batch_size=1, backend=backend):
        for batch, out in zip(prompts, want, strict=True):
            same(models.generate(model, batch), out)
            # Encoder, prefill and decode step: one graph each, and no other for another length of the bucket.
            assert counters["stats"]["unique_graphs"] == 3
        assert not counters["graph_break"]


def test_three_graphs_without_a_break():
    traced("eager")


@pytest.mark.slow
def test_inductor():
    traced("inductor")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sparsevlm", "polymorphic", "pyramiddrop", "visionzip"])
def test_methods_are_traced_whole(name):
    model, prompts = models.build("llava"), prompts_of("llava")
    with prune(model, name, **METHODS[name]):
        want = models.generate(model, prompts, 2)
    with compiled(model, method=name, options=METHODS[name], batch_size=1, backend="eager"):
        same(models.generate(model, prompts, 2), want)


# --- no read-back ---


class HostTensors(TorchDispatchMode):
    """Records the ops that touch a tensor on the host: with a CUDA device each is a copy, which a graph must not hold.
    On the meta device every read of a value raises."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, torch.Tensor)]
        if any(x.device.type == "cpu" and x.ndim for x in tensors):
            self.found.append(str(func))
        return out


def on_meta(name: str):
    with torch.device("meta"):
        model = transformers.AutoModelForImageTextToText.from_config(
            RANDOM[name].config(), dtype=torch.bfloat16, attn_implementation="sdpa"
        )
    model.generation_config.pad_token_id = 0
    return model.eval()


TRUE_SIZE = {"sts": {"budget": 128}} | {name: {"budget": 0.5} for name in ("pyramiddrop", "sparsevlm", "polymorphic")}


@pytest.mark.parametrize("method", TRUE_SIZE)
def test_true_size_reads_nothing(method, monkeypatch):
    """Encoder, prefill and decode step of LLaVA-1.5-7B read no value."""
    monkeypatch.setattr(torch, "autocast", lambda *args, **options: contextlib.nullcontext())  # not on the meta device
    model = on_meta("llava-1.5-7b")
    with compiled(model, method=method, options=TRUE_SIZE[method], prompt_tokens=640, batch_size=1) as handle:
        graph = handle._graphs
        (encode, run, _), (ready,) = *graph._encoders.values(), graph._runners.values()
        assert encode.rows == handle.plan.keep(576)
        for _ in range(2):  # lists from the host are copied once
            with HostTensors() as seen:
                parts = [run.run(), ready.prefill.run(), ready.decode.run()]
        assert seen.found == []
    assert parts[0]["rows"].shape == (handle.plan.keep(576), 4096)
    assert parts[1]["logits"].shape == parts[2]["logits"].shape == (1, 32064)


def test_the_stock_forward_reads():
    """Control: the stock forward reads values, and the meta device shows it."""
    model = on_meta("llava-1.5-7b")
    ids = torch.zeros(1, 616, dtype=torch.long, device="meta")
    pixels = torch.empty(1, 3, 336, 336, dtype=torch.bfloat16, device="meta")
    with torch.no_grad(), pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        model(input_ids=ids, pixel_values=pixels)


# --- mutation tests ---

FILLED = "segment.filled.copy_(lengths[number])"
LAST = "(lengths[-1] - 1).clamp(min=0)"
MUTANTS = {
    "prompt filled one too far": (runner, FILLED, "segment.filled.copy_(lengths[number] + 1)"),
    "deep layers as full as the first": (runner, FILLED, "segment.filled.copy_(lengths[0])"),
    "a token does not see itself": (runner, "slot <= segment.filled", "slot < segment.filled"),
    "decoding at the last position": (layout, "full[1:].max() + 1", "full[1:].max()"),
    "positions of the kept tokens in order": (encoder, "self.places[:, token]", "self.places[:, : len(token)]"),
    "the bucket's last slot as the last token": (runner, LAST, "lengths[-1] * 0 + hidden.shape[1] - 1"),
    "text that a cut may drop": (runner, "chosen | ~run.candidates", "chosen | run.text"),
    "rows of the first image for all": (layout, "first += many", "first += 0"),
    "counters do not advance": (runner, "segment.filled.add_(1)", "segment.filled.add_(0)"),
    "positions do not advance": (runner, "self.position.add_(1)", "self.position.add_(0)"),
    "worst tokens": (runner, "best_of(run.scores", "best_of(-run.scores"),
}


def disagreement(prompts) -> float:
    model = models.shared("llava")
    with apply_sts(model, CONFIG):
        want = models.logits_of(models.generate(model, prompts))
    with compiled(model, CONFIG):
        got = models.logits_of(models.generate(model, prompts))
    return float((got - want).abs().max().nan_to_num(torch.inf))


@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_is_caught(name):
    prompts = prompts_of("llava", (1, 2), seed=6)
    with mutated(*MUTANTS[name]):
        assert disagreement(prompts) > 1e-3
    assert disagreement(prompts) < 1e-5, "the mutation stayed"


def test_what_an_earlier_prompt_left_is_caught():
    """Without zeros after a prompt, its masked slots could hold NaN of an earlier prompt."""
    with mutated(runner, "slots[:, prompt:].zero_()", "slots[:, prompt:].fill_(torch.nan)"):
        assert disagreement(prompts_of("llava")) > 1e-3


# --- CUDA graphs ---


def test_replays_equal_the_functions_themselves(cuda):
    """Replays are bit-equal to uncaptured runs, on other data than at capture, with two buckets in one memory pool."""
    model = models.build("llava", device=cuda, dtype=torch.bfloat16)
    prompts = [prompts_of("llava", seed=seed, after=9 + 64 * (seed % 2)) for seed in range(4)]
    with compiled(model, CONFIG, batch_size=1) as handle:
        first = [models.generate(model, batch, 6) for batch in prompts]
        again = [models.generate(model, batch, 6) for batch in reversed(prompts)][::-1]
        assert len(handle._graphs.built) == 2
        for ready in handle._graphs._runners.values():
            replayed = ready.prefill.run()["logits"].clone(), ready.decode.run()["logits"].clone()
            with graphs.quietly(), graphs.replaced(ready.runner.replacements(True)):
                plain = ready.runner.prefill()["logits"].clone(), ready.runner.decode()["logits"].clone()
            for mine, other in zip(replayed, plain, strict=True):
                assert torch.equal(mine, other)
        for encode, graph, _ in handle._graphs._encoders.values():
            replayed = {k: v.clone() for k, v in graph.run().items() if isinstance(v, torch.Tensor)}
            with graphs.quietly():
                plain = encode.run()
            for name, value in replayed.items():
                assert torch.equal(value, plain[name])
    for mine, other in zip(first, again, strict=True):
        assert torch.equal(mine.sequences, other.sequences)
        assert torch.equal(models.logits_of(mine), models.logits_of(other))


@pytest.mark.parametrize("name", METHODS)
def test_every_method_is_captured(name, cuda):
    """Methods are captured with cooperative launches, cluster launches and Triton kernels; replays do not sync."""
    model = models.shared("llava", "sdpa", cuda)
    prompts = [prompts_of("llava", (1, 2), seed=seed) for seed in (3, 9)]
    with prune(model, name, **METHODS[name]):
        want = [models.generate(model, batch) for batch in prompts]
    with compiled(model, method=name, options=METHODS[name]) as handle:
        for batch, out in zip(prompts, want, strict=True):
            same(models.generate(model, batch), out)
        (ready,), (encoding,) = handle._graphs._runners.values(), handle._graphs._encoders.values()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for graph in (encoding[1], ready.prefill, ready.decode):
                graph.run()
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_large_selections_are_captured(cuda):
    """576 tokens of 1024 channels, which the cluster kernel selects from, and 2880 tokens."""
    for tokens, keep in ((576, 192), (2880, 960)):
        features = torch.randn(2, tokens, 1024, device=cuda, dtype=torch.bfloat16)
        ready = graphs.Graphs(cuda, None).ready(lambda x=features, k=keep: {"order": repulsion_select(x, k)})
        for _ in range(2):
            assert torch.equal(ready.run()["order"], repulsion_select(features, keep))
            features.copy_(torch.randn(features.shape, device=cuda))


def test_constants_are_copied_once():
    """A host list becomes one device tensor, which every run of a graph reuses."""
    store: dict = {}
    with _packed.constants(store):
        one, two = _packed.host([1, 2], "cpu"), _packed.host([1, 2], "cpu")
        assert one is two
        assert _packed.host([1, 2], "cpu", torch.int32) is not one
    assert len(store) == 2
    assert _packed.host([1, 2], "cpu") is not one


def test_constants_are_those_of_the_thread():
    inside, outside, stores = threading.Barrier(2), threading.Barrier(2), ({}, {})

    def run(number):
        with _packed.constants(stores[number]):
            inside.wait()
            if number:
                outside.wait()  # the other thread leaves its context first
            _packed.host([number], "cpu")
        if not number:
            outside.wait()

    threads = [threading.Thread(target=run, args=(number,)) for number in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    _packed.host([2], "cpu")
    assert [[values for values, *_ in store] for store in stores] == [[(0,)], [(1,)]]
