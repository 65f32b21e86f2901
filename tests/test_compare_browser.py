"""The page of fastpeft compare in a browser: nothing of it is wider than a phone or a desk, and its tables sort."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path
from typing import Any

import pytest
from compare_rows import failed, row

from fastpeft.experiments.compare.report import write_report

# Two clicks on the heading of the parameters: the largest at the top.
PROBE = """<script>
const heading = [...document.querySelectorAll("th button")].find(button => button.textContent === "trainable");
heading.click();
heading.click();
const broken = [...document.images].filter(image => !image.complete || image.naturalWidth === 0).length;
document.body.dataset.found = JSON.stringify({
  window: innerWidth, page: document.documentElement.scrollWidth, broken,
  first: document.querySelector("tbody tr").cells[0].textContent,
  last: [...document.querySelectorAll("table.sortable tbody tr")].at(-1).cells[0].textContent,
});
</script>"""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("report")
    rows = [row(method) for method in ("none", "full", "lora", "ia3", "bitfit")]
    write_report([*rows, failed("vera", 0, "x" * 200)], folder)
    return (folder / "page.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_fits_its_window(page: str, width: int, tmp_path: Path) -> None:
    found = probe(page, width, tmp_path)
    assert found["window"] == width
    assert found["page"] <= width
    assert found["broken"] == 0
    assert found["first"] == "full fine-tuning"
    assert found["last"].startswith("VeRA")  # has no number


def probe(page: str, width: int, folder: Path) -> dict[str, Any]:
    """What :data:`PROBE` finds in a frame of this width: a browser's own window may have a least width."""
    (folder / "page.html").write_text(page.replace("</body>", PROBE + "</body>"), encoding="utf-8")
    outer = f'<iframe src="page.html" style="width: {width}px; height: 900px; border: 0"></iframe>'
    read = "onload = () => document.body.append(document.querySelector('iframe').contentDocument.body.dataset.found)"
    (folder / "outer.html").write_text(f"<!doctype html><body>{outer}<script>{read}</script></body>", encoding="utf-8")
    if shutil.which("chromium") is None:
        pytest.fail("no chromium: install it (Debian, Ubuntu: apt install chromium)")
    command = ["chromium", "--headless=new", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files"]
    command += [f"--user-data-dir={folder / 'profile'}", "--window-size=1600,1000", "--virtual-time-budget=5000"]
    dumped = subprocess.run(
        [*command, "--dump-dom", (folder / "outer.html").as_uri()],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    ).stdout
    found = re.search(r"\{&quot;window.*?\}|\{\"window.*?\}", dumped)
    assert found is not None, dumped[-2000:]
    return json.loads(unescape(found[0]))
