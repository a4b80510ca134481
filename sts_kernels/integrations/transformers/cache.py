"""A pruned prompt in a key/value cache: every layer keeps its own length, and the cache tells both lengths."""

import torch
from transformers import Cache

_STATE = "_sts_prompt"


class PrunedPrompt:
    """What of a prompt of `length` columns a cache holds: `lengths[0]` columns in the layers before `prune_layer`,
    `lengths[1]` from it on. `valid[g]` (B, lengths[g]) bool tells tokens from pad slots there; None: all are tokens."""

    def __init__(self, length: int, width: int, valid: torch.Tensor | None, prune_layer: int):
        self.length = length
        self.lengths = [width, width]
        self.valid = [valid, valid]
        self.prune_layer = prune_layer
        self.ragged = False  # whether a later turn came with an attention mask, which may hold padding
        self.running = False  # whether the hooks are around the text model right now

    @property
    def hidden(self) -> int:
        """Columns that callers count and layer 0 does not hold."""
        return self.length - self.lengths[0]

    def cut(self, width: int, valid: torch.Tensor | None) -> None:
        self.lengths[1], self.valid[1] = width, valid

    def trim(self, columns: int) -> None:
        """Forgets the last columns: they follow the prompt, and may be taken back."""
        self.length -= columns
        self.lengths = [n - columns for n in self.lengths]
        self.valid = [v if v is None else v[:, : v.shape[1] - columns] for v in self.valid]

    def rows(self, index: torch.Tensor) -> None:
        self.valid = [v if v is None else v.index_select(0, index.to(v.device)) for v in self.valid]


class PrunedCache:
    """Mixed into the class of a cache that holds a pruned prompt. `get_seq_length` counts the columns the caller sees;
    masks are built on the columns that are there."""

    def get_seq_length(self, *args, **kwargs):
        held = super().get_seq_length(*args, **kwargs)
        return held + self._sts_prompt.hidden if held else 0

    def get_query_offset(self, layer_idx: int = 0):
        return super().get_seq_length(layer_idx)

    def update(self, *args, **kwargs):
        if not self._sts_prompt.running:
            raise RuntimeError(
                "this cache holds a prompt that STS pruned, and can be continued only while apply_sts is active on the "
                "model; apply it again, or start from an empty cache"
            )
        return super().update(*args, **kwargs)

    def crop(self, tokens: int):
        """Takes a negative number of columns to remove or, as before transformers 5, the length to leave."""
        remove = tokens if tokens <= 0 else tokens - self.get_seq_length()
        if remove < 0:
            for layer in self.layers:
                layer.crop(remove)

    def reorder_cache(self, beam_idx):
        self._sts_prompt.rows(beam_idx)
        return super().reorder_cache(beam_idx)

    def batch_select_indices(self, indices):
        self._sts_prompt.rows(indices)
        return super().batch_select_indices(indices)

    def batch_repeat_interleave(self, repeats: int):
        prompt = self._sts_prompt
        prompt.valid = [v if v is None else v.repeat_interleave(repeats, dim=0) for v in prompt.valid]
        return super().batch_repeat_interleave(repeats)


_pruned_classes: dict[type, type] = {}


def attach(cache: Cache, prompt: PrunedPrompt) -> None:
    """Marks `cache` as holding a pruned prompt."""
    kind = type(cache)
    if kind not in _pruned_classes:
        _pruned_classes[kind] = type(f"Pruned{kind.__name__}", (PrunedCache, kind), {})
    setattr(cache, _STATE, prompt)
    cache.__class__ = _pruned_classes[kind]


def pruned_prompt(cache: Cache | None) -> PrunedPrompt | None:
    """The pruned prompt in `cache`. A cache that was reset, or cropped into its prompt, becomes a plain one again."""
    prompt = getattr(cache, _STATE, None)
    if prompt is None:
        return None
    if held(cache, 0) < prompt.lengths[0]:
        delattr(cache, _STATE)
        cache.__class__ = type(cache).__mro__[2]
        return None
    return prompt


def held(cache: Cache | None, layer: int) -> int:
    """Columns that `layer` of the cache really holds."""
    if cache is None or layer >= len(cache.layers):
        return 0
    return int(cache.layers[layer].get_seq_length())
