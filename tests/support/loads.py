"""fio as a load that verifies what it wrote, for as long as a test does its worst to the server.

In: a block device of at least DEV_BYTES, whose first bytes are the load's. Out: fio's report.
"""

from __future__ import annotations

import json
import signal
import subprocess
from pathlib import Path
from typing import Any

DEV_BYTES = 16 << 20
# For each way of a write: by the mapping, by chunks, by registered pages.
SIZES = "512/20:4k/30:20k/20:64k/20:512k/10"


class Load:
    """fio, which writes by two ways into two halves and reads every block again soon after."""

    def __init__(self, block_path: str, report: Path) -> None:
        self._report = report
        common = ["--direct=1", "--thread", "--time_based", "--runtime=86400", "--verify=crc32c"]
        common += [f"--filename={block_path}", "--allow_file_create=0", "--verify_fatal=1"]
        common += [f"--size={DEV_BYTES // 2}", "--verify_backlog=48", "--iodepth=16"]
        jobs = ["--name=a", "--ioengine=libaio", "--rw=randwrite", f"--bssplit={SIZES}"]
        jobs += [f"--output={report}", "--output-format=json"]
        other = ["--name=b", "--ioengine=io_uring", "--rw=randrw", "--bs=4k", "--fsync=64"]
        other += [f"--offset={DEV_BYTES // 2}", *common]
        self.process = subprocess.Popen(
            ["fio", *jobs, *common, *other], stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )

    def end(self) -> dict[str, dict[str, Any]]:
        """End it, and return its jobs' reports by name."""
        assert self.process.poll() is None, "fio ended by itself"
        self.process.send_signal(signal.SIGINT)
        self.process.communicate(timeout=60)
        text = self._report.read_text()
        return {job["jobname"]: job for job in json.loads(text[text.index("{") :])["jobs"]}


def nr_written(dev_id: int) -> int:
    """How many writes the block device has completed."""
    return int(Path(f"/sys/block/ublkb{dev_id}/stat").read_text().split()[4])
