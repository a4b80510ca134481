"""Aliases for untyped objects: models of transformers and vLLM, known by the names of their parts and not by class."""

from typing import Any, TypeAlias

Model: TypeAlias = Any  # a whole or a base model, its LLM, its encoder or a part of them
Config: TypeAlias = Any  # of a model; other models have other fields
Args: TypeAlias = tuple[Any, ...]  # of a forward, by position
Kwargs: TypeAlias = dict[str, Any]  # of a forward, by name
