"""A decode step runs no hook that it does not need, and pruned prompts stay off cuDNN's attention."""

import pytest
import torch

from sts_kernels import STSConfig
from sts_kernels.integrations.transformers import apply_sts, cudnn

from . import flash, models
from .models import CACHE, output_cache

CONFIG = STSConfig(keep=10, keep_after=4, prune_layer=3)


def watch(model, look) -> tuple[list, list]:
    """-> values of `look()` inside the last layer, one per forward, and the hooks to remove."""
    seen, layer = [], model.model.language_model.layers[-1]
    return seen, [layer.mlp.register_forward_pre_hook(lambda *args: seen.append(look()))]


@pytest.mark.parametrize("attention", ["sdpa", flash.NAME])
@pytest.mark.parametrize("family", models.FAMILIES)
def test_layers_have_hooks_only_where_they_need_other_arguments(family, attention):
    model = flash.use(models.build(family)) if attention == flash.NAME else models.build(family, attention)
    layers = model.model.language_model.layers
    seen, watching = watch(model, lambda: [len(layer._forward_pre_hooks) for layer in layers])
    alone, several = [models.prompt_of(family, 1, seed=1)], [models.prompt_of(family, n, seed=n) for n in (1, 2)]
    with apply_sts(model, CONFIG):
        models.generate(model, alone, 3)
        assert seen == [[1] * 6, [1] + [0] * 5, [1] + [0] * 5]
        assert [len(layer._forward_pre_hooks) for layer in layers] == [1] + [0] * 5
        seen.clear()
        models.generate(model, [models.prompt_of(family, 0)], 2)  # nothing to prune
        assert seen == [[1] + [0] * 5] * 2
        seen.clear()
        models.generate(model, several, 2)  # padded: a mask for either part of the layers
        assert seen == [[1] * 6] * 2
    assert [len(layer._forward_pre_hooks) for layer in layers] == [0] * 6
    watching[0].remove()


@pytest.fixture
def on_cuda(monkeypatch):
    """Prompts count as on a GPU; the switch of cuDNN's attention works on every machine."""
    monkeypatch.setattr(cudnn, "concerns", lambda x: True)
    assert torch.backends.cuda.cudnn_sdp_enabled()
    yield
    assert torch.backends.cuda.cudnn_sdp_enabled()


@pytest.mark.parametrize("allowed", [False, True])
def test_cudnn_attention(allowed, on_cuda):
    model, prompt = models.build("llava"), [models.prompt_of("llava", 1, seed=1)]
    seen, watching = watch(model, torch.backends.cuda.cudnn_sdp_enabled)
    with apply_sts(model, CONFIG, cudnn_attention=allowed):
        models.generate(model, prompt, 3)
        assert seen == [allowed] * 3
        assert torch.backends.cuda.cudnn_sdp_enabled()
        seen.clear()
        models.generate(model, [models.prompt_of("llava", 0)], 2)
        with torch.no_grad():
            first = model(**models.batch(model, prompt))
            model(input_ids=torch.tensor([[5]]), **{CACHE: output_cache(first)})
        assert seen == [True] * 2 + [allowed] * 2
    with apply_sts(model, STSConfig(budget=1.0), cudnn_attention=allowed):
        seen.clear()
        models.generate(model, prompt, 2)
        assert seen == [True] * 2
    watching[0].remove()


def test_cudnn_attention_after_an_error(on_cuda):
    model, prompt = models.build("llava"), [models.prompt_of("llava", 1, seed=1)]

    def explode(*args):
        raise RuntimeError("boom")

    hook = model.model.language_model.layers[4].mlp.register_forward_pre_hook(explode)
    with apply_sts(model, CONFIG):
        with pytest.raises(RuntimeError, match="boom"):
            models.generate(model, prompt, 2)
        assert torch.backends.cuda.cudnn_sdp_enabled()
    hook.remove()


def test_cudnn_attention_that_the_user_turned_off(on_cuda):
    model, prompt = models.build("llava"), [models.prompt_of("llava", 1, seed=1)]
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        with apply_sts(model, CONFIG):
            models.generate(model, prompt, 2)
            assert not torch.backends.cuda.cudnn_sdp_enabled()
        assert not torch.backends.cuda.cudnn_sdp_enabled()
    finally:
        torch.backends.cuda.enable_cudnn_sdp(True)


def test_the_llm_by_itself_continues_a_pruned_prompt_by_ids():
    """On a pruned cache, ids and their embeddings give the LLM's output bit for bit alike."""
    model = models.build("llava")
    inputs = models.batch(model, [models.prompt_of("llava", 1, seed=1)])
    ids, embedding = torch.tensor([[5, 6]]), model.get_input_embeddings()
    with apply_sts(model, CONFIG), torch.no_grad():
        found = []
        for given in ({"input_ids": ids}, {"inputs_embeds": embedding(ids)}):
            cache = output_cache(model(**inputs, use_cache=True))
            found.append(model.model.language_model(**given, **{CACHE: cache}).last_hidden_state)
    assert torch.equal(*found)
