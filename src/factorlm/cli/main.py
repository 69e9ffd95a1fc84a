"""``factorlm <command>``: finds the command's file, parses, and turns errors into exit codes.

Every module of this package whose name has no underscore in front, this one aside, is a command:
``HELP`` and ``EPILOG`` (str), ``add_arguments(parser)``, ``run(args, extra) -> exit code``. With
``TAKES_OVERRIDES = True`` it takes ``--section.key value`` arguments, which ``run`` gets as
``extra``. With ``KEEPS_MEMORY = True`` freed memory is kept for the next tensor. None imports torch
at module level, so that ``--help`` is quick.

A package in place of a module is a group, ``factorlm <group> <command>``: it has a ``HELP``, and
its modules are commands by the same rules.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import os
import pkgutil
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import NoReturn

import factorlm
from factorlm.errors import ConfigError, FactorlmError, InterruptedRun, did_you_mean
from factorlm.memory import keep_freed_memory

INTERRUPTED = 130
BROKEN_PIPE = 141
"""What a shell gives for SIGINT and SIGPIPE."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code (see ``factorlm.errors``)."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    name = " ".join(["factorlm", *arguments[:1]])
    try:
        code = _run(arguments)
        sys.stdout.flush()
        return code
    except FactorlmError as error:
        kind = "" if isinstance(error, InterruptedRun) else "error: "
        print(f"{name}: {kind}{error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # Whoever read our output went away; Python would complain once more when it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE


def command_names(group: str | None = None) -> list[str]:
    """The commands, by their files; those of one ``group``, without its name."""
    folder = os.path.join(os.path.dirname(__file__), group or "")
    found = (module.name for module in pkgutil.iter_modules([folder]))
    return sorted(name for name in found if name != "main" and not name.startswith("_"))


def full_names() -> list[str]:
    """The commands as they are called, those of groups with both words."""
    return [
        f"{name} {command}" if command else name
        for name in command_names()
        for command in (command_names(name) if _is_group(name) else [""])
    ]


def _is_group(name: str) -> bool:
    return os.path.isdir(os.path.join(os.path.dirname(__file__), name))


def _run(arguments: list[str], group: str | None = None) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_overview(group))
        return 0
    if arguments[0] in ("-V", "--version") and group is None:
        print(f"factorlm {factorlm.__version__}")
        return 0
    name = arguments[0]
    known = command_names(group)
    if name not in known:
        raise ConfigError(
            f"unknown command '{name}'; known: {', '.join(known)}.{did_you_mean(name, known)}"
        )
    if group is None and _is_group(name):
        return _run(arguments[1:], name)
    command = f"{group} {name}" if group else name
    module = _load(command)
    parser = _parser(command, module)
    own, extra = _split(parser, arguments[1:], getattr(module, "TAKES_OVERRIDES", False))
    if getattr(module, "KEEPS_MEMORY", False):
        keep_freed_memory()
    code: int = module.run(parser.parse_args(own), extra)
    return code


def _load(command: str) -> ModuleType:
    """The file of a command, or the package of a group."""
    return importlib.import_module(f"factorlm.cli.{command.replace(' ', '.')}")


def _overview(group: str | None) -> str:
    prefix = f"{group} " if group else ""
    commands = "\n".join(
        f"  {name:<10} {_load(prefix + name).HELP}" for name in command_names(group)
    )
    about = (
        _load(group).HELP
        if group
        else "language models whose feed-forward layers are structured matrices"
    )
    last = "" if group else "; --version the version"
    return (
        f"usage: factorlm {prefix}<command> [arguments]\n\n"
        f"{about[0].upper()}{about[1:]}.\n\n"
        f"commands:\n{commands}\n\n"
        f"factorlm {prefix}<command> --help shows its arguments with examples{last}."
    )


class _Parser(argparse.ArgumentParser):
    """Reports a wrong argument as everything else that is wrong is reported."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message} (see {self.prog} --help)")


def _parser(command: str, module: ModuleType) -> argparse.ArgumentParser:
    help_ = module.HELP
    parser = _Parser(
        prog=f"factorlm {command}",
        description=f"{help_[0].upper()}{help_[1:]}.",
        epilog=module.EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    module.add_arguments(parser)
    return parser


def _split(
    parser: argparse.ArgumentParser, arguments: list[str], takes_overrides: bool
) -> tuple[list[str], list[str]]:
    """The command's own arguments, and the ``--section.key value`` ones.

    Raises ``ConfigError`` for an unknown one where the command takes none, or where it is nearly
    one of the command's own.
    """
    own: list[str] = []
    extra: list[str] = []
    flags = [flag for flag in parser._option_string_actions if flag.startswith("--")]
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        flag, equals, _ = argument.partition("=")
        if argument == "--":
            return [*own, argument, *rest], extra
        if not flag.startswith("--") or flag in flags:
            own.append(argument)
        elif not takes_overrides or difflib.get_close_matches(flag, flags, cutoff=0.75):
            raise ConfigError(f"unknown argument '{flag}'.{did_you_mean(flag, flags)}")
        else:
            extra.append(argument)
            if not equals and rest and not rest[0].startswith("--"):
                extra.append(rest.pop(0))
    return own, extra
