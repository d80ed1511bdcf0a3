"""Partition tables."""

from __future__ import annotations


def one_partition() -> bytes:
    """Return a table with one partition of type 83 from sector 2048 on, 2,048 sectors long."""
    entry = bytes(4) + b"\x83" + bytes(3) + (2048).to_bytes(4, "little") * 2
    return bytes(446) + entry + bytes(48) + b"\x55\xaa"
