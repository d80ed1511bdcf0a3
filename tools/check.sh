#!/usr/bin/env bash
# What must hold before each commit: ruff, mypy, the C style, a build without warnings, unit tests.
#
#   tools/check.sh              everything
#   tools/check.sh --fast       without build and tests
#
# Tools come from .venv if it is there (pip install -e '.[dev]'), or else from the PATH. Every
# check runs; the exit code is 0 only if all passed.

set -uo pipefail
cd "$(dirname "$0")/.." || exit
[ -d .venv/bin ] && PATH=$PWD/.venv/bin:$PATH

fast=
case ${1-} in
--fast) fast=1 ;;
'') ;;
*) sed -n '2,/^$/s/^# \{0,1\}//p' "$0" >&2; exit 2 ;;
esac

failed=()
check() {
    local name=$1
    shift
    "$@" || failed+=("$name")
}

check "ruff check" ruff check --quiet .
check "ruff format" ruff format --quiet --check .
check "mypy" mypy --no-error-summary
check "C style" python3 tools/c_format.py
if [ -z "$fast" ]; then
    # In place, and only what changed. A module older than the header would crash the tests.
    check "build" env UBLK_LOOP_WERROR=1 \
        python3 -W ignore -c 'import setuptools; setuptools.setup()' -q build_ext --inplace
    check "unit tests" python3 -m pytest -q tests/unit
fi

if [ ${#failed[@]} -gt 0 ]; then
    printf 'check.sh: failed: %s\n' "${failed[@]}" >&2
    exit 1
fi
