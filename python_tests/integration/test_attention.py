"""Masks for each attention implementation, FlashAttention's conventions, and no read-back while decoding."""

import importlib.util

import pytest
import torch

from sts_kernels import STSConfig
from sts_kernels.integrations.transformers import apply_sts, masks

from . import flash, models
from .models import CACHE, output_cache

CONFIG = STSConfig(keep=10, keep_after=4, prune_layer=3)


def allowed_by_hand(valid, queries: int, past: int) -> torch.Tensor:
    rows = 1 if valid is None else len(valid)
    out = torch.zeros(rows, queries, past + queries, dtype=torch.bool)
    for row in range(rows):
        for query in range(queries):
            for key in range(past + queries):
                token = valid is None or bool(valid[row, key])
                out[row, query, key] = (token and key <= past + query) or key == past + query
    return out


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(("queries", "past"), [(1, 0), (1, 5), (4, 0), (3, 5)])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_masks(attention, queries, past, padded):
    valid = None
    if padded:
        valid = torch.ones(2, past + queries, dtype=torch.bool)
        valid[0, :2] = False
    like = torch.zeros(1, dtype=torch.bfloat16)
    mask = masks.attention_mask(attention, valid, queries, past, like)
    expected = allowed_by_hand(valid, queries, past)
    if mask is None:  # the kernel's own causal mask, or none at all, must be enough
        square = attention == "sdpa" and past == 0
        assert not padded
        assert square or bool(expected.all())
        return
    assert mask.shape == (len(expected), 1, queries, past + queries)
    if attention == "eager":
        assert mask.dtype == torch.bfloat16
        assert set(mask.flatten().tolist()) <= {0.0, torch.finfo(torch.bfloat16).min}
        mask = mask == 0
    assert torch.equal(mask[:, 0], expected)


def test_flash_masks_are_two_dimensional():
    like, valid = torch.zeros(1), torch.ones(2, 7, dtype=torch.bool)
    assert masks.attention_mask("flash_attention_2", None, 7, 0, like) is None
    assert masks.attention_mask("flash_attention_2", valid, 3, 4, like) is valid


def test_compact():
    keep = torch.tensor([[1, 0, 1, 0, 1], [0, 0, 0, 1, 0]]).bool()
    columns, valid = masks.compact(keep, 3)
    assert columns[valid].tolist() == [0, 2, 4, 3]
    assert valid.tolist() == [[True] * 3, [False, False, True]]
    columns, valid = masks.compact(torch.zeros(2, 3, dtype=torch.bool), 0)
    assert columns.shape == valid.shape == (2, 0)


@pytest.mark.parametrize("family", models.FAMILIES)
def test_flash_conventions(family):
    """Under the emulation every family answers as under SDPA; no gap in the positions is taken for packed sequences."""
    plain, emulated = models.shared(family), flash.use(models.build(family))
    for prompts in ([models.prompt_of(family, 1, seed=1)], [models.prompt_of(family, n, seed=n) for n in (1, 2, 0)]):
        with apply_sts(plain, CONFIG):
            expected = models.generate(plain, prompts)
        with apply_sts(emulated, CONFIG), flash.counting() as packed:
            actual = models.generate(emulated, prompts)
            assert packed() == 0
        torch.testing.assert_close(models.logits_of(actual), models.logits_of(expected), rtol=0, atol=2e-4)
    if family in ("qwen2_5_vl", "internvl", "llava"):
        with apply_sts(plain, STSConfig(keep=9, keep_after=1.0, anchor="saliency")):
            expected = models.generate(plain, prompts)
        with apply_sts(emulated, STSConfig(keep=9, keep_after=1.0, anchor="saliency")):
            actual = models.generate(emulated, prompts)
        torch.testing.assert_close(models.logits_of(actual), models.logits_of(expected), rtol=0, atol=2e-4)


