"""The boundary header, the types of the compiled module, and what a build says when it cannot."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import ublk_loop
from ublk_loop import _uring

ROOT = Path(__file__).parents[2]
CSRC = ROOT / "ublk_loop" / "csrc"
STUB = ROOT / "ublk_loop" / "_uring.pyi"


def without_comments(path: Path) -> str:
    return re.sub(r"/\*.*?\*/", "", path.read_text(), flags=re.DOTALL)


def test_the_types_of_the_compiled_module_are_those_of_the_header() -> None:
    command = [sys.executable, str(ROOT / "tools" / "uring_stub.py")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert STUB.read_text() == done.stdout, "run tools/uring_stub.py > ublk_loop/_uring.pyi"


def test_the_compiled_module_has_what_its_types_name() -> None:
    body = STUB.read_text().split("class Lib:")[1]
    typed = set(re.findall(r"^    (?:def )?(\w+)[(:]", body, re.M))
    assert typed == set(dir(_uring.lib))


def test_the_header_is_free_of_the_preprocessor_and_of_callbacks() -> None:
    text = without_comments(CSRC / "ul.h")
    assert not re.search(r"^\s*#", text, re.M)
    assert not re.search(r"\binline\b", text)
    assert "(*" not in text


def test_every_function_of_the_header_is_named_after_its_object() -> None:
    names = re.findall(r"\b(\w+)\(", without_comments(CSRC / "ul.h"))
    assert names
    assert all(re.fullmatch(r"ul_[a-z0-9]+(_[a-z0-9]+)+", name) for name in names)


def test_every_c_file_goes_into_the_sdist() -> None:
    listed = set(re.findall(r'"ublk_loop/csrc/([\w.]+)"', (ROOT / "pyproject.toml").read_text()))
    assert listed == {path.name for path in CSRC.glob("*.[ch]")}


def test_the_version_is_the_same_in_metadata_and_package() -> None:
    match = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.M)
    assert match
    assert match[1] == ublk_loop.__version__


@pytest.mark.parametrize("kind", ["wheel", "editable"])
@pytest.mark.parametrize(
    ("lacking", "packages"),
    [
        ({"PKG_CONFIG_LIBDIR": "/nonexistent"}, ["liburing-dev"]),
        ({"CC": "/nonexistent/cc"}, ["gcc"]),
        ({"PATH": "/nonexistent"}, ["gcc", "pkg-config", "liburing-dev"]),
    ],
)
def test_a_build_ends_in_one_line_that_names_the_packages_when_tools_are_missing(
    kind: str, lacking: dict[str, str], packages: list[str]
) -> None:
    pytest.importorskip("setuptools")
    code = f"from ublk_loop import _uring_build as b; b.get_requires_for_build_{kind}()"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "CC": "", "PKG_CONFIG_PATH": "", **lacking},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert done.stderr.strip().endswith("apt-get install " + " ".join(packages))
