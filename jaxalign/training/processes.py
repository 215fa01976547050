"""Several processes, one run: they find each other, agree on what is run, and stop together.

Every process runs the same command. Nothing here is needed, or does anything, where there is one process.
"""

import contextlib
import hashlib
import json
import os
import re
import socket
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import jaxalign
from jaxalign.data.pipeline import Batches
from jaxalign.training.mesh import replicated

LOST = 3  # exit status of a process that lost another one: worth starting again
# What errors say when somebody is gone: of collectives, of any type, and of JAX's coordination service.
_COLLECTIVE = re.compile(r"gloo|nccl|collective operation", re.IGNORECASE)
_SERVICE = re.compile(r"connection|socket|heartbeat|unavailable|deadline|unhealthy|coordination|barrier", re.IGNORECASE)


# ---- finding each other


def cluster(environment: Mapping[str, str] = os.environ) -> str | None:
    """The launcher that started this as one of several processes, or None; told by its environment variables.

    'TPU' is a slice on GKE: Cloud TPU VMs have no such variables, and `join` is told to `detect` them.
    """

    def several(name: str) -> bool:
        value = environment.get(name, "")
        return value.isdigit() and int(value) > 1

    if "," in environment.get("TPU_WORKER_HOSTNAMES", "") or several("MEGASCALE_NUM_SLICES"):
        return "TPU"
    # srun sets the variables of the step; a batch script that starts no step is one process, whatever it reserved.
    if several("SLURM_STEP_NUM_TASKS") and "SLURM_PROCID" in environment:
        return "Slurm"
    if several("OMPI_COMM_WORLD_SIZE"):
        return "Open MPI"
    return None


def join(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    detect: bool = False,
    timeout: int = 60,
    environment: Mapping[str, str] = os.environ,
) -> bool:
    """Join the other processes if there are any, before anything else touches JAX; whether there are.

    Told by arguments (coordinator is HOST:PORT of process 0) or by JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and
    JAX_PROCESS_ID, else found out from Slurm, Open MPI or a TPU slice on GKE; `detect` asks JAX's own detection, which
    a TPU VM outside of GKE needs. A process that is not heard of for `timeout` seconds counts as lost, and all stop.
    Raises ValueError when one of the three is missing.
    """
    told = {
        "coordinator": coordinator or environment.get("JAX_COORDINATOR_ADDRESS"),
        "num_processes": _number(num_processes, environment, "JAX_NUM_PROCESSES"),
        "process_id": _number(process_id, environment, "JAX_PROCESS_ID"),
    }
    given = {name: value for name, value in told.items() if value is not None}
    if given and len(given) < 3 and not (cluster(environment) or detect):
        missing = ", ".join(f"--{name}" for name in told if name not in given)
        raise ValueError(f"several processes need --coordinator, --num_processes and --process_id; {missing} missing")
    if told["num_processes"] == 1 or not (given or cluster(environment) or detect):
        return False
    if len(given) == 3 and not 0 <= told["process_id"] < told["num_processes"]:
        raise ValueError(f"--process_id={told['process_id']}: the processes are 0 … {told['num_processes'] - 1}")
    # SIGTERM is answered between two steps (interrupt.py); JAX's service knows no other notice and would swallow it.
    jax.config.update("jax_enable_preemption_service", False)
    host = (told["coordinator"] or "").rsplit(":", 1)[0]
    # On one machine nobody from outside needs to reach the coordinator.
    bind = {"coordinator_bind_address": told["coordinator"]} if host in ("localhost", "127.0.0.1", "[::1]") else {}
    try:
        jax.distributed.initialize(
            told["coordinator"],
            told["num_processes"],
            told["process_id"],
            heartbeat_timeout_seconds=timeout,
            # At the end all wait for the slowest, which may still be writing.
            shutdown_timeout_seconds=max(timeout, 300),
            cluster_detection_method="deactivate" if len(given) == 3 else None,
            **bind,
        )
    except RuntimeError as error:
        where = told["coordinator"] or cluster(environment) or "JAX's detection"
        raise ConnectionError(f"the processes did not find each other ({where}): {str(error)[:300]}") from None
    return jax.process_count() > 1


