"""One file a model family, found by its name."""

import importlib
import pkgutil

from .base import EncodeCall, EncoderShape, Features, FixedEncoder, ModelAdapter

_modules = sorted(module.name for module in pkgutil.iter_modules(__path__) if module.name != "base")
ADAPTERS = tuple(adapter for name in _modules for adapter in importlib.import_module(f".{name}", __name__).ADAPTERS)

__all__ = ["ADAPTERS", "EncodeCall", "EncoderShape", "Features", "FixedEncoder", "ModelAdapter", "adapter_of"]


def adapter_of(model_type: str) -> ModelAdapter | None:
    return next((adapter for adapter in ADAPTERS if model_type in adapter.model_types), None)
