#!/usr/bin/env bash
# The steps of tools/demo.sh, on a kernel with ublk_drv, as root:  demo_steps.sh VENV
#
# Whatever happens, the device, the mount and the files are gone at the end. A failure is one line
# on stderr and exit code 1.

set -uo pipefail
VENV=$1
TOOLS=$(cd "$(dirname "$0")" && pwd)
PATH=$VENV/bin:/usr/sbin:/usr/bin:/sbin:/bin
# Or Python would write into the very tree that is copied.
export PYTHONDONTWRITEBYTECODE=1
DISK_SIZE=512M
BEGIN=$SECONDS

work=$(mktemp -d /tmp/ublk-demo.XXXXXX)
mnt=$work/mnt
dev_id='' step_title='begin' nr_steps=0

clean_up() {
    if mountpoint -q "$mnt"; then
        umount "$mnt" 2>/dev/null || umount --lazy "$mnt"
    fi
    [ -z "$dev_id" ] || ublk del -n "$dev_id" >/dev/null 2>&1
    rm -rf "$work"
}
trap clean_up EXIT
trap 'fail interrupted' INT TERM HUP

step() {
    nr_steps=$((nr_steps + 1))
    step_title="$nr_steps. $*"
    printf '\n\033[1m%s\033[0m\n' "$step_title"
}

fail() {
    printf 'demo: failed at step "%s": %s\n' "$step_title" "$*" >&2
    exit 1
}

# run COMMAND...: show it as typed, and its output; what it said last is the reason of a failure.
run() {
    printf '$ %s\n' "$*"
    "$@" 2>"$work/stderr" || fail "$1: exit code $?: $(tail -n 1 "$work/stderr")"
}

add() {
    run ublk add -t loop -f disk.img | tee "$work/added"
    dev_id=$(sed -n 's/^dev id \([0-9]*\):.*/\1/p' "$work/added")
    [ -n "$dev_id" ] || exit 1
    node=/dev/ublkb$dev_id
}

del() {
    run ublk del -n "$dev_id"
    dev_id=''
}

# Type, mode, owner, time and link of all below a folder, and the contents of its files.
manifest() {
    cd "$1" || return
    find . -mindepth 1 -printf '%y %m %U:%G %T@ %l %p\n' | LC_ALL=C sort
    find . -type f -print0 | LC_ALL=C sort -z | xargs -0 sha256sum
}

cd "$work" || exit 1
mkdir "$mnt"
# Of moderate size, and on every machine that has come this far.
tree=$(/usr/bin/python3 -c 'import sysconfig; print(sysconfig.get_path("stdlib"))')
printf 'Linux %s, %s CPUs, %s\n' "$(uname -r)" "$(nproc)" "$(date +%F)"
modprobe -q ublk_drv || [ -e /dev/ublk-control ] || fail "this kernel has no ublk_drv"

step "Add: a file becomes a block device"
run truncate -s "$DISK_SIZE" disk.img
add

step "Make a file system on it and mount it"
run mkfs.ext4 -q "$node"
run mount "$node" mnt

step "Copy a real tree: $tree"
(manifest "$tree") >before || fail "cannot read $tree"
nr_files=$(find "$tree" -type f | wc -l) nr_mib=$(du -sm "$tree" | cut -f1)
printf '%d files, %d MiB\n' "$nr_files" "$nr_mib"
run cp -a "$tree/." mnt/tree
run sync

step "Unmount and delete the device; the file stays"
run umount mnt
del
run ls -sh disk.img

step "Add it again, mount, compare checksums"
add
run e2fsck -fn "$node"
run mount -o ro "$node" mnt
(manifest mnt/tree) >after || fail "cannot read the copy"
cmp -s before after || fail "the copy differs: $(diff before after | grep -m 1 '^[<>]')"
printf 'All %d files are as they were: contents, modes, owners, times, links.\n' "$nr_files"
run umount mnt
del

step "fio beside /dev/loop: 4 KiB, depth 64, O_DIRECT, files on tmpfs"
cd /
"$VENV/bin/python" "$TOOLS/fio_compare.py" --here --profile quick ||
    fail "fio_compare.py: exit code $?; what it said is above"

printf '\n\033[1mShown in %d s: a file was served as %s by the real ublk driver; ext4 on it was made,\n' \
    $((SECONDS - BEGIN)) "$node"
printf 'filled, verified after a new start, and measured beside /dev/loop.\033[0m\n'
