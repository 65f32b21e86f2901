"""``make gpu-window``: what a machine with a GPU and no network may lack, in one folder for ``gpu_check --packages``.

    python tests/gpu_window.py [--out FOLDER] [--cuda 130]

bitsandbytes is loaded by any python; of its libraries, one for each version of CUDA and ROCm, one is taken.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from importlib.metadata import distribution
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "bitsandbytes"


def fill(folder: Path, cuda: str) -> None:
    """Copies bitsandbytes from this environment, with its library for one version of CUDA.

    Raises:
        FileNotFoundError: it has no library for that version.
    """
    library = f"lib{PACKAGE}_cuda{cuda}.so"
    found = distribution(PACKAGE)
    files = [file for file in found.files or () if file.suffix != ".pyc"]
    if not any(file.name == library for file in files):
        raise FileNotFoundError(f"--cuda: {PACKAGE} {found.version} has no {library}")
    for file in files:
        if file.parts[0] != ".." and (file.suffix != ".so" or file.name == library):
            target = folder / file
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(found.locate_file(file), target)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "gpu-window")
    parser.add_argument("--cuda", default="130", help="as in the library's name: 130 for 13.0")
    arguments = parser.parse_args()
    try:
        fill(arguments.out, arguments.cuda)
    except FileNotFoundError as error:
        sys.exit(str(error))
    size = sum(path.stat().st_size for path in arguments.out.rglob("*") if path.is_file())
    print(f"{arguments.out}: {size / 2**20:.1f} MiB; there: python3 tests/gpu_check.py --packages {arguments.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
