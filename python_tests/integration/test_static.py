"""Static caches: the same answers as with growing caches, in decode steps compiled without graph breaks."""

import copy
import functools
import gc
import os
import sys
import traceback
import weakref

import pytest
import torch
from torch._dynamo.utils import counters
from torch.overrides import TorchFunctionMode

from sts_kernels import STSConfig, _checks
from sts_kernels.integrations.transformers import apply_sts, llm_hooks, masks, prune, static_cache

from . import models
from .models import CACHE, output_cache
from .oracle import NearTie, expect
from .test_generation import AFTER, CONFIG, KEEP, LAYER, batches, close
from .test_methods import CASES, expected_of
from .test_mutants import mutated
from .test_oracle import PROMPTS

STATIC = {"cache_implementation": "static", "disable_compile": True}
SEVERAL = {"layers": [2, 3, 5], "ratios": [11, 6, 2]}  # four segments
OLD = models.transformers.__version__.startswith("4.")


def near(actual, expected) -> None:
    """Logits within 1e-5 of the largest, and the same tokens."""
    want, got = models.logits_of(expected), models.logits_of(actual)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5 * want.abs().max().item())
    assert torch.equal(actual.sequences, expected.sequences)


def slots(output) -> list[int]:
    return [layer.keys.shape[2] for layer in output_cache(output).layers]


def roomy(model, columns: int = 300) -> dict:
    """A static cache with room for later turns."""
    if not OLD:
        return {"cache_implementation": "static", "max_cache_len": columns}
    return {CACHE: models.transformers.StaticCache(config=model.config.get_text_config(), max_cache_len=columns)}


def next_turn(model, output, more: list[list[int]], tokens: int = 3, mask=None, **options):
    """Continues the conversation with the tokens `more`, on the returned cache."""
    ids = torch.cat([output.sequences, torch.tensor(more, device=output.sequences.device)], 1)
    mask = torch.ones_like(ids) if mask is None else mask
    options = {"max_new_tokens": tokens, "do_sample": False, "output_logits": True, **options}
    given = {"input_ids": ids, "attention_mask": mask, CACHE: output_cache(output)}
    if "mm_token_type_ids" in models.model_arguments(model):
        given["mm_token_type_ids"] = torch.zeros_like(ids)
    return model.generate(**given, return_dict_in_generate=True, **options)


# --- the same answers ---


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", models.FAMILIES)
def test_every_family(family, attention, device):
    """A row alone, and ragged rows with one image, two images and none."""
    model = models.shared(family, attention, device)
    prompts = batches(family)
    with prune(model, "sts", keep=KEEP, **SEVERAL):
        for rows in (prompts[:1], prompts):
            grown = models.generate(model, rows)
            static = models.generate(model, rows, **STATIC)
            near(static, grown)
            assert slots(static) == [-(-n // 64) * 64 for n in slots(grown)]
            assert output_cache(static).get_seq_length() == output_cache(grown).get_seq_length()


def test_every_segment_has_slots_of_its_own(device):
    model, prompt = models.shared("llava", "sdpa", device), models.prompt_of("llava", 2, seed=1)
    with prune(model, "pyramiddrop", layers=[2, 4], ratios=[20, 3]):
        assert slots(models.generate(model, [prompt], 38, **STATIC)) == [192, 192, 128, 128, 64, 64]


@pytest.mark.parametrize("name", CASES)
def test_every_method(name, device):
    case, model = CASES[name], models.shared("llava", "sdpa", device)
    prompts = batches("llava")[:2]
    with prune(model, case.method or name, **case.options):
        near(models.generate(model, prompts, 3, **STATIC), models.generate(model, prompts, 3))


@pytest.mark.parametrize("name", ["pyramiddrop", "sparsevlm", "polymorphic", "sts at a set of layers"])
@pytest.mark.parametrize("family", ["llava_next", "video_llava", "qwen2_5_vl", "internvl"])
def test_the_oracle(family, name, device):
    """Several cuts, contiguous positions, recycled and merged tokens."""
    case, model = CASES[name], models.shared(family, "sdpa", device)
    if family not in case.families:
        pytest.skip("refused")
    for seed in range(4, 20):
        prompts = [models.prompt_of(family, *count, seed=seed + i) for i, count in enumerate(PROMPTS[family][:2])]
        with prune(model, case.method or name, **case.options):
            out = models.generate(model, prompts, 3, **STATIC)
        try:
            answers = out.sequences[:, -3:].tolist()
            want = [expected_of(model, family, p, a, case) for p, a in zip(prompts, answers, strict=True)]
        except NearTie:
            continue
        break
    else:
        pytest.fail("no prompts without near-ties")
    for row, expected in enumerate(want):
        close(models.logits_of(out)[row], expected.logits, 1e-5)


@pytest.mark.parametrize("budget", ["everything", "no images"])
@pytest.mark.parametrize("family", models.FAMILIES)
def test_bits_of_the_plain_model(family, budget, device):
    """Where nothing is pruned, logits are bit-equal to the plain model's, and the static cache has the same length."""
    images = int(budget == "everything")
    for attention in ("sdpa", "eager"):
        model = models.shared(family, attention, device)
        prompts = [models.prompt_of(family, images * n, seed=n) for n in (1, 2)]
        plain = models.generate(model, prompts, **STATIC)
        with apply_sts(model, STSConfig(budget=1.0) if images else CONFIG):
            same = models.generate(model, prompts, **STATIC)
        assert torch.equal(models.logits_of(plain), models.logits_of(same))
        assert slots(plain) == slots(same)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "qwen3_vl"])
