"""State of one thread that uses a pruned model, phase by phase: encode images, place them, prefill, decode."""

import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from .adapters import EncodeCall
from .layer_pruning import Forward
from .report import Report
from .vision_attention import AttentionCall
from .vision_pruning import Kept
from .visual_item import VisualItem


@dataclass
class Encoding:
    """A call of get_image_features or get_video_features under way."""

    call: EncodeCall
    texts: Callable[[list[VisualItem]], list[torch.Tensor]]  # items -> embeddings of the text of each item's prompt
    attention: list[AttentionCall] = field(default_factory=list)  # of the encoder, so far
    # Kept rows (or the items, for methods that select after the projector), and the shape of the projector's rows.
    dropping: tuple[torch.Tensor | list[VisualItem], torch.Size] | None = None
    kept: Kept | None = None  # where the model interpolates after the projector; the others are dropped after that


@dataclass
class Placed:
    """A forward of the base model, before it enters the LLM."""

    ids: torch.Tensor | None = None
    mask: torch.Tensor | None = None
    by_embeds: bool = False  # the caller gave embeddings, which may hold encoded features
    prompt_length: int | None = None  # columns of the prompt with images that generate() was given
    columns: int | None = None  # columns of the prompt and of all new tokens of generate()
    modality: torch.Tensor | None = None  # (B, S) int8 modality ids of a prompt with images


@dataclass(eq=False)
class Session:
    encoding: Encoding | None = None
    encoded: dict[str, list[VisualItem]] = field(default_factory=dict)  # items encoded last, by kind
    # Encoded for a caller outside the model: items, and the first channel of their features (dropped.of_output).
    handed_out: dict[str, tuple[list[VisualItem], torch.Tensor]] = field(default_factory=dict)
    placed: Placed | None = None
    forward: Forward | None = None  # inside the LLM; a Prefill, or a plain Forward while decoding
    report: Report | None = None  # of the prompt under way
    removed: bool = False  # whether the pruning was removed inside a forward of this thread
    checked: bool = False  # whether the options of the innermost generate() were checked when it started
    clock: dict[str, float] = field(default_factory=dict)

    @property
    def under_way(self) -> bool:
        """Whether this thread is inside a forward that prunes, or that follows a pruned prompt."""
        placed = self.placed is not None and self.placed.modality is not None
        return placed or self.encoding is not None or self.forward is not None


class Sessions(threading.local):
    """`now`: the session of the current thread. known: those of all threads."""

    def __init__(self, known: "weakref.WeakSet[Session]"):
        self.now, self.known = Session(), known
        known.add(self.now)
