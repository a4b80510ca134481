"""FlashAttention's calling convention on the CPU: 2D masks or none, packed sequences inferred from position gaps.

The arithmetic is SDPA's, so results equal SDPA's wherever the arguments are right. A gap in the positions splits the
attention into packed sequences, as in FlashAttention, and is counted.
"""

import contextlib

import torch
from transformers.masking_utils import AttentionMaskInterface, flash_attention_mask
from transformers.modeling_flash_attention_utils import _is_packed_sequence
from transformers.modeling_utils import AttentionInterface

NAME = "emulated_flash"
packed = 0  # number of calls whose positions were taken for packed sequences


def _attention(
    module,
    query,
    key,
    value,
    attention_mask=None,
    scaling=None,
    is_causal=None,
    position_ids=None,
    cu_seq_lens_q=None,
    **_,
):
    global packed
    batch, heads, queries, _ = query.shape
    keys, group = key.shape[2], heads // key.shape[1]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    allowed = torch.ones(batch, 1, queries, keys, dtype=torch.bool, device=query.device)
    if cu_seq_lens_q is not None:
        seam = torch.bucketize(torch.arange(queries, device=query.device), cu_seq_lens_q[1:].long(), right=True)
        allowed = allowed & (seam[:, None] == seam)
    elif attention_mask is not None:
        assert attention_mask.shape == (batch, keys), (attention_mask.shape, (batch, keys))
        allowed = allowed & attention_mask.bool()[:, None, None]
    elif position_ids is not None and queries > 1 and _is_packed_sequence(position_ids, batch):
        packed += 1
        seam = (position_ids[0].diff(prepend=position_ids[0, :1] - 1) != 1).cumsum(0)
        allowed = allowed & (seam[:, None] == seam)
    if module.is_causal if is_causal is None else is_causal:
        allowed = allowed & torch.ones(queries, keys, dtype=torch.bool, device=query.device).tril(keys - queries)
    allowed = allowed | ~allowed.any(-1, keepdim=True)
    assert module.config._attn_implementation == NAME, module.config._attn_implementation
    out = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=allowed, scale=scaling)
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, flash_attention_mask)


def use(model):
    """Sets the emulation as the attention implementation of every part of the model."""
    configs = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}
    for config in list(configs.values()):
        for part in (config, getattr(config, "text_config", None), getattr(config, "vision_config", None)):
            if part is not None:
                part._attn_implementation_internal = NAME
    return model


@contextlib.contextmanager
def counting():
    """Yields a function: the number of calls taken for packed sequences since entry."""
    before = packed
    yield lambda: packed - before
