"""The shapes in which kernels are launched: a shipped table by the family of the GPU.

Every GPU gets an answer: that of its family or, where no table names one, the cautious one, which needs no more than 64
KiB of shared memory and two stages.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch


class Config(NamedTuple):
    """How a kernel is launched.

    Attributes:
        rows: of a tile.
        columns: of a tile.
        warps: of a program.
        stages: of the pipeline of loads.
    """

    rows: int
    columns: int
    warps: int = 4
    stages: int = 2


# Multiprocessors of A100, H100 SXM, B200, MI300X and of a small GPU, for compiling and counting without one.
_PROGRAMS = {"sm_80": 108, "sm_90": 132, "sm_100": 148, "gfx942": 304, "cautious": 80}

# Rows, columns, warps and stages by the ranks of a tile, of the square kernels by q: 16, 32, 64, 128 and 256, as far as
# there are launches: the largest tiles that compile without spills in every form (``compile``). First A and B, or M, in
# half types, then in others.
_TABLES = {
    "sm_80": {
        "project": (
            "128x64x4x3 128x64x8x3 128x64x8x3 128x64x8x3 64x64x8x3",
            "128x64x8x3 128x64x8x3 32x64x4x2 32x64x8x2",
        ),
        "project_group": (
            "64x64x8x3 64x64x8x3 64x64x8x3",
            "64x64x8x3 64x32x8x2",
        ),
        "accumulate": (
            "32x512x8x3 32x512x8x3 32x512x8x3 32x256x8x3 32x128x8x2",
            "32x512x8x3 32x256x8x3 32x256x8x3 32x128x8x2",
        ),
        "output_gradient": (
            "64x512x8x2 64x512x8x2 64x256x8x2 32x64x8x2 32x64x8x2",
            "64x128x8x2 32x64x8x2 16x32x4x2 16x32x4x2",
        ),
        "input_gradient": (
            "32x256x8x2 32x256x8x2 32x128x8x2 32x128x8x2 16x64x4x1",
            "32x128x8x2 32x128x8x2 16x128x8x2 16x32x4x2",
        ),
        "input_gradient_group": (
            "32x128x8x2 32x128x8x2 32x64x8x2",
            "32x128x8x2 32x64x8x2",
        ),
        "square": (
            "64x16x4x2 64x32x4x2 64x64x8x2 64x64x8x2 64x64x8x2",
            "32x16x4x2 64x32x8x1 64x32x8x1 64x32x8x1 64x32x8x1",
        ),
        "square_input_gradient": (
            "64x32x8x2 64x32x4x2 64x64x8x2 64x64x8x2 64x64x8x2",
            "32x32x4x2 64x32x4x2 64x64x8x2 64x64x8x2 64x64x8x2",
        ),
        "square_gradient": (
            "32x32x4x2 64x32x4x2 32x64x4x2 32x128x8x2 32x128x8x2",
            "32x32x4x2 64x32x4x2 32x64x4x2 32x64x4x2 32x64x4x2",
        ),
        "epilogue": (
            "128x128x8x3 128x128x8x3 128x128x8x3 128x128x8x3 128x128x8x3",
            "128x128x8x3 64x128x8x3 32x64x4x2",
        ),
    },
    "sm_90": {
        "project": (
            "128x64x4x3 128x64x4x3 128x64x4x3 128x64x8x3 128x64x8x3",
            "32x64x4x3 32x64x4x3 32x64x4x3 32x64x8x2",
        ),
        "project_group": (
            "64x64x8x3 64x64x8x3 64x64x8x3",
            "32x32x4x2 32x32x4x2",
        ),
        "accumulate": (
            "32x512x8x3 32x512x8x3 32x512x8x3 32x512x8x3 32x256x8x3",
            "32x512x8x3 32x256x8x3 32x128x8x2 32x64x4x2",
        ),
        "output_gradient": (
            "64x512x8x2 64x512x8x2 64x512x8x2 64x256x8x2 32x64x8x2",
            "32x128x8x2 32x64x8x2 32x64x8x2 32x64x8x2",
        ),
        "input_gradient": (
            "32x256x8x2 32x256x8x2 32x256x8x2 32x128x8x2 32x64x8x2",
            "32x128x8x2 32x128x8x2 32x64x8x2 16x32x4x2",
        ),
        "input_gradient_group": (
            "32x128x8x2 32x64x8x2 32x64x8x2",
            "32x64x8x2 16x64x8x2",
        ),
        "square": (
            "64x16x4x2 64x32x4x2 64x64x4x2 64x128x8x2 64x128x8x2",
            "32x16x4x2 64x32x8x1 64x64x8x2 64x64x8x2 64x64x8x2",
        ),
        "square_input_gradient": (
            "64x32x8x2 64x32x4x2 64x64x8x2 64x64x8x2 64x64x8x2",
            "64x32x4x2 64x32x4x2 64x32x4x2 64x32x4x2 64x32x4x2",
        ),
        "square_gradient": (
            "32x32x4x2 64x32x4x2 32x64x4x2 32x128x8x2 32x128x8x2",
            "32x32x4x2 64x32x4x2 32x64x4x2 32x64x4x2 32x64x4x2",
        ),
        "epilogue": (
            "128x128x8x3 128x128x8x3 128x128x8x3 128x128x8x3 128x128x8x3",
            "128x128x8x3 128x128x8x3 64x128x8x3",
        ),
    },
    "sm_100": {
        "project": (
            "128x64x4x3 128x64x4x3 128x64x4x3 128x64x4x3 128x64x8x3",
            "128x64x4x3 128x64x8x3 128x64x8x3 64x64x8x3",
        ),
        "project_group": (
            "64x64x8x3 64x64x8x3 64x64x8x3",
            "64x64x8x3 64x64x8x3",
        ),
        "accumulate": (
            "32x512x8x3 32x512x8x3 32x512x8x3 32x512x8x3 32x256x8x3",
            "32x512x8x3 32x256x8x3 32x128x8x2 32x64x4x2",
        ),
        "output_gradient": (
            "64x512x8x2 64x512x8x2 64x512x8x2 64x256x8x2 64x128x8x2",
            "64x512x8x2 64x128x8x2 32x64x8x2 32x64x8x2",
        ),
        "input_gradient": (
            "32x256x8x2 32x256x8x2 32x256x8x2 32x64x8x2 32x64x8x2",
            "32x128x8x2 32x128x8x2 32x128x8x2 16x32x4x2",
        ),
        "input_gradient_group": (
            "32x128x8x2 32x128x8x2 32x128x8x2",
            "32x64x8x2 32x64x8x2",
        ),
        "square": (
            "64x16x4x2 128x32x8x2 64x64x4x2 64x128x8x2 64x128x8x2",
            "32x16x4x2 128x32x8x2 64x64x8x1 64x64x8x1 64x64x8x1",
        ),
        "square_input_gradient": (
            "64x32x8x2 64x32x4x2 64x64x8x2 64x64x8x2 64x64x8x2",
            "64x32x4x2 64x32x4x2 64x32x4x2 64x32x4x2 64x32x4x2",
        ),
        "square_gradient": (
            "32x32x4x2 64x32x4x2 32x64x4x2 64x128x8x2 64x128x8x2",
            "64x32x4x1 64x32x4x1 64x32x4x1 64x32x4x1 64x32x4x1",
        ),
        "epilogue": (
            "128x128x8x3 128x128x8x3 128x128x8x3 128x128x8x3 128x128x8x3",
            "128x256x8x3 128x256x8x3 128x256x8x3",
        ),
    },
    "cautious": {
        "project": (
            "64x64x8x2 32x64x4x2 32x64x4x2 32x64x4x2 32x64x4x2",
            "64x64x8x2 64x64x8x2 32x64x4x2 32x64x8x2",
        ),
        "project_group": (
            "64x64x8x2 64x64x8x2 64x64x8x2",
            "64x64x8x2 32x32x4x2",
        ),
        "accumulate": (
            "32x256x8x2 32x256x8x2 32x128x8x2 32x64x4x2 32x64x4x2",
            "32x256x8x2 32x128x8x2 32x64x4x2 16x32x4x2",
        ),
        "output_gradient": (
            "32x256x8x2 64x128x8x2 64x128x8x2 32x64x8x2 32x64x8x2",
            "32x128x8x2 32x64x8x2 16x64x4x2 16x32x4x2",
        ),
        "input_gradient": (
            "32x256x8x2 32x256x8x2 32x128x8x2 32x64x8x2 16x64x4x1",
            "32x128x8x2 32x64x8x2 16x64x4x2 16x32x8x1",
        ),
        "input_gradient_group": (
            "32x128x8x2 32x128x8x2 16x64x4x2",
            "32x64x8x2 16x64x8x2",
        ),
        "square": (
            "64x16x4x2 64x32x4x2 64x64x8x2 64x64x8x2 64x64x8x2",
            "32x16x4x2 64x32x8x1 64x32x8x1 64x32x8x1 64x32x8x1",
        ),
        "square_input_gradient": (
            "64x32x8x2 64x32x4x2 64x64x8x2 64x64x8x2 64x64x8x2",
            "32x32x4x2 64x32x4x2 64x64x8x2 64x64x8x2 64x64x8x2",
        ),
        "square_gradient": (
            "32x32x4x2 64x32x4x2 32x64x4x2 32x128x8x2 32x128x8x2",
            "32x32x4x2 64x32x4x2 32x64x4x2 32x64x4x2 32x64x4x2",
        ),
        "epilogue": (
            "128x128x8x2 128x128x8x2 64x128x4x2 64x64x4x2 64x64x4x2",
            "128x128x8x2 64x64x4x2 32x64x4x2",
        ),
    },
}
_TABLES["gfx942"] = _TABLES["cautious"]
FAMILIES = tuple(_TABLES)


@cache
def family(device: torch.device) -> str:
    """The family of a GPU; what the interpreter runs is launched as on sm_90."""
    if device.type != "cuda":
        return "sm_90"
    if torch.version.hip:
        return "gfx942"
    return of_capability(*torch.cuda.get_device_capability(device))


def of_capability(major: int, minor: int) -> str:
    """The family of an NVIDIA GPU; sm_86, sm_89 and sm_12x have less shared memory than sm_80 and sm_100."""
    return {(8, 0): "sm_80", (9, 0): "sm_90", (10, 0): "sm_100", (10, 3): "sm_100"}.get((major, minor), "cautious")


def shipped(kernel: str, ranks: int, itemsize: int, of: str) -> Config:
    """The table's entry.

    Args:
        kernel: its name, ``"project"`` say; of more branches than one ``"project_group"``.
        ranks: of a tile.
        itemsize: bytes of an element of A and B or of the activations, of the wider of the two. Half types have more
            ranks than the table has for wide ones; those keep their entry.
        of: one of ``FAMILIES``.
    """
    half, wide = _TABLES[of][kernel]
    return _read(wide if itemsize > 2 and _place(ranks) < len(wide.split()) else half, ranks)


def programs(of: str) -> int:
    """Into how many programs a kernel is parted at most, so that small inputs fill a GPU of the family, too."""
    return _PROGRAMS[of]


@cache
def multiprocessors(device: torch.device) -> int:
    """Of the GPU that is there: those of a family differ, and one program too many would take twice the time."""
    if device.type != "cuda":
        return programs(family(device))
    return torch.cuda.get_device_properties(device).multi_processor_count


@cache
def _read(entries: str, ranks: int) -> Config:
    return Config(*map(int, entries.split()[_place(ranks)].split("x")))


def _place(ranks: int) -> int:
    return ranks.bit_length() - 5


def neighbours(config: Config) -> list[Config]:
    """Configurations that may be faster than a shipped one."""
    found = [config._replace(stages=config.stages + step) for step in (-1, 1)]
    found += [config._replace(rows=config.rows * 2), config._replace(rows=config.rows // 2)]
    found += [config._replace(columns=config.columns // 2), config._replace(warps=12 - config.warps)]
    return [one for one in found if one.stages > 0 and one.rows >= 16 and one.columns >= 16]


def smaller(config: Config) -> Config | None:
    """The configuration to take where this one needs more than a GPU has; None if it is the smallest."""
    if config.stages > 1:
        return config._replace(stages=config.stages - 1)
    if max(config.rows, config.columns) <= 16:
        return None
    if config.rows > config.columns:
        return config._replace(rows=config.rows // 2)
    return config._replace(columns=config.columns // 2)
