"""The exception that rejects a file of a dataset."""

OUT_OF_MEMORY = "out of memory"
UNREADABLE_FILE = "unreadable"
TRANSIENT = frozenset({OUT_OF_MEMORY, UNREADABLE_FILE})
"""Reasons that depend on the machine: the same file may be readable later."""


class Rejected(Exception):
    """A file cannot be used for training. Rejections are counted by `reason`; `detail` describes the finding."""

    def __init__(self, reason: str, detail: str) -> None:
        self.reason = reason
        self.detail = detail
        super().__init__(f"{reason}: {detail}")
