"""The audit passes what the build makes, and names each way in which a shared object breaks the wheel's promise."""

from __future__ import annotations

import importlib.util
import platform
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from mbf.ops import native_status
from tests.wheel import audit

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="reads ELF, the format of Linux"),
    pytest.mark.skipif(
        not all(map(shutil.which, ("nm", "readelf", "c++filt", "g++"))), reason="needs binutils and g++"
    ),
]
needs_auditwheel = pytest.mark.skipif(
    importlib.util.find_spec("auditwheel") is None, reason="needs auditwheel: pip install 'mbf[dev]'"
)

# A name that is taken or exported, and what the audit says of it.
PLANTED = {
    "of Python": ('extern "C" void* PyList_New(long); static void* use = PyList_New(0);', "takes PyList_New of Python"),
    "of torch's C++": (
        "namespace c10 { void warn(int); } static int use = (c10::warn(1), 0);",
        "takes c10::warn(int) of torch's C++",
    ),
    "of libstdc++ through torch": (
        'namespace std { extern "C++" void newer(); } static int use = (std::newer(), 0);',
        "takes std::newer() of torch's C++",
    ),
    "of a later torch": (
        'extern "C" int torch_new_generator_handle(); static int use = torch_new_generator_handle();',
        "takes torch_new_generator_handle, which is not of torch 2.10's C interface",
    ),
    "exported": ('extern "C" void leaked() {}', "exports leaked"),
}
ALLOWED = """
extern "C" int aoti_torch_get_dim(void*, long*);
static int* use = new int(aoti_torch_get_dim(nullptr, nullptr));
"""


def link(source: str, target: Path, *flags: str) -> Path:
    target.parent.mkdir(parents=True, exist_ok=True)
    target.with_suffix(".cpp").write_text(source)
    command = ["g++", "-shared", "-fPIC", "-O0", str(target.with_suffix(".cpp")), "-o", str(target), *flags]
    subprocess.run(command, check=True)
    return target


def pack(library: Path, folder: Path, tag: str = "py3-none-linux") -> Path:
    """A wheel whose one module is ``library``."""
    wheel = folder / f"planted-1.0-{tag}_{platform.machine()}.whl"
    wheel.parent.mkdir(parents=True, exist_ok=True)
    info = "planted-1.0.dist-info"
    listed = ["mbf/_C.abi3.so", *(f"{info}/{name}" for name in ("METADATA", "WHEEL", "RECORD"))]
    files = {
        "METADATA": "Metadata-Version: 2.1\nName: planted\nVersion: 1.0\n",
        "WHEEL": f"Wheel-Version: 1.0\nRoot-Is-Purelib: false\nTag: {tag}_{platform.machine()}\n",
        "RECORD": "".join(f"{name},,\n" for name in listed),
    }
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(library, "mbf/_C.abi3.so")
        for name, text in files.items():
            archive.writestr(f"{info}/{name}", text)
    return wheel


@pytest.mark.skipif(not native_status().loaded, reason=f"mbf._C: {native_status().reason}")
def test_the_extension_that_is_built_has_no_fault() -> None:
    assert audit.complaints(native_status().path) == []
    used = subprocess.check_output(["nm", "-D", "--undefined-only", str(native_status().path)], text=True)
    assert {"torch_library_impl", "torch_parallel_for", "aoti_torch_get_sizes"} <= set(used.split())


def test_what_is_allowed_passes(tmp_path: Path) -> None:
    assert audit.complaints(link(ALLOWED, tmp_path / "fine.so")) == []


@pytest.mark.parametrize(("source", "complaint"), PLANTED.values(), ids=PLANTED)
def test_a_planted_symbol_is_named(source: str, complaint: str, tmp_path: Path) -> None:
    (found,) = audit.complaints(link(source, tmp_path / "planted.so"))
    assert found.startswith(complaint)


def test_libpython_is_named(tmp_path: Path) -> None:
    stand_in = link("", tmp_path / "libpython3.so", "-Wl,-soname=libpython3.so")
    (found,) = audit.complaints(link("", tmp_path / "planted.so", "-Wl,--no-as-needed", str(stand_in)))
    assert found.startswith("needs libpython3.so")


@pytest.mark.parametrize(("tag", "said"), [("cp310-abi3-linux", "is tagged cp310-abi3"), ("py3-none-linux", None)])
def test_the_tag_is_read(tag: str, said: str | None, tmp_path: Path) -> None:
    found = audit.audit(pack(link(ALLOWED, tmp_path / "fine.so"), tmp_path, tag))
    assert [complaint[: len(said or "")] for complaint in found] == ([said] if said else [])


def test_a_wheel_without_the_extension_fails(tmp_path: Path) -> None:
    wheel = pack(link(ALLOWED, tmp_path / "fine.so"), tmp_path)
    with zipfile.ZipFile(wheel, "w"):
        pass
    assert audit.audit(wheel) == ["has no mbf/_C.abi3.so: build it with MBF_BUILD_CPU=1"]


@needs_auditwheel
def test_a_clean_wheel_gets_its_platform_tag(tmp_path: Path) -> None:
    wheel = pack(link(ALLOWED, tmp_path / "fine.so"), tmp_path)
    assert audit.main([str(wheel), "--output", str(tmp_path / "out")]) == 0
    (written,) = (tmp_path / "out").iterdir()
    assert written.name == f"planted-1.0-py3-none-manylinux_2_28_{platform.machine()}.whl"


@needs_auditwheel
@pytest.mark.skipif(
    platform.libc_ver() < ("glibc", "2.34") or platform.machine() != "x86_64",
    reason="needs glibc 2.34, in which dlopen moved",
)
def test_a_glibc_that_is_too_new_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = "#include <dlfcn.h>\nstatic void* use = dlopen(nullptr, 1);"
    wheel = pack(link(source, tmp_path / "planted.so"), tmp_path)
    assert audit.main([str(wheel), "--output", str(tmp_path / "out")]) == 1
    said = " ".join(capsys.readouterr().err.split())
    assert "does not deserve manylinux_2_28" in said and "too-recent versioned symbols" in said
    assert not list(tmp_path.glob("out/*.whl"))


@needs_auditwheel
def test_a_violation_writes_no_wheel(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wheel = pack(link(PLANTED["of Python"][0], tmp_path / "planted.so"), tmp_path)
    assert audit.main([str(wheel), "--output", str(tmp_path / "out")]) == 1
    assert "mbf/_C.abi3.so takes PyList_New of Python" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
