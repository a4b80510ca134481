"""Pruned models at the speed of the device: encoder, prefill and decode as functions of fixed shapes, each one graph.

driver     stock generate() stays the loop; which calls it serves, buckets, errors
layout     a batch of prompts as numbers of fixed shapes, on the host
encoder    vision encoder and projector, on what a method keeps
runner     pruned prefill and decode of an LLM
graphs     how such functions are run: as they are, compiled, captured in CUDA graphs
"""

from .driver import Bucket, Captured, check, check_backend, sizes

__all__ = ["Bucket", "Captured", "check", "check_backend", "sizes"]
