"""The one exception by which a file leaves the set."""


class Rejected(Exception):
    """This file cannot be trained. `reason` is the class it is counted under, `detail` what exactly was
    found."""

    def __init__(self, reason: str, detail: str) -> None:
        self.reason = reason
        self.detail = detail
        super().__init__(f"{reason}: {detail}")
