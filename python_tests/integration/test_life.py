"""The whole life of a handle: construction, interrupts, threads, copies, adapters. No model is left half changed."""

import contextlib
import copy
import gc
import linecache
import os
import pickle
import sys
import threading
import weakref

import pytest
import torch

from sts_kernels import STSConfig
from sts_kernels.integrations import transformers as integration
from sts_kernels.integrations.transformers import apply_sts, attention_capture, cudnn, hooks, prune, remove_pruning

from . import flash, models
from .test_identity import footprint
from .test_refusals import one_sentence

CONFIG = STSConfig(keep=10, keep_after=4, prune_layer=3)
PACKAGE = os.path.dirname(integration.__file__)


class Interrupt(BaseException):
    """No Exception, like KeyboardInterrupt: torch does not run its always_call hooks."""


def logits(model, prompts, tokens: int = 2, **options) -> torch.Tensor:
    return models.logits_of(models.generate(model, prompts, tokens, **options))


def rows(family: str) -> list[models.Prompt]:
    return [models.prompt_of(family, n, seed=n) for n in (1, 2)]


# --- construction and interrupts ---


@pytest.mark.parametrize("module", [hooks.Hooks, attention_capture], ids=["hooks", "captures"])
@pytest.mark.parametrize("error", [RuntimeError, Interrupt])
def test_construction_that_fails_half_way(module, error, monkeypatch):
    model, name = models.shared("qwen3_vl"), "before" if module is hooks.Hooks else "attach"
    before, original = footprint(model), getattr(module, name)
    for fails in range(3 if module is hooks.Hooks else 2):
        calls = []

        def install(*args, fails=fails, calls=calls):
            original(*args)
            calls.append(1)
            if len(calls) > fails:
                raise error("boom")

        monkeypatch.setattr(module, name, install)
        with pytest.raises(error, match="boom"):
            apply_sts(model, STSConfig(keep=6, anchor="saliency"))
        assert footprint(model) == before
        monkeypatch.undo()
        apply_sts(model, CONFIG).remove()


def interrupted(call, at: int) -> int:
    """Raises Interrupt before the `at`-th line that the integration executes -> lines executed.

    Never before a `with`: the trace reports its line again on leaving, where Python handles no signal before __exit__.
    """
    count = 0

    def line(frame, event, arg):
        nonlocal count
        text = linecache.getline(frame.f_code.co_filename, frame.f_lineno)
        if event == "line" and not text.lstrip().startswith("with "):
            count += 1
            if count == at:
                sys.settrace(None)
                raise Interrupt
        return line

    tracing = sys.gettrace()
    sys.settrace(lambda frame, event, arg: line if frame.f_code.co_filename.startswith(PACKAGE) else None)
    try:
        call()
    except Interrupt:
        pass
    finally:
        sys.settrace(tracing)
    return count


@pytest.mark.parametrize(("family", "anchor"), [("llava", "mean"), ("qwen3_vl", "saliency")])
def test_an_interrupt_at_any_line(family, anchor, monkeypatch):
    """Interrupts in construction, a prompt, decoding and removal: remove() restores the model.

    Where the handle was lost, remove_pruning() restores it.
    """
    monkeypatch.setattr(cudnn, "concerns", lambda x: True)
    model, prompts, handles = models.build(family), rows(family), []
    plain, before = logits(model, prompts), footprint(model)

    def life():
        handles.clear()
        handles.append(apply_sts(model, STSConfig(keep=6, keep_after=3, anchor=anchor)))
        logits(model, prompts)
        handles[0].remove()

    total = interrupted(life, -1)
    assert total > 1000
    for at in range(1, total + 1, 37):
        interrupted(life, at)
        if handles:
            handles[0].remove()
        else:
            remove_pruning(model)
        assert footprint(model) == before, f"interrupted at line {at} of {total}"
        assert torch.backends.cuda.cudnn_sdp_enabled(), f"interrupted at line {at} of {total}"
    assert torch.equal(logits(model, prompts), plain)


PLACES = {
    "vision encoder": lambda model: next(m for n, m in model.named_modules() if n.endswith("layers.1.mlp")),
    "projector": lambda model: model.model.multi_modal_projector.linear_2,
    "scored layer": lambda model: model.model.language_model.layers[2].self_attn.q_proj,
    "layer after the cut": lambda model: model.model.language_model.layers[4].mlp,
    "language head": lambda model: model.lm_head,
}


