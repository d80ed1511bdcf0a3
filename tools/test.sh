#!/usr/bin/env bash
# Every test, the ones against the real ublk driver too.
#
#   tools/test.sh                   all of them: the kernel tests in guests with 7.3 and with 6.12, or
#                                   on this host's own kernel if it has ublk_drv and you are root
#   tools/test.sh --vm              the kernel tests in guests in any case
#   tools/test.sh --kernel 7.3      the kernel tests in that guest only (repeatable)
#   tools/test.sh --quick           unit and integration tests only
#   tools/test.sh ... -- ARGS       ARGS go to pytest, such as -k NAME
#
# Installs what it needs on a fresh Debian 12 or 13. Exit code 0: all passed, none skipped.

. "$(dirname "$0")/setup.sh"

usage() { sed -n '2,/^$/s/^# \{0,1\}//p' "$0"; }

quick= vm_args=() kernels=()
while [ $# -gt 0 ]; do
    case $1 in
    --quick) quick=1 ;;
    --vm) vm_args=(--vm) ;;
    --kernel) kernels+=("${2:?--kernel needs a version}"); shift ;;
    --) shift; break ;;
    -h|--help) usage; exit 0 ;;
    *) usage >&2; exit 2 ;;
    esac
    shift
done

failed=()
stage() {
    local name=$1
    shift
    say "$name"
    "$@" || failed+=("$name (exit $?)")
}

host_has_ublk() {
    [ "$(id -u)" = 0 ] && { [ -e /dev/ublk-control ] || modprobe -q ublk_drv; }
}

export UBLK_LOOP_NO_SKIP=1
cd "$ROOT"
stage "unit and integration tests" "$VENV/bin/python" -m pytest -q tests/unit tests/integration "$@"
if [ -z "$quick" ]; then
    kernel_tests=("$VENV/bin/python" -m pytest -q -p no:cacheprovider --durations=10 tests/kernel "$@")
    if [ ${#kernels[@]} = 0 ] && [ ${#vm_args[@]} = 0 ] && host_has_ublk; then
        stage "kernel tests on this host" "${kernel_tests[@]}"
    else
        [ ${#kernels[@]} -gt 0 ] || kernels=(7.3 6.12)
        for kernel in "${kernels[@]}"; do
            stage "kernel tests on Linux $kernel" \
                python3 tools/vm.py --vm --kernel "$kernel" --timeout 1500 -- "${kernel_tests[@]}"
        done
    fi
fi

if [ ${#failed[@]} -gt 0 ]; then
    printf 'FAILED: %s\n' "${failed[@]}" >&2
    exit 1
fi
say "all passed"
