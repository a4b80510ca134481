"""What one thread is doing with a pruned model: it encodes images, prefills a prompt, or decodes."""

import threading
import weakref
from dataclasses import dataclass, field

import torch

from .families import EncodeCall
from .images import VisualItem
from .report import Report
from .stack import Caller
from .stage2 import Pass


@dataclass(eq=False)
class Session:
    # encoding
    call: EncodeCall | None = None
    dropping: tuple | None = None  # rows that the projector gets, and the shape of its input
    saliency: list[tuple] = field(default_factory=list)  # query, key and scale of the vision encoder's attention
    items: dict[str, list[VisualItem]] = field(default_factory=dict)  # encoded last, by kind
    handed_out: dict[str, tuple] = field(default_factory=dict)  # to a caller: items, and the marks in their features
    # one forward of the base model
    prompt_ids: torch.Tensor | None = None
    caller: Caller | None = None  # of a prompt with images
    found: torch.Tensor | None = None  # placeholders of a prompt with images
    by_ids: bool = False  # the prompt came as ids: no embeddings of the caller's
    # one forward of the text model
    run: Pass | None = None
    report: Report | None = None  # of the prompt under way
    # measure=True
    clock: dict[str, float] = field(default_factory=dict)


class Sessions(threading.local):
    """`now`: the session of the current thread."""

    def __init__(self, known: "weakref.WeakSet[Session]"):
        self.now = Session()
        known.add(self.now)
