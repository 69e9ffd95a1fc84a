from __future__ import annotations

import os
import subprocess
import sys
import types
from pathlib import Path

import pytest

import factorlm
from factorlm.cli import main as cli
from factorlm.errors import ConfigError, DataError, InterruptedRun, NumericError

HEAVY = ("torch", "transformers", "datasets", "numpy", "pyarrow")


def fake_command(monkeypatch: pytest.MonkeyPatch, run, *, takes_overrides: bool = False) -> list:
    """Make ``factorlm compare`` a command with two flags that calls ``run(args, extra)``."""
    module = types.ModuleType("fake")
    seen: list = []

    def add_arguments(parser) -> None:
        parser.add_argument("recipe", nargs="?")
        parser.add_argument("--runs-dir")
        parser.add_argument("--dry-run", action="store_true")

    def called(args, extra) -> int:
        seen.append((vars(args), extra))
        return run() or 0

    module.HELP, module.EPILOG = "do a thing", "examples:\n  factorlm compare a"
    module.TAKES_OVERRIDES = takes_overrides
    module.add_arguments, module.run = add_arguments, called
    monkeypatch.setattr(cli, "_load", lambda name: module)
    return seen


def fresh(*arguments: str, check: str = "") -> subprocess.CompletedProcess[str]:
    """Run in a new process, then print which heavy modules it imported."""
    code = (
        "import sys; from factorlm.cli.main import main\n"
        "try: code = main(sys.argv[1:])\n"
        "except SystemExit as stop: code = stop.code\n"
        f"print('IMPORTED', [m for m in {HEAVY} if m in sys.modules])\nsys.exit(code)"
    )
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=60
    )


def test_commands_are_the_files_of_the_package() -> None:
    folder = Path(cli.__file__).parent
    files = {path.stem for path in folder.glob("*.py")}
    groups = {path.parent.name for path in folder.glob("*/__init__.py")}
    files = {name for name in files if not name.startswith("_")} - {"main"}
    assert set(cli.command_names()) == files | groups
    assert {name.split()[0] for name in cli.full_names() if " " in name} == groups
    assert {"compare", "eval", "generate", "train"} <= set(cli.command_names())


def test_overview_is_lean_and_names_every_command() -> None:
    done = fresh("--help")
    assert done.returncode == 0, done.stderr
    assert "IMPORTED []" in done.stdout
    assert all(f"\n  {name} " in done.stdout for name in cli.command_names())


@pytest.mark.parametrize("command", cli.full_names())
def test_help_of_a_command_is_lean_and_has_examples(command: str) -> None:
    done = fresh(*command.split(), "--help")
    assert done.returncode == 0, done.stderr
    assert "IMPORTED []" in done.stdout
    assert f"usage: factorlm {command}" in done.stdout
    assert f"examples:\n  factorlm {command} " in done.stdout


def test_help_of_a_group_names_its_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["scale", "--help"]) == cli.main(["scale"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("usage: factorlm scale <command>")
    assert all(f"\n  {name} " in out for name in cli.command_names("scale"))


def test_unknown_command_of_a_group(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["scale", "publshed"]) == ConfigError.exit_code
    assert "unknown command 'publshed'" in (error := capsys.readouterr().err)
    assert "Did you mean 'published'?" in error


def test_python_m_factorlm() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "factorlm", "--version"], capture_output=True, text=True, timeout=60
    )
    assert done.stdout == f"factorlm {factorlm.__version__}\n"


def test_without_a_command_it_shows_the_overview(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 0
    assert capsys.readouterr().out.startswith("usage: factorlm <command>")


def test_unknown_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["comprae", "a"]) == ConfigError.exit_code
    assert "unknown command 'comprae'" in (error := capsys.readouterr().err)
    assert "Did you mean 'compare'?" in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dry-rum"], "unknown argument '--dry-rum'. Did you mean '--dry-run'?"),
        (["--data.path", "x"], "unknown argument '--data.path'."),
        (["--runs-dir"], "expected one argument (see factorlm compare --help)"),
        (["a", "b"], "unrecognized arguments: b (see factorlm compare --help)"),
        (["-x"], "unrecognized arguments: -x"),
        (["--runs", "x"], "unknown argument '--runs'. Did you mean '--runs-dir'?"),
    ],
)
def test_wrong_arguments(
    arguments: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    seen = fake_command(monkeypatch, lambda: 0)
    assert cli.main(["compare", *arguments]) == ConfigError.exit_code
    assert message in capsys.readouterr().err
    assert not seen


@pytest.mark.parametrize(
    ("arguments", "recipe", "extra"),
    [
        (["r.yaml", "--a.b", "3"], "r.yaml", ["--a.b", "3"]),
        (["--a.b", "3", "r.yaml"], "r.yaml", ["--a.b", "3"]),
        (["--a.b=3", "r.yaml", "--c", "-1"], "r.yaml", ["--a.b=3", "--c", "-1"]),
        (["--a.b=", "r.yaml"], "r.yaml", ["--a.b="]),
        (["--a.b", "--dry-run", "r.yaml"], "r.yaml", ["--a.b"]),
        (["r.yaml", "--c", "{x: 1, y: [2]}"], "r.yaml", ["--c", "{x: 1, y: [2]}"]),
        (["--", "--odd.yaml"], "--odd.yaml", []),
    ],
)
def test_overrides_are_told_from_arguments(
    arguments: list[str], recipe: str, extra: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = fake_command(monkeypatch, lambda: 0, takes_overrides=True)
    assert cli.main(["compare", *arguments]) == 0
    ((values, found),) = seen
    assert values["recipe"] == recipe
    assert found == extra
    assert values["dry_run"] == ("--dry-run" in arguments)


def test_nearly_a_flag_is_no_override(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_command(monkeypatch, lambda: 0, takes_overrides=True)
    assert cli.main(["compare", "--dryrun", "r.yaml"]) == ConfigError.exit_code
    assert "Did you mean '--dry-run'?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (ConfigError("rank=0"), 3, "factorlm compare: error: rank=0\n"),
        (DataError("cut"), 4, "factorlm compare: error: cut\n"),
        (NumericError("nan"), 8, "factorlm compare: error: nan\n"),
        (InterruptedRun("stopped"), 75, "factorlm compare: stopped\n"),
        (KeyboardInterrupt(), 130, "factorlm compare: interrupted\n"),
    ],
)
def test_errors_become_a_message_and_a_code(
    error: BaseException,
    code: int,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail() -> None:
        raise error

    fake_command(monkeypatch, fail)
    assert cli.main(["compare"]) == code
    assert capsys.readouterr().err == message


def test_faults_of_ours_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise RuntimeError("a bug")

    fake_command(monkeypatch, fail)
    with pytest.raises(RuntimeError, match="a bug"):
        cli.main(["compare"])


def test_the_commands_own_code_is_returned(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_command(monkeypatch, lambda: 42)
    assert cli.main(["compare"]) == 42


def test_reader_of_the_output_goes_away() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-m", "factorlm", "--help"],
        stdout=writing,
        stderr=subprocess.PIPE,
        text=True,
        timeout=60,
    )
    os.close(writing)
    assert done.returncode == cli.BROKEN_PIPE
    assert done.stderr == ""
