"""Pruning methods as plain tensor code."""

from .keep_top import keep_top

__all__ = ["keep_top"]
