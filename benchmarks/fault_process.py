"""Run `simpletuner train` in a process that lists its file operations, or kills itself at one of them.

    python benchmarks/fault_process.py list FILE -- FLAGS...
    python benchmarks/fault_process.py kill FILE NUMBER -- FLAGS...

`list` appends a line to FILE for each operation that changes something below the working folder: a file opened for
writing, a rename, a removal, a link, a new folder. `kill` sends SIGKILL to its own process just before operation
NUMBER, counted from 0, and writes that operation's line to FILE.
"""

import os
import signal
import sys
from typing import Any

CHANGES = frozenset(
    {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate", "shutil.rmtree"}
)
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


class Operations:
    """An audit hook that counts the operations below the folder that is current when it is created."""

    def __init__(self, record: str, fatal: int | None) -> None:
        self._folder = os.path.realpath(os.getcwd()) + os.sep
        self._record = os.open(record, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self._fatal = fatal
        self._count = 0

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            name, _, flags = arguments
            if not isinstance(flags, int) or not flags & WRITES:
                return
        elif event in CHANGES:
            name = arguments[1] if event in ("os.rename", "os.link", "os.symlink") else arguments[0]
        else:
            return
        if not isinstance(name, str | bytes | os.PathLike):
            return
        path = os.path.abspath(os.fsdecode(name))
        if not path.startswith(self._folder):
            return
        number, self._count = self._count, self._count + 1
        if self._fatal is None or number == self._fatal:
            os.write(self._record, f"{event} {path.removeprefix(self._folder)}\n".encode())
        if number == self._fatal:
            os.kill(os.getpid(), signal.SIGKILL)


def main() -> int:
    end = sys.argv.index("--")
    mode, record, *number = sys.argv[1:end]
    sys.addaudithook(Operations(record, int(number[0]) if mode == "kill" else None))
    from simpletuner.cli.main import main as command

    return command(["train", *sys.argv[end + 1 :]])


if __name__ == "__main__":
    sys.exit(main())