def _number(given: int | None, environment: Mapping[str, str], name: str) -> int | None:
    if given is not None or name not in environment:
        return given
    if not environment[name].isdigit():
        raise ValueError(f"{name}={environment[name]!r}: write a number")
    return int(environment[name])


def me() -> str:
    """'process 1 of 4 on HOST'."""
    return f"process {jax.process_index()} of {jax.process_count()} on {socket.gethostname()}"


# ---- agreeing


def gather(facts: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The JSON-able `facts` of every process, in order; all processes must call it."""
    text = np.frombuffer(json.dumps(facts).encode(), np.uint8)
    sizes = np.atleast_1d(multihost_utils.process_allgather(np.int32(len(text))))
    rows = multihost_utils.process_allgather(np.pad(text, (0, int(sizes.max()) - len(text))))
    rows = rows.reshape(len(sizes), -1)
    return [json.loads(bytes(row[:size]).decode()) for row, size in zip(rows, sizes, strict=True)]


def differences(facts: Sequence[Mapping[str, Any]]) -> list[str]:
    """One line a fact in which processes differ: who has which value; fact 'host' says where a process is."""
    lines = []
    for name in dict.fromkeys(name for one in facts for name in one):
        values: dict[str, list[int]] = {}
        for process, one in enumerate(facts):
            values.setdefault(json.dumps(one.get(name)), []).append(process)
        if name == "host" or len(values) == 1:
            continue

        def who(processes: list[int]) -> str:
            named = [f"{p} ({facts[p].get('host', '?')})" for p in processes[:3]]
            more = f" and {len(processes) - 3} more" if len(processes) > 3 else ""
            return f"process{'es' if len(processes) > 1 else ''} {', '.join(named)}{more}"

        largest_first = sorted(values.items(), key=lambda item: -len(item[1]))
        lines.append(f"{name}: " + ", ".join(f"{value} on {who(found)}" for value, found in largest_first))
    return lines


def check_agreement(facts: Mapping[str, Any]) -> None:
    """ValueError, the same on every process, that says which processes differ in which of the facts.

    All processes must call it; with one process it does nothing.
    """
    if jax.process_count() == 1:
        return
    if lines := differences(gather({**facts, "host": socket.gethostname()})):
        more = f"; and {len(lines) - 6} more" if len(lines) > 6 else ""
        raise Disagreement(f"the processes do not run the same thing: {'; '.join(lines[:6])}{more}")


class Disagreement(ValueError):
    """Every process knows of it, so each can leave in peace."""


def code_digest() -> str:
    """A digest of this package's source files."""
    root = Path(jaxalign.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def data_facts(data: Batches, seed: int) -> dict[str, Any]:
    """What the global order of clips follows from: the videos found, their windows, the seed."""
    items = [(item.name, item.frames, item.label, item.split) for item in data.source.items]
    windows = [(window.item, window.start, window.stop) for window in data.windows]
    digest = hashlib.sha256(json.dumps([items, windows, seed]).encode()).hexdigest()[:16]
    facts = {"data: videos": len(items), "data: windows": len(windows), "data: order": digest}
    if data.source.tokens is not None:  # what a student is told
        facts["data: captions"] = hashlib.sha256(json.dumps(data.source.captions).encode()).hexdigest()[:16]
    return facts


@contextlib.contextmanager
def all_or_none(what: str) -> Iterator[None]:
    """Within it each process works alone; a mistake that only some of them meet ends all, and all say whose it was."""
    failed = None
    try:
        yield
    except (ValueError, OSError) as error:
        if jax.process_count() == 1:
            raise
        failed = error
    if jax.process_count() > 1:
        told = gather({"error": str(failed) if failed else "", "host": socket.gethostname()})
        wrong = [(p, one) for p, one in enumerate(told) if one["error"]]
        if wrong:
            process, one = wrong[0]
            others = f" (and {len(wrong) - 1} others)" if len(wrong) > 1 else ""
            raise Disagreement(f"{what}, process {process} on {one['host']}{others}: {one['error']}") from failed


def check_shared(folder: Path) -> None:
    """ValueError on every process unless all see one and the same folder: they write one checkpoint together."""
    if jax.process_count() == 1:
        return
    token = folder / ".shared"
    with all_or_none("workdir"):
        if jax.process_index() == 0:
            token.write_text(f"{socket.gethostname()} {os.getpid()} {os.urandom(8).hex()}")
    told = multihost_utils.broadcast_one_to_all(_padded(token.read_text() if jax.process_index() == 0 else ""))
    text = bytes(told).rstrip(b" ").decode()
    with all_or_none("workdir"):
        found = token.read_text() if token.is_file() else None
        if found != text:
            raise ValueError(f"{folder} is not the folder of process 0: give one that all of them share")
    if jax.process_index() == 0:
        token.unlink(missing_ok=True)


def _padded(text: str) -> np.ndarray:
    return np.frombuffer(text.encode()[:512].ljust(512), np.uint8)


# ---- saving and stopping together

GO_ON, SAVE, STOP = 0, 1, 2


class Vote:
    """Whether any process wants all to save, or to save and stop; asked at every step, answered one step later to all.

    A signal reaches the processes at different steps; a process that left alone would leave the others waiting. The
    vote is one number a device, their largest taken on the devices behind the training step: nobody waits for it.
    """

    def __init__(self, mesh: Mesh):
        self._asked = None
        if jax.process_count() > 1:
            self._sharding = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
            self._size = mesh.size
            self._largest = jax.jit(lambda votes: votes.max(), out_shardings=replicated(mesh))

    def __call__(self, wish: int) -> int:
        """GO_ON, SAVE or STOP. With one process: its wish. With several: the largest of those at the step before."""
        if jax.process_count() == 1:
            return wish
        before, one = self._asked, np.full(1, wish, np.int32)
        self._asked = self._largest(jax.make_array_from_callback((self._size,), self._sharding, lambda _: one))
        return GO_ON if before is None else int(before)


@contextlib.contextmanager
def leaving_at_once(say: Callable[[str], None] | None = None) -> Iterator[None]:
    """Within it an error of one process of several ends that process outright, after one line that says why.

    Leaving in order would wait for the others (at a barrier of the checkpoint, or of JAX's shutdown), who in turn wait
    in a collective for this one. So the connection is dropped, which the others notice: exit status 3 where another
    process was lost, else 2. With one process, and for what all processes know, the error goes its way.
    `say` puts process 0's line into the report.
    """
    try:
        yield
    except Disagreement:
        raise
    except BaseException as error:
        if jax.process_count() == 1:
            raise
        lost, expected = is_loss(error), isinstance(error, (OSError, FloatingPointError, KeyboardInterrupt))
        try:
            if not (lost or expected) or _wants_traceback():
                traceback.print_exc()
            text = " ".join(str(error).split()) or type(error).__name__
            if lost:
                text = (
                    f"another process was lost ({text[:200]}); the same command on all goes on from the last checkpoint"
                )
            elif not expected:
                text = f"{type(error).__name__}: {text}"
            if say is not None and jax.process_index() == 0:
                say(f"error: {me()}: {text}")
            else:
                print(f"error: {me()}: {text}", file=sys.stderr)
            sys.stdout.flush()
            sys.stderr.flush()
        finally:  # also when nothing takes the line any more: a closed pipe, a full disk
            os._exit(LOST if lost else 2)


def is_loss(error: BaseException) -> bool:
    """Whether an error of a run of several processes means that one of them is gone."""
    text = str(error)
    # XLA raises some of its errors as ValueError, so collectives are told by their name alone.
    return bool(_COLLECTIVE.search(text) or (isinstance(error, RuntimeError) and _SERVICE.search(text)))


def _wants_traceback() -> bool:
    return flags.FLAGS.is_parsed() and bool(flags.FLAGS.get_flag_value("traceback", False))