@pytest.mark.parametrize("place", PLACES)
def test_a_live_handle_goes_on_after_an_interrupt(place):
    model, prompts, text = models.build("llava"), rows("llava"), [models.prompt_of("llava", 0)]
    plain = logits(model, text)

    def interrupt(*args):
        raise Interrupt

    with apply_sts(model, CONFIG):
        good = logits(model, prompts)
        for run in (lambda: logits(model, prompts), lambda: model(**models.batch(model, prompts))):
            hook = PLACES[place](model).register_forward_pre_hook(interrupt)
            with pytest.raises(Interrupt), torch.no_grad():
                run()
            hook.remove()
            assert torch.equal(logits(model, text), plain)
            assert torch.equal(logits(model, prompts), good)


def test_a_closed_generator():
    model = models.build("llava")
    logits(model, rows("llava"))  # the library installs hooks of its own on first use
    before = footprint(model)

    def answers():
        with apply_sts(model, CONFIG):
            while True:
                yield logits(model, rows("llava"))

    stream = answers()
    next(stream)
    stream.close()
    assert footprint(model) == before


def test_a_lost_handle():
    model = models.build("llava")
    before = footprint(model)
    apply_sts(model, CONFIG)
    with pytest.raises(ValueError, match=r"remove_pruning\(model\)"):
        apply_sts(model, CONFIG)
    assert remove_pruning(model)
    assert not remove_pruning(model)
    assert not remove_pruning(torch.nn.Linear(2, 2))
    assert footprint(model) == before


# --- threads ---


