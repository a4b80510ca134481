"""Versions of transformers: names of the cache, arguments by position, forwards that pruning does not know."""

import copy
import inspect
import warnings

import pytest
import torch

from sts_kernels import STSConfig
from sts_kernels.integrations.transformers import apply_sts, compat

from . import models
from .models import CACHE, output_cache
from .test_identity import footprint
from .test_refusals import one_sentence

CONFIG = STSConfig(keep=10, keep_after=4, prune_layer=3)


@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated")
@pytest.mark.parametrize("name", ["cache", "past_key_values"])
@pytest.mark.parametrize("family", models.FAMILIES)
def test_a_cache_by_either_name(family, name):
    """Both argument names take the caller's cache, in the prompt and in the next step."""
    model = models.shared(family)
    if name not in models.model_arguments(model) and CACHE == "past_key_values":
        pytest.skip(f"transformers {models.transformers.__version__} knows no {name}")
    inputs = models.batch(model, [models.prompt_of(family, 1, seed=1)])
    step = {"input_ids": torch.tensor([[5]]), "position_ids": torch.tensor([[inputs["input_ids"].shape[1]]])}
    logits = []
    with apply_sts(model, CONFIG), torch.no_grad():
        for given in (CACHE, name):
            cache = models.transformers.DynamicCache()
            first = model(**inputs, **{given: cache})
            assert output_cache(first) is cache
            logits.append(torch.cat([first.logits[:, -1:], model(**step, **{given: cache}).logits], 1))
    assert torch.equal(*logits)


def by_position(module, arguments: dict, last: str) -> tuple[list, dict]:
    """Arguments up to `last` by position, all others by name."""
    order = list(inspect.signature(module.forward).parameters)
    order = order[: order.index(last) + 1]
    return [arguments.get(name) for name in order], {n: v for n, v in arguments.items() if n not in order}


@pytest.mark.parametrize("family", models.FAMILIES)
def test_arguments_by_position(family):
    """The base model takes its arguments by position, and so does the LLM, which transformers calls by name."""
    model = models.shared(family)
    inputs = models.batch(model, [models.prompt_of(family, 1, seed=1)])
    base, text, seen = model.model, model.model.language_model, []
    pixels = next(name for name in inputs if "pixel" in name)
    with torch.no_grad():
        plain = base(**inputs)[0]
        with apply_sts(model, CONFIG):
            expected = base(**inputs)[0]
            args, kwargs = by_position(base, inputs, pixels)
            assert torch.equal(base(*args, **kwargs)[0], expected)
            assert not torch.equal(expected, plain)

            hook = text.register_forward_pre_hook(lambda m, args, kwargs: seen.append(kwargs), with_kwargs=True)
            out = base(**inputs, use_cache=True)
            hook.remove()
            embeds = text.embed_tokens(torch.tensor([[5]]))
            step = {"inputs_embeds": embeds, "position_ids": seen[0]["position_ids"], CACHE: output_cache(out)}
            step["position_ids"] = None if step["position_ids"] is None else step["position_ids"][..., -1:] + 1
            twin = copy.deepcopy(step)
            args, kwargs = by_position(text, step, "inputs_embeds")
            assert torch.equal(text(*args, **kwargs, use_cache=True)[0], text(**twin, use_cache=True)[0])


@pytest.mark.parametrize("family", models.FAMILIES)
def test_outputs_as_tuples(family):
    model = models.shared(family)
    inputs = models.batch(model, [models.prompt_of(family, 1, seed=1)])
    with apply_sts(model, CONFIG), torch.no_grad():
        assert torch.equal(model(**inputs, return_dict=False)[0], model(**inputs).logits)


@pytest.mark.parametrize("part", ["the base model", "the LLM", "a layer"])
def test_a_forward_that_pruning_does_not_know(part, monkeypatch):
    """An unknown signature is refused when STS is applied, not in the middle of a prompt."""
    model = models.build("llava")
    text = model.model.language_model
    module, argument = {
        "the base model": (model.model, "inputs_embeds"),
        "the LLM": (text, CACHE),
        "a layer": (text.layers[0], "position_embeddings"),
    }[part]
    before, signature = footprint(model), inspect.signature(type(module).forward)
    others = [p for p in signature.parameters.values() if p.name != argument]

    def forward(self, *args, **kwargs):
        raise AssertionError("it must not come to that")

    forward.__signature__ = signature.replace(parameters=others)
    monkeypatch.setattr(type(module), "forward", forward)
    with pytest.raises(
        NotImplementedError, match=rf"{type(module).__name__}\.forward .* has no argument .*{argument}"
    ) as e:
        apply_sts(model, CONFIG)
    one_sentence(e)
    assert footprint(model) == before


def test_an_untested_version_warns_once(monkeypatch):
    model = models.shared("llava")
    monkeypatch.setattr(compat, "version", lambda: (99, 0))
    compat._warn_untested.cache_clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            apply_sts(model, CONFIG).remove()
    (said,) = caught
    assert "tested on transformers 4.57 to" in str(said.message)
    compat._warn_untested.cache_clear()
    monkeypatch.undo()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        apply_sts(model, CONFIG).remove()
