"""The operators of mbf: the fused LoRA layer, bases, merges, and the dropout that they share."""

from mbf.ops._layers import GroupLayer
from mbf.ops._library import native_status, use_backend
from mbf.ops._terms import BranchTerms
from mbf.ops.basis import orthonormal_rows, orthonormal_rows_ref
from mbf.ops.frozen_linear import frozen_linear, frozen_linear_ref
from mbf.ops.lilora import LiloraTerms, lilora_accumulate, lilora_accumulate_ref
from mbf.ops.lora_accumulate import lora_accumulate, lora_accumulate_ref
from mbf.ops.lora_group import lora_group, lora_group_ref
from mbf.ops.lora_linear import LoraTerms, lora_linear, lora_linear_ref
from mbf.ops.lora_mlp import lora_mlp, lora_mlp_ref
from mbf.ops.merge import MergeNorms, merge_, merge_ref_
from mbf.ops.mora import MoraTerms, mora_accumulate, mora_accumulate_ref, mora_size
from mbf.ops.philox import draw_seed, dropout_mask
from mbf.ops.rsvd import rsvd, rsvd_ref
from mbf.ops.task_boundary import task_boundary_, task_boundary_ref_

__all__ = [
    "BranchTerms",
    "GroupLayer",
    "LiloraTerms",
    "LoraTerms",
    "MergeNorms",
    "MoraTerms",
    "draw_seed",
    "dropout_mask",
    "frozen_linear",
    "frozen_linear_ref",
    "lilora_accumulate",
    "lilora_accumulate_ref",
    "lora_accumulate",
    "lora_accumulate_ref",
    "lora_group",
    "lora_group_ref",
    "lora_linear",
    "lora_linear_ref",
    "lora_mlp",
    "lora_mlp_ref",
    "merge_",
    "merge_ref_",
    "mora_accumulate",
    "mora_accumulate_ref",
    "mora_size",
    "native_status",
    "orthonormal_rows",
    "orthonormal_rows_ref",
    "rsvd",
    "rsvd_ref",
    "task_boundary_",
    "task_boundary_ref_",
    "use_backend",
]
