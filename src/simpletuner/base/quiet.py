"""Libraries that log, while they are imported, what they found on a machine or did not."""

import contextlib
import logging
from collections.abc import Iterator


@contextlib.contextmanager
def quiet_import() -> Iterator[None]:
    """Inside, only errors are logged: an extension for another machine is no news to who trains on this one."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
