"""``ublk doctor``: look at driver, machine, devices and servers, and say what is wrong.

In: the machine. Out: Findings, worst first, from the checks in doctor_host.py and
doctor_devices.py; and the repair of those that can be repaired without harm. Runs in the CLI, also
where there is no driver at all: telling what is missing then is its first use.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator, Sequence

from . import doctor_devices, doctor_host, listing, state, uapi
from .doctor_devices import Known
from .errors import DaemonError, UblkLoopError
from .finding import SEVERITIES, Finding, Host


def examine(host: Host | None = None) -> list[Finding]:
    """Return what is found, problems first."""
    found = list(_all(host or Host()))
    return sorted(found, key=lambda finding: SEVERITIES.index(finding.severity))


def _all(host: Host) -> Iterator[Finding]:
    yield from doctor_host.check_driver(host)
    yield from doctor_host.check_io_uring(host)
    yield from doctor_host.check_liburing(host)
    yield from doctor_host.check_features(host, _ask_features)
    yield from doctor_host.check_rights(host)
    yield from doctor_host.check_sandbox()
    yield from doctor_host.check_memlock(host)
    yield from doctor_host.check_cgroup(host)
    yield from doctor_host.check_udev(host)
    try:
        devices, dev_ids = _devices()
    except (ImportError, UblkLoopError):
        return  # said above
    unprivileged = [one for one in devices if one.info.flags & uapi.UBLK_F_UNPRIVILEGED_DEV]
    yield from doctor_host.check_ublks_max(host, len(unprivileged))
    for known in devices:
        yield from doctor_devices.check_device(host, known)
    yield from doctor_devices.check_state_folder(host, dev_ids)


def repair(findings: Sequence[Finding]) -> list[tuple[Finding, str]]:
    """Repair what can be; return what was tried, with an error's text or an empty one."""
    done = []
    for finding in findings:
        if finding.repair is None:
            continue
        try:
            finding.repair()
            done.append((finding, ""))
        except (OSError, ValueError, subprocess.SubprocessError) as error:
            done.append((finding, str(error)))
    return done


def text(findings: Sequence[Finding]) -> str:
    """Return what ``ublk doctor`` prints, with no newline at the end."""
    lines = []
    for finding in findings:
        lines += [f"{finding.severity:<7}  {finding.topic}: {finding.text}"]
        lines += [f"         fix: {finding.fix}"]
    counts = {name: sum(one.severity == name for one in findings) for name in SEVERITIES}
    summary = ", ".join(f"{count} {name}{'s' * (count != 1)}" for name, count in counts.items())
    if any(finding.repair for finding in findings):
        summary += "; ublk doctor --fix repairs what it safely can"
    return "\n".join([*lines, summary])


def _ask_features() -> int:
    from .control import Control

    with Control() as control:
        return control.get_features()


def _devices() -> tuple[list[Known], list[int]]:
    from .control import Control, list_dev_ids

    found = []
    with Control() as control:
        dev_ids = list_dev_ids()
        for dev_id in dev_ids:
            try:
                info = control.get_dev_info(dev_id)
            except UblkLoopError:
                continue  # deleted since, or another user's
            try:
                known = listing.state_of(info, state.read(dev_id))
            except DaemonError:
                known = None
            found.append(Known(info, known))
    return found, dev_ids


__all__ = ["examine", "repair", "text"]
