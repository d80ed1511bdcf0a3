# Sourced by demo.sh and test.sh: packages, virtual environment, build. Debian 12 or 13.
#
# In: nothing, or PYTHON=... for another interpreter. Out: $ROOT, and $VENV with the package
# installed in it (editable). Does only what is missing, so a second run costs a second.

set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
VENV=$ROOT/.venv
PACKAGES=(
    gcc libc6-dev pkg-config liburing-dev python3 python3-dev python3-venv libtsan2 libasan8
    qemu-system-x86 busybox-static kmod cpio xz-utils
    fio e2fsprogs xfsprogs btrfs-progs util-linux procps
)

say() { printf '\033[1m==> %s\033[0m\n' "$*" >&2; }
die() { printf '%s: %s\n' "$(basename "$0")" "$*" >&2; exit 1; }

missing_packages() {
    local name
    for name in "${PACKAGES[@]}"; do
        [ "$(dpkg-query -W -f '${db:Status-Status}' "$name" 2>/dev/null)" = installed ] ||
            printf '%s\n' "$name"
    done
}

install_packages() {
    command -v dpkg-query >/dev/null || die "this needs Debian's package tools; see README.md, Install"
    local missing as_root=()
    mapfile -t missing < <(missing_packages)
    [ ${#missing[@]} -gt 0 ] || return 0
    if [ "$(id -u)" != 0 ]; then
        sudo -n true 2>/dev/null || { [ -t 0 ] && command -v sudo >/dev/null; } ||
            die "packages are missing and you are not root; run: sudo apt-get install ${missing[*]}"
        as_root=(sudo)
    fi
    say "installing ${missing[*]}"
    "${as_root[@]}" apt-get update -q >&2
    "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive \
        apt-get install -q -y --no-install-recommends "${missing[@]}" >&2
}

# Changes whenever a rebuild is due.
build_stamp() {
    (cd "$ROOT" && cat pyproject.toml ublk_loop/_uring_build.py ublk_loop/csrc/* | sha256sum)
}

build() {
    local stamp
    stamp=$(build_stamp)
    if [ -x "$VENV/bin/ublk" ] && [ "$(cat "$VENV/ublk_loop.stamp" 2>/dev/null)" = "$stamp" ]; then
        return 0
    fi
    say "building into .venv"
    [ -x "$VENV/bin/python" ] || "${PYTHON:-python3}" -m venv "$VENV"
    "$VENV/bin/pip" install -q --disable-pip-version-check -e "$ROOT[test]" >&2
    printf '%s\n' "$stamp" >"$VENV/ublk_loop.stamp"
}

install_packages
build
