"""PEFT's LoRA layers on the fused operators: swap them in place, and read, write, replace and
initialise one adapter's factors."""

from mbf.peft.adapter import AdapterLayer, adapter_layers
from mbf.peft.config import describe_ranks, sync_config
from mbf.peft.fuse import fuse, fused, is_fused, unfuse
from mbf.peft.initialise import orthogonalize_
from mbf.peft.linear import FusedLinear, calls
from mbf.peft.pissa import init_pissa_
from mbf.peft.report import FuseReport
from mbf.peft.saving import save_adapter, whole_adapter

__all__ = [
    "AdapterLayer",
    "FuseReport",
    "FusedLinear",
    "adapter_layers",
    "calls",
    "describe_ranks",
    "fuse",
    "fused",
    "init_pissa_",
    "is_fused",
    "orthogonalize_",
    "save_adapter",
    "sync_config",
    "unfuse",
    "whole_adapter",
]
