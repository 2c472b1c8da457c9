from __future__ import annotations

import json

import torch

from mbf.ops import native_status
from mbf.ops._library import NativeStatus


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
