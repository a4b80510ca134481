"""What papers print about efficiency, and what sizes alone give for it. `names()` lists the papers."""

import importlib
import pkgutil

from .base import Accuracy, Number, Paper

__all__ = ["Accuracy", "Number", "Paper", "load", "names"]


def names() -> list[str]:
    """The files of this folder, except base.py and those that start with _; each has the name of its method."""
    found = (module.name for module in pkgutil.iter_modules(__path__))
    return sorted(name for name in found if not name.startswith("_") and name != "base")


def load(name: str) -> Paper:
    paper: Paper = importlib.import_module(f".{name}", __name__).paper()
    return paper
