"""What text may be: a caption that says something, a name that can be a file's, a value without stray characters."""

import re
import unicodedata

CAPTION_BYTES = 64 * 1024
"""Longest caption in UTF-8. The text encoder reads 512 tokens; tokenizing megabytes takes minutes and gigabytes."""

NAME_BYTES = 200
"""Longest name that becomes a file's, in UTF-8. File systems take 255 bytes, and sizes, numbers, suffixes and the
marks of temporary files are appended."""

_INVISIBLE = frozenset({"Cc", "Cf", "Zs", "Zl", "Zp", "Mn", "Me"})
"""Unicode categories: control and format characters, spaces, marks without a letter."""
_BLANK = frozenset("\u115f\u1160\u2800\u3164\uffa0")
"""Letters and symbols that are drawn as nothing."""
_NOT_IN_A_FILE_NAME = re.compile(r'[/\\:*?"<>|]')


def is_visible(text: str) -> bool:
    """Whether `text` holds a character that is drawn; a zero-width space or a byte-order mark is not."""
    return any(unicodedata.category(char) not in _INVISIBLE and char not in _BLANK for char in text)


def size_in_bytes(text: str) -> int:
    """Length of `text` in UTF-8."""
    return len(text.encode(errors="surrogatepass"))


def stray_characters(text: str) -> list[str]:
    """Control characters in `text` other than tab and newline, and halves of surrogate pairs: `\\r` where a script was
    saved with Windows line ends."""
    return [char for char in text if unicodedata.category(char) in ("Cc", "Cs") and char not in "\t\n"]


def does_as_file_name(name: str) -> bool:
    """Whether `name`, with what is appended to it, can be a file's name on any file system."""
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
"""What `does_as_file_name` expects, in words."""
