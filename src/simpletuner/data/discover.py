"""Which files a storage holds, sorted into pictures, captions and the rest."""

from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from simpletuner.base.errors import DataError
from simpletuner.base.imagefiles import CAPTION_SUFFIXES, PICTURE_SUFFIXES, caption_key
from simpletuner.base.storage import PASSED_OVER, Stamp, Storage, UnlistedFile
from simpletuner.data.sample import Rejection
from simpletuner.data.storages import ours


@dataclass(frozen=True)
class FoundFiles:
    """The files of an image set, by name."""

    pictures: dict[str, Stamp]
    """Sorted by name."""
    captions: dict[str, str]
    """Text files by `caption_key`."""
    unused_captions: tuple[str, ...]
    """`.caption` files beside a `.txt` of the same name."""
    rejections: tuple[Rejection, ...]


def discover(images: Storage) -> FoundFiles:
    """All files of a storage, subfolders included.

    Hidden files and folders (a leading dot: `.DS_Store`, `._x.jpg`, `.git`) are passed over in silence, and
    `.txt` and `.caption` files are captions; every other file that is not a picture is rejected by name, as is what
    the storage cannot list, and a folder that is a run or a cache of ours.

    Raises:
        DataError: no such folder, one that cannot be read, or one that is itself a run or a cache.
    """
    try:
        files = images.list(pass_over=ours)
    except (FileNotFoundError, NotADirectoryError) as error:
        reason = "not a folder" if isinstance(error, NotADirectoryError) else "no such folder"
        raise DataError.of(
            f"instance_data_dir = {images.shown()!r}: {reason}",
            "a folder of pictures",
            f"Relative paths are against {Path.cwd()}: correct the path or make it.",
        ) from error
    pictures: dict[str, Stamp] = {}
    captions: dict[str, str] = {}
    second_captions: dict[str, str] = {}
    rejections: list[Rejection] = []
    for file in files:
        if isinstance(file, UnlistedFile):
            if not file.name:
                raise _not_a_dataset(images, file)
            rejections.append(Rejection(file.name, file.reason, file.detail))
            continue
        suffix = PurePosixPath(file.name).suffix.lower()
        if suffix in PICTURE_SUFFIXES:
            pictures[file.name] = file.stamp
        elif suffix in CAPTION_SUFFIXES:
            found = captions if suffix == CAPTION_SUFFIXES[0] else second_captions
            found.setdefault(caption_key(file.name), file.name)
        else:
            rejections.append(Rejection(file.name, "not an image", f"{suffix or 'no suffix'} is not a picture's"))
    unused = tuple(second_captions[key] for key in sorted(second_captions.keys() & captions.keys()))
    return FoundFiles(dict(sorted(pictures.items())), second_captions | captions, unused, tuple(rejections))


def _not_a_dataset(images: Storage, folder: UnlistedFile) -> DataError:
    """The set's own folder cannot be listed, or is one of ours."""
    found = f"instance_data_dir = {images.shown()!r}: "
    if folder.detail != PASSED_OVER:
        remedy = "Give the user that runs this command the right to list it, or name another folder."
        return DataError.of(f"{found}{folder.reason} ({folder.detail})", remedy=remedy)
    remedy = "Name the folder in it that holds the pictures, or move them to a folder of their own."
    return DataError.of(f"{found}this is {folder.reason} of this program", "a folder of pictures", remedy)
