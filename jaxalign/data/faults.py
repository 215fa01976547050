"""Whether a read failed for the machine's or the disk's sake, or because a file is broken."""

import errno
from collections.abc import Iterator

import av

# What no content of a file can be answered with.
_NAMES = (
    "EMFILE ENFILE ESTALE ETIMEDOUT ENOTCONN ESHUTDOWN ECONNABORTED ECONNREFUSED ECONNRESET ENETDOWN ENETRESET "
    "ENETUNREACH EHOSTDOWN EHOSTUNREACH ENODEV ENXIO ENOLINK EREMOTEIO EUCLEAN EKEYEXPIRED"
)
_NEVER_THE_FILES = frozenset(getattr(errno, name) for name in _NAMES.split() if hasattr(errno, name))
# FFmpeg says these of damage too: EIO of a Matroska file that is cut short, ENOMEM of nonsense in an MP4's header.
_AMBIGUOUS = frozenset((errno.EIO, errno.ENOMEM))


def not_the_files(error: BaseException) -> bool:
    """Whether an error, or one that led to it, is the machine's or the disk's: what cannot be read now can be later.

    Too many open files, no memory, a disk that fails or went away. Where FFmpeg leaves it open, the file is read whole:
    the disk is at fault where that fails.
    """
    return any(_machines(link) for link in _chain(error))


def numbers(error: BaseException) -> set[int]:
    """The errnos by which an error is the machine's or the disk's (`not_the_files`); empty if it is not."""
    links = [link for link in _chain(error) if _machines(link)]
    return {errno.ENOMEM if isinstance(link, MemoryError) else link.errno for link in links}


def disk_fault(path: str) -> OSError | None:
    """What reading a file's plain bytes fails with, where that is the disk's or the machine's fault; else None."""
    try:
        with open(path, "rb", buffering=0) as file:
            while file.read(1 << 22):
                pass
    except OSError as error:
        return error if not_the_files(error) else None
    except ValueError:  # no path of a file: a member of an archive, say
        return None
    return None


def _machines(error: BaseException) -> bool:
    number = getattr(error, "errno", None)
    if isinstance(error, av.error.FFmpegError) and number in _AMBIGUOUS:
        path = getattr(error, "filename", None)
        return isinstance(path, str) and disk_fault(path) is not None
    if isinstance(error, MemoryError):
        return True
    return isinstance(error, OSError) and number in _NEVER_THE_FILES | _AMBIGUOUS


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The error and all that led to it, each once."""
    waiting, seen = [error], set()
    while waiting:
        link = waiting.pop()
        if link is not None and id(link) not in seen:
            seen.add(id(link))
            yield link
            waiting += [link.__cause__, link.__context__]
