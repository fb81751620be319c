"""The command's outermost line: picks the word's module, turns what is raised into an exit code."""

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
    "init": "three questions, and the files of a first project",
    "doctor": "what training needs and this machine lacks, before anything is downloaded",
    "train": "train with the configuration found here, or the one that is named",
    "sample": "make pictures with what was trained",
    "inspect": "what a LoRA or a model's file is, how it was trained, and which programs load it",
    "convert": "write a LoRA or a model under the names that another program wants",
    "merge": "add several LoRAs up, as one LoRA or into the weights of a model",
    "resize": "write a LoRA at a lower rank",
    "extract": "write the difference of two models as a LoRA",
    "dataset": "scan, show or cache the images before a run; change their captions, find duplicates, delete",
    "config": "check or show the configuration without training",
    "plan": "what a configuration takes of memory, before anything is loaded; where on the path it trains",
    "run": "start, stop, look after and queue runs",
    "checkpoint": "list, verify or delete the checkpoints of a run",
    "server": "the web page, on http://localhost:8001",
    "env": "print versions and devices, for a bug report",
    "completion": "let bash, zsh or fish complete commands, options and names",
}
"""A command is one line here: `simpletuner.cli.NAME.run(arguments)` returns its exit code, and `FORMS` beside it says
what may be typed after each of its verbs, for help and completion. `USAGE` is what the help begins with."""

OWN_HELP = ("train", "sample")
"""Commands whose `run` answers `--help` itself."""

HELP = ("help", "--help", "-h")
"""Words that ask for help, on all or on the command after them."""

VERSION_FLAGS = ("--version", "-V")

ALLOCATOR_SETTINGS = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
"""Where torch's CUDA allocator looks for its settings: the first that is set counts (torch 2.11 to 2.13)."""

INTERRUPTED = 130
NOT_READ = 141
"""As of a command that SIGPIPE ended."""
BUG = 1


def usage() -> str:
    """What `simpletuner --help` prints."""
    more = {
        "simpletuner help COMMAND": "says more about a command",
        "simpletuner train --example tiny-lora": "tries everything out in a few minutes",
        "simpletuner --version": "names the version",
    }
    return "\n\n".join(("usage: simpletuner COMMAND [options]", rows_text(COMMANDS), rows_text(more)))


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line, by default the process's own, and return its exit code.

    A `UserError` is printed without a traceback and gives its own code; anything else that is raised is a bug
    and keeps its traceback.
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
            return NOT_READ  # whoever read the output has seen enough (`… | head`)
        except OSError as error:
            # What the file system of the user answers is no bug of ours, wherever it was asked.
            problem = file_problem(error)
            if problem is None:
                return _bug()
            complain(str(problem))
            return DiskError.exit_code
        except Exception as error:  # noqa: BLE001  the outermost line: what arrives here is a bug
            return _interrupted() if _is_interrupt(error) else _bug()


def _interrupted() -> int:
    complain("Interrupted.")
    return INTERRUPTED


def _is_interrupt(error: BaseException | None) -> bool:
    """Whether a KeyboardInterrupt began it: numpy, interrupted while it is imported, raises an ImportError."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error is not None


def _check_working_folder() -> None:
    """Raise a DiskError where the working folder is gone: MKL, for one, ends the process there without a word."""
    try:
        os.getcwd()
    except FileNotFoundError:
        raise DiskError.of(
            "the working folder has been removed", remedy="Change to one that is there: cd FOLDER."
        ) from None


def _bug() -> int:
    """Print the exception that is being handled, and whom to tell."""
    complain(traceback.format_exc(), end="")
    complain("This is a bug in simpletuner. Please report the lines above and what `simpletuner env` prints.")
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
        # pydantic looks for plug-ins in every installed package, which takes longer than all our checks.
        os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")
        # A thread that waits for another spins for a while. By default so long that a second program on a small
        # machine (a browser with the page, say) halves our speed; so short costs nothing measurable (docs/log.md).
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
        # By default the last bits of MKL's fp32 products depend, on some processors, on the addresses of their inputs.
        # In this mode they do not, and a resumed run has the bits of an uninterrupted one (docs/log.md).
        os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")
        # Buckets of many sizes leave gaps in segments of fixed size that no other bucket fills; these ones grow. Read
        # when torch first takes memory of a GPU; on a CPU without effect.
        if not any(name in os.environ for name in ALLOCATOR_SETTINGS):
            os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
        # Imported here, so that help and mistakes are answered without loading what they do not need.
        from simpletuner.cli.help import command_help, help_asked

        command, typed = import_module(f"simpletuner.cli.{word}"), arguments[1:]
        if word not in OWN_HELP and help_asked(typed) is not None:
            say(command_help(command.USAGE, command.FORMS, typed))
            return 0
        run: Callable[[list[str]], int] = command.run
        return run(typed)
    raise _no_such_word(word)


def _no_such_word(word: str) -> ConfigError:
    # Its import is paid only by this mistake.
    from difflib import get_close_matches

    near = get_close_matches(word, (*COMMANDS, HELP[1], VERSION_FLAGS[0]), n=1)
    hint = f"Did you mean simpletuner {near[0]}?" if near else "`simpletuner --help` lists the commands."
    return ConfigError.of(f"simpletuner {word}: no such command", remedy=hint)
