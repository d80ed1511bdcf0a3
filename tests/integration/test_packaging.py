"""An sdist holds what a build needs; the wheel built from it holds what a user needs."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# The hooks run in the folder of the source tree, each in a process of its own.
HOOK = """
import sys
from ublk_loop import _uring_build
print(getattr(_uring_build, sys.argv[1])(sys.argv[2]))
"""


def run_hook(name: str, tree: Path, out: Path) -> Path:
    out.mkdir(exist_ok=True)
    command = [sys.executable, "-c", HOOK, name, str(out)]
    done = subprocess.run(command, cwd=tree, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return out / done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tree = tmp_path_factory.mktemp("tree")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    ignored = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(ROOT / "ublk_loop", tree / "ublk_loop", ignore=ignored)
    return run_hook("build_sdist", tree, tree / "dist")


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    tree = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(sdist) as archive:
        if hasattr(tarfile, "data_filter"):
            archive.extraction_filter = tarfile.data_filter  # Debian 12's Python has none
        archive.extractall(tree)
    (folder,) = tree.iterdir()
    return run_hook("build_wheel", folder, tree / "dist")


def test_the_sdist_holds_sources_headers_and_licence(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    csrc = {f"ublk_loop/csrc/{path.name}" for path in (ROOT / "ublk_loop/csrc").glob("*.[ch]")}
    assert csrc | {"LICENSE", "README.md", "ublk_loop/_uring.pyi", "ublk_loop/py.typed"} <= names


def test_the_wheel_holds_module_types_and_licence_and_no_c_source(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {"ublk_loop/_uring.pyi", "ublk_loop/py.typed", "ublk_loop/__main__.py"} <= set(names)
    assert [name for name in names if name.endswith("/LICENSE")]
    assert [name for name in names if name.endswith(".so")]
    assert not [name for name in names if "csrc" in name]


def test_the_wheel_holds_the_command_as_a_program(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    [name] = [name for name in archive.namelist() if name.endswith(".data/scripts/ublk")]
    assert archive.read(name).startswith(b"\x7fELF")
    assert archive.getinfo(name).external_attr >> 16 & 0o111


def test_the_wheel_can_be_imported_from_where_it_was_unpacked(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path)
    code = "import ublk_loop.control as c; print(c.__file__)"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert Path(done.stdout.strip()).is_relative_to(tmp_path)