def in_threads(*calls) -> list:
    """Runs the calls at the same time -> results or exceptions."""
    results, barrier = [None] * len(calls), threading.Barrier(len(calls))

    def run(index, call):
        barrier.wait()
        try:
            results[index] = call()
        except Exception as error:
            results[index] = error

    threads = [threading.Thread(target=run, args=pair) for pair in enumerate(calls)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    return results


@pytest.mark.parametrize(
    ("family", "attention"), [("llava", "sdpa"), ("qwen2_5_vl", "eager"), ("internvl", flash.NAME)]
)
def test_threads_on_one_model(family, attention, monkeypatch):
    """Each thread answers as alone, or is refused: prompts of several lengths, one without images, and a batch."""
    monkeypatch.setattr(cudnn, "concerns", lambda x: True)
    model = flash.use(models.build(family)) if attention == flash.NAME else models.build(family, attention)
    prompts = [[models.prompt_of(family, n, seed=n, before=4 + n)] for n in (1, 2, 0)] + [rows(family)]
    with apply_sts(model, STSConfig(keep=10, keep_after=4, prune_layer=3, anchor="saliency")):
        alone = [logits(model, p, 6) for p in prompts]
        calls = [lambda p=p: [logits(model, p, 6) for _ in range(3)] for p in prompts]
        for want, got in zip(alone, in_threads(*calls), strict=True):
            if isinstance(got, Exception):  # the model itself stores a prompt's rotary positions
                assert family == "qwen2_5_vl"
                assert "run one generate() at a time" in str(got)
                continue
            for one in got:
                torch.testing.assert_close(one, want, rtol=0, atol=1e-4 * want.abs().max().item())
        assert torch.backends.cuda.cudnn_sdp_enabled()


INSIDE = [
    *((place, 0) for place in PLACES if place != "language head"),
    ("scored layer", 2),
    ("layer after the cut", 2),
]
NO_CACHE, STATIC = {"use_cache": False}, {"cache_implementation": "static"}
REMOVED, NOT_CONTINUED = "the pruning was removed while", "only while the pruning"


@pytest.mark.parametrize(
    ("place", "step", "options", "error"),
    [
        *((*inside, options, REMOVED) for inside in INSIDE for options in ({}, NO_CACHE)),
        *((*inside, STATIC, NOT_CONTINUED if inside[1] else REMOVED) for inside in INSIDE),
        *(("language head", 0, options, NOT_CONTINUED) for options in ({}, STATIC)),
        *(("language head", 2, options, None) for options in ({}, NO_CACHE, STATIC)),  # after the last forward
    ],
)
def test_removal_by_another_thread(place, step, options, error):
    model, prompts = models.build("llava"), rows("llava")
    plain = logits(model, prompts, 3, **options)
    before, calls, handle = footprint(model), [], apply_sts(model, CONFIG)
    pruned = logits(model, prompts, 3, **options)

    def remove(*args):
        calls.append(1)
        if len(calls) == step + 1:
            thread = threading.Thread(target=handle.remove)
            thread.start()
            thread.join()

    hook = PLACES[place](model).register_forward_pre_hook(remove)
    with pytest.raises(RuntimeError, match=error) if error else contextlib.nullcontext():
        assert torch.equal(logits(model, prompts, 3, **options), pruned)
    hook.remove()
    assert footprint(model) == before
    assert torch.equal(logits(model, prompts, 3, **options), plain)


# --- copies ---


@pytest.mark.parametrize("family", models.FAMILIES)
def test_a_deep_copy_is_a_plain_model(family):
    """A deep copy is not pruned, has its own weights, and does not keep the original alive."""
    model, prompts = models.build(family), rows(family)
    plain = logits(model, prompts)
    with apply_sts(model, STSConfig(keep=10, keep_after=4, prune_layer=3, anchor="saliency")):
        pruned = logits(model, prompts)
        twin = copy.deepcopy(model)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(-1)
        with pytest.warns(UserWarning, match="copy of one that is pruned"):
            assert torch.equal(logits(twin, prompts), plain)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(-1)
        assert torch.equal(logits(model, prompts), pruned)
    with apply_sts(twin, STSConfig(keep=10, keep_after=4, prune_layer=3, anchor="saliency")):
        assert torch.equal(logits(twin, prompts), pruned)
    original = weakref.ref(model)
    del model
    gc.collect()
    assert original() is None
    assert torch.equal(logits(twin, prompts), plain)


def test_a_copy_made_while_pruning_can_be_compiled_and_pickled():
    model, prompts = models.build("llava"), rows("llava")
    with apply_sts(model, CONFIG):
        twin = copy.deepcopy(model)
        pruned = logits(model, prompts)
    assert torch.equal(logits(pickle.loads(pickle.dumps(twin)), prompts), logits(model, prompts))
    with prune(twin, "sts", budget=8) as handle:
        handle.compile(max_new_tokens=8, batch_size=len(prompts), strict=True)
        models.generate(twin, prompts)
        assert handle.report is not None
    with apply_sts(twin, CONFIG):
        assert torch.equal(logits(twin, prompts), pruned)


def test_a_removed_handle_does_not_come_back():
    model, prompts = models.build("llava"), rows("llava")
    handle = prune(model, "sts", budget=8)
    generate = model.generate  # shadowed
    handle.remove()
    for use in (handle.__enter__, handle.compile, lambda: setattr(handle, "prompt_length", 4)):
        with pytest.raises(RuntimeError, match=r"this handle was removed.*call prune\(\) again") as e:
            use()
        one_sentence(e)
    inputs = models.batch(model, prompts)
    kept = generate(**inputs, max_new_tokens=3, do_sample=False, cache_implementation="static")
    assert torch.equal(kept, model.generate(**inputs, max_new_tokens=3, do_sample=False, cache_implementation="static"))


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated", "ignore:torch.quantize_per_tensor")
def test_quantisation_of_an_active_model():
    """quantize_dynamic copies the model and replaces the copy's linear layers: the copy is not pruned."""
    model, prompts = models.build("llava"), rows("llava")
    quantize = torch.ao.quantization.quantize_dynamic
    want = logits(quantize(model), prompts)
    with apply_sts(model, CONFIG):
        quantized = quantize(model)
    assert torch.equal(logits(quantized, prompts), want)


def test_pickling_is_refused(tmp_path):
    model = models.build("llava")
    with apply_sts(model, CONFIG):
        for save in (pickle.dumps, lambda model: torch.save(model, tmp_path / "model.pt")):
            with pytest.raises(TypeError, match=r"cannot be pickled; call remove\(\)") as e:
                save(model)
            one_sentence(e)
        model.save_pretrained(tmp_path)
    prompts = rows("llava")
    assert torch.equal(logits(pickle.loads(pickle.dumps(model)), prompts), logits(model, prompts))


def test_data_parallel_replicas_are_refused():
    model = models.build("llava")
    with apply_sts(model, CONFIG):
        replica = model.model._replicate_for_data_parallel()
        with pytest.raises(NotImplementedError, match="DataParallel is not supported") as e:
            replica(**models.batch(model, rows("llava")))
        one_sentence(e)


# --- wrappers and base models ---


def lora(model):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    return peft.get_peft_model(model, config).eval()


OPTIONS = {"no cache": {"use_cache": False}, "drafts": {"prompt_lookup_num_tokens": 3, "eos_token_id": [99]}}


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("given", ["base model", "wrapper", "adapter", "inside an adapter"])
def test_the_prompt_ends_where_generate_says(given, options):
    """Stage 2's query is the prompt's last token, whichever object apply_sts was given or runs generate()."""
    model = models.build("llava")
    prompt = models.prompt_of("llava", 1, seed=5)
    prompt.ids += models.words(3, 7) * 4
    adapted = lora(model) if "adapter" in given else model
    target = {"base model": model.model, "wrapper": models.Wrapper(model), "adapter": adapted}.get(given, model)
    with apply_sts(model, CONFIG):
        want = models.generate(model, [prompt], 6, eos_token_id=[99]).sequences
    with apply_sts(target, CONFIG):
        for called in {id(m): m for m in (model, adapted)}.values():
            got = models.generate(called, [prompt], 6, **{"eos_token_id": [99], **OPTIONS[options]}).sequences
            length = min(got.shape[1], want.shape[1])
            assert length > len(prompt.ids) + 2
            assert torch.equal(got[:, :length], want[:, :length])


# --- adapters ---


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
@pytest.mark.parametrize("family", models.FAMILIES)
def test_an_adapter_added_while_active(family):
    prompts = rows(family)
    model = models.build(family)
    adapted = lora(model)
    plain = logits(adapted, prompts)
    with apply_sts(model, CONFIG):
        want = logits(adapted, prompts)
    model = models.build(family)
    handle = apply_sts(model, CONFIG)
    adapted = lora(model)
    assert torch.equal(logits(adapted, prompts), want)
    handle.remove()
    assert torch.equal(logits(adapted, prompts), plain)
    assert not torch.equal(plain, want)


def test_a_projector_trained_by_an_adapter():
    """peft copies the projector with its hooks, and runs the copy: pruning still applies."""
    peft = pytest.importorskip("peft")
    model, prompts = models.build("llava"), rows("llava")
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["multi_modal_projector"])
    with apply_sts(model, CONFIG):
        want = logits(model, prompts)
        adapted = peft.get_peft_model(model, config).eval()
        torch.testing.assert_close(logits(adapted, prompts), want, rtol=0, atol=1e-4 * want.abs().max().item())


