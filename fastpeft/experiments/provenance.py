"""Where a measurement comes from: the machine, the versions of what decides it, the commit."""

from __future__ import annotations

import platform
import re
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import fastpeft
from fastpeft import extension
from fastpeft.info import capabilities


def machine(device: str = "cpu") -> dict[str, Any]:
    """Facts about this machine, or about its GPU; ``name`` is fit for a file name. A CPU's says with which instruction
    set fastpeft's kernels run: what is fast differs by it, also between processors of one name. ``played`` is it where
    the processor has a faster one (:mod:`.play`)."""
    import psutil

    if device == "cuda":
        gpu = torch.cuda.get_device_properties(0)
        return {
            "name": slug(gpu.name),
            "gpu": gpu.name,
            "memory_gib": round(gpu.total_memory / 2**30, 1),
            "capability": [gpu.major, gpu.minor],
            "multiprocessors": gpu.multi_processor_count,
            "cuda": torch.version.cuda,
            "system": f"{platform.system()} {platform.machine()}",
        }
    found = capabilities()
    cpu = found.get("cpu_name") or platform.processor() or platform.machine()
    cores = psutil.cpu_count(logical=False) or psutil.cpu_count()
    kernels, played = "reference", False
    if extension.C is not None:
        kernels = extension.C.isa()
        played = kernels != extension.C.isas()[0]
    return {
        "name": f"{slug(cpu)}-{'playing-' * played}{slug(kernels)}-{cores}-cores",
        "played": kernels if played else None,
        "cpu": cpu,
        "cores": cores,
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "features": sorted(name for name, present in found.items() if present is True),
        "system": f"{platform.system()} {platform.machine()}",
    }


def slug(name: str) -> str:
    """Lower case, words joined by hyphens; trade marks and clock rates left out."""
    words = re.sub(r"\((r|tm)\)|@.*|\bcpu\b|\bprocessor\b", " ", name.lower())
    return re.sub(r"[^a-z0-9]+", "-", words).strip("-")


def versions() -> dict[str, str]:
    """Of what decides a measurement."""
    found = {"python": platform.python_version(), "fastpeft": fastpeft.__version__}
    for package in ("torch", "triton", "peft", "transformers"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def commit() -> tuple[str | None, bool | None]:
    """fastpeft's git commit and whether tracked files differ from it; (None, None) where git does not track it."""
    source = Path(fastpeft.__file__).resolve()  # an assembled package is made of links into the checkout
    if _git(source.parent, "ls-files", "--error-unmatch", source.name) is None:
        return None, None
    status = _git(
        source.parent, "status", "--porcelain", "--untracked-files=no", "--", ":/", ":(top,exclude)bench/results"
    )
    return _git(source.parent, "rev-parse", "HEAD"), bool(status)


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
