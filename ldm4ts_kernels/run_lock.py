"""One process trains in a run's directory: a lock that ends with its holder, however that ends."""

import errno
import logging
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from ldm4ts_kernels.data import OptionError

logger = logging.getLogger("ldm4ts_kernels")

LOCK = ".lock"  # in the run's directory; holds the number of the process that holds it
NO_LOCKS_HERE = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)  # of some network file systems
SECONDS_OF_A_LOOK = 0.1  # longer than `find_holder` keeps others out


@contextmanager
def hold(directory: Path) -> Iterator[None]:
    """Keep other processes from training in directory, which is made and, left empty, removed.

    The lock is the operating system's (flock): it ends with the process, so that none is left
    behind by a crash. Raises OptionError, naming the process, where another one holds it.
    """
    made = not directory.exists()
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / LOCK
    with path.open("a+") as file:
        if not _take(file):
            file.seek(0)
            raise OptionError(
                f"output: process {file.read().strip() or 'unknown'} is training in {directory}; "
                "wait for its end or stop it, or choose another --output"
            )
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        try:
            yield
        finally:
            file.truncate(0)
            if not (directory / "config.json").exists():  # the run never began, or is deleted
                path.unlink(missing_ok=True)
                if made:
                    with suppress(OSError):  # not empty
                        directory.rmdir()


def find_holder(directory: Path) -> int | None:
    """Return the number of the process that trains in directory now, None where none does."""
    try:
        with (directory / LOCK).open() as file:
            if _try(file, exclusively=False):
                return None
            return int(file.read().strip() or 0)
    except (OSError, ValueError):  # no run has been here, or the number is being written
        return None


def _take(file: IO[str]) -> bool:
    """Return whether the lock is ours now; a look of `find_holder` is waited for."""
    if _try(file, exclusively=True):
        return True
    time.sleep(SECONDS_OF_A_LOOK)
    return _try(file, exclusively=True)


def _try(file: IO[str], exclusively: bool) -> bool:
    if sys.platform == "win32":
        return True  # no flock there
    import fcntl

    try:
        fcntl.flock(file, (fcntl.LOCK_EX if exclusively else fcntl.LOCK_SH) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in NO_LOCKS_HERE:
            raise
        if exclusively:
            logger.info("no lock, see to it that one process trains here: %s: %s", file.name, error)
    return True
