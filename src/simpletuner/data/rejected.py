"""The one exception by which a file leaves the set."""

OUT_OF_MEMORY = "out of memory"
UNREADABLE_FILE = "unreadable"
PASSING = frozenset({OUT_OF_MEMORY, UNREADABLE_FILE})
"""Reasons that lie with the machine: the same file may be read another time."""


class Rejected(Exception):
    """This file cannot be trained. `reason` is the class it is counted under, `detail` what exactly was
    found."""

    def __init__(self, reason: str, detail: str) -> None:
        self.reason = reason
        self.detail = detail
        super().__init__(f"{reason}: {detail}")
