"""Adds the C++ extension, and the CUDA one where nvcc is found, to what pyproject.toml declares; where one cannot be
built the install goes on without it."""

from __future__ import annotations

import importlib.util
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent
SPEC = importlib.util.spec_from_file_location("fastpeft_build", ROOT / "fastpeft" / "build.py")
assert SPEC is not None and SPEC.loader is not None
build = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(build)


class BuildNative(build_ext):
    def build_extension(self, ext: Extension) -> None:
        if importlib.util.find_spec("torch") is None:  # pip's isolated build hides the environment it installs into
            sys.path += [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
        name = ext.name.rpartition(".")[2]
        try:
            BUILDERS[name](ROOT / "csrc", Path(self.get_ext_fullpath(ext.name)), ROOT / "build" / name.strip("_"))
        except build.BuildError as error:
            raise CompileError(f"fastpeft is installed without {ext.name} and runs slower: {error}") from error


BUILDERS = {"_C": build.build} | ({"_cuda": build.build_cuda} if build.find_nvcc() else {})
EXTENSIONS = [Extension(f"fastpeft.{name}", sources=[], optional=True) for name in BUILDERS]
setup(ext_modules=EXTENSIONS, cmdclass={"build_ext": BuildNative})
