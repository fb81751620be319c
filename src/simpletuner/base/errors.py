"""Errors that the user can fix: what was found, what was expected, and a remedy.

Any other exception is a bug in this program and is shown with its traceback.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import ClassVar, Self

from simpletuner.base.signals import STOPPED


@dataclass(frozen=True)
class Problem:
    """One problem, written as one sentence and a remedy: "`found`: expected `expected`. `remedy`"."""

    found: str
    expected: str = ""
    remedy: str = ""
    key: str = field(default="", compare=False)
    """The option with the problem, so that a page can show the problem beside the option."""

    @property
    def parts(self) -> dict[str, str]:
        """The problem as JSON: each field, and the whole message as `text`."""
        return asdict(self) | {"text": str(self)}

    def __str__(self) -> str:
        text = f"{self.found}: expected {self.expected}" if self.expected else self.found
        text = text if text.endswith((".", "?", "!")) else text + "."
        return f"{text} {self.remedy}" if self.remedy else text


class UserError(Exception):
    """All problems of one stage. Ends the command with `exit_code` and without a traceback."""

    exit_code: ClassVar[int] = 1
    where: ClassVar[str] = ""
    """What several problems are about, after "2 problems"; empty if only the problems themselves say it."""

    def __init__(self, *problems: Problem) -> None:
        if not problems:
            raise ValueError("a UserError needs at least one problem")
        self.problems = problems
        super().__init__(str(self))

    @classmethod
    def of(cls, finding: str, expected: str = "", remedy: str = "") -> Self:
        """An error with a single problem."""
        return cls(Problem(finding, expected, remedy))

    @classmethod
    def raise_if(cls, problems: Iterable[Problem]) -> None:
        """Raise one error with all `problems`, without repetitions; do nothing if there are none."""
        distinct = tuple(dict.fromkeys(problems))
        if distinct:
            raise cls(*distinct)

    def __str__(self) -> str:
        if len(self.problems) == 1:
            return str(self.problems[0])
        lines = "\n".join(f"  - {problem}" for problem in self.problems)
        return f"{len(self.problems)} problems{self.where and f' {self.where}'}:\n{lines}"


class ConfigError(UserError):
    exit_code = 2
    where = "in the configuration"


class DataError(UserError):
    exit_code = 3
    where = "in the data"


class AccessError(UserError):
    exit_code = 4
    where = "in reaching the model"


class MemoryBudgetError(UserError):
    exit_code = 5
    where = "with memory"


class CheckpointError(UserError):
    exit_code = 6
    where = "in the checkpoint"


class DiskError(UserError):
    exit_code = 7
    where = "with the disk"


class Stopped(UserError):
    """The run was stopped by a signal or a request, and can be resumed."""

    exit_code = STOPPED
    where = "with the run"


class RanksError(UserError):
    """A process of a run with several processes is gone or timed out."""

    exit_code = 8
    where = "between the processes"


def error_class(exit_code: int) -> type[UserError]:
    """The class of errors with `exit_code`; `UserError` itself if no class has it."""
    return next((kind for kind in UserError.__subclasses__() if kind.exit_code == exit_code), UserError)
