"""Compiled pruned models: encoder, prefill and decode step as functions of fixed shapes, one graph each.

driver     serves the forwards of stock generate(): which bucket, errors
refusals   methods, models and calls that graphs do not serve
layout     a batch of prompts -> host tensors of fixed shapes
encoder    vision encoder, selection and projector
runner     pruned prefill and decode step of an LLM
graphs     runs such functions as they are, compiled, or captured in CUDA graphs
"""

from .driver import Bucket, Captured
from .refusals import check, check_backend, sizes

__all__ = ["Bucket", "Captured", "check", "check_backend", "sizes"]
