"""A userspace loop device on the kernel's ublk driver."""

__version__ = "0.1.0"
