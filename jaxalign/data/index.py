"""The headers of many files: probed in threads, remembered in the user's cache folder."""

import concurrent.futures
import contextlib
import dataclasses
import hashlib
import json
import os
import tempfile
from pathlib import Path

from jaxalign.data.video import UnreadableVideo, VideoInfo, probe

REMEMBER_FROM = 50  # fewer files are probed in less time than it takes to explain a cache
_VERSION = 2  # raised when `probe` answers otherwise than before


def probe_all(paths: list[Path], root: Path) -> list[VideoInfo | UnreadableVideo]:
    """The header of every file, or why it has none, in the order of `paths`.

    With 50 files or more the answers are kept in the user's cache folder (XDG_CACHE_HOME or ~/.cache), one
    small JSON for each `root`; a file whose size or time has changed is probed again, and so is one without an
    answer: what kept it from being read (rights, a failing disk, a missing decoder) may be mended by now. A cache
    that cannot be read or written is done without.
    """
    remembered = _recall(root) if len(paths) >= REMEMBER_FROM else {}

    def one(path: Path):
        try:
            stat = path.stat()
        except OSError as error:
            return None, UnreadableVideo(str(path), str(error.strerror or error))
        stamp = [stat.st_size, stat.st_mtime_ns]
        entry = remembered.get(str(path))
        if entry is not None and entry[0] == stamp:
            return entry, VideoInfo(*entry[1])
        try:
            answer = probe(str(path))
        except UnreadableVideo as error:
            return None, error
        return [stamp, dataclasses.astuple(answer)], answer

    # Files are waited for more than computed with: more threads than cores.
    with concurrent.futures.ThreadPoolExecutor(min(32, 4 * (os.cpu_count() or 1))) as pool:
        answers = list(pool.map(one, paths))
    if len(paths) >= REMEMBER_FROM:
        entries = {str(path): entry for path, (entry, _) in zip(paths, answers, strict=True) if entry}
        if entries != remembered:
            _remember(root, entries)
    return [answer for _, answer in answers]


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
        with tempfile.NamedTemporaryFile("w", dir=target.parent, suffix=".tmp", delete=False) as file:
            json.dump({"version": _VERSION, "files": entries}, file)
        os.replace(file.name, target)
