"""Build of ublk_loop._uring, the cffi module (API mode) that holds the data plane.

In: csrc/ul.h, which is both the C header and the cffi cdef, and the C sources that pyproject.toml
lists. Out: the compiled extension. Runs at build time only, in setuptools' build_ext; liburing is
found by pkg-config. It never runs at import time.
"""

from __future__ import annotations

import copy
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension
from setuptools.command.build_ext import build_ext

LIBURING_MIN = "2.3"
CSRC = Path("ublk_loop") / "csrc"
WARNINGS = ["-Wall", "-Wextra", "-Wno-unused-parameter"]


def _pkg_config(*arguments: str) -> list[str]:
    done = subprocess.run(["pkg-config", *arguments, "liburing"], capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(
            f"ublk_loop: liburing >= {LIBURING_MIN} was not found by pkg-config: "
            "install liburing-dev (Debian) or liburing-devel (Fedora)"
        )
    return shlex.split(done.stdout)


def _require_tools() -> None:
    if shutil.which("pkg-config") is None:
        raise SystemExit("ublk_loop: pkg-config is missing: install pkg-config")
    compiler = shlex.split(os.environ.get("CC", "cc"))[0]
    if shutil.which(compiler) is None and shutil.which("gcc") is None:
        raise SystemExit(f"ublk_loop: no C compiler ({compiler}): install gcc and python3-dev")


class BuildExt(build_ext):
    """Emit the cffi glue into the build folder, then compile it with the C sources."""

    def build_extension(self, ext: Extension) -> None:
        from cffi import FFI

        _require_tools()
        _pkg_config(f"--atleast-version={LIBURING_MIN}")
        ffi = FFI()
        ffi.cdef((CSRC / "ul.h").read_text())
        ffi.set_source(ext.name, '#include "ul.h"')
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
            "-std=gnu11",
            "-O2",
            "-fvisibility=hidden",
            *WARNINGS,
            *(["-Werror"] if os.environ.get("UBLK_LOOP_WERROR") else []),
            *_pkg_config("--cflags"),
        ]
        built.extra_link_args = [*ext.extra_link_args, "-pthread", *_pkg_config("--libs")]
        super().build_extension(built)


if __name__ == "__main__":
    sys.exit("ublk_loop._uring_build is run by the build: pip install .")
