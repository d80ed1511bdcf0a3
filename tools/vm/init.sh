#!/bin/busybox sh
# The guest's /init, in the initramfs: build the root file system, then go on as run.sh in it.
# /config (shell variables) and /job (the command) were written for this run by vm_guest.py.
# What is printed here goes to the console, which is shown only if the guest fails.

set -u
. /config

fail() {
	echo "vm-init: $*"
	reboot -f
}

mount -t devtmpfs none /dev
mount -t proc none /proc
mount -t sysfs none /sys
for module in $MODULES; do
	insmod "/modules/$module" || echo "vm-init: cannot load $module"
done

# cache=loose: the host's files are taken not to change meanwhile, since every round trip is dear.
# msize: 500 KiB is the most that the transport carries at once.
options=trans=virtio,version=9p2000.L,msize=512000,access=any
mkdir -p /host /upper /root /overlay
mount -t 9p -o "ro,cache=loose,$options" host /host || fail "no root over 9p"
mount -t tmpfs -o size=90%,mode=755 none /upper
mkdir /upper/files /upper/work
mount -t overlay -o lowerdir=/host,upperdir=/upper/files,workdir=/upper/work none /root ||
	fail "no overlay"
mount --bind /root /overlay

mount --move /dev /root/dev
mkdir -p /root/dev/shm /root/dev/pts
mount -t devpts -o mode=620,ptmxmode=666 none /root/dev/pts
ln -s /proc/self/fd /root/dev/fd
ln -s fd/0 /root/dev/stdin
ln -s fd/1 /root/dev/stdout
ln -s fd/2 /root/dev/stderr
for dir in /tmp /run /dev/shm; do
	mkdir -p "/root$dir"
	mount -t tmpfs -o size=90%,mode=1777 none "/root$dir"
done
chmod 755 /root/run
mkdir -p /root/run/lock /root/run/vm

# A file or directory below one of these that the job needs, such as a checkout, stays visible.
eval "set -- $KEEP"
for path; do
	if [ -L "/overlay$path" ]; then
		cp -d "/overlay$path" "/root$path"
		continue
	elif [ -d "/overlay$path" ]; then
		mkdir -p "/root$path"
	else
		: >"/root$path"
	fi
	mount --bind "/overlay$path" "/root$path" || echo "vm-init: cannot keep $path"
done
umount /overlay

[ -d /sys/kernel/debug ] && mount -t debugfs none /sys/kernel/debug
[ -d /sys/fs/cgroup ] && mount -t cgroup2 none /sys/fs/cgroup
[ -d /sys/kernel/config ] && mount -t configfs none /sys/kernel/config
ip link set lo up
hostname ublk-vm
echo "127.0.0.1 ublk-vm" >>/root/etc/hosts

if [ -n "$MODULES" ]; then
	tree=/root/lib/modules/$(uname -r)
	mkdir -p "$tree"
	mount -t 9p -o "ro,cache=loose,$options" modules "$tree" || fail "no modules over 9p"
fi
eval "set -- $SHARED"
index=0
for dir; do
	# Not cached: the host has a result as soon as it is written, even if the guest dies then.
	mkdir -p "/root$dir"
	mount -t 9p -o "rw,cache=none,$options" "shared$index" "/root$dir" ||
		fail "cannot share $dir"
	index=$((index + 1))
done

# An emulated kernel boots on one processor, which is also faster.  With two, one boot in fifty ended
# in "Oops: int3" (seen with QEMU 7.2): one ran an old translation of code that the other patched,
# which the kernel does mostly while it boots.
for cpu in /sys/devices/system/cpu/cpu[0-9]*; do
	if [ -e "$cpu/online" ] && read -r online <"$cpu/online" && [ "$online" = 0 ]; then
		echo 1 >"$cpu/online"
	fi
done

cp /bin/busybox /job /run.sh /config /root/run/vm/
mount --move /proc /root/proc
mount --move /sys /root/sys
exec switch_root /root /run/vm/busybox sh /run/vm/run.sh
