from __future__ import annotations

import json
import os
import warnings

import pytest
import torch

from mbf.ops import native_status
from mbf.ops._cuda import cuda_status
from mbf.ops._library import NativeStatus
from mbf.run.doctor import gpus

GPU = "NVIDIA H100, 9.0, 81559 MiB, 570.86.15, 345 MHz, 1980 MHz, 2618 MHz, 2619 MHz, 700.00 W"


def test_json(mbf, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("MBF_CACHE", str(tmp_path))
    (tmp_path / "models" / "small").mkdir(parents=True)
    (tmp_path / "models" / "small" / "weights").write_bytes(bytes(1234))
    (tmp_path / "models" / "small.lock").touch()
    result = mbf("doctor", "--json")
    assert result.exit_code == 0
    found = json.loads(result.stdout)
    assert found["versions"]["torch"] == torch.__version__
    assert found["compiled extension"]["loaded"] == native_status().loaded
    assert found["compiled extension"]["CPU kernels"] == (native_status().kernels or None)
    assert found["gpu"]["CUDA kernels"] == cuda_status().reason
    assert found["cpu"]["torch dispatches to"] == torch.backends.cpu.get_cpu_capability()
    assert found["cache"] == {"folder": str(tmp_path), "entries": {"models/small": 1234}}


def test_text(mbf, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("MBF_CACHE", str(tmp_path / "nothing"))
    result = mbf("doctor")
    assert result.exit_code == 0
    assert f"reason: {native_status().reason}" in result.stdout
    assert "entries: none" in result.stdout


def test_says_why_the_extension_is_off(mbf, monkeypatch) -> None:
    status = NativeStatus(False, None, "not built: no compiler")
    monkeypatch.setattr("mbf.run.doctor.native_status", lambda: status)
    result = mbf("doctor")
    assert "loaded: no" in result.stdout
    assert "reason: not built: no compiler" in result.stdout


def test_gpus_of_nvidia_smi(mbf, tmp_path, monkeypatch) -> None:
    nvidia_smi(tmp_path, monkeypatch, GPU, "with a field too few, 1", GPU.replace("H100", "H200"))
    result = mbf("doctor", "--json")
    found = json.loads(result.stdout)["gpu"]
    assert found["nvidia-smi sees"] == [
        f"NVIDIA {name}, compute capability 9.0, 81559 MiB" for name in ("H100", "H200")
    ]
    assert found["driver"] == "570.86.15"
    clocks = "SM 345 MHz of 1980 MHz, memory 2618 MHz of 2619 MHz, power limit 700.00 W"
    assert found["clocks"] == [clocks, clocks]
    assert found["torch sees"] == [torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count())]


def test_one_gpu_is_asked_for_by_its_uuid(tmp_path, monkeypatch) -> None:
    nvidia_smi(tmp_path, monkeypatch, GPU)
    (gpu,) = gpus("GPU-1234")
    query, _, uuid = (tmp_path / "asked").read_text().split()
    assert uuid == "--id=GPU-1234" and gpu.clocks.startswith("SM 345 MHz of 1980 MHz,")
    assert query.startswith("--query-gpu=") and len(query.split(",")) == len(GPU.split(","))


@pytest.mark.parametrize("there", [True, False])
def test_without_nvidia_smi_there_are_no_gpus(tmp_path, monkeypatch, there: bool) -> None:
    if there:
        nvidia_smi(tmp_path, monkeypatch, GPU, status=9)
    else:
        monkeypatch.setenv("PATH", str(tmp_path))
    assert gpus() == []


def test_says_why_triton_kernels_are_off(mbf, monkeypatch) -> None:
    def obstacle() -> str:
        warnings.warn("said twice", stacklevel=1)
        return "no triton"

    monkeypatch.setattr("mbf.run.doctor.obstacle", obstacle)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "Triton kernels: cannot be used: no triton" in mbf("doctor").stdout
    monkeypatch.setattr("mbf.run.doctor.obstacle", lambda: None)
    assert "Triton kernels: can serve a GPU" in mbf("doctor").stdout


def nvidia_smi(folder, monkeypatch, *lines: str, status: int = 0) -> None:
    """Put an nvidia-smi that prints ``lines`` first in PATH; it notes in ``asked`` what it was asked."""
    text = "\n".join(lines)
    file = folder / "nvidia-smi"
    file.write_text(f"#!/bin/sh\necho \"$@\" > '{folder}/asked'\ncat <<'END'\n{text}\nEND\nexit {status}\n")
    file.chmod(0o755)
    monkeypatch.setenv("PATH", os.pathsep.join([str(folder), os.environ["PATH"]]))
