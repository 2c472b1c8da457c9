"""Continual-LoRA methods, one file each. A new method is a new file here that registers a subclass of ``Method``."""

import importlib
import pkgutil

from mbf.methods.base import Batches, Factors, Layer, Method, MethodInfo, Options, available, get, register

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")  # _*.py are rooms that several methods share

__all__ = ["Batches", "Factors", "Layer", "Method", "MethodInfo", "Options", "available", "get", "register"]