@pytest.mark.parametrize("implementation", ["flash_attention_2", "flash_attention_3"])
@pytest.mark.parametrize("family", models.FAMILIES)
def test_flash_attention(family, implementation, cuda):
    """Real kernels, in bfloat16, against SDPA on the same weights."""
    package = {"flash_attention_2": "flash_attn", "flash_attention_3": "flash_attn_interface"}[implementation]
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"needs {package}")
    plain = models.build(family, "sdpa", cuda, torch.bfloat16)
    other = models.build(family, implementation, cuda, torch.bfloat16)
    prompts = [models.prompt_of(family, n, seed=n) for n in (1, 2, 0)]
    config = STSConfig(keep=10, keep_after=1.0)  # scores of bfloat16 layers differ enough to choose otherwise
    with apply_sts(plain, config), apply_sts(other, config):
        expected, actual = (models.logits_of(models.generate(m, prompts, 1)) for m in (plain, other))
    torch.testing.assert_close(actual, expected, rtol=0, atol=0.1 * expected.abs().max().item())


class Readbacks(torch.utils._python_dispatch.TorchDispatchMode):
    """Records the ops that would make the host wait for a GPU: reads of values, and of sizes that depend on values."""

    NAMES = ("_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "equal", "unique")

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        indexed = name == "index" and any(i is not None and i.dtype == torch.bool for i in args[1])
        if name in self.NAMES or indexed:
            self.found.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("attention", ["sdpa", "eager", flash.NAME])
@pytest.mark.parametrize("family", models.FAMILIES)
def test_decoding_reads_nothing_back(family, attention):
    """In the same decode steps the pruned model reads back no more than the plain one.

    Ragged and uniform batches, with the mask and positions that generate() passes in each step.
    """
    model = flash.use(models.build(family)) if attention == flash.NAME else models.shared(family, attention)
    for prompts in ([models.prompt_of(family, 1, seed=1)], [models.prompt_of(family, n, seed=n) for n in (1, 2)]):
        counts = []
        for pruned in (False, True):
            handle = apply_sts(model, CONFIG) if pruned else None
            inputs = models.batch(model, prompts)
            with torch.no_grad():
                out = model(**inputs, use_cache=True)
                mask, length = inputs["attention_mask"], inputs["input_ids"].shape[1]
                with Readbacks() as readbacks:
                    for step in range(2):
                        mask = torch.cat([mask, mask.new_ones(len(prompts), 1)], dim=1)
                        out = model(
                            input_ids=torch.full((len(prompts), 1), 5),
                            attention_mask=mask,
                            position_ids=torch.full((len(prompts), 1), length + step),
                            **{CACHE: output_cache(out)},
                            use_cache=True,
                        )
                counts.append(len(readbacks.found))
            if handle:
                handle.remove()
        assert counts[1] <= counts[0], readbacks.found


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", models.FAMILIES)
def test_decoding_does_not_sync(family, attention, cuda):
    """Under CUDA's sync debug mode, a decode step with the hooks on does not synchronise."""
    model = models.shared(family, attention, cuda)
    for prompts in ([models.prompt_of(family, 1, seed=1)], [models.prompt_of(family, n, seed=n) for n in (1, 2)]):
        for pruned in (False, True):
            handle = apply_sts(model, CONFIG) if pruned else None
            inputs = models.batch(model, prompts)
            length = inputs["input_ids"].shape[1]
            token = torch.full((len(prompts), 1), 5, device=cuda)
            positions = torch.full((len(prompts), 1), length, device=cuda)
            try:
                with torch.no_grad():
                    cache = output_cache(model(**inputs, use_cache=True))
                    torch.cuda.synchronize()
                    torch.cuda.set_sync_debug_mode("error")
                    model(input_ids=token, position_ids=positions, **{CACHE: cache}, use_cache=True)
            except RuntimeError as error:
                if pruned or "synchroniz" not in str(error):
                    raise
                pytest.skip(f"the plain model itself syncs: {error}")
            finally:
                torch.cuda.set_sync_debug_mode("default")
                if handle:
                    handle.remove()
