"""Checkpoints that are whole or not there: asynchronous Orbax saves, sealed by a manifest, with fall-back.

    DIRECTORY/STEP/state/         Orbax's arrays, one entry a leaf under its dotted name
    DIRECTORY/STEP/metadata.json  step, shape and dtype of every leaf, and what the caller adds (the config)
    DIRECTORY/STEP/manifest.json  written last: a folder without it was never finished (interop/sealed.py)

The state goes in as a flat {dotted name: array}: what is on disk does not depend on NNX's or optax's
classes, and parts can be picked by regex. Processes share DIRECTORY; process 0 seals, prunes and decides
what is good.
"""

import contextlib
import errno
import json
import os
import shutil
import socket
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from jaxalign.interop import sealed
from jaxalign.interop.converted import quiet_orbax
from jaxalign.training import restore
from jaxalign.training.mesh import named_leaves


class Restored(NamedTuple):
    """What `Checkpoints.restore_latest` found."""

    state: Any
    step: int
    extra: dict[str, Any]
    messages: list[str]


def check_writable(directory: str | Path) -> Path:
    """Make `directory` and try there what a save does, so that a run fails at its start and not at its first save.

    Orbax ends a save by renaming a full folder, which a bucket's disk may refuse that takes files.
    Raises OSError that says which folder, why and what to do.
    """
    directory = Path(directory)
    probe = directory / f".write_test.{socket.gethostname()}.{os.urandom(4).hex()}"  # other processes try the same
    renamed = probe.with_name(f"{probe.name}.renamed")
    failed, remedy = "write to", "use another folder"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        probe.mkdir()
        (probe / "file").write_bytes(b"x" * 4096)
        failed = "rename a folder in"
        remedy = "mount a bucket with rename-dir-limit=200000, give it a hierarchical namespace, or use another folder"
        probe.rename(renamed)
        failed, remedy = "delete in", "use another folder"
        shutil.rmtree(renamed)
    except OSError as error:
        for left in (probe, renamed):
            shutil.rmtree(left, ignore_errors=True)
        reason = error.strerror or str(error)
        raise type(error)(error.errno, f"cannot {failed} {directory}: {reason}; {remedy}") from None
    return directory


def _reason(error: BaseException) -> str:
    """One line of why writing failed; the storage library wraps the system's words in lines of its own."""
    text = " ".join((getattr(error, "strerror", None) or str(error)).split())
    if "No space left on device" in text:
        return "no space left on the disk"
    return text if isinstance(error, OSError) else f"{type(error).__name__}: {text[:200]}"


def agree(value: int) -> int:
    """Process 0's number, on every process."""
    return value if jax.process_count() == 1 else int(multihost_utils.broadcast_one_to_all(np.int64(value)))


def _finish_at_exit(checkpoints: "Checkpoints") -> None:
    """Let a process that leaves without `close` finish the save under way.

    Orbax works with thread pools. Python shuts those before it joins threads and runs `atexit`, and a save
    that is then under way fails, or hangs. The hook that the pools themselves use comes early enough; it has
    no public name.
    """
    this = weakref.ref(checkpoints)
    if register := getattr(threading, "_register_atexit", None):
        register(lambda: (alive := this()) and alive.wait())


