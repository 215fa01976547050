"""A manifest makes a folder checkable: size and digest of every file in it, written last and atomically.

Orbax does not notice changed array bytes (measured: 25 of 25 flipped bits were restored silently), so a
checkpoint, or a converted network, counts as one only while its manifest exists and agrees with its files. A
crash at any earlier moment leaves a folder without a manifest, which nobody picks.
"""

import contextlib
import glob
import hashlib
import json
import os
import shutil
import time
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

NAME = "manifest.json"
FORMAT = 1  # raised when an older reader could not make sense of a manifest any more
FORGOTTEN = 86_400  # seconds in which nothing was written: whoever did was killed


def sync(path: Path) -> None:
    """Wait until a file's bytes (or a folder's entries) are on the disk; OSError if they cannot be."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def unfinished(path: Path) -> Path:
    """A hidden name beside `path` for what becomes it, of this call alone: in containers all processes have one id."""
    return path.with_name(f".{path.name}.{os.getpid()}.{os.urandom(4).hex()}.tmp")


@contextlib.contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A folder to fill that is called `folder` (free, or empty) once it is whole; of half a one nothing stays.

    What killed processes left of it goes once nobody has written into it for a day.
    """
    for left in folder.parent.glob(f".{glob.escape(folder.name)}.*.tmp"):
        if _last_written(left) < time.time() - FORGOTTEN:
            shutil.rmtree(left, ignore_errors=True)
    temporary = unfinished(folder)
    try:
        temporary.mkdir(parents=True)
        yield temporary
        if folder.exists():
            folder.rmdir()
        temporary.rename(folder)
        sync(folder.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _last_written(folder: Path) -> float:
    """When a file in a folder was written last; infinite where one cannot be looked at."""
    try:
        return max(path.stat().st_mtime for path in (folder, *folder.rglob("*")))
    except OSError:  # its owner is just renaming or removing it
        return float("inf")


def write_atomic(path: Path, text: str) -> None:
    """Write a text file so that a reader, or a crash, sees the old one or the new one and nothing between.

    Raises OSError (the old file is then untouched and the temporary one removed).
    """
    temporary = unfinished(path)
    try:
        # Names of files may hold bytes that are not UTF-8; escaped, they are what JSON reads back.
        with open(temporary, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=32)).hexdigest()


def write_manifest(folder: Path) -> None:
    """Commit a folder: force its files to disk, then write their sizes and digests; raises OSError.

    One file after the other: this runs beside the training step and shall not take its cores.
    """
    files = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != NAME:
            sync(path)
            files[path.relative_to(folder).as_posix()] = {
                "size": path.stat().st_size,
                "blake2b": _digest(path),
            }
    for path in sorted({folder, *(path for path in folder.rglob("*") if path.is_dir())}):
        sync(path)
    write_atomic(folder / NAME, json.dumps({"format": FORMAT, "files": files}, indent=1, sort_keys=True) + "\n")


def identity(folder: str | Path) -> str:
    """16 hexadecimal digits of the manifest, which tell a sealed folder from another one; nothing else is read."""
    return hashlib.sha256((Path(folder) / NAME).read_bytes()).hexdigest()[:16]


def find_damage(folder: Path, names: Collection[str] | None = None) -> str | None:
    """What is wrong with a folder, in words for a person; None when every file is as its manifest says.

    With `names` only those files are read, which the manifest must list. Others that it does not list are
    nobody's business (a file manager's or a network disk's own).
    """
    try:
        manifest = json.loads((folder / NAME).read_text(encoding="utf-8"))
        written, files = manifest["format"], manifest["files"]
        expected = {name: (entry["size"], entry["blake2b"]) for name, entry in files.items()}
    except FileNotFoundError:
        return "it has no manifest: saving it never finished"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"its manifest cannot be read ({type(error).__name__})"
    if written != FORMAT:
        return f"its format is {written!r}, this version reads {FORMAT}"
    if not expected:
        return "its manifest lists no files"
    if names is not None:
        if unlisted := [name for name in names if name not in expected]:
            return f"its manifest does not list {unlisted[0]}"
        expected = {name: expected[name] for name in names}

    def check(item: tuple[str, tuple[int, str]]) -> str | None:
        name, (size, digest) = item
        try:
            found = (folder / name).stat().st_size
            if found != size:
                return f"{name} has {found} bytes instead of {size}"
            return None if _digest(folder / name) == digest else f"{name} has changed bytes"
        except FileNotFoundError:
            return f"{name} is missing"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror or error})"

    # Several at once: this one is waited for, and hashing leaves Python's lock.
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        wrong = [message for message in pool.map(check, expected.items()) if message]
    if not wrong:
        return None
    return wrong[0] + (f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else "")
