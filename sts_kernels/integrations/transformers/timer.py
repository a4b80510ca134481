"""Times of a prompt's phases, for profile=True."""

import contextlib
import time
from collections.abc import Iterator

import torch

from .session import Session


class Timer:
    """`with timer(session, name)` times what a session does; without `on` it does nothing."""

    def __init__(self, module: torch.nn.Module, on: bool):
        self.module, self.on = module, on

    def start(self, session: Session) -> None:
        if self.on:
            session.clock["start"] = self._now()

    def stop(self, session: Session, name: str) -> None:
        if self.on and "start" in session.clock:
            session.clock[name] = 1e3 * (self._now() - session.clock.pop("start"))

    def take(self, session: Session) -> dict[str, float]:
        """Times of the prompt that ends here, in ms; the next prompt starts without any."""
        times, session.clock = session.clock, {}
        return times

    @contextlib.contextmanager
    def __call__(self, session: Session, name: str) -> Iterator[None]:
        self.start(session)
        try:
            yield
        finally:
            self.stop(session, name)

    def _now(self) -> float:
        if any(parameter.is_cuda for parameter in self.module.parameters()):
            torch.cuda.synchronize()
        return time.perf_counter()