def test_beams_and_several_sequences(family, device):
    model, prompts = models.shared(family, "sdpa", device), [models.prompt_of(family, 1, seed=n) for n in (1, 2)]
    with prune(model, "sts", keep=KEEP, **SEVERAL):
        for options in (
            {"num_beams": 3, "num_return_sequences": 2, "output_logits": False, "output_scores": True},
            {"do_sample": True, "num_return_sequences": 3},
        ):
            found = []
            for static in ({}, STATIC):
                torch.manual_seed(0)
                found.append(models.generate(model, prompts, **options, **static))
            assert torch.equal(found[0].sequences, found[1].sequences)
        near(found[1], found[0])


def test_prompt_lookup(device):
    """Rejected drafts leave the slots. transformers 4 itself takes a growing cache instead, with a warning."""
    model, prompt = models.shared("llava", "sdpa", device), models.prompt_of("llava", 1, seed=5)
    prompt.ids += models.words(3, 7) * 4
    options = {"eos_token_id": [99], "prompt_lookup_num_tokens": 3, **STATIC}
    with prune(model, "sts", keep=KEEP, **SEVERAL):
        plain = models.generate(model, [prompt], 10, eos_token_id=[99])
        try:
            drafted = models.generate(model, [prompt], 10, **options)
        except ValueError as error:
            if "assisted generate is not supported" not in str(error):
                raise
            pytest.skip(f"the library does not allow it: {error}")
    length = min(plain.sequences.shape[1], drafted.sequences.shape[1])
    assert torch.equal(plain.sequences[:, :length], drafted.sequences[:, :length])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(("family", "name"), [("llava", "pyramiddrop"), ("llava_next", "sts"), ("qwen2_5_vl", "sts")])
