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
# The two guests run side by side where there are two CPUs and 6 GiB for them. Where a guest with 7.3
# is used, tools/icount_gate.py runs too: it fails if a request has become dearer.
#
# Installs what it needs on a fresh Debian 12 or 13. Exit code 0: all passed, none skipped but
# what the driver of 6.12 cannot do.

. "$(dirname "$0")/setup.sh"

usage() { sed -n '2,/^$/s/^# \{0,1\}//p' "$0"; }

quick='' in_guest='' kernels=()
while [ $# -gt 0 ]; do
    case $1 in
    --quick) quick=1 ;;
    --vm) in_guest=1 ;;
    --kernel) kernels+=("${2:?--kernel needs a version}"); shift ;;
    --) shift; break ;;
    -h|--help) usage; exit 0 ;;
    *) usage >&2; exit 2 ;;
    esac
    shift
done
if [ -n "$quick" ]; then
    in_guest=''
elif [ ${#kernels[@]} -gt 0 ] || ! host_has_ublk; then
    in_guest=1
fi
[ -z "$in_guest" ] || [ ${#kernels[@]} -gt 0 ] || kernels=(7.3 6.12)

failed=()
# stage NAME COMMAND...: run it, go on whatever comes out of it.
stage() {
    local name=$1 begin=$SECONDS code=0
    shift
    say "$name"
    "$@" || code=$?
    # 5: pytest found no test by that name here (-k); another stage may have it.
    if [ $code = 5 ] && [ -n "$chosen" ]; then
        code=0
    fi
    say "$name: exit code $code after $((SECONDS - begin)) s"
    [ $code = 0 ] || failed+=("$name")
}

# Many containers forbid it: then the integration tests run in a guest as well.
io_uring_works() {
    "$VENV/bin/python" - <<'EOF'
import ctypes, sys
IO_URING_SETUP = 425
sys.exit(ctypes.CDLL(None).syscall(IO_URING_SETUP, 1, ctypes.create_string_buffer(120)) < 0)
EOF
}

# guest KERNEL [OPTION...]: the kernel tests in a guest.
guest() {
    python3 tools/vm.py --vm --timeout 3600 --kernel "$@" -- "${kernel_pytest[@]}"
}

room_for_two_guests() {
    local free_kib
    free_kib=$(sed -n 's/^MemAvailable: *\([0-9]*\) kB/\1/p' /proc/meminfo)
    [ "$(nproc)" -ge 2 ] && [ "$free_kib" -ge $((6 << 20)) ]
}

# both KERNEL KERNEL: side by side; what the second one says comes when the first is done.
both() {
    local one_thread=()
    # With fewer CPUs than the two guests have, the one that waits for its turn keeps the other
    # CPU of its guest waiting too: then one CPU a guest takes half the time.
    [ "$(nproc)" -ge 4 ] || one_thread=(--one-thread)
    second_log=$(mktemp)
    guest "$2" "${one_thread[@]}" >"$second_log" 2>&1 &
    second_pid=$!
    trap 'kill "$second_pid" 2>/dev/null; rm -f "$second_log"' EXIT
    stage "kernel tests on Linux $1" guest "$1" "${one_thread[@]}"
    stage "kernel tests on Linux $2, side by side with it" end_of_second
}

end_of_second() {
    local code=0
    wait "$second_pid" || code=$?
    trap - EXIT
    cat "$second_log"
    rm -f "$second_log"
    return $code
}

chosen=$*
set_up ${in_guest:+guest}
cd "$ROOT"
export UBLK_LOOP_NO_SKIP=1
pytest=("$VENV/bin/python" -m pytest -q)
kernel_tests=(tests/kernel)
if io_uring_works || [ -z "$in_guest" ]; then
    stage "unit and integration tests" "${pytest[@]}" tests/unit tests/integration "$@"
else
    say "io_uring is forbidden here: the integration tests will run in the guest"
    stage "unit tests" "${pytest[@]}" tests/unit "$@"
    kernel_tests=(tests/integration tests/kernel)
fi
kernel_pytest=("${pytest[@]}" -p no:cacheprovider --durations=10 "${kernel_tests[@]}" "$@")
if [ -n "$in_guest" ]; then
    if [ ${#kernels[@]} = 2 ] && room_for_two_guests; then
        both "${kernels[@]}"
    else
        for kernel in "${kernels[@]}"; do
            stage "kernel tests on Linux $kernel" guest "$kernel"
        done
    fi
    # The figures are those of one kernel.
    if [[ " ${kernels[*]} " == *" 7.3 "* ]] && [ -z "$chosen" ]; then
        stage "instructions per I/O" tools/icount_gate.py
    fi
elif [ -z "$quick" ]; then
    stage "kernel tests on this host" "${kernel_pytest[@]}"
fi

if [ ${#failed[@]} -gt 0 ]; then
    printf 'FAILED: %s\n' "${failed[@]}" >&2
    exit 1
fi
say "all passed in $((SECONDS / 60)) min $((SECONDS % 60)) s"
