"""The command line: what it prints and with which code it exits."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import cuda_emulation
import pytest
import torch
from click.testing import CliRunner
from fastpeft.bench.play import LIMITS

import fastpeft
from fastpeft import cli, dispatch, extension, info
from fastpeft.backends.gpu.cuda import CudaBackend
from fastpeft.selfcheck import DTYPES, self_check


def run(*arguments: str, env: dict[str, str] | None = None) -> tuple[int, str]:
    result = CliRunner(env={"COLUMNS": "200", **(env or {})}).invoke(cli.main, arguments)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


def test_help_lists_every_command() -> None:
    code, output = run("--help")
    assert code == 0
    assert [name for name in ("bench", "build", "demo", "info") if f"  {name}  " not in output] == []


def test_help_loads_no_subcommand() -> None:
    script = (
        "import sys; from click.testing import CliRunner; from fastpeft.cli import main\n"
        "result = CliRunner().invoke(main, ['--help']); assert result.exit_code == 0, result.output\n"
        "print(*sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert {"peft", "transformers", "matplotlib", "fastpeft.info", "fastpeft.bench"}.isdisjoint(result.stdout.split())


@pytest.mark.parametrize("command", ["bench", "build", "demo", "info"])
def test_each_command_has_help(command: str) -> None:
    code, output = run(command, "--help")
    assert code == 0
    assert f"Usage: main {command}" in output


def test_python_m_fastpeft_is_the_command() -> None:
    result = subprocess.run([sys.executable, "-m", "fastpeft", "--version"], capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (0, f"fastpeft, version {fastpeft.__version__}\n")


def test_an_unknown_command_is_refused() -> None:
    code, output = run("fly")
    assert code == 2
    assert "No such command 'fly'" in output


def test_a_missing_package_is_named_with_the_command_that_installs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "needs_more.py").write_text("import a_package_that_is_not_there.part\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(cli.COMMANDS, "needy", ("needs_more", ""))
    package = "a_package_that_is_not_there"
    assert run("needy") == (1, f"Error: the package {package} is missing: pip install {package}\n")


def test_a_mistake_of_our_own_is_no_missing_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "wrong.py").write_text("import fastpeft.no_such_module\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(cli.COMMANDS, "wrong", ("wrong", ""))
    with pytest.raises(ModuleNotFoundError, match=r"fastpeft\.no_such_module"):
        run("wrong")


def test_build_without_a_compiler_says_how_to_get_one() -> None:
    code, output = run("build", env={"CXX": "/nonexistent"})
    assert code == 1
    assert output.startswith("Error: no C++ compiler: CXX=/nonexistent is not there; install one")
    assert "Traceback" not in output


def test_info_shows_versions_backends_and_the_check() -> None:
    code, output = run("info")
    assert code == 0
    assert fastpeft.__version__ in output
    assert torch.__version__ in output
    for backend in dispatch.BACKENDS:
        assert backend.name in output
        reason = backend.unavailable()
        passed = output.count(f"{backend.name}, ")
        assert passed >= len(DTYPES) if reason is None else squeezed(reason) in squeezed(output)
    assert "FAILED" not in output


def test_info_warns_where_stock_torch_emulates_bfloat16() -> None:
    command = [sys.executable, "-m", "fastpeft", "info"]
    done = subprocess.run(command, env=os.environ | LIMITS["avx2"], capture_output=True, text=True, check=True)
    assert "stocktorchemulatesithere" in squeezed(done.stdout)
    assert "computedinfloat32arithmeticbyitsownproduct" in squeezed(done.stdout)


def test_bfloat16_is_emulated_where_a_processor_has_no_instructions_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """oneDNN says that it has a product of bfloat16 with AVX-512 alone, and is slow there."""
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
    for found, emulated in (
        ({"avx512_f": True, "avx512_bf16": False}, True),
        ({"avx512_f": True, "avx512_bf16": True}, False),
        ({"asimd_hp": True}, False),
    ):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda found=found: found, raising=False)
        assert info.emulates_bfloat16() == emulated
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    assert info.emulates_bfloat16()


def test_what_fastpeft_does_about_it_takes_the_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(info, "emulates_bfloat16", lambda: True)
    assert info.WIDENED in dict(info.processor())["bfloat16"]
    monkeypatch.setattr(extension, "C", None)
    assert dict(info.processor())["bfloat16"] == info.EMULATED


def squeezed(text: str) -> str:
    """Without the lines and the borders of a table's cells."""
    return re.sub(r"[\s│]+", "", text)


def test_a_gpus_backend_is_shown_and_checked_where_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda_emulation.use(monkeypatch)
    monkeypatch.setattr(CudaBackend, "unavailable", lambda self: None)
    monkeypatch.setattr(CudaBackend, "device", "cpu")
    code, output = run("info")
    assert code == 0
    assert "cudaavailable" in squeezed(output)
    assert output.count("cuda, ") == len(DTYPES)


OPS = pytest.mark.parametrize("op", ["lora_linear", "lora_grouped_linear"])


@OPS
def test_info_fails_when_a_backend_is_wrong(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    reference = dispatch.named("reference")
    right = getattr(reference, op)

    def wrong(x: torch.Tensor, *args: object) -> tuple[torch.Tensor, ...]:
        y, *kept = right(x, *args)
        return (y if x.dtype == torch.float64 else y * 1.25), *kept

    monkeypatch.setattr(reference, op, wrong)
    code, output = run("info")
    assert code == 1
    assert len(re.findall(r"reference, \w+\W+FAILED", output)) == len(DTYPES)
    assert "the self-check failed" in output


@OPS
def test_the_check_reports_a_backend_that_breaks(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    reference = dispatch.named("reference")
    right = getattr(reference, op)

    def breaks(x: torch.Tensor, *args: object) -> tuple[torch.Tensor, ...]:
        if x.dtype != torch.float64:
            raise RuntimeError("no luck")
        return right(x, *args)

    monkeypatch.setattr(reference, op, breaks)
    verdicts = [verdict for verdict in self_check() if verdict.backend == "reference"]
    assert [(v.passed, v.failure) for v in verdicts] == [(False, "RuntimeError: no luck")] * len(DTYPES)


def test_a_backend_that_leaves_experts_to_others_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    """As those of GPUs do in float32: that is no failure."""

    def refuses(self: object, x: torch.Tensor, weight: torch.Tensor, factors: object) -> str | None:
        return "no stacks" if weight.dim() == 3 else None

    monkeypatch.setattr(type(dispatch.named("cpu")), "refuses", refuses)
    code, output = run("info")
    assert code == 0
    assert squeezed(output).count("withoutexperts:nostacks") == len(DTYPES)


def test_the_check_leaves_the_generator_alone() -> None:
    before = torch.get_rng_state()
    self_check()
    assert torch.equal(before, torch.get_rng_state())
