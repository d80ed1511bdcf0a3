"""Build of ublk_loop._uring, the cffi module (API mode) that holds the data plane.

In: csrc/ul.h, which is both the C header and the cffi cdef, and the C sources that pyproject.toml
lists. Out: the compiled extension, and the ``ublk`` command, of csrc/client.c. Runs at build time
only, in setuptools' build_ext and build_scripts; liburing is found by pkg-config. It is never
imported at run time. UBLK_LOOP_WERROR=1 makes warnings errors.

It is the build backend too: setuptools' own, but for a look at the tools before anything else, so
that pip's report of a missing one is a single line.
"""

from __future__ import annotations

import copy
import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TypeAlias

from setuptools import Command, Extension, build_meta
from setuptools.build_meta import (
    build_editable,
    build_sdist,
    build_wheel,
    get_requires_for_build_sdist,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)
from setuptools.command.build_ext import build_ext

LIBURING_MIN = "2.3"
CSRC = Path("ublk_loop") / "csrc"
WARNINGS = ["-Wall", "-Wextra"]
_Settings: TypeAlias = Mapping[str, str | list[str] | None] | None
# ul.h has no preprocessor line, so its types come first.
PREAMBLE = '#include <stdint.h>\n#include "ul.h"\n'


def _pkg_config(*arguments: str) -> str | None:
    """Return what pkg-config says about liburing, or None if it says no."""
    done = subprocess.run(
        ["pkg-config", *arguments, "liburing"], capture_output=True, text=True, check=False
    )
    return done.stdout.strip() if done.returncode == 0 else None


def _flags(*arguments: str) -> list[str]:
    return shlex.split(_pkg_config(*arguments) or "")


def _compiler() -> list[str]:
    return shlex.split(os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc")


def _missing() -> Iterator[tuple[str, str]]:
    """Yield what the build lacks, each as (what it is, the Debian package that has it)."""
    if shutil.which(_compiler()[0]) is None:
        yield "a C compiler", "gcc"
    if not any(
        (Path(sysconfig.get_path(name)) / "Python.h").exists()
        for name in ("include", "platinclude")
    ):
        yield "Python.h", "python3-dev"
    if shutil.which("pkg-config") is None:
        yield "pkg-config", "pkg-config"
        yield f"liburing {LIBURING_MIN}", "liburing-dev"
    elif (found := _pkg_config("--modversion")) is None:
        yield f"liburing {LIBURING_MIN}", "liburing-dev"
    elif _pkg_config(f"--atleast-version={LIBURING_MIN}") is None:
        yield f"liburing {LIBURING_MIN} (found {found})", "liburing-dev"


def require_tools() -> None:
    """End the build in one line that says what to install, if anything is missing."""
    missing = list(_missing())
    if missing:
        needs = ", ".join(what for what, _ in missing)
        packages = " ".join(package for _, package in missing)
        raise SystemExit(f"ublk-loop needs {needs} to build: apt-get install {packages}")


def get_requires_for_build_wheel(config_settings: _Settings = None) -> list[str]:
    """First hook that pip calls for a wheel; the requirements are setuptools' answer."""
    require_tools()
    return build_meta.get_requires_for_build_wheel(config_settings)


def get_requires_for_build_editable(config_settings: _Settings = None) -> list[str]:
    """First hook that pip calls for an editable install."""
    require_tools()
    return build_meta.get_requires_for_build_editable(config_settings)


def _compile_args() -> list[str]:
    is_strict = os.environ.get("UBLK_LOOP_WERROR") == "1"
    return ["-std=gnu11", "-O2", *WARNINGS, *(["-Werror"] if is_strict else [])]


class BuildExt(build_ext):
    """Emit the cffi glue into the build folder, then compile it with the C sources."""

    def build_extension(self, ext: Extension) -> None:
        require_tools()
        if importlib.util.find_spec("cffi") is None:
            raise SystemExit("ublk-loop needs cffi to build: pip install cffi")
        from cffi import FFI

        ffi = FFI()
        ffi.cdef((CSRC / "ul.h").read_text())
        ffi.set_source(ext.name, PREAMBLE)
        glue = Path(self.build_temp) / "_uring.c"
        glue.parent.mkdir(parents=True, exist_ok=True)
        ffi.emit_c_code(str(glue))

        # A copy: a path that leaves the tree must not stay in ext.sources, or an editable
        # install and the sdist would record it.
        built = copy.copy(ext)
        built.sources = [*ext.sources, str(glue)]
        built.include_dirs = [*ext.include_dirs, str(CSRC)]
        built.extra_compile_args = [
            *ext.extra_compile_args,
            *_compile_args(),
            "-fvisibility=hidden",
            *_flags("--cflags"),
        ]
        built.extra_link_args = [*ext.extra_link_args, "-pthread", *_flags("--libs")]
        super().build_extension(built)


class BuildClient(Command):
    """Make the ``ublk`` command, in place of setuptools' build_scripts: a program, not a script."""

    build_dir: str
    scripts: list[str]

    def initialize_options(self) -> None:
        self.build_dir = ""
        self.scripts = self.distribution.scripts or []

    def finalize_options(self) -> None:
        self.build_dir = self.build_dir or self.get_finalized_command("build").build_scripts

    def get_source_files(self) -> list[str]:
        return self.scripts

    def run(self) -> None:
        require_tools()
        os.makedirs(self.build_dir, exist_ok=True)
        version = f'-DUBLK_LOOP_VERSION="{self.distribution.get_version()}"'
        program = os.path.join(self.build_dir, "ublk")
        command = [*_compiler(), *_compile_args(), version, "-o", program, *self.scripts]
        # Finding its libraries would be three quarters of its start. Not all have libc.a.
        if subprocess.run([*command, "-static", "-s"], capture_output=True, check=False).returncode:
            subprocess.run(command, check=True)


__all__ = [
    "BuildClient",
    "BuildExt",
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]

if __name__ == "__main__":
    sys.exit("ublk_loop._uring_build is run by the build: pip install .")
