"""The run that a command line names."""

from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from simpletuner.base.console import answer_to
from simpletuner.base.errors import ConfigError, Problem
from simpletuner.cli.arguments import Positional, refuse_extra
from simpletuner.cli.loading import load_here
from simpletuner.runs.layout import RunDirectory
from simpletuner.runs.status import find_runs, is_run

RUNS = Path("output")
"""Where runs lie unless they are sent elsewhere."""


def confirm_deletion(what: str, contents: str) -> None:
    """Ask on the terminal whether to delete `what`, with its `contents`.

    Raises:
        ConfigError: there is no terminal, or the answer is no.
    """
    answer = answer_to(f"Delete {what} ({contents})? [y/N] ")
    if answer is None:
        raise ConfigError.of(
            f"nobody can be asked whether to delete {what}", remedy="Give --yes to delete without being asked."
        )
    if answer.lower() not in ("y", "yes"):
        raise ConfigError.of("nothing is deleted")


@dataclass(frozen=True)
class NamedRun:
    """What is typed after a command about one run."""

    run: Path | None = Positional(convert=Path).default(None)
    """The run's directory. Without it, `rest` says which configuration has it as its output_dir."""
    train_options: tuple[str, ...] = ()

    def directory(self, command: str) -> RunDirectory:
        """The run that is named; without a name, that of the configuration found here.

        Raises:
            ConfigError: there is no such run, the configuration is wrong, or more was typed.
        """
        if self.run is not None:
            refuse_extra(self.train_options, command)
            run = RunDirectory(self.run)
        else:
            try:
                run = RunDirectory(Path(load_here(self.train_options).config.output_dir))
            except ConfigError as error:
                no_run = Problem(
                    "no run is named", f"its directory after `{command}`, or a configuration that tells it"
                )
                raise ConfigError(no_run, *error.problems) from None
        if is_run(run) or run.lock().is_held():
            return run
        others = {str(other.root): other for other in find_runs(RUNS)}
        near = get_close_matches(str(run.root), others, n=1) or [
            path for path, other in others.items() if other.root.name == run.root.name
        ]
        if near:
            remedy = f"Did you mean {near[0]}?"
        else:
            remedy = "`simpletuner run list` lists the runs." if others else "`simpletuner run start` starts one."
        raise ConfigError.of(f"{run.root}: no run is there", remedy=remedy)
