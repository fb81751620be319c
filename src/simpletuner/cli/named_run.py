"""For commands about one run: find the run that the command line names, and ask before a deletion."""

from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from simpletuner.base.console import ask_user
from simpletuner.base.errors import ConfigError, Problem
from simpletuner.cli.arguments import Positional, refuse_extra
from simpletuner.cli.loading import load_here
from simpletuner.runs.layout import RunDirectory
from simpletuner.runs.status import find_runs, is_run

RUNS = Path("output")
"""Default folder of runs."""


def confirm_deletion(target: str, contents: str) -> None:
    """Ask on the terminal whether to delete `target`, whose size or files `contents` describes.

    Raises:
        ConfigError: there is no terminal, or the answer is no.
    """
    answer = ask_user(f"Delete {target} ({contents})? [y/N] ")
    if answer is None:
        raise ConfigError.of(
            f"there is no terminal to confirm the deletion of {target}",
            remedy="Give --yes to delete without confirmation.",
        )
    if answer.lower() not in ("y", "yes"):
        raise ConfigError.of("nothing is deleted")


@dataclass(frozen=True)
class NamedRun:
    """Arguments of a command about one run."""

    run: Path | None = Positional(convert=Path).default(None)
    """The run's directory. Without it, the run is the output_dir of the configuration that `train_options` select."""
    train_options: tuple[str, ...] = ()

    def directory(self, command: str) -> RunDirectory:
        """The named run; without a name, the run of the selected configuration.

        Raises:
            ConfigError: the run does not exist, the configuration has problems, or there are extra arguments.
        """
        if self.run is not None:
            refuse_extra(self.train_options, command)
            run = RunDirectory(self.run)
        else:
            try:
                run = RunDirectory(Path(load_here(self.train_options).config.output_dir))
            except ConfigError as error:
                no_run = Problem(
                    "no run is named", f"its directory after `{command}`, or a configuration that names it"
                )
                raise ConfigError(no_run, *error.problems) from None
        if is_run(run) or run.lock().is_held():
            return run
        runs = {str(each.root): each for each in find_runs(RUNS)}
        near = get_close_matches(str(run.root), runs, n=1) or [
            path for path, each in runs.items() if each.root.name == run.root.name
        ]
        if near:
            remedy = f"Did you mean {near[0]}?"
        else:
            remedy = "`simpletuner run list` lists the runs." if runs else "`simpletuner run start` starts one."
        raise ConfigError.of(f"{run.root}: no such run", remedy=remedy)