def test_later_turns(family, name, attention, device):
    """Two later turns on the returned cache, of five tokens and of one; for one row, and for a padded ragged batch."""
    model = models.shared(family, attention, device)
    rows = batches(family)[:2]
    for prompts in (rows[:1], rows):
        more = [[models.words(5, 77)] * len(prompts), [[9]] * len(prompts)]
        found = []
        with prune(model, name, **(SEVERAL if name == "pyramiddrop" else {"keep": KEEP, **SEVERAL})):
            for static in ({}, roomy(model)):
                out = models.generate(model, prompts, 3, disable_compile=True, **static)
                mask = (models.batch(model, prompts)["attention_mask"], torch.ones(len(prompts), 3, dtype=torch.long))
                mask = torch.cat([x.to(device) for x in mask], 1)
                for words in more:
                    new = torch.ones(len(prompts), len(words[0]), dtype=torch.long, device=device)
                    new[0, : len(words[0]) - 2] = 0  # two words in row 0
                    mask = torch.cat([mask, new if len(prompts) > 1 else torch.ones_like(new)], 1)
                    out = next_turn(model, out, words, mask=mask, disable_compile=True)
                    mask = torch.cat([mask, mask.new_ones(len(prompts), 3)], 1)
                found.append(out)
        near(found[1], found[0])


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "internvl"])
def test_a_manual_loop_on_a_cache_of_the_users(family, device):
    """forward() by hand, without masks or positions after the prompt."""
    model, prompt = models.shared(family, "sdpa", device), batches(family)[1]
    inputs, answer, logits = models.batch(model, [prompt]), [], []
    cache = models.transformers.StaticCache(config=model.config.get_text_config(), max_cache_len=len(prompt.ids) + 3)
    with apply_sts(model, CONFIG), torch.inference_mode():
        out = model(**inputs, **{CACHE: cache}, use_cache=True)
        for _ in range(3):
            logits.append(out.logits[0, -1])
            answer.append(int(logits[-1].argmax()))
            step = {"input_ids": torch.tensor([answer[-1:]], device=device), CACHE: cache}
            if "cache_position" in models.model_arguments(model):  # before 5.x Qwen has no positions without it
                step["cache_position"] = torch.tensor([len(prompt.ids) + len(answer) - 1], device=device)
            out = model(**step, use_cache=True)
        assert cache.get_seq_length() == len(prompt.ids) + 3
    close(torch.stack(logits), expect(model, prompt, answer, KEEP, AFTER, LAYER).logits, 1e-5)


# --- compiled ---


def compile_config(backend: str = "eager", fullgraph: bool = True):
    config = models.transformers.CompileConfig(fullgraph=fullgraph, dynamic=False, backend=backend, mode=None)
    config._compile_all_devices = True
    return {"cache_implementation": "static", "compile_config": config}


class Graphs:
    """Calling it asserts that there was no graph break -> number of graphs compiled since the last call."""

    def __init__(self):
        torch._dynamo.reset()
        counters.clear()
        self.seen = 0

    def __call__(self) -> int:
        assert not counters["graph_break"], dict(counters["graph_break"])
        new, self.seen = counters["stats"]["unique_graphs"] - self.seen, counters["stats"]["unique_graphs"]
        return new


@pytest.fixture
def graphs():
    yield Graphs()
    torch._dynamo.reset()
    counters.clear()


@pytest.mark.parametrize(
    ("family", "attention", "name"),
    [
        ("llava", "eager", "pyramiddrop"),
        ("llava_next", "sdpa", "sts"),
        ("video_llava", "sdpa", "sparsevlm"),
        ("qwen2_vl", "eager", "sts"),
        ("qwen2_5_vl", "sdpa", "sts"),
        ("qwen3_vl", "sdpa", "sts"),
        ("internvl", "sdpa", "sts"),
        ("llava_onevision", "sdpa", "sts"),
        ("qwen3_vl_moe", "sdpa", "sts"),
        ("llava_next_video", "sdpa", "sts"),
    ],
)
def test_compiled(family, attention, name, graphs):
    """The decode step is one graph without breaks.

    The next prompt, another prompt length, a later turn and the next handle compile no other graph.
    """
    model = models.build(family, attention)
    prompts = [models.prompt_of(family, 1, seed=1), models.prompt_of(family, 1, seed=1, before=7, after=12)]
    for round in range(2):
        with prune(model, name, **(SEVERAL if name != "sts" else {"keep": KEEP, **SEVERAL})):
            for prompt in prompts:
                out = models.generate(model, [prompt], 3, **compile_config())
                assert graphs() == (round == 0 and prompt is prompts[0])
                near(out, models.generate(model, [prompt], 3))
                del out
            if round == 0 and family in ("llava", "qwen2_5_vl"):
                config = {"compile_config": compile_config()["compile_config"]}
                out = models.generate(model, [prompt], 3, **roomy(model), **config)
                assert graphs() == 1  # more slots
                second = next_turn(model, out, [models.words(5, 7)], **config)
                assert graphs() <= (family == "qwen2_5_vl")  # the library's positions have another shape there
                grown = next_turn(model, models.generate(model, [prompt], 3), [models.words(5, 7)])
                near(second, grown)


