"""Checks of text: visible characters, stray characters, and valid file names."""

import re
import unicodedata

CAPTION_BYTES = 64 * 1024
"""Maximum length of a caption in UTF-8. The text encoder reads 512 tokens; tokenizing megabytes takes minutes and
gigabytes."""

NAME_BYTES = 200
"""Maximum length in UTF-8 of a name that becomes part of a file name. File systems allow 255 bytes; the program appends
sizes, numbers, suffixes and marks of temporary files."""

_INVISIBLE = frozenset({"Cc", "Cf", "Zs", "Zl", "Zp", "Mn", "Me"})
"""Unicode categories: control and format characters, spaces, marks without a letter."""
_BLANK = frozenset("\u115f\u1160\u2800\u3164\uffa0")
"""Letters and symbols that are rendered as blanks."""
_NOT_IN_A_FILE_NAME = re.compile(r'[/\\:*?"<>|]')


def is_visible(text: str) -> bool:
    """Whether `text` has a visible character; a zero-width space or a byte-order mark is invisible."""
    return any(unicodedata.category(char) not in _INVISIBLE and char not in _BLANK for char in text)


def size_in_bytes(text: str) -> int:
    """Length of `text` in UTF-8."""
    return len(text.encode(errors="surrogatepass"))


def stray_characters(text: str) -> list[str]:
    """Control characters in `text` except tab and newline, and lone surrogates.

    One is `\\r`, from scripts that were saved with Windows line endings."""
    return [char for char in text if unicodedata.category(char) in ("Cc", "Cs") and char not in "\t\n"]


def is_file_name(name: str) -> bool:
    """Whether `name`, even with suffixes appended, is a valid file name on any file system."""
    return (
        is_visible(name)
        and not stray_characters(name)
        and _NOT_IN_A_FILE_NAME.search(name) is None
        and "\t" not in name
        and "\n" not in name
        and not name.startswith((".", " "))
        and not name.endswith((".", " "))
        and size_in_bytes(name) <= NAME_BYTES
    )


FILE_NAME = f'at most {NAME_BYTES} bytes in UTF-8, none of / \\ : * ? " < > |, no dot or space at its ends'
"""The requirements of `is_file_name`, for messages."""
