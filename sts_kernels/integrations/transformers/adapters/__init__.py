"""Model families: every module here except base is one family, found by its presence."""

import importlib
import pkgutil

from .base import EncodeCall, EncoderShape, Features, FixedEncoder, ModelAdapter

_modules = sorted(module.name for module in pkgutil.iter_modules(__path__) if module.name != "base")
_families = [importlib.import_module(f".{name}", __name__) for name in _modules]
ADAPTERS: tuple[ModelAdapter, ...] = tuple(adapter for family in _families for adapter in family.ADAPTERS)

__all__ = ["ADAPTERS", "EncodeCall", "EncoderShape", "Features", "FixedEncoder", "ModelAdapter", "adapter_of"]


def adapter_of(model_type: str | None) -> ModelAdapter | None:
    return next((adapter for adapter in ADAPTERS if model_type in adapter.model_types), None)
