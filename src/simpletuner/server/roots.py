"""The folders that the page may access, for the routes: a path that `reach` refuses raises a fault."""

from collections.abc import Callable
from pathlib import Path

from simpletuner.base.errors import ConfigError
from simpletuner.server.faults import Fault
from simpletuner.server.reach import OutOfReach, Reach


class Roots(Reach):
    """The workspace, where relative paths start, and the folders given by `--root`."""

    def resolve(self, text: str) -> Path:
        """Return the real path that `text` names, symbolic links followed; it need not exist.

        Raises:
            Fault: 403, it lies outside or is hidden; 422, it is not a valid path.
        """
        return _or_fault(lambda: self.checked_path(text))

    def resolve_for(self, key: str, text: str) -> Path:
        """As `resolve`, for the value of an option or dataset key, which accepts one kind of path.

        Raises:
            Fault: 403, it lies outside or is hidden; 422, it is not a valid path, or of another kind.
        """
        return _or_fault(lambda: self.real_for(key, text))

    def folder(self, text: str) -> Path:
        """Return the real path of the folder that `text` names.

        Raises:
            Fault: 403, it lies outside or is hidden; 404, there is no such folder; 422, it is not a valid path.
        """
        path = self.resolve(text)
        if not path.is_dir():
            raise Fault.of(404, f"{text} is not a folder")
        return path

    def display_path(self, path: Path) -> str:
        """`path` as the page shows it and `resolve` accepts it: relative if it lies in the workspace."""
        text = str(path.relative_to(self.workspace)) if path.is_relative_to(self.workspace) else str(path)
        # A name whose bytes are not UTF-8 cannot be sent as text.
        return text.encode(errors="backslashreplace").decode()


def _or_fault(resolved: Callable[[], Path]) -> Path:
    try:
        return resolved()
    except ConfigError as error:
        raise Fault(403 if isinstance(error, OutOfReach) else 422, *error.problems) from None
