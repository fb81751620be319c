"""Which folders the page may see: a path counts only once it is resolved and lies below one of them."""

from dataclasses import dataclass
from pathlib import Path

from simpletuner.server.faults import Fault


@dataclass(frozen=True)
class Roots:
    """The workspace, where relative paths start, and other folders that were named when the server was started."""

    workspace: Path
    others: tuple[Path, ...] = ()

    @property
    def all(self) -> tuple[Path, ...]:
        return (self.workspace, *self.others)

    def holds(self, path: Path) -> bool:
        """Whether a real path, its links followed, lies below one of them."""
        return any(path.is_relative_to(root) for root in self.all)

    def resolve(self, text: str) -> Path:
        """The real path that `text` stands for, symbolic links followed; it need not be there.

        Raises:
            Fault: 403, it lies outside, or 422, it is no path.
        """
        if not text or "\0" in text:
            raise Fault.of(422, f"{text!r} is no path")
        try:
            path = (self.workspace / Path(text).expanduser()).resolve()
            path.exists()  # raises where the system takes no such name
        except (OSError, RuntimeError, ValueError):
            raise Fault.of(422, f"{text!r} cannot be followed") from None
        if not self.holds(path):
            raise Fault.of(
                403,
                f"{text} lies outside the folders of this page",
                remedy="Start the server with --root FOLDER to add one.",
            )
        return path

    def shown(self, path: Path) -> str:
        """`path` as the page names it, and as `resolve` takes it: relative where it lies in the workspace."""
        text = str(path.relative_to(self.workspace)) if path.is_relative_to(self.workspace) else str(path)
        # A name of bytes that are no text cannot be sent.
        return text.encode(errors="backslashreplace").decode()
