"""Which folders the page may see, for the routes: what the rule of `reach` refuses is a fault."""

from collections.abc import Callable
from pathlib import Path

from simpletuner.base.errors import ConfigError
from simpletuner.server.faults import Fault
from simpletuner.server.reach import OutOfReach, Reach


class Roots(Reach):
    """The workspace, where relative paths start, and other folders that were named when the server was started."""

    def resolve(self, text: str) -> Path:
        """The real path that `text` stands for, symbolic links followed; it need not be there.

        Raises:
            Fault: 403, it lies outside or is hidden; 422, it is no path.
        """
        return _or_fault(lambda: self.real(text))

    def resolve_named(self, key: str, text: str) -> Path:
        """The same for the value of an option or dataset key, which takes paths of one kind.

        Raises:
            Fault: 403, it lies outside or is hidden; 422, it is no path, or something of another kind.
        """
        return _or_fault(lambda: self.named(key, text))

    def folder(self, text: str) -> Path:
        """The real path of the folder that `text` names.

        Raises:
            Fault: 403, it lies outside or is hidden; 404, none is there; 422, it is no path.
        """
        path = self.resolve(text)
        if not path.is_dir():
            raise Fault.of(404, f"{text} is no folder")
        return path

    def shown(self, path: Path) -> str:
        """`path` as the page names it, and as `resolve` takes it: relative where it lies in the workspace."""
        text = str(path.relative_to(self.workspace)) if path.is_relative_to(self.workspace) else str(path)
        # A name of bytes that are no text cannot be sent.
        return text.encode(errors="backslashreplace").decode()


def _or_fault(resolved: Callable[[], Path]) -> Path:
    try:
        return resolved()
    except ConfigError as error:
        raise Fault(403 if isinstance(error, OutOfReach) else 422, *error.problems) from None
