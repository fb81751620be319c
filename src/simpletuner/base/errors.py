"""Errors that are the user's to fix: what was found, what was expected, what to do.

Anything that is not a `UserError` is a bug in this program and keeps its traceback.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import ClassVar, Self

from simpletuner.base.signals import STOPPED


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong, in one breath: "`found`: expected `expected`. `remedy`"."""

    found: str
    expected: str = ""
    remedy: str = ""
    key: str = field(default="", compare=False)
    """The option it is about, for who shows it beside that option."""

    @property
    def parts(self) -> dict[str, str]:
        """For JSON: each field, and as `text` all of it in one breath."""
        return asdict(self) | {"text": str(self)}

    def __str__(self) -> str:
        text = f"{self.found}: expected {self.expected}" if self.expected else self.found
        text = text if text.endswith((".", "?", "!")) else text + "."
        return f"{text} {self.remedy}" if self.remedy else text


class UserError(Exception):
    """Problems found at one stage, all of them together. Ends the command with `exit_code`, no traceback."""

    exit_code: ClassVar[int] = 1
    where: ClassVar[str] = "here"

    def __init__(self, *problems: Problem) -> None:
        if not problems:
            raise ValueError("a UserError needs at least one problem")
        self.problems = problems
        super().__init__(str(self))

    @classmethod
    def of(cls, found: str, expected: str = "", remedy: str = "") -> Self:
        """The error of a single problem."""
        return cls(Problem(found, expected, remedy))

    @classmethod
    def raise_if(cls, problems: Iterable[Problem]) -> None:
        """Raise one error that holds all `problems`, each once; return when there is none."""
        found = tuple(dict.fromkeys(problems))
        if found:
            raise cls(*found)

    def __str__(self) -> str:
        if len(self.problems) == 1:
            return str(self.problems[0])
        lines = "\n".join(f"  - {problem}" for problem in self.problems)
        return f"{len(self.problems)} problems {self.where}:\n{lines}"


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
    """The run was asked to stop and can be resumed."""

    exit_code = STOPPED
    where = "with the run"


class RanksError(UserError):
    """A process of a run on several is gone, or was waited for in vain."""

    exit_code = 8
    where = "between the processes"


def error_class(exit_code: int) -> type[UserError]:
    """The class of errors that ends a command with `exit_code`; `UserError` itself where none has this code."""
    return next((kind for kind in UserError.__subclasses__() if kind.exit_code == exit_code), UserError)