class Checkpoints:
    """The checkpoints of one run: `save` returns soon, a thread finishes; a context manager.

    `keep`: how many of the newest to keep; `keep_every`: steps divisible by it stay for ever (0: none). `say` gets
    each line meant for a person, also from the background thread. `failed_saves` counts saves that did not
    get to the disk.
    """

    def __init__(
        self,
        directory: str | Path,
        *,
        keep: int = 3,
        keep_every: int | None = None,
        say: Callable[[str], None] = print,
    ):
        if keep < 1:
            raise ValueError(f"checkpoint.keep is {keep}: keep at least 1 checkpoint")
        self.directory = Path(directory).absolute()
        self.messages: list[str] = []
        self.failed_saves = 0
        self._keep, self._keep_every, self._say_line = keep, keep_every, say
        self._primary = jax.process_index() == 0
        self._good: set[int] = set()  # written, or checked, by this process
        self._damaged: set[int] = set()
        self._failed: set[int] = set()  # begun and not sealed; late writers may still drop files there
        self._thread: threading.Thread | None = None
        # Weights hardly compress: plain bytes cost less time and as much space.
        self._orbax = ocp.AsyncCheckpointer(ocp.PyTreeCheckpointHandler(use_compression=False))
        self._quiet = contextlib.ExitStack()
        self._quiet.enter_context(quiet_orbax())
        _finish_at_exit(self)
        if self._primary:
            check_writable(self.directory)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()

    def _say(self, line: str) -> None:
        self.messages.append(line)
        if self._primary:
            self._say_line(line)

    def _folders(self) -> list[int]:
        return restore.step_folders(self.directory)

    def steps(self) -> list[int]:
        """The steps whose saving was finished, ascending; whether they are whole shows at restore."""
        return [step for step in self._folders() if (self.directory / str(step) / sealed.NAME).is_file()]

    @property
    def last_good(self) -> int | None:
        """The newest step that this object wrote or checked."""
        return max(self._good, default=None)

    # ---- saving

    def save(self, step: int, state: Any, *, extra: dict[str, Any] | None = None) -> None:
        """Copy the state off the devices and write it in the background as checkpoint `step`.

        The arrays may be donated or changed as soon as this returns. Every process must call it. A save
        that fails (disk full) becomes one line and a count, never an exception: the checkpoint before it is
        untouched. A step that is already saved is left as it is. Raises TypeError for a leaf that is no
        array or number.
        """
        leaves = named_leaves(state)
        restore.check_leaves(leaves)
        self.wait()
        described = {name: restore.signature(leaf) for name, leaf in leaves.items()}
        arrays = {
            name: np.asarray(leaf) if isinstance(leaf, (*restore.SCALARS, np.generic)) else leaf
            for name, leaf in leaves.items()
            if 0 not in described[name][1]
        }
        size = sum(leaf.nbytes for leaf in arrays.values())
        metadata = {"step": step, "leaves": described, "extra": extra or {}}
        # Orbax's processes wait for each other: all save, or none does.
        if not agree(self._prepare(step, size, metadata) if self._primary else 0):
            return
        try:
            self._orbax.save(self.directory / str(step) / "state", args=ocp.args.PyTreeSave(arrays))
        except Exception as error:  # OSError, or whatever the storage library makes of it
            self._save_failed(step, error)
            return
        self._thread = threading.Thread(target=self._finish, args=(step,), name=f"checkpoint-{step}")
        self._thread.start()

    def _prepare(self, step: int, size: int, metadata: dict[str, Any]) -> int:
        """Process 0's part before the arrays: 1 when they can be written, 0 when not or not needed."""
        if step in self._good:
            return 0
        folder = self.directory / str(step)
        try:
            free = shutil.disk_usage(self.directory).free
            if free < size * 1.02 + 100_000:  # better than finding out half-way
                reason = f"no space left on the disk: {size / 1e6:.1f} MB needed, {free / 1e6:.1f} MB free"
                raise OSError(errno.ENOSPC, reason)
            self._clear(step)
            self._failed.add(step)  # until it is sealed
            folder.mkdir(parents=True)
            sealed.write_atomic(folder / restore.METADATA, json.dumps(metadata, indent=1) + "\n")
        except OSError as error:
            self._save_failed(step, error)
            return 0
        return 1

    def _clear(self, step: int) -> None:
        """Free the name of a step that was reached again after falling back past its damaged checkpoint."""
        self._remove_failed()
        folder = self.directory / str(step)
        if not folder.exists():
            return
        if not (folder / sealed.NAME).exists():
            self._remove(step)
            self._say(f"removed the unfinished checkpoint {folder}")
            return
        aside, count = folder.with_name(f"{step}.aside"), 1
        while aside.exists():
            count += 1
            aside = folder.with_name(f"{step}.aside.{count}")
        folder.rename(aside)
        self._damaged.discard(step)
        self._say(f"moved the older checkpoint {folder} aside to {aside.name}: step {step} is saved again")

    def _finish(self, step: int) -> None:
        try:
            self._orbax.wait_until_finished()
            if self._primary:
                sealed.write_manifest(self.directory / str(step))
        except Exception as error:
            self._save_failed(step, error)
            return
        self._good.add(step)
        self._failed.discard(step)
        if self._primary:
            try:
                self._prune(step)
            except OSError as error:
                self._say(f"warning: old checkpoints in {self.directory} could not be removed ({_reason(error)})")

    def _save_failed(self, step: int, error: BaseException) -> None:
        self.failed_saves += 1
        self._remove_failed()  # what is half written only takes room that the next save needs
        good = f"the last good one is {self.last_good}" if self._good else "there is no good one yet"
        self._say(
            f"warning: checkpoint {step} was not written ({_reason(error)}); {good}; failed saves: {self.failed_saves}"
        )

    def _remove_failed(self) -> None:
        for step in self._failed if self._primary else ():
            self._remove(step)

    def _remove(self, step: int) -> None:
        folder = self.directory / str(step)
        # The manifest goes first: a kill in the middle leaves an unfinished checkpoint and not a damaged one.
        (folder / sealed.NAME).unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=True)

    def _prune(self, newest: int) -> None:
        """Delete what `newest`, just sealed, makes superfluous; known damage is left to a person."""
        finished = self.steps()
        whole = [step for step in finished if step <= newest and step not in self._damaged]
        for step in whole[: -self._keep]:
            if not (self._keep_every and step % self._keep_every == 0):
                self._remove(step)
                self._good.discard(step)
        for step in set(self._folders()) - set(finished):
            self._remove(step)
            self._say(f"removed the unfinished checkpoint {self.directory / str(step)}")

    def wait(self) -> None:
        """Return when the save under way is sealed (or has failed); call it before leaving the process."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def close(self) -> None:
        """Finish the save under way and release Orbax."""
        self.wait()
        self._orbax.close()
        self._remove_failed()
        self._quiet.close()

    # ---- restoring

    def _newest_good(self) -> int | None:
        """Check from the newest to the oldest, say what is damaged; the first whole one, agreed by all."""
        chosen = None
        for step in reversed(self._folders()) if self._primary else ():
            damage = sealed.find_damage(self.directory / str(step))
            if damage is None:
                chosen = step
                break
            self._damaged.add(step)
            self._say(f"skipped the damaged checkpoint {self.directory / str(step)}: {damage}")
        agreed = agree(-1 if chosen is None else chosen)
        return None if agreed < 0 else agreed

    def restore_latest(
        self, abstract_state: Any, *, check: Callable[[dict[str, Any]], None] = lambda extra: None
    ) -> Restored | None:
        """The newest whole checkpoint in the structure and shardings of `abstract_state`, or None.

        `abstract_state` has ShapeDtypeStructs (with shardings, else the first device) or arrays where
        arrays come back, and numbers where numbers do. Each damaged checkpoint is one line in `messages`
        and stays where it is. `check` sees what the caller had added, before anything else is done with it. Raises
        ValueError with the names of the leaves when a whole checkpoint does not fit the state.
        """
        self.wait()
        before = len(self.messages)
        wanted = named_leaves(abstract_state)
        restore.check_leaves(wanted)
        step = self._newest_good()
        if step is None:
            return None
        self._good.add(step)
        folder = self.directory / str(step)
        metadata = restore.read_metadata(folder)
        check(metadata["extra"])
        remedy = "it belongs to another model, optimizer or version: use another workdir"
        restore.check_match(folder, metadata["leaves"], wanted, exact=True, remedy=remedy)
        found = restore.read(self._orbax, folder, wanted)
        state = jax.tree.unflatten(jax.tree.structure(abstract_state), [found[name] for name in wanted])
        return Restored(state, step, metadata["extra"], self.messages[before:])
