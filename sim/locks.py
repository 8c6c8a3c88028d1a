"""Folders that one process at a time works in."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fedimpr.errors import ConfigError


@contextmanager
def locked(lock: Path, key: str, folder: Path, who: str) -> Iterator[None]:
    """Lock a folder for the length of a block; the lock goes with the process, however that ends.

    Args:
        lock: the file that is locked; it is made where it is missing, and so is its folder.
        key: the setting that named the folder.
        folder: what is locked.
        who: works there, e.g. ``"run"``.

    Raises:
        ConfigError: another one is at work there, or the folder cannot be written to.
    """
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        file = lock.open("w")
    except OSError as error:
        raise ConfigError(key, str(folder), f"a folder that can be written to ({error.strerror})") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(key, str(folder), f"a folder that no other {who} is at work in") from error
        yield
