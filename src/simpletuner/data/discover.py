"""List a storage's files and sort them into images, captions and rejected files."""

from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from simpletuner.base.errors import DataError
from simpletuner.base.imagefiles import CAPTION_SUFFIXES, IMAGE_SUFFIXES, caption_key
from simpletuner.base.storage import SKIPPED_FOLDER, Stamp, Storage, UnlistedFile
from simpletuner.data.sample import Rejection
from simpletuner.data.storages import own_folder_kind


@dataclass(frozen=True)
class FolderFiles:
    """The files of a dataset, by name."""

    pictures: dict[str, Stamp]
    """Stamps of the images, sorted by name."""
    captions: dict[str, str]
    """Caption files by `caption_key`."""
    unused_captions: tuple[str, ...]
    """`.caption` files that are not read because there is a `.txt` file of the same name."""
    rejections: tuple[Rejection, ...]


def discover(images: Storage) -> FolderFiles:
    """List all files of a storage, subfolders included.

    Hidden files and folders (a leading dot: `.DS_Store`, `._x.jpg`, `.git`) are skipped silently. `.txt` and
    `.caption` files are captions. Every other file that is not an image is rejected, as are entries that the storage
    cannot list, and subfolders that are a run directory or a cache of this program.

    Raises:
        DataError: the folder does not exist, cannot be read, or is itself a run directory or a cache.
    """
    try:
        files = images.list(skip_reason=own_folder_kind)
    except (FileNotFoundError, NotADirectoryError) as error:
        reason = "not a folder" if isinstance(error, NotADirectoryError) else "no such folder"
        raise DataError.of(
            f"instance_data_dir = {images.text()!r}: {reason}",
            "a folder of images",
            f"Relative paths start at {Path.cwd()}: correct the path or create the folder.",
        ) from error
    image_stamps: dict[str, Stamp] = {}
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
        if suffix in IMAGE_SUFFIXES:
            image_stamps[file.name] = file.stamp
        elif suffix in CAPTION_SUFFIXES:
            captions_of_suffix = captions if suffix == CAPTION_SUFFIXES[0] else second_captions
            captions_of_suffix.setdefault(caption_key(file.name), file.name)
        else:
            rejections.append(Rejection(file.name, "not an image", f"its suffix is {suffix or 'missing'}"))
    unused = tuple(second_captions[key] for key in sorted(second_captions.keys() & captions.keys()))
    return FolderFiles(dict(sorted(image_stamps.items())), second_captions | captions, unused, tuple(rejections))


def _not_a_dataset(images: Storage, folder: UnlistedFile) -> DataError:
    """The dataset's folder itself cannot be listed, or is a run directory or a cache of this program."""
    finding = f"instance_data_dir = {images.text()!r}: "
    if folder.detail != SKIPPED_FOLDER:
        remedy = "Give the user who runs this command permission to list it, or name another folder."
        return DataError.of(f"{finding}{folder.reason} ({folder.detail})", remedy=remedy)
    remedy = "Name the subfolder that holds the images, or move them to a separate folder."
    return DataError.of(f"{finding}this is {folder.reason} of this program", "a folder of images", remedy)