def test_compiled_beside_the_plain_model(graphs):
    """A prompt that loses no token is compiled without breaks too, bit-equal to the plain model.

    Pruned and plain prompts do not get each other's graphs.
    """
    model, image, text = models.build("llava"), [models.prompt_of("llava", 1)], [models.prompt_of("llava", 0)]
    plain = [models.logits_of(models.generate(model, p, 3, **compile_config())) for p in (image, text)]
    assert graphs() == 1
    with apply_sts(model, CONFIG):
        near(models.generate(model, image, 3, **compile_config()), models.generate(model, image, 3))
        assert torch.equal(models.logits_of(models.generate(model, text, 3, **compile_config())), plain[1])
    assert graphs() == 2  # pruned, and plain with another keyword
    with apply_sts(model, STSConfig(budget=1.0)):
        assert torch.equal(models.logits_of(models.generate(model, image, 3, **compile_config())), plain[0])
    assert graphs() == 1  # its layers never needed hooks
    assert torch.equal(models.logits_of(models.generate(model, image, 3, **compile_config())), plain[0])
    assert graphs() == 0


def test_ragged_rows_compiled(graphs):
    """fullgraph=False, the library's default, allows graph breaks: there are none."""
    model, rows, options = models.build("llava"), batches("llava"), compile_config(fullgraph=False)
    for new in (1, 0):
        with prune(model, "sts", keep=KEEP, **SEVERAL):
            near(models.generate(model, rows, 3, **options), models.generate(model, rows, 3))
            assert graphs() == new
            models.generate(model, [models.prompt_of("llava", n, seed=n) for n in (2, 1, 1)], 3, **options)
            assert graphs() == 0


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_inductor(family, graphs):
    model, rows = models.build(family), batches(family)[:2]
    with prune(model, "sts", keep=KEEP, **SEVERAL):
        near(models.generate(model, rows, 3, **compile_config("inductor")), models.generate(model, rows, 3))
    assert graphs() == 1


@pytest.mark.parametrize("family", ["llava", "llava_next", "qwen2_5_vl"])
def test_on_a_gpu_the_step_is_a_cuda_graph(family, cuda, graphs):
    """generate() compiles the step on its own there: one graph, no break, nothing left out of CUDA graphs."""
    model, prompt = models.build(family, device=cuda), [models.prompt_of(family, 1)]
    with prune(model, "sts", keep=KEEP, **SEVERAL):
        grown = models.generate(model, prompt, 6)
        for new in (1, 0, 0):
            near(models.generate(model, prompt, 6, cache_implementation="static"), grown)
            assert graphs() == new
    assert not counters["inductor"]["cudagraph_skips"]


# --- life ---


def run(model, prompt, tokens: int = 3, **options):
    return models.generate(model, [prompt], tokens, **STATIC, **options)


def test_slots_are_used_again():
    """The next prompt reuses the slots of a cache that the caller has dropped. Only the last few caches are held."""
    model, prompt = models.build("llava"), models.prompt_of("llava", 1, seed=1)
    run(model, models.prompt_of("llava", 0), 500)  # the library makes static caches of at least this length now
    with apply_sts(model, CONFIG) as sts:
        held = lambda: [h.layers for h in sts._llm.slots._held]  # noqa: E731
        place = lambda: held()[-1][0].keys.data_ptr()  # noqa: E731
        kept = run(model, prompt)
        assert set(slots(kept)) == {64}
        first, good = place(), models.logits_of(kept)
        run(model, prompt)
        assert place() != first
        assert len(held()) == 2
        assert torch.equal(
            models.logits_of(next_turn(model, kept, [[7]], 1)),
            models.logits_of(next_turn(model, run(model, prompt), [[7]], 1)),
        )
        del kept
        gc.collect()
        for layer in [layer for layers in held() for layer in layers]:
            layer.values.fill_(torch.nan)
        assert torch.equal(models.logits_of(run(model, prompt)), good)
        assert len(held()) == 1
        before = place()
        with torch.inference_mode():
            run(model, prompt, num_beams=2, output_logits=False)
            run(model, prompt)
        assert before in [layers[0].keys.data_ptr() for layers in held()]
        for rows in range(2, 9):
            models.generate(model, [prompt] * rows, 1, **STATIC)
        assert len(held()) == static_cache.SPARE + 1
        keys = weakref.ref(held()[0][0].keys)
    gc.collect()
    assert keys() is None


