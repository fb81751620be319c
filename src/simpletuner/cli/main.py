"""Entry point of the command: runs the subcommand's module and turns exceptions into exit codes."""

import os
import sys
import traceback
from collections.abc import Callable, Sequence
from importlib import import_module

from simpletuner import __version__
from simpletuner.base.console import complain, guarded, say
from simpletuner.base.errors import ConfigError, DiskError, UserError
from simpletuner.base.files import file_problem
from simpletuner.base.signals import deferred_signals
from simpletuner.cli.printing import rows_text

COMMANDS = {
    "init": "ask three questions and write the files of a first project",
    "doctor": "check whether this machine can train, before anything is downloaded",
    "train": "train with the configuration in this folder, or with the one you name",
    "sample": "generate images with a trained LoRA or model",
    "inspect": "describe a LoRA or model file, how it was trained, and which programs load it",
    "convert": "write a LoRA or a model in another program's format",
    "merge": "add several LoRAs, into one LoRA or into the weights of a model",
    "resize": "write a LoRA at a lower rank",
    "extract": "write the difference of two models as a LoRA",
    "dataset": "scan, show or cache the training images; edit captions, find duplicates, delete images",
    "config": "check or show the configuration without training",
    "plan": "predict a run's memory without loading the model; show its distribution of timesteps",
    "run": "start, stop, watch, list, delete and queue runs",
    "checkpoint": "list, verify or delete the checkpoints of a run",
    "server": "serve the web page on http://localhost:8001",
    "env": "print versions and devices for a bug report",
    "completion": "print a script that completes commands, options and names in bash, zsh or fish",
}
"""Each command with its help line. `simpletuner.cli.NAME.run(arguments)` runs it and returns the exit code. `FORMS` in
the same module declares the arguments of each verb, for help and completion. `USAGE` is the beginning of the help."""

OWN_HELP = ("train", "sample")
"""Commands whose `run` handles `--help` itself."""

HELP = ("help", "--help", "-h")
"""Words that ask for help: general help, or help on the command that follows."""

VERSION_FLAGS = ("--version", "-V")

ALLOCATOR_SETTINGS = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
"""Environment variables with settings of torch's CUDA allocator. The first that is set wins (torch 2.11 to 2.13)."""

INTERRUPTED = 130
NOT_READ = 141
"""Exit code if nobody reads standard output, as shells report it for a command that SIGPIPE killed."""
BUG = 1


def usage() -> str:
    """The text of `simpletuner --help`."""
    first_commands = {
        "simpletuner help COMMAND": "explains a command",
        "simpletuner train --example tiny-lora": "trains a small example in a few minutes",
        "simpletuner --version": "prints the version",
    }
    return "\n\n".join(("usage: simpletuner COMMAND [options]", rows_text(COMMANDS), rows_text(first_commands)))


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line (by default that of this process) and return its exit code.

    A `UserError` is printed without a traceback and sets the exit code. Any other exception is a bug and is printed
    with its traceback.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    with guarded():
        try:
            if arguments[:1] != ["train"]:
                deferred_signals.give_up()
            return _run(arguments)
        except UserError as error:
            complain(str(error))
            return error.exit_code
        except KeyboardInterrupt:
            return _interrupted()
        except BrokenPipeError:
            return NOT_READ  # the reader of our output has closed it (`… | head`)
        except OSError as error:
            # An error of the user's file system, such as a full disk, is not a bug, wherever it is raised.
            problem = file_problem(error)
            if problem is None:
                return _bug()
            complain(str(problem))
            return DiskError.exit_code
        except Exception as error:  # noqa: BLE001  any exception that reaches this line is a bug
            return _interrupted() if _is_interrupt(error) else _bug()


def _interrupted() -> int:
    complain("Interrupted.")
    return INTERRUPTED


def _is_interrupt(error: BaseException | None) -> bool:
    """Whether a KeyboardInterrupt caused `error`. numpy raises an ImportError when its import is interrupted."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error is not None


def _check_working_folder() -> None:
    """Raise a DiskError if the working folder is gone. Otherwise MKL ends the process without a message."""
    try:
        os.getcwd()
    except FileNotFoundError:
        raise DiskError.of(
            "the working folder has been removed", remedy="Change to an existing folder: cd FOLDER."
        ) from None


def _bug() -> int:
    """Print the current exception and how to report it."""
    complain(traceback.format_exc(), end="")
    complain("This is a bug in simpletuner. Please report the lines above and the output of `simpletuner env`.")
    return BUG


def _run(arguments: list[str]) -> int:
    word = arguments[0] if arguments else ""
    if word in HELP and arguments[1:]:
        word, *typed = arguments[1:]
        arguments = [word, "--help", *typed]
    if word in ("", *HELP):
        say(usage())
        return 0 if word else ConfigError.exit_code
    if word in VERSION_FLAGS:
        say(f"simpletuner {__version__}")
        return 0
    if word in COMMANDS:
        _check_working_folder()
        # pydantic would search every installed package for plug-ins, which takes longer than all our checks.
        os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")
        # A waiting OpenMP thread spins for a while. The default is so long that a second program on a small machine
        # (such as a browser with the page) halves our speed. This value costs nothing measurable (docs/log.md).
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
        # On some processors, the last bits of MKL's fp32 products depend on the addresses of their inputs. This mode
        # removes the dependence, so a resumed run is bit-identical to an uninterrupted one (docs/log.md).
        os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")
        # Buckets of many sizes fragment segments of fixed size; expandable segments grow instead. torch reads this at
        # its first allocation on a GPU. On a CPU it has no effect.
        if not any(name in os.environ for name in ALLOCATOR_SETTINGS):
            os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
        # Imported late: general help and a mistyped command do not need it.
        from simpletuner.cli.help import command_help, requested_help

        command, typed = import_module(f"simpletuner.cli.{word}"), arguments[1:]
        if word not in OWN_HELP and requested_help(typed) is not None:
            say(command_help(command.USAGE, command.FORMS, typed))
            return 0
        run: Callable[[list[str]], int] = command.run
        return run(typed)
    raise _unknown_command(word)


def _unknown_command(word: str) -> ConfigError:
    # Imported late: only this mistake needs it.
    from difflib import get_close_matches

    near = get_close_matches(word, (*COMMANDS, HELP[1], VERSION_FLAGS[0]), n=1)
    hint = f"Did you mean simpletuner {near[0]}?" if near else "`simpletuner --help` lists the commands."
    return ConfigError.of(f"simpletuner {word}: no such command", remedy=hint)
