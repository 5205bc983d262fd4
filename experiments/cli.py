"""Command lines: options from the fields of `ExperimentConfig`, and how a command ends: messages and exit codes."""

import argparse
import difflib
import re
import shlex
import shutil
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import Field, fields

from experiments.config import ExperimentConfig, SetupError, first_line
from experiments.storage import SaveError

EXIT_FAILED, EXIT_SETUP, EXIT_INTERRUPTED = 1, 2, 130
EXIT_SIGNAL = 128  # plus the signal's number: 130 for Ctrl-C
GOES_ON = "finished cells are kept, the same command goes on from there"
_FIELDS: dict[str, Field] = {item.name: item for item in fields(ExperimentConfig)}

MODEL = ("model", "dtype", "device", "seed")
"""What every command asks that loads a model; then what most of them do."""
STREAM = ("n_sink", "window_size")
TEXTS = ("datasets", "text_key", "bos")


class _WideHelp(argparse.RawDescriptionHelpFormatter):
    """Options and what they mean side by side, as wide as the examples below them; a list's name stands once."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=33, width=max(118, shutil.get_terminal_size().columns - 2))

    def _format_args(self, action: argparse.Action, default_metavar: str) -> str:
        if action.nargs == argparse.ONE_OR_MORE:
            return f"{self._metavar_formatter(action, default_metavar)(1)[0]} ..."
        return super()._format_args(action, default_metavar)


class OneLineParser(argparse.ArgumentParser):
    """A parser that answers a wrong command line with one line, and whose help keeps to two screens."""

    def __init__(self, prog: str, description: str, epilog: str = ""):
        about = {"prog": prog, "usage": f"{prog} [options]", "description": description, "epilog": epilog}
        super().__init__(**about, formatter_class=_WideHelp, allow_abbrev=False)

    def error(self, message: str):
        for word in re.findall(r"(--[\w-]+)", message.partition("unrecognized arguments: ")[2])[:1]:
            near = difflib.get_close_matches(word, self._option_string_actions, n=1)
            message += f" (did you mean {near[0]}?)" if near else ""
        print(f"error: {message} (--help lists the options)", file=sys.stderr)
        raise SystemExit(EXIT_SETUP)


def add_options(
    parser: argparse.ArgumentParser, title: str, names: Iterable[str], one: Iterable[str] = (), **changes: dict
) -> argparse._ArgumentGroup:
    """Add the options of some of the configuration's fields to a parser, as a group.

    `one`: of those that hold several values, which take only one here. `changes`: by field, what differs from what
    the configuration says: arguments of `add_argument`, and `flags`.
    """
    group = parser.add_argument_group(title)
    for name in names:
        item, flag = _FIELDS[name], f"--{name.replace('_', '-')}"
        details = {"dest": name, "default": item.default, "help": item.metadata["help"]}
        flags = item.metadata.get("flags", (flag,))
        if isinstance(item.default, bool):
            details["action"] = "store_false" if item.default else "store_true"
            flags = (f"--no-{name}",) if item.default else flags
        else:
            number = float if "float" in str(item.type) else int if "int" in str(item.type) else str
            details |= {"type": number, "metavar": item.metadata.get("metavar", "NAME")}
            if item.metadata.get("many") and name not in one:
                details["nargs"] = "+"
            elif isinstance(item.default, tuple):
                details["default"] = item.default[0]
        details |= changes.get(name, {})
        group.add_argument(*details.pop("flags", flags), **details)
    return group


def config_from(options: argparse.Namespace, argv: Sequence[str] = (), program: str = "", **more) -> ExperimentConfig:
    """The configuration that a parsed command line asks for; options that are no fields of it are left out."""
    given = {name: value for name, value in vars(options).items() if name in _FIELDS}
    return ExperimentConfig(**{**given, **more}, command=shlex.join(["python", program, *argv]))


def guarded(command: Callable[[], int], *failures: type[Exception], later: str = "") -> int:
    """Run a command and turn what can go wrong into one line on stderr and an exit code.

    `failures`: what else, beside a result that cannot be saved, ends it with exit code 1. `later`: what is there then.
    """
    try:
        return command()
    except SetupError as error:
        code, line = EXIT_SETUP, f"error: {error}"
    except (SaveError, *failures) as error:
        code, line = EXIT_FAILED, f"error: {first_line(error)}{later and '; '}{later}"
    except KeyboardInterrupt:
        code, line = EXIT_INTERRUPTED, f"interrupted{later and '; '}{later}"
    print(line, file=sys.stderr, flush=True)
    return code
