"""Records of ArrayRecord shards: readers that stay open, and what their errors mean."""

import errno
import functools
import os
import re

from array_record.python.array_record_data_source import ArrayRecordDataSource

OPEN = 256  # readers that a process keeps open; a folder may have thousands of shards
_NUMBERS = {os.strerror(number): number for number in errno.errorcode}


@functools.lru_cache(maxsize=OPEN)  # thread-safe, and every process makes its own
def reader(shards: tuple[str, ...]) -> ArrayRecordDataSource:
    """The records of some shards one after the other; 'PATH[0:9]' need not be looked into to know how many it has.

    Raises what the library raises: RuntimeError, ValueError.
    """
    return ArrayRecordDataSource(list(shards))


def record(shards: tuple[str, ...], number: int) -> bytes:
    """The bytes of one record, asked for twice: a reader that has failed once fails for ever, a new one need not.

    Raises OSError where the system refused (so that who waits for a disk can tell), RuntimeError for a damaged file,
    ValueError for no such record.
    """
    try:
        return reader(shards)[number]
    except (RuntimeError, OSError):
        reader.cache_clear()
    try:
        return reader(shards)[number]
    except RuntimeError as error:
        raise _by_system(error) from error


def _by_system(error: RuntimeError) -> RuntimeError | OSError:
    """The library says 'pread() failed: Input/output error; reading PATH' and leaves the number out."""
    told = re.search(r"\w+\(\) failed: ([^;]+)", str(error))
    number = _NUMBERS.get(told[1].strip()) if told else None
    return error if number is None else OSError(number, " ".join(str(error).split()))
