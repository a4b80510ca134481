"""Models that something else has changed: wrappers, torch.compile, accelerate's offload."""

import pytest
import torch

from sts_kernels import STSConfig
from sts_kernels.integrations.transformers import apply_sts, prune

from . import models

CONFIG = STSConfig(keep=10, keep_after=4, prune_layer=3)


@pytest.mark.parametrize(
    ("what", "order"),
    [
        ("a layer", "compiled first"),
        *(
            pytest.param(what, order, marks=pytest.mark.slow)
            for what in ("model", "layers")
            for order in ("compiled first", "applied first")
        ),
    ],
)
def test_compile(what, order):
    """Answers are the same under torch.compile; graph breaks at the hooks are allowed."""
    torch._dynamo.reset()
    model = models.build("llava")
    prompts = [models.prompt_of("llava", n, seed=n) for n in (1, 2)]
    with apply_sts(model, CONFIG):
        expected = models.logits_of(models.generate(model, prompts, 3))
    plain = models.logits_of(models.generate(model, prompts, 3))
    handle = apply_sts(model, CONFIG) if order == "applied first" else None
    if what == "model":
        model.forward = torch.compile(model.forward, backend="eager", dynamic=True)
    else:
        layers = model.model.language_model.layers
        for layer in layers if what == "layers" else layers[CONFIG.prune_layer : CONFIG.prune_layer + 1]:
            layer.compile(backend="eager", dynamic=True)
    if order == "compiled first":  # graphs from before the hooks must not be used again
        models.generate(model, prompts, 3)
    handle = handle or apply_sts(model, CONFIG)
    actual = models.logits_of(models.generate(model, prompts, 3))
    handle.remove()
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(models.logits_of(models.generate(model, prompts, 3)), plain, rtol=0, atol=1e-4)
    torch._dynamo.reset()


@pytest.mark.parametrize("order", ["offloaded first", "applied first"])
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_offload(family, order, device):
    """Logits are bit-equal when accelerate offloads the weights to the CPU until their module runs."""
    accelerate = pytest.importorskip("accelerate")
    model = models.build(family, "sdpa", device)
    prompts = [models.prompt_of(family, n, seed=n) for n in (1, 2)]
    with apply_sts(model, CONFIG):
        expected = models.logits_of(models.generate(model, prompts))
    handle = apply_sts(model, CONFIG) if order == "applied first" else None
    inputs = models.batch(model, prompts)
    accelerate.cpu_offload(model, execution_device=device)
    handle = handle or apply_sts(model, CONFIG)
    out = model.generate(**inputs, max_new_tokens=4, do_sample=False, output_logits=True, return_dict_in_generate=True)
    handle.remove()
    assert torch.equal(models.logits_of(out), expected)


@pytest.mark.parametrize("method", ["pyramiddrop", "fastervlm", "divprune"])
def test_offload_of_other_methods(method, device):
    """Offloading works although a cut by the next layer's attention stops that layer's forward half way."""
    accelerate = pytest.importorskip("accelerate")
    model = models.build("llava", "sdpa", device)
    prompts = [models.prompt_of("llava", n, seed=n) for n in (1, 2)]
    options = {} if method == "pyramiddrop" else {"budget": 8}
    with prune(model, method, **options):
        expected = models.logits_of(models.generate(model, prompts))
    inputs = models.batch(model, prompts)
    accelerate.cpu_offload(model, execution_device=device)
    with prune(model, method, **options):
        for _ in range(2):
            out = model.generate(
                **inputs, max_new_tokens=4, do_sample=False, output_logits=True, return_dict_in_generate=True
            )
            assert torch.equal(models.logits_of(out), expected)


@pytest.mark.parametrize("part", ["wrapper", "base model"])
def test_parts_and_wrappers(part):
    model = models.shared("llava")
    inputs = models.batch(model, [models.prompt_of("llava", n, seed=n) for n in (1, 2)])
    target = model.model if part == "base model" else models.Wrapper(models.Wrapper(model))
    with torch.no_grad():
        plain = model(**inputs).logits[:, -1]
        with apply_sts(model, CONFIG):
            expected = model(**inputs).logits[:, -1]
        with apply_sts(target, CONFIG):
            actual = model(**inputs).logits[:, -1]
        after = model(**inputs).logits[:, -1]
    assert torch.equal(actual, expected)
    assert torch.equal(after, plain)
    assert (plain - expected).abs().max() > 1e-2
