#!/usr/bin/env bash
# The main job, shown: a file becomes /dev/ublkbN, is formatted, mounted, filled and verified, and is
# then compared with the kernel's /dev/loop by fio.
#
#   tools/demo.sh                   on this host's own kernel if it has ublk_drv and you are root,
#                                   else in a guest with Linux 7.3
#   tools/demo.sh --vm              in a guest in any case
#   tools/demo.sh --kernel 6.12     in a guest with that kernel
#
# Installs what it needs on a fresh Debian 12 or 13. Leaves nothing behind but packages, .venv and
# the cached kernel. Exit code 0: everything shown has worked.

. "$(dirname "$0")/setup.sh"

usage() { sed -n '2,/^$/s/^# \{0,1\}//p' "$0"; }

in_guest='' kernel=7.3
while [ $# -gt 0 ]; do
    case $1 in
    --vm) in_guest=1 ;;
    --kernel) kernel=${2:?--kernel needs a version} in_guest=1; shift ;;
    -h|--help) usage; exit 0 ;;
    *) usage >&2; exit 2 ;;
    esac
    shift
done
host_has_ublk || in_guest=1
set_up ${in_guest:+guest}

# For the progress bar, which sees no terminal from inside a guest.
if [ -t 2 ]; then
    export FORCE_COLOR=1 COLUMNS LINES
    COLUMNS=$(tput cols 2>/dev/null || echo 80) LINES=$(tput lines 2>/dev/null || echo 24)
fi
steps=("$ROOT/tools/demo_steps.sh" "$VENV")
[ -n "$in_guest" ] || exec bash "${steps[@]}"
say "booting a guest with Linux $kernel (KVM where it works, else software emulation)"
exec python3 "$ROOT/tools/vm.py" --vm --kernel "$kernel" --timeout 1200 -- bash "${steps[@]}"
