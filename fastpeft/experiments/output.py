"""The folder that a report goes to: tried out before the work, and changed only by a report that is whole."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile


def try_out(folder: Path, names: Iterable[str]) -> None:
    """Makes ``folder`` and writes a file in it that is gone again afterwards.

    Raises:
        OSError: that is not possible, or one of ``names`` is a folder there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryFile(dir=folder) as file:
        file.write(b"something")
    for path in (folder / name for name in names):
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))


def write_together(folder: Path, writers: Mapping[str, Callable[[Path], object]]) -> None:
    """Writes files in ``folder``: each by its writer, which is called with the path to write to.

    A stop before all are written leaves the old ones as they were; one in the short moment after that leaves files
    out, but never an old one beside a new one.
    """
    with TemporaryDirectory(prefix=".unfinished-", dir=folder) as unfinished:
        for name, write in writers.items():
            write(Path(unfinished, name))
        for name in writers:
            (folder / name).unlink(missing_ok=True)
        for name in writers:
            Path(unfinished, name).replace(folder / name)