def test_a_cache_that_outlives_its_handle():
    model, prompt = models.build("llava"), models.prompt_of("llava", 1, seed=1)
    with apply_sts(model, CONFIG):
        out = run(model, prompt)
    with pytest.raises(RuntimeError, match="only while the pruning"):
        next_turn(model, out, [[7, 8]], disable_compile=True)
    assert torch.equal(models.logits_of(run(model, prompt)), models.logits_of(run(models.build("llava"), prompt)))


def test_a_cache_that_is_reset():
    """After reset() the cache is a plain StaticCache again: prompts with and without images can use it."""
    model, prompt, text = models.build("llava"), models.prompt_of("llava", 1, seed=1), models.prompt_of("llava", 0)
    want = models.logits_of(models.generate(model, [text], 3))
    cache = models.transformers.StaticCache(config=model.config.text_config, max_cache_len=90)
    with apply_sts(model, CONFIG):
        good = models.generate(model, [prompt], 3)
        for _ in range(2):
            near(models.generate(model, [prompt], 3, disable_compile=True, **{CACHE: cache}), good)
            cache.reset()
            assert type(cache) is models.transformers.StaticCache
            assert len(set(map(type, cache.layers))) == 1
        got = models.generate(model, [text], 3, disable_compile=True, **{CACHE: cache})
        torch.testing.assert_close(models.logits_of(got), want, rtol=0, atol=1e-4)


def test_a_copied_cache_continues():
    model, prompt = models.build("llava"), models.prompt_of("llava", 1, seed=1)
    with apply_sts(model, CONFIG):
        out = run(model, prompt)
        twin = copy.deepcopy(out)
        near(
            next_turn(model, out, [[7, 8]], disable_compile=True),
            next_turn(model, twin, [[7, 8]], disable_compile=True),
        )


def test_a_prompt_that_fails_leaves_a_usable_model():
    model, prompt, text = models.build("llava"), models.prompt_of("llava", 1, seed=1), models.prompt_of("llava", 0)
    run(model, prompt)  # the library makes static caches of at least this length now
    plain = models.logits_of(run(model, text))

    def explode(*args):
        raise RuntimeError("boom")

    with apply_sts(model, CONFIG):
        good = models.logits_of(run(model, prompt))
        hook = model.model.language_model.layers[4].mlp.register_forward_pre_hook(explode)
        with pytest.raises(RuntimeError, match="boom"):
            run(model, prompt)
        hook.remove()
        assert torch.equal(models.logits_of(run(model, text)), plain)
        assert torch.equal(models.logits_of(run(model, prompt)), good)
    assert torch.equal(models.logits_of(run(model, text)), plain)


def test_no_room():
    model, prompt = models.build("llava"), models.prompt_of("llava", 1, seed=1)
    with apply_sts(model, CONFIG), torch.no_grad():
        out = run(model, prompt)
        with pytest.raises(ValueError, match=r"static cache has room for \d+ tokens behind its pruned prompt, got 102"):
            next_turn(model, out, [[7] * 99], disable_compile=True)
        small = models.transformers.StaticCache(config=model.config.text_config, max_cache_len=20)
        with pytest.raises(ValueError, match=r"must have room for the prompt of \d+ columns, got max_cache_len=20"):
            model(**models.batch(model, [prompt]), **{CACHE: small})


# --- mutation tests ---

# name: module, source text, mutated text
MUTANTS = {
    "the first segment's mask for all": (llm_hooks, "segments[prompt.segment_of(layer)]", "segments[0]"),
    "the last segment's mask for all": (llm_hooks, "segments[prompt.segment_of(layer)]", "segments[-1]"),
    "one slot too few": (masks, "key[past : past + queries, None]", "key[past : past + queries, None] - 1"),
    "one slot too many": (masks, "key[past : past + queries, None]", "key[past : past + queries, None] + 1"),
    "slots that are not told apart from tokens": (
        masks,
        "(key <= query)[None, None]",
        "(key <= key)[None, None].expand(1, 1, len(query), -1)",
    ),
    "what the last prompt left": (static_cache, "self.filled.fill_(new)", "self.filled.add_(new)"),
    "a token over the last": (static_cache, "self.filled.add_(new)", "pass"),
    "states of the last prompt": (static_cache, "buffer[:, :, :new] = given.detach()", "pass"),
    "beams as they were": (static_cache, "buffer.copy_(buffer", "(buffer"),
}


