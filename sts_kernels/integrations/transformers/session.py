"""What one thread is doing with a pruned model, phase by phase: it encodes images, places them, prefills, decodes."""

import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from .adapters import EncodeCall
from .layer_pruning import Forward
from .report import Report
from .vision_attention import AttentionCall
from .visual_item import VisualItem


@dataclass
class Encoding:
    """A call of get_image_features or get_video_features under way."""

    call: EncodeCall
    texts: Callable[[list[VisualItem]], list[torch.Tensor]]  # of items, the embeddings of the text beside each
    attention: list[AttentionCall] = field(default_factory=list)  # of the encoder
    # Rows that stay (for methods behind the projector: the items), and the features' shape.
    dropping: tuple[torch.Tensor | list[VisualItem], torch.Size] | None = None


@dataclass
class Placed:
    """A forward of the base model, before it enters the LLM."""

    ids: torch.Tensor | None = None
    mask: torch.Tensor | None = None
    by_embeds: bool = False  # the caller gave embeddings, which may hold encoded features
    prompt_length: int | None = None  # columns of a prompt with images that generate() was given
    columns: int | None = None  # of the prompt and of all that generate() may add
    modality: torch.Tensor | None = None  # (B, S) int8 placeholders of a prompt with images


@dataclass(eq=False)
class Session:
    encoding: Encoding | None = None
    encoded: dict[str, list[VisualItem]] = field(default_factory=dict)  # last, by kind
    # To a caller: items, and the marks in their features.
    handed_out: dict[str, tuple[list[VisualItem], torch.Tensor]] = field(default_factory=dict)
    placed: Placed | None = None
    forward: Forward | None = None  # Prefill or Decoding: inside the LLM
    report: Report | None = None  # of the prompt under way
    checked: bool = False  # whether the options of the innermost generate() were looked at when it started
    clock: dict[str, float] = field(default_factory=dict)


class Sessions(threading.local):
    """`now`: the session of the current thread."""

    def __init__(self, known: "weakref.WeakSet[Session]"):
        self.now = Session()
        known.add(self.now)
