"""Pool: the checked input of one selection."""

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from .. import _checks

ARGUMENTS = {  # signal -> argument of `Method.select`
    "features": "features",
    "attention": "scores",
    "relevance": "scores",
    "keys": "keys",
    "text": "text",
}
SHAPES = {"features": "(B, N, C)", "scores": "(B, N)", "keys": "(B, N, D)", "text": "(B, M, C)"}
ABSENT = cast(Tensor, None)  # a signal that is not given; a method reads only the signals that it names


@dataclass(frozen=True)
class Pool:
    """B items of up to N tokens each, to select k tokens from. Values of padding tokens are unspecified.

    Attributes:
        k: slots of each item.
        count: (B,) int64, tokens of each item.
        present: (B, N) bool mask of the first count[b] tokens.
        num_tokens: `count`; None: all items have N tokens.
        features, scores, text, keys: shapes as in `SHAPES`; ABSENT if not given.
    """

    k: int
    count: Tensor
    present: Tensor
    num_tokens: Tensor | None = None
    features: Tensor = ABSENT
    scores: Tensor = ABSENT
    text: Tensor = ABSENT
    keys: Tensor = ABSENT

    @property
    def device(self) -> torch.device:
        return self.present.device

    @property
    def batch(self) -> int:
        return self.present.shape[0]

    @property
    def tokens(self) -> int:
        return self.present.shape[1]

    def finite(self, *signals: str) -> Tensor:
        """(B, N) bool: present tokens whose `signals` (names among features, scores and keys) are all finite."""
        usable = self.present
        for name in signals:
            finite = getattr(self, name).isfinite()
            usable = usable & (finite if finite.ndim == 2 else finite.all(-1))
        return usable

    @staticmethod
    def of(
        op: str,
        signals: frozenset[str],
        k: int,
        features: Tensor | None,
        scores: Tensor | None,
        text: Tensor | None,
        keys: Tensor | None,
        num_tokens: Tensor | None,
    ) -> "Pool":
        """Pool of the arguments of `Method.select`, checked; errors name the method `op`."""
        given = {"features": features, "scores": scores, "keys": keys, "text": text}
        for signal in sorted(signals):
            name = ARGUMENTS[signal]
            if given[name] is None:
                raise ValueError(f"{op}: {name} must be a tensor of shape {SHAPES[name]}, got None")
        if features is not None:
            _checks.features(op, features)
        if scores is not None:
            _checks.tensor(op, "scores", scores, _checks.SCORES, "(B, N)")
        for name, value in (("keys", keys), ("text", text)):
            if value is not None:
                _checks.tensor(op, name, value, _checks.FLOATING, SHAPES[name])
        tensors = {name: value for name, value in given.items() if value is not None}
        sizes = [(name, tensors[name]) for name in ("features", "scores", "keys") if name in tensors]
        if not sizes:
            raise ValueError(f"{op}: give features, scores or keys, their shape says how many tokens there are")
        first, like = sizes[0]
        for name, value in [*sizes[1:], *([] if text is None else [("text", text)])]:
            _checks.same_device(op, name, value, like, first)
            equal = 1 if name == "text" else 2
            if value.shape[:equal] != like.shape[:equal]:
                expected = f"{SHAPES[name]} with {'B, N'[: 3 * equal - 2]} = {tuple(like.shape[:equal])} as {first} has"
                raise ValueError(f"{op}: {name} must have shape {expected}, got {tuple(value.shape)}")
        batch, tokens = like.shape[:2]
        _checks.integer(op, "k", k, 1, tokens, " (the number of tokens)")
        if num_tokens is not None:
            _checks.index_vector(op, "num_tokens", num_tokens, batch, "(B,)", like)
            _checks.counts(op, "num_tokens", num_tokens, tokens, "tokens")
        return Pool.sized(k, batch, tokens, like.device, num_tokens, **given)

    @staticmethod
    def sized(k: int, batch: int, tokens: int, device: Any, num_tokens: Tensor | None = None, **signals: Any) -> "Pool":
        """Pool of `batch` items of `tokens` tokens, from checked input. A num_tokens[b] out of range counts as 0."""
        if num_tokens is None:
            count = torch.full((batch,), tokens, dtype=torch.int64, device=device)
        else:
            count = num_tokens.long()
            count = torch.where((count >= 0) & (count <= tokens), count, 0)
        present = torch.arange(tokens, device=device) < count[:, None]
        return Pool(k, count, present, None if num_tokens is None else count, **signals)
