"""KV cache with a pruned prompt: each layer holds its own length, and the cache reports the full one."""

from typing import TYPE_CHECKING, Any

import torch
from transformers import Cache

from .segments import PrunedPrompt

if TYPE_CHECKING:
    from transformers import Cache as MixedInto
else:
    MixedInto = object

_STATE = "_sts_prompt"


class PrunedCache(MixedInto):
    """Mixin for the class of a cache that holds a pruned prompt. `get_seq_length` counts the caller's columns; masks
    are built on the columns that the cache holds."""

    plain_class: type[Cache]
    _sts_prompt: PrunedPrompt

    def get_seq_length(self, *args: Any, **kwargs: Any) -> int:
        length = super().get_seq_length(*args, **kwargs)
        return length + self._sts_prompt.hidden if length else 0

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return super().get_seq_length(layer_idx)

    def update(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        prompt = self._sts_prompt
        if not prompt.running and not (prompt.slots is not None and prompt.slots.active):
            raise RuntimeError(
                "this cache holds a pruned prompt, and can be continued only while the pruning (apply_sts or prune) is "
                "active on the model; apply it again, or start from an empty cache"
            )
        return super().update(*args, **kwargs)

    def crop(self, *args: int, **kwargs: int) -> None:
        """Takes a negative number of columns to remove or, as before transformers 5, the length to leave."""
        (tokens,) = (*args, *kwargs.values())  # the argument's name depends on the version
        length = self.get_seq_length()
        remove = max(tokens if tokens <= 0 else tokens - length, -length)
        if -length < remove < self._sts_prompt.length - length:
            raise NotImplementedError(
                f"sts_kernels: a cache cannot be cropped into its pruned prompt of {self._sts_prompt.length} columns, "
                f"got {length + remove} to leave; start from an empty cache"
            )
        if remove < 0:
            self._shorten(remove, length)

    def _shorten(self, remove: int, length: int) -> None:
        for layer in self.layers:
            layer.crop(remove if remove > -length else -layer.get_seq_length())

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        self._sts_prompt.select_rows(beam_idx)
        super().reorder_cache(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._sts_prompt.select_rows(indices)
        super().batch_select_indices(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._sts_prompt.repeat_rows(repeats)
        super().batch_repeat_interleave(repeats)


_pruned_classes: dict[tuple[type, type], type] = {}


def attach_state(cache: Cache, prompt: PrunedPrompt, mixin: type[PrunedCache] = PrunedCache) -> None:
    """Marks `cache` as holding a pruned prompt."""
    kind = (mixin, type(cache))
    if kind not in _pruned_classes:
        _pruned_classes[kind] = type(f"Pruned{type(cache).__name__}", kind, {"plain_class": type(cache)})
    setattr(cache, _STATE, prompt)
    cache.__class__ = _pruned_classes[kind]


def detach_state(cache: Cache) -> None:
    """Turns `cache` back into a plain cache of its original class."""
    delattr(cache, _STATE)
    cache.__class__ = cache.plain_class


def pruned_state(cache: Cache | None) -> PrunedPrompt | None:
    """The pruned prompt in `cache`. A cache that was emptied becomes a plain one again."""
    prompt: PrunedPrompt | None = getattr(cache, _STATE, None)
    if cache is None or prompt is None or cache.get_seq_length():
        return prompt
    detach_state(cache)
    return None


def columns_behind(cache: Cache, prompt: PrunedPrompt) -> int:
    """Number of columns after the pruned prompt, equal in every layer."""
    return cache.get_seq_length() - prompt.length
