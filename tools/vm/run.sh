# The guest's process 1 once the root file system is up: run the job, tell the host of its end, and
# wait for the host to end the guest.
#
# Marks in the job's output tell of its start and its end.  What the job wrote before it ended is
# certain to be in front of the mark, whatever still writes behind it.

set -u
. /run/vm/config
busybox=/run/vm/busybox

# The ports appear a while after their driver, under names that only sysfs explains.
find_port() {
	while :; do
		for dir in /sys/class/virtio-ports/*; do
			if read -r name <"$dir/name" && [ "$name" = "$1" ]; then
				echo "/dev/${dir##*/}"
				return
			fi
		done 2>/dev/null
		$busybox usleep 10000
	done
}

# The job writes to pipes: a port can be opened only once, so that `tee /dev/stderr` would fail.
cd /run/vm
$busybox mkfifo -m 666 stdout stderr
exec 8<>"$(find_port vm.stdout)" 9<>"$(find_port vm.stderr)"
$busybox cat <stdout >&8 &
$busybox cat <stderr >&9 &
exec 6>stdout 7>stderr

# The host sends a line when the time is over: then the console tells who hangs, and where.
(
	until read -r _ <&8; do
		$busybox usleep 200000
	done
	echo 8 >/proc/sys/kernel/printk
	echo l >/proc/sysrq-trigger
	echo w >/proc/sysrq-trigger
	$busybox ps -o pid,ppid,stat,args | $busybox grep -v '\[' >/dev/console
	$busybox sleep 1 # the kernel prints in its own time
	printf '%s said\n' "$MARK" >&6
) &

# As systemd has it: select() users stay safe, who needs more raises the soft limit.
ulimit -Hn 524288
printf '%s start\n' "$MARK" >&6
/bin/sh /run/vm/job </dev/null >&6 2>&7 6>&- 7>&- 8>&- 9>&-
status=$?
for disk in $DISKS; do
	$busybox timeout 30 $busybox blockdev --flushbufs "/dev/$disk"
done
printf '%s end\n' "$MARK" >&7
printf '%s exit %d\n' "$MARK" "$status" >&6
while :; do
	$busybox sleep 1000
done
