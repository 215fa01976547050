"""One run in a workdir at a time: two would remove and rename each other's checkpoints.

    WORKDIR/.lock     held by process 0 while it runs, and who that is: {"host", "boot", "pid", "job", "starts"}

The system lets go of it with the process, however that ends. A disk of a network does so for a machine that is gone
after a while only, or never. On some disks (a bucket's) it is seen on the same machine alone.
"""

import contextlib
import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

NAME = ".lock"
PATIENCE = 100  # seconds for a machine that may be gone: NFS gives what it held to others after 90
_HELD = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)
_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL)


@contextlib.contextmanager
def alone_in(workdir: Path, *, say: Callable[[str], None] = print) -> Iterator[None]:
    """Within it no other run can be `workdir`'s, which exists; on a disk without locks it does nothing.

    Process 0 holds it for all. ValueError says who else does and what to do; OSError where the file cannot be made.
    """
    if jax.process_index() != 0:
        yield
        return
    path = Path(workdir) / NAME
    descriptor = _take(path, say)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            if _lies_at(path, descriptor):
                path.unlink()
        os.close(descriptor)


def _take(path: Path, say: Callable[[str], None]) -> int:
    """The descriptor of the lock, once it is held."""
    me, until, stale = _me(), None, 0
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _NO_LOCKS:
                return descriptor
            holder = _read(descriptor)
            os.close(descriptor)
            if error.errno not in _HELD:
                raise
        else:
            if _lies_at(path, descriptor) or stale == 10:  # a disk may count its files anew at every look
                _write(descriptor, me)
                return descriptor
            os.close(descriptor)  # its last holder has just taken the file away
            stale += 1
            continue
        if holder.get("job") and holder["job"] == me["job"] and holder.get("starts", 0) < me["starts"]:
            path.unlink(missing_ok=True)  # Slurm has ended this job's earlier start; the disk does not know yet
            continue
        who = _said(holder)
        if until is None:
            elsewhere = bool(holder) and any(holder.get(name) != me[name] for name in ("host", "boot"))
            # One that has not said who it is yet does so at once.
            until = time.monotonic() + (PATIENCE if elsewhere else 0 if holder else 5)
            if elsewhere:
                say(f"{path.parent} is held by {who}; waiting {PATIENCE} s, for that machine may be gone")
        if time.monotonic() >= until:
            raise ValueError(
                f"another run works in {path.parent}: {who}; end that one or give another --workdir (if its machine is "
                f"gone for good, remove {path})"
            )
        time.sleep(2)


def _me() -> dict[str, Any]:
    """Who this is; `job` and `starts` are Slurm's, whose jobs come back under their number."""
    starts = os.environ.get("SLURM_RESTART_COUNT", "")
    return {
        "host": socket.gethostname(),
        "boot": _boot(),
        "pid": os.getpid(),
        "job": os.environ.get("SLURM_JOB_ID", ""),
        "starts": int(starts) if starts.isdigit() else 0,
    }


def _boot() -> str:
    """Which start of a machine this is: one that took another's place may have its name."""
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return ""


def _said(holder: Mapping[str, Any]) -> str:
    if not holder:
        return "a process that has not said who it is"
    job = f" (Slurm job {holder['job']})" if holder.get("job") else ""
    return f"process {holder.get('pid')} on {holder.get('host')}{job}"


def _lies_at(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _write(descriptor: int, me: Mapping[str, Any]) -> None:
    with contextlib.suppress(OSError):  # on a full disk nobody is told who it is
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(me).encode(), 0)
        os.fsync(descriptor)


def _read(descriptor: int) -> dict[str, Any]:
    try:
        found = json.loads(os.pread(descriptor, 4096, 0))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
