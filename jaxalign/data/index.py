"""The headers of many files: probed in threads, remembered in the user's cache folder."""

import concurrent.futures
import contextlib
import dataclasses
import hashlib
import json
import os
import sys
import tempfile
import time
from pathlib import Path

from jaxalign.data.faults import not_the_files
from jaxalign.data.patience import WAITS, say_once, sleep
from jaxalign.data.video import UnreadableVideo, VideoInfo, probe

REMEMBER_FROM = 50  # fewer files are probed in less time than it takes to explain a cache
AT_ONCE = 1000  # files between two looks at the clock
SAID_AFTER, SAID_EVERY = 10, 30  # seconds
KEPT_EVERY = 60  # seconds: what a killed process loses at most
KEPT_COST = 20  # of the time goes at most one part in so many into writing: a million answers are 100 MB
_VERSION = 3  # raised when `probe` answers otherwise than before: version 2 may hold counts of readings cut short


def probe_all(paths: list[Path], root: Path) -> list[VideoInfo | UnreadableVideo]:
    """The header of every file, or why it has none, in the order of `paths`.

    With 50 files or more the answers are kept in the user's cache folder (XDG_CACHE_HOME or ~/.cache), one
    small JSON for each `root`, every minute and at the end; a file whose size or time has changed is probed again, and
    so is one without an answer: what kept it from being read (rights, a failing disk, a missing decoder) may be mended
    by now. A disk that is away is waited for. A cache that cannot be read or written is done without. What takes long
    says on stderr how far it is.
    """
    remembered = _recall(root) if len(paths) >= REMEMBER_FROM else {}
    pace = _Pace(root, paths, remembered)
    answers: list[VideoInfo | UnreadableVideo] = []
    # Files are waited for more than computed with: more threads than cores.
    with concurrent.futures.ThreadPoolExecutor(min(32, 4 * (os.cpu_count() or 1))) as pool:

        def ask(some: list[Path]) -> list[VideoInfo | UnreadableVideo]:
            found = list(pool.map(lambda path: _one(path, remembered), some))
            pace.entries |= {str(path): entry for path, (entry, _) in zip(some, found, strict=True) if entry}
            return [answer for _, answer in found]

        for start in range(0, len(paths), AT_ONCE):
            answers += ask(paths[start : start + AT_ONCE])
            pace.look(len(answers))
        away = [k for k, answer in enumerate(answers) if isinstance(answer, UnreadableVideo)]
        for wait in WAITS[:-2]:  # one file that stays so is only skipped: no start waits minutes for it
            away = [k for k in away if isinstance(answers[k], UnreadableVideo) and not_the_files(answers[k])]
            if not away:
                break
            say_once(f"{len(away)} files cannot be read now, the first is {answers[away[0]]}; they are tried again")
            sleep(wait)
            for k, answer in zip(away, ask([paths[k] for k in away]), strict=True):
                answers[k] = answer
    if len(paths) >= REMEMBER_FROM and pace.entries != remembered:
        _remember(root, pace.entries)
    return answers


def _one(path: Path, remembered: dict) -> tuple[list | None, VideoInfo | UnreadableVideo]:
    """(what is remembered of a file, its header); None beside the reason why it has none."""
    try:
        stat = path.stat()
        stamp = [stat.st_size, stat.st_mtime_ns]
        entry = remembered.get(str(path))
        if entry is not None and entry[0] == stamp:
            return entry, VideoInfo(*entry[1])
        answer = probe(str(path))
    except UnreadableVideo as error:
        return None, error
    except OSError as error:
        unreadable = UnreadableVideo(str(path), str(error.strerror or error))
        unreadable.__cause__ = error
        return None, unreadable
    return [stamp, dataclasses.astuple(answer)], answer


class _Pace:
    """How far the probing of many files is: said and kept while it takes long."""

    def __init__(self, root: Path, paths: list[Path], remembered: dict):
        self.root, self.count = root, len(paths)
        # Those whose turn has not come, and those that are away now, stay; a stamp tells whether they are good.
        self.entries = {name: remembered[name] for name in map(str, paths) if name in remembered}
        self.began = time.monotonic()
        self.say_at, self.keep_at = self.began + SAID_AFTER, self.began + KEPT_EVERY

    def look(self, done: int) -> None:
        """`done` files are answered for."""
        now = time.monotonic()
        if now >= self.say_at and done < self.count:
            left = (now - self.began) * (self.count - done) / done
            text = f"data {self.root}: {done:,} of {self.count:,} headers read, {left:,.0f} s left"
            print(text, file=sys.stderr, flush=True)
            self.say_at = now + SAID_EVERY
        if now >= self.keep_at and self.count >= REMEMBER_FROM and done < self.count:
            _remember(self.root, self.entries)
            self.keep_at = time.monotonic() + max(KEPT_EVERY, KEPT_COST * (time.monotonic() - now))


def cache_file(root: Path) -> Path:
    """Where the headers below `root` are remembered."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return home / "jaxalign" / "videos" / f"{hashlib.sha256(str(root.resolve()).encode()).hexdigest()[:20]}.json"


def _recall(root: Path) -> dict:
    try:
        stored = json.loads(cache_file(root).read_text())
        return stored["files"] if stored["version"] == _VERSION else {}
    except (OSError, ValueError, KeyError, TypeError, RuntimeError):
        return {}


def _remember(root: Path, entries: dict) -> None:
    with contextlib.suppress(OSError, RuntimeError):  # a full or read-only disk, no home folder
        target = cache_file(root)
        target.parent.mkdir(parents=True, exist_ok=True)
        # Written aside and moved into place: another run may be reading.
        file, name = tempfile.mkstemp(dir=target.parent, suffix=".tmp")
        try:
            with open(file, "w", encoding="utf-8") as written:
                json.dump({"version": _VERSION, "files": entries}, written)
            os.replace(name, target)
        except BaseException:
            os.unlink(name)  # a full disk is no fuller for it
            raise
