"""A pytest plugin, ``-p broken_context``: a worker of pytest-xdist ends with the test that broke its CUDA context, and
xdist starts another in its place.

After an illegal access every call of CUDA fails in that process, and so would all its later tests. The test that did it
is reported twice, with its error and as one that its worker did not survive.
"""

from __future__ import annotations

import os
import re
from collections.abc import Generator

import pytest

CUDA_ERROR = re.compile(r"CUDA error|Triton Error \[CUDA\]|illegal memory access")


def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config, "workerinput"):
        config.pluginmanager.register(_Worker())


class _Worker:
    def __init__(self) -> None:
        self._broken = False

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed and CUDA_ERROR.search(report.longreprtext):
            self._broken = True

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self) -> Generator[None, object, object]:
        result = yield
        if self._broken:
            os._exit(1)  # the reports are sent; nothing that is torn down could still reach the GPU
        return result
