"""``make test-versions``: the tests of what other packages bring, with the oldest versions that fastpeft supports and
with the newest that there are.

    python tests/versions.py [oldest|newest]

Torch is the environment's own, and Triton has its tests with the oldest and the newest (tests/test_triton_aot.py).
Each set of versions is installed into an environment of its own under ``build/versions``, beside the one that runs.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import environments

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("peft", "transformers", "accelerate", "bitsandbytes")
TESTS = ("test_peft_*.py", "test_four_bit*.py", "test_compile.py", "test_methods*.py", "test_precision.py")
TESTS += ("test_failures.py",)
NOT_OURS = ("other_quantizers",)  # which torchao and HQQ a PEFT wants is between them
# Of what the oldest do not have, or have in another form, by the names of tests.
LATER = (
    *("hot_swap", "(what_is_left_to_peft and rank)", "convolutions_are_left", "loftq", "(longer_way and two)"),
    *("another_variant", "(gradient_checkpointing_changes_nothing and loreft)", "hidden_states_are_the_edited"),
    *("every_token_is_real", "(blocks_are_found and (vit or phi))", "reparametrised"),
    *("GraniteMoe", "NemotronH", "(cannot_be_fused and interface)"),
    *("adapters_of_different_ranks", "(experts and life_of_adapters)", "wrappers_made_while"),
    "(experts_dora and several_adapters)",
)


def supported() -> dict[str, str]:
    """Each package's oldest version, by pyproject.toml."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    found = dict(re.fullmatch(r"([\w-]+)>=([\d.]+)", line).groups() for line in extras["peft"])
    (found["bitsandbytes"],) = (line.partition(">=")[2] for line in extras["bench"] if line.startswith("bitsandbytes"))
    assert set(found) == set(PACKAGES)
    return found


def run(which: str) -> int:
    """The exit code of the tests with these versions."""
    python = environments.beside(ROOT / "build" / "versions" / which, with_pip=True, with_checkout=True)
    oldest = [f"{name}=={version}" for name, version in supported().items()]
    environments.install(python, oldest if which == "oldest" else [*PACKAGES, "--upgrade"], "--no-warn-conflicts")
    shown = [python, "-m", "pip", "--disable-pip-version-check", "list"]
    listed = subprocess.run(shown, capture_output=True, text=True, check=True).stdout
    print(which, *(line for line in listed.splitlines() if line.split()[0] in PACKAGES), sep="\n  ", flush=True)
    tests = sorted(str(path) for pattern in TESTS for path in (ROOT / "tests").glob(pattern))
    left_out = " and ".join(f"not {name}" for name in NOT_OURS + LATER * (which == "oldest"))
    command = [python, "-m", "pytest", "-q", "-n", "2", "--dist", "loadgroup", "-k", left_out, *tests]
    return subprocess.run([str(part) for part in command], cwd=ROOT, check=False).returncode


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("which", nargs="?", choices=["oldest", "newest"], help="[both]")
    which = parser.parse_args().which
    codes = [run(each) for each in ([which] if which else ["oldest", "newest"])]
    return int(any(codes))


if __name__ == "__main__":
    sys.exit(main())