def answers(**static) -> list[torch.Tensor]:
    """Logits of one row and twice of ragged rows, and scores of beams."""
    model, rows, found = models.shared("llava"), batches("llava")[:2], []
    with prune(model, "sts", keep=KEEP, layers=[2, 3], ratios=[9, 4]):
        for prompts in (rows[:1], rows, rows):
            found.append(models.logits_of(models.generate(model, prompts, **static)))
        found.append(models.generate(model, rows, num_beams=3, output_scores=True, **static).sequences_scores)
    return found


@functools.cache
def grown() -> list[torch.Tensor]:
    return answers()


def disagreement() -> float:
    """Largest difference between static and growing caches, relative to the largest value."""
    pairs = zip(answers(**STATIC), grown(), strict=True)
    return max(((a - b).abs().max() / b.abs().max()).nan_to_num(9.0).item() for a, b in pairs)


@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_is_caught(name):
    module, old, new = MUTANTS[name]
    grown()
    with mutated(module, old, new):
        try:
            found = disagreement()
        except (RuntimeError, ValueError, IndexError):
            found = float("inf")  # an error is not silently wrong
    assert found > 1e-3, f"nobody noticed: {found:.1e}"
    assert disagreement() < 1e-5, "the mutation stayed"


# --- read-backs in a prompt ---


class HostReads(TorchFunctionMode):
    """Records the package's modules that make the host wait for values of a tensor, in order of the calls.

    Watches the Python functions that copy to the host or need a value there. visual_item and the packing of LLaVA-NeXT
    are not counted: they compute with tensors on the host.
    """

    NAMES = ("tolist", "item", "cpu", "numpy", "nonzero", "masked_select", "unique", "__bool__", "__int__", "__index__")

    def __init__(self):
        super().__init__()
        self.found, self.others = [], 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        picks = args[1] if name == "__getitem__" else None
        picks = picks if isinstance(picks, tuple) else (picks,)
        if name in self.NAMES or any(isinstance(p, torch.Tensor) and p.dtype == torch.bool for p in picks):
            files = [frame.f_code.co_filename for frame, _ in traceback.walk_stack(sys._getframe())]
            files = [file for file in files if "/torch/" not in file and file != __file__]
            ours = [file.rpartition("/sts_kernels/")[2] for file in files if "/sts_kernels/" in file]
            if not set(map(os.path.basename, ours)) & {"visual_item.py", "llava_next.py", "llava_onevision.py"}:
                if "/sts_kernels/" in files[0]:
                    self.found.append(os.path.basename(files[0]).removesuffix(".py"))
                else:
                    self.others += 1
        return func(*args, **(kwargs or {}))


# One read-back for the prompt, one for image sizes on the device, and deepstack features, as in the model's own layers.
READS = {
    "internvl": ["prompt", "prompt"],
    "qwen2_vl": ["qwen_vl", "prompt"],
    "qwen2_5_vl": ["qwen_vl", "prompt"],
    "qwen3_vl": ["qwen_vl", "prompt", *["layer_pruning"] * 3],
}


@pytest.mark.parametrize("static", [{}, STATIC], ids=["growing", "static"])
@pytest.mark.parametrize("family", models.FAMILIES)
def test_pruning_reads_back_once_a_prompt(family, static, monkeypatch):
    """Read-backs of prompt and decode steps together are READS. The library reads no more than without pruning."""
    monkeypatch.setattr(_checks, "values_readable", lambda value: False)  # as on a GPU
    model = models.shared(family)
    for rows in (batches(family)[:1], batches(family)):
        with HostReads() as plain:
            models.generate(model, rows, 3, **static)
        with prune(model, "sts", keep=KEEP, **SEVERAL), HostReads() as reads:
            models.generate(model, rows, 3, **static)
        assert reads.found == READS.get(family, ["prompt"])
        assert reads.others <= plain.others