# --- the user's default device and dtype ---


@pytest.mark.parametrize("scope", ["image", "crop"])
@pytest.mark.parametrize("family", models.FAMILIES)
def test_default_device_and_dtype(family, scope):
    model = models.shared(family)
    clips = int(family in ("video_llava", "qwen2_vl", "qwen3_vl", "llava_onevision"))
    prompts = [models.prompt_of(family, 1, clips, seed=1), models.prompt_of(family, 2, seed=2)]
    inputs = models.batch(model, prompts)
    config = STSConfig(keep=10, keep_after=4, prune_layer=3, anchor="saliency", scope=scope)

    def run():
        out = model.generate(
            **inputs, max_new_tokens=2, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
        return models.logits_of(out)

    with torch.device("meta"):
        try:
            run()
        except NotImplementedError as error:
            pytest.skip(f"the plain model cannot: {error}")
    with apply_sts(model, config) as sts:
        want, table = run(), str(sts.report)
        torch.set_default_dtype(torch.float64)
        try:
            with torch.device("meta"):
                assert torch.equal(run(), want)
                assert str(sts.report) == table
        finally:
            torch.set_default_dtype(torch.float32)


def test_a_hook_that_another_thread_takes_off():
    """torch then calls the hook without keyword arguments: it returns None."""
    with apply_sts(models.shared("llava"), CONFIG):
        layer = models.shared("llava").model.language_model.layers[0]
        (hook,) = layer._forward_pre_hooks.values()
        assert hook(layer, ()) is None


def test_a_method_is_shadowed_twice():
    target, inner, outer = torch.nn.Identity(), hooks.Hooks(), hooks.Hooks()
    inner.shadow(target, "forward", lambda original, x: original(x) + 1)
    outer.shadow(target, "forward", lambda original, x: original(x) * 10)
    assert target(2) == 30
    outer.remove()
    assert target(2) == 3
    inner.remove()
    assert target(2) == 2


def test_a_failed_prompt_frees_its_pixels():
    model = models.build("llava")
    inputs = models.batch(model, rows("llava"))
    inputs["input_ids"][0, -1] = models.IMAGE  # one placeholder too many
    pixels = weakref.ref(inputs["pixel_values"])
    with apply_sts(model, CONFIG):
        with pytest.raises(ValueError, match="do not match"):
            model.generate(**inputs, max_new_tokens=2)
        del inputs
        gc.collect()
        assert pixels() is None


def test_a_wrapper_that_calls_the_model_its_language_model():
    class Outer(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.language_model = inner

    model = models.build("llava")
    with apply_sts(Outer(model), CONFIG) as sts:
        assert sts.base is model.model
