"""Hooks around the LLM and its layers: they pass a prompt to the LayerPruner, and hold the state of a forward."""

import functools
import sys
import threading
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from ...methods import Method, Plan
from . import compat, cudnn, dropped, prompt, unsupported
from .cache import pruned_state
from .hooks import MASKS, Hooks
from .layer_pruning import Forward, LayerPruner, Prefill
from .report import Left, Report, describe
from .session import Placed, Session, Sessions
from .static_cache import StaticSlots, is_static
from .timer import Timer
from .untyped import Args, Kwargs, Model

if TYPE_CHECKING:
    from transformers import Cache


REMOVED = "sts_kernels: the pruning was removed while this thread was inside the model; run the prompt again"


class LLMHooks:
    def __init__(
        self,
        base: Model,
        text: Model,
        method: Method,
        plan: Plan,
        contiguous: bool,
        cudnn_attention: bool,
        sessions: Sessions,
        timer: Timer,
    ):
        self.base, self.text, self.plan, self.sessions, self.timer = base, text, plan, sessions, timer
        self.pruner = LayerPruner(text, method, contiguous)
        self.prompt_length: int | None = None
        self.cudnn_attention = cudnn_attention
        self.report: Report | None = None
        self.generating: set[int] = set()  # ids of threads inside a generate()
        self.handed_out = False  # whether a caller has encoded features
        self.slots = StaticSlots()
        self.active = True
        self._arguments = compat.parameters(text)
        self._layer_hooks = Hooks()
        self._layer_users: weakref.WeakSet[Session] = weakref.WeakSet()  # forwards that need hooks on every layer
        self._layers_stay, self._lock = False, threading.RLock()

    def install(self, hooks: Hooks) -> None:
        hooks.before(self.text, self._before_text)
        hooks.after(self.text, self._after_text)
        hooks.before(self.text.layers[0], self._before_first_layer, layer=0)

    def captured(self) -> dict[int, "functools.partial[None]"]:
        """Scoring layers of the cuts -> attention callbacks."""
        layers = {cut.scoring_layer for cut in self.plan.cuts if cut.queries != "text"}
        return {layer: functools.partial(self._score, layer) for layer in layers}

    def remove(self) -> None:
        with self._lock:
            self.active = False
            self.slots.close()  # caches stop other threads before layers lose their masks
            for session in list(self.sessions.known):
                session.removed |= session.under_way
                self.close(session)
                session.placed = None
            self._layer_hooks.remove()

    def _find_handed_out(self, embeds: torch.Tensor, cache: "Cache | None") -> Placed | None:
        """Placeholders of a prompt that the caller merged with encoded features. None: it has none of them."""
        session = self.sessions.now
        modality = dropped.find(embeds, session.handed_out)
        if modality is None:
            return None
        unsupported.check_gradients(self.base)
        unsupported.check_cache(cache, self.text)
        session.encoded.update({kind: items for kind, (items, _) in session.handed_out.items()})
        caller = unsupported.checked_caller(self.base, session.checked)
        return Placed(prompt_length=caller.prompt_length, columns=caller.columns, modality=modality)

    # --- steps of generate() on a static cache ---

    def create_masks(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Around the library's function that makes masks of a static cache's length.

        A prompt gets its masks inside the LLM, once its dropped tokens are known. A step after a pruned prompt gets its
        masks from `prepare_inputs`.
        """
        like = kwargs.get("inputs_embeds", kwargs.get("input_embeds"))
        new = kwargs["sequence_length"] if like is None else like.shape[1]
        if new > 1 or pruned_state(compat.cache_of(kwargs)) is not None:
            return args[0] if args else kwargs.get("attention_mask")
        return original(*args, **kwargs)

    def prepare_inputs(self, original: Callable[..., Kwargs], *args: Any, **kwargs: Any) -> Kwargs:
        """Around prepare_inputs_for_generation: adds the masks of a step that runs without hooks."""
        inputs = original(*args, **kwargs)
        cache = compat.cache_of(inputs)
        if not is_static(cache):
            return inputs
        prompt, given = pruned_state(cache), inputs.get("input_ids")
        given = inputs["inputs_embeds"] if given is None else given
        if prompt is not None:
            like = torch.empty(*given.shape[:2], 0, dtype=self.base.dtype, device=given.device)
            segments = self.pruner.later_masks(inputs.get("attention_mask"), cache, prompt, like, by_hand=False)
            inputs["attention_mask"] = segments[0]
            inputs[MASKS] = tuple(segments[prompt.segment_of(layer)] for layer in range(len(cache.layers)))
        elif given.shape[1] == 1:
            inputs[MASKS] = ()
        return inputs

    # --- the text model ---

    def _before_text(self, module: torch.nn.Module, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs] | None:
        if module is not self.text:
            return None
        session = self.sessions.now
        self.close(session)  # an interrupt may have ended the last forward
        placed, session.placed = session.placed, None
        given = compat.named(self._arguments, args, kwargs)
        cache, embeds = compat.cache_of(given), given.get("inputs_embeds")
        if embeds is not None and self.handed_out and (placed is None or placed.by_embeds):
            placed = self._find_handed_out(embeds, cache) or placed
        state = pruned_state(cache)
        started: tuple[Forward, Kwargs] | None
        if state is not None:
            given = self.pruner.embedded(given)
            embeds = given["inputs_embeds"]
            by_hand = threading.get_ident() not in self.generating
            started = self.pruner.resume(given, cache, state, by_hand)
        elif placed is None or placed.modality is None or embeds is None or placed.modality.shape != embeds.shape[:2]:
            return None
        else:
            started = self._prefill(session, given, placed, placed.modality)
        if started is None:
            return None
        with self._lock:
            if not self.active:
                raise RuntimeError(REMOVED)
            session.forward, changed = started
            session.forward.prompt.running = True
            if not self.cudnn_attention and cudnn.concerns(embeds):
                cudnn.turn_off(session)
        return (), changed

    def _prefill(
        self, session: Session, kwargs: Kwargs, placed: Placed, modality: torch.Tensor
    ) -> tuple[Prefill, Kwargs] | None:
        embeds, mask = kwargs["inputs_embeds"], unsupported.plain_mask(kwargs.get("attention_mask"))
        valid = None if mask is None else mask.bool()
        prompt_length = placed.prompt_length if self.prompt_length is None else self.prompt_length
        trailing = 0 if prompt_length is None else max(0, embeds.shape[1] - prompt_length)
        marks = dropped.is_dropped(embeds)
        rows = prompt.read_rows(modality, valid, marks.to(modality.device), trailing, session.encoded, self.plan)
        if not any(row.items for row in rows):
            return None
        started = self.pruner.prefill(kwargs, modality, valid, marks, rows, self.plan.cuts, trailing)
        if started is not None and is_static(cache := compat.cache_of(kwargs)):
            most = cache.layers[0].max_cache_len
            columns = most if placed.columns is None else min(most, placed.columns)
            if columns < embeds.shape[1]:
                raise ValueError(
                    f"sts_kernels: the static cache must have room for the prompt of {embeds.shape[1]} columns, "
                    f"got max_cache_len={most}"
                )
            self.slots.give(cache, started[0].prompt, len(embeds), started[0].widths, columns - embeds.shape[1])
        self.report = describe(self.plan, self.text.config, embeds.dtype, rows, modality, marks)
        session.report = self.report
        self.timer.start(session)
        return started

    def _after_text(self, module: torch.nn.Module, args: Args, kwargs: Kwargs, output: Any) -> None:
        if module is not self.text:
            return
        session = self.sessions.now
        forward, report = session.forward, session.report
        try:
            if forward is not None:
                self.pruner.finish(forward, output)
            if report is not None and output is not None:
                self.timer.stop(session, "prefill")
                left: Left = {}
                if isinstance(forward, Prefill):
                    left = {c.cut.layer: slots for c, slots in zip(forward.cuts, forward.left, strict=False)}
                report.finish(left, self.timer.take(session))
        finally:
            self.close(session)

    def close(self, session: Session) -> None:
        """Releases the state of a forward of the text model."""
        if session.forward is None and session.report is None:
            return
        if session.forward is not None:
            session.forward.prompt.running = False
        cudnn.turn_on(session)
        self._release_layers(session)
        session.forward = session.report = None

    # --- decoder layers ---

    def _before_first_layer(self, module: torch.nn.Module, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs] | None:
        """Adds hooks to the other layers if this forward needs them: all layers are called with the first one's
        arguments."""
        session = self.sessions.now
        if session.forward is None:
            return None
        if self.pruner.needs_layers(session.forward, kwargs):
            self._hold_layers(session, session.forward)
        return self.pruner.before_layer(session.forward, 0, module, args, kwargs)

    def _before_layer(
        self, index: int, module: torch.nn.Module, args: Args, kwargs: Kwargs
    ) -> tuple[Args, Kwargs] | None:
        forward = self.sessions.now.forward
        return None if forward is None else self.pruner.before_layer(forward, index, module, args, kwargs)

    def _score(
        self, layer: int, module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, kwargs: Kwargs
    ) -> None:
        forward = self.sessions.now.forward
        if forward is not None:
            self.pruner.score(forward, layer, query, key, kwargs.get("scaling"))

    def _hold_layers(self, session: Session, forward: Forward) -> None:
        with self._lock:
            self._layer_users.add(session)
            # Compiled code does not notice hooks that are added or removed.
            self._layers_stay |= compiled() or forward.prompt.slots is not None
            if self._layer_hooks or not self.active:
                return
            for index, layer in enumerate(self.text.layers):
                if index:
                    self._layer_hooks.before(layer, self._before_layer, index, layer=index)

    def _release_layers(self, session: Session) -> None:
        with self._lock:
            self._layer_users.discard(session)
            if not self._layer_users and not self._layers_stay:
                self._layer_hooks.remove()


def compiled(what: str = "frames") -> bool:
    """Whether torch.compile has compiled any frames, or broken any graph ("graph_break")."""
    dynamo = sys.modules.get("torch._dynamo")
    return dynamo is not None and bool(dynamo.utils.counters[what])
