"""Pruning methods as plain tensor code."""

from .config import STSConfig, STSPlan
from .keep_top import keep_top

__all__ = ["STSConfig", "STSPlan", "keep_top"]
