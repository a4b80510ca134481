"""A pruned prompt in a key/value cache: every layer keeps its own length, and the cache tells the full one."""

from transformers import Cache

from .segments import PrunedPrompt

_STATE = "_sts_prompt"


class PrunedCache:
    """Mixed into the class of a cache that holds a pruned prompt. `get_seq_length` counts the columns the caller sees;
    masks are built on the columns that are there."""

    def get_seq_length(self, *args, **kwargs):
        length = super().get_seq_length(*args, **kwargs)
        return length + self._sts_prompt.hidden if length else 0

    def get_query_offset(self, layer_idx: int = 0):
        return super().get_seq_length(layer_idx)

    def update(self, *args, **kwargs):
        if not self._sts_prompt.running:
            raise RuntimeError(
                "this cache holds a pruned prompt, and can be continued only while the pruning (apply_sts or prune) is "
                "active on the model; apply it again, or start from an empty cache"
            )
        return super().update(*args, **kwargs)

    def crop(self, tokens: int):
        """Takes a negative number of columns to remove or, as before transformers 5, the length to leave."""
        remove = tokens if tokens <= 0 else tokens - self.get_seq_length()
        if remove < 0:
            for layer in self.layers:
                layer.crop(remove)

    def reorder_cache(self, beam_idx):
        self._sts_prompt.select_rows(beam_idx)
        return super().reorder_cache(beam_idx)

    def batch_select_indices(self, indices):
        self._sts_prompt.select_rows(indices)
        return super().batch_select_indices(indices)

    def batch_repeat_interleave(self, repeats: int):
        self._sts_prompt.repeat_rows(repeats)
        return super().batch_repeat_interleave(repeats)


_pruned_classes: dict[type, type] = {}


def attach_state(cache: Cache, prompt: PrunedPrompt) -> None:
    """Marks `cache` as holding a pruned prompt."""
    kind = type(cache)
    if kind not in _pruned_classes:
        _pruned_classes[kind] = type(f"Pruned{kind.__name__}", (PrunedCache, kind), {})
    setattr(cache, _STATE, prompt)
    cache.__class__ = _pruned_classes[kind]


def pruned_state(cache: Cache | None) -> PrunedPrompt | None:
    """The pruned prompt in `cache`. A cache that was reset, or cropped into its prompt, becomes a plain one again."""
    prompt = getattr(cache, _STATE, None)
    if prompt is None:
        return None
    if layer_length(cache, 0) < prompt.segments[0].length:
        delattr(cache, _STATE)
        cache.__class__ = type(cache).__mro__[2]
        return None
    return prompt


def layer_length(cache: Cache | None, layer: int) -> int:
    """Columns that `layer` of the cache really holds."""
    if cache is None or layer >= len(cache.layers):
        return 0
    return int(cache.layers[layer].get_seq_length())
