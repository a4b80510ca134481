"""Efficiency numbers printed in papers, recomputed from model sizes. `names()` lists the papers."""

import importlib
import pkgutil

from .base import Accuracy, Number, Paper

__all__ = ["Accuracy", "Number", "Paper", "load", "names"]


def names() -> list[str]:
    """Sorted names of the papers: the modules of this folder, each named as its method; not base.py nor `_*.py`."""
    found = (module.name for module in pkgutil.iter_modules(__path__))
    return sorted(name for name in found if not name.startswith("_") and name != "base")


def load(name: str) -> Paper:
    paper: Paper = importlib.import_module(f".{name}", __name__).paper()
    return paper
