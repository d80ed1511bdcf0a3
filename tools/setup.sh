# Sourced by demo.sh and test.sh: packages, virtual environment, build. Debian 12 or 13.
#
# In: PYTHON=... for another interpreter. Out: functions and $ROOT; after set_up, $VENV with the
# package installed in it (editable). Does only what is missing: a second run takes a second.

set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
VENV=$ROOT/.venv
ME=tools/$(basename "$0")
PACKAGES=(
    ca-certificates gcc libc6-dev pkg-config liburing-dev python3 python3-dev python3-venv
    fio stress-ng e2fsprogs xfsprogs btrfs-progs dmsetup udev mount kmod util-linux procps
)
# What tools/vm.py boots a kernel with.
GUEST_PACKAGES=(qemu-system-x86 busybox-static cpio xz-utils debian-archive-keyring)

say() { printf '\033[1m==> %s\033[0m\n' "$*" >&2; }
die() { printf '%s: %s\n' "$ME" "$*" >&2; exit 1; }

# Whether the kernel that runs now will do: otherwise it takes a guest.
host_has_ublk() {
    [ "$(id -u)" = 0 ] || return 1
    [ -e /dev/ublk-control ] || modprobe -q ublk_drv 2>/dev/null && [ -e /dev/ublk-control ]
}

missing_packages() {
    local installed
    installed=$(dpkg-query -W -f '${Package} ${db:Status-Status}\n' "$@" 2>/dev/null || true)
    local name
    for name; do
        grep -q "^$name installed\$" <<<"$installed" || printf '%s\n' "$name"
    done
}

install_packages() {
    command -v dpkg-query >/dev/null || die "this is not a Debian system; README.md, Install, says what is needed"
    local missing as_root=()
    mapfile -t missing < <(missing_packages "$@")
    [ ${#missing[@]} -gt 0 ] || return 0
    if [ "$(id -u)" != 0 ]; then
        may_use_sudo || die "not root, and these packages are missing; as root run: apt-get install ${missing[*]}"
        as_root=(sudo)
    fi
    say "installing ${missing[*]}"
    "${as_root[@]}" apt-get update -q >&2 &&
        "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive \
            apt-get install -q -y --no-install-recommends "${missing[@]}" >&2 ||
        die "apt-get failed; what it said is above"
}

# Without a password, or somebody is there to give it.
may_use_sudo() {
    command -v sudo >/dev/null && { sudo -n true 2>/dev/null || [ -t 0 ]; }
}

# Changes whenever a rebuild is due; a checkout that has moved needs one too.
build_stamp() {
    printf '%s\n' "$ROOT"
    (cd "$ROOT" && cat pyproject.toml ublk_loop/_uring_build.py ublk_loop/csrc/*) | sha256sum
}

build() {
    local stamp
    stamp=$(build_stamp)
    if "$VENV/bin/python" -c '' 2>/dev/null &&
        [ "$(cat "$VENV/ublk_loop.stamp" 2>/dev/null)" = "$stamp" ]; then
        return 0
    fi
    if [ -e "$VENV" ] && [ ! -w "$VENV" ]; then
        die "$VENV belongs to $(stat -c %U "$VENV"): be that user, or remove it"
    fi
    say "building into $VENV"
    # One whose interpreter is gone is made anew.
    "$VENV/bin/python" -c '' 2>/dev/null || "${PYTHON:-python3}" -m venv --clear "$VENV" ||
        die "the virtual environment could not be made"
    "$VENV/bin/python" -m pip install -q --disable-pip-version-check -e "$ROOT[test,demo]" >&2 ||
        die "the build failed; what pip said is above"
    printf '%s\n' "$stamp" >"$VENV/ublk_loop.stamp"
}

# set_up [guest]: all that the tools need; with `guest` also what boots one.
set_up() {
    local packages=("${PACKAGES[@]}")
    [ "${1:-}" != guest ] || packages+=("${GUEST_PACKAGES[@]}")
    install_packages "${packages[@]}"
    build
}
