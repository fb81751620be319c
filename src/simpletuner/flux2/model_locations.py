"""Model locations: folders on this disk, and Hub repositories, from which only requested files are downloaded."""

import contextlib
import functools
import json
import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path

from simpletuner.base.errors import AccessError, DiskError
from simpletuner.base.files import file_errors_reported, sha256_file, with_home, write_atomic
from simpletuner.base.machine import free_disk_bytes
from simpletuner.base.sizes import format_size
from simpletuner.base.tensorfile import is_weight_file
from simpletuner.config.flavours import FLAVOURS
from simpletuner.config.options.model import ModelOptions
from simpletuner.runs.process import interruptible

ReportLine = Callable[[str], None]

_SHA256_DIGITS = 64
_OR_A_FOLDER = "Or give a local folder as pretrained_model_name_or_path."


class ModelFolder:
    """A folder on this disk. Never touches the network."""

    commit: str | None = None

    def __init__(self, root: Path) -> None:
        self.root = root
        self.name = root.resolve().name
        """Name in the run's record: only the folder's name, which reveals no path of this machine."""
        self.label = str(root)
        """Name in messages to the user."""

    def contains(self, name: str) -> bool:
        """Whether the file `name`, a relative path with forward slashes, exists."""
        return (self.root / name).is_file()

    def path(self, name: str) -> Path:
        """The path of the file `name`."""
        return self.root / name


@dataclass(frozen=True)
class HubFile:
    """A file in a Hub repository."""

    size: int
    """Bytes."""
    etag: str
    """SHA-256 of a large file, git's hash of a small one. Names the blob in the cache."""

    @property
    def is_large(self) -> bool:
        return len(self.etag) == _SHA256_DIGITS


class Hub:
    """A model repository at one commit; like `ModelFolder`, but `path` downloads missing files.

    Downloads go to the cache of huggingface_hub. If the Hub cannot be reached, earlier downloads are used and the user
    gets a notice.

    Raises (all methods):
        AccessError: no login, no access, unknown repository or revision, no connection, or a damaged download.
    """

    _ID = re.compile(r"[\w.-]+/[\w.-]+")

    def __init__(self, repo: str, options: ModelOptions, report: ReportLine, environ: Mapping[str, str]) -> None:
        self.name = self.label = repo
        self._revision = options.revision
        self._options = options
        self._endpoint = environ.get("HF_ENDPOINT")
        self._report = report
        self._offline: ModelFolder | None = None

    @classmethod
    def is_id(cls, text: str) -> bool:
        """Whether `text` has the form owner/name of a Hub repository."""
        return cls._ID.fullmatch(text) is not None

    @property
    def cache(self) -> Path:
        """The cache folder for downloads."""
        return hub_cache(self._options)

    @property
    def _folder(self) -> Path:
        """This repository's folder in the cache."""
        return _repo_cache(self._options, self.name)

    @property
    def commit(self) -> str | None:
        """The commit whose files are used."""
        return self._listing[0]

    def contains(self, name: str) -> bool:
        """Whether the repository has the file `name`."""
        files = self._listing[1]
        return self._offline.contains(name) if self._offline is not None else name in files

    def path(self, name: str) -> Path:
        """The path of the file `name` in the cache, downloaded if it is missing."""
        commit, _ = self._listing
        if self._offline is not None:
            return self._offline.path(name)
        file = self._folder / "snapshots" / commit / name
        return file if file.is_file() else self._download(name)

    def check_access(self) -> str:
        """Check that the files can be downloaded, and return the commit.

        Listing them proves nothing: anyone can list a gated repository.
        """
        from huggingface_hub import get_hf_file_metadata, hf_hub_url

        commit, files = self._listing
        name = next((name for name in files if name.endswith(".safetensors")), None)
        if name is not None:
            with self._translated_errors():
                get_hf_file_metadata(hf_hub_url(self.name, name, revision=commit, endpoint=self._endpoint))
        return commit

    def absent(self, names: Sequence[str]) -> dict[str, int]:
        """Bytes still to download for each of `names` that the cache lacks at this commit.

        0 if another commit has the same file; less than its size if an earlier download was interrupted.
        """
        commit, files = self._listing
        if self._offline is not None:
            return {}
        return {
            name: self._remaining(files[name])
            for name in names
            if not (self._folder / "snapshots" / commit / name).is_file()
        }

    def keep_commit(self) -> None:
        """Record the branch's commit in the cache, for later runs without a network.

        Call this once all required files are downloaded: until then a complete older commit is more useful.
        """
        commit, _ = self._listing
        if self._offline is None and _recorded_commit(self._options, self.name) != commit:
            with contextlib.suppress(DiskError):  # the cache may be read-only
                ref = _ref(self._options, self.name)
                write_atomic(ref, commit.encode())

    @functools.cached_property
    def _listing(self) -> tuple[str, dict[str, HubFile]]:
        """The commit, and its files by name; without files if the Hub cannot be reached."""
        from huggingface_hub import HfApi, constants

        try:
            with self._translated_errors():
                info = interruptible(
                    lambda: HfApi(endpoint=self._endpoint).model_info(
                        self.name,
                        revision=self._revision,
                        files_metadata=True,
                        timeout=constants.HF_HUB_ETAG_TIMEOUT,
                    )
                )
        except _UnreachableError as error:
            commit = _recorded_commit(self._options, self.name)
            snapshot = self._folder / "snapshots" / str(commit)
            if commit is None or not snapshot.is_dir():
                raise
            reason = error.problems[0].found
            self._report(f"{reason[0].upper()}{reason[1:]}: using the earlier download.")
            self._offline = ModelFolder(snapshot)
            self._offline.label = self.label = f"the download of {self.name} in {snapshot}"
            return commit, {}
        return str(info.sha), {
            sibling.rfilename: HubFile(
                sibling.size or 0, sibling.lfs.sha256 if sibling.lfs is not None else sibling.blob_id or ""
            )
            for sibling in info.siblings or []
        }

    def _remaining(self, file: HubFile) -> int:
        """Bytes of `file` that the cache lacks."""
        blob = self._folder / "blobs" / file.etag
        partial = _partial(blob)
        if blob.is_file():
            return 0
        return max(0, file.size - (partial.stat().st_size if partial.is_file() else 0))

    def _download(self, name: str) -> Path:
        """Download the file `name` into the cache and return its path."""
        from huggingface_hub import hf_hub_download

        commit, files = self._listing

        def download() -> str:
            if files[name].is_large:
                self._download_large(name, commit, files[name])
            return hf_hub_download(self.name, name, revision=commit, cache_dir=self.cache, endpoint=self._endpoint)

        with file_errors_reported(self.cache), self._translated_errors():
            return Path(interruptible(download))

    def _download_large(self, name: str, commit: str, file: HubFile) -> None:
        """Download the content of `name` into the cache, resuming an interrupted download.

        huggingface_hub's own download would start over, leave behind partial files of killed processes, and check only
        sizes. It still downloads files that the Hub offers over Xet, which is faster than one HTTP connection and
        verifies content itself.
        """
        from huggingface_hub import get_hf_file_metadata, hf_hub_url
        from huggingface_hub.file_download import http_get
        from huggingface_hub.utils._fixes import WeakFileLock
        from huggingface_hub.utils._headers import build_hf_headers
        from huggingface_hub.utils._runtime import is_xet_available

        url = hf_hub_url(self.name, name, revision=commit, endpoint=self._endpoint)
        metadata = get_hf_file_metadata(url, endpoint=self._endpoint, retry_on_errors=True)
        blob = self._folder / "blobs" / file.etag
        lock = self.cache / ".locks" / self._folder.name / f"{file.etag}.lock"
        for folder in (blob.parent, lock.parent):
            folder.mkdir(parents=True, exist_ok=True)
        with WeakFileLock(lock):  # huggingface_hub's own lock: no other process downloads this file meanwhile
            for leftover in blob.parent.glob(f"{file.etag}.*.incomplete"):
                leftover.unlink()
            if blob.is_file() or (metadata.xet_file_data is not None and is_xet_available()):
                return
            partial = _partial(blob)
            with partial.open("ab") as stream:
                if stream.tell() > file.size:
                    stream.truncate(0)
                    stream.seek(0)
                http_get(
                    url,
                    stream,
                    resume_size=stream.tell(),
                    headers=build_hf_headers(),
                    expected_size=file.size,
                    displayed_filename=name,
                )
            digest = sha256_file(partial)
            if digest != file.etag:
                partial.unlink()
                raise AccessError.of(
                    f"{name} of {self.name} arrived damaged: its sha256 begins with {digest[:12]}",
                    f"{file.etag[:12]}, as the Hub lists it",
                    "Run the command again: it downloads this file again and keeps complete ones.",
                )
            partial.rename(blob)

    @contextlib.contextmanager
    def _translated_errors(self) -> Iterator[None]:
        """Translate huggingface_hub's errors in this block into ours. Neither theirs nor ours contains a token."""
        from huggingface_hub.errors import FileMetadataError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

        # The base exception of the HTTP library that this version of huggingface_hub uses.
        http_error: type[BaseException] = HfHubHTTPError.__bases__[0]
        try:
            yield
        except HFValidationError as error:
            raise AccessError.of(f"{self.name} is not a Hub id: {error}", remedy="Check the spelling.") from error
        except (FileMetadataError, KeyError, TypeError, json.JSONDecodeError) as error:
            raise self._no_hub() from error
        except (OSError, http_error) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise  # a disk error, not a Hub error
            # For a small file that it cannot download, huggingface_hub only reports that the cache lacks it.
            reason = error.__cause__ if isinstance(error, LocalEntryNotFoundError) else None
            raise self._access_error(reason or error) from error

    def _no_hub(self) -> "_UnreachableError":
        return _UnreachableError.of(
            f"{self._endpoint or 'https://huggingface.co'} does not answer like the Hub for {self.name}",
            remedy="Check HF_ENDPOINT, and whether a proxy or a login page intercepts requests. " + _OR_A_FOLDER,
        )

    def _access_error(self, error: BaseException) -> AccessError:
        """The AccessError for an error of huggingface_hub or of its HTTP library."""
        from huggingface_hub import get_token
        from huggingface_hub.errors import (
            FileMetadataError,
            GatedRepoError,
            HfHubHTTPError,
            OfflineModeIsEnabled,
            RepositoryNotFoundError,
            RevisionNotFoundError,
        )

        log_in = "log in with `hf auth login` (or set HF_TOKEN)"
        if isinstance(error, GatedRepoError):
            licenses = [flavour.license for flavour in FLAVOURS.values() if flavour.repo == self.name]
            license_text = f"its license ({licenses[0].split(',')[0]})" if licenses else "its license"
            accept = f"Accept {license_text} on https://huggingface.co/{self.name}"
            if get_token() is None:
                return AccessError.of(
                    f"{self.name} is gated and you are not logged in", remedy=f"{accept}, then {log_in}."
                )
            return AccessError.of(
                f"{self.name} is gated and your account has no access to it",
                remedy=f"{accept} with the account of your token.",
            )
        if isinstance(error, RevisionNotFoundError):
            return AccessError.of(f"revision = {self._revision}: {self.name} has no such branch, tag or commit")
        if isinstance(error, RepositoryNotFoundError):
            return AccessError.of(
                f"{self.name} is neither a local folder nor a Hub repository that you can access",
                remedy=f"Check the spelling; {log_in} if it is private.",
            )
        if isinstance(error, FileMetadataError):
            return self._no_hub()
        if isinstance(error, HfHubHTTPError):
            status = error.response.status_code
            if status in (401, 403):
                refused = "requires a login" if get_token() is None else "refuses your token"
                return AccessError.of(
                    f"the Hub {refused} for {self.name} (HTTP {status})", remedy=f"{log_in[0].upper()}{log_in[1:]}."
                )
            later = "Try again later: downloaded data is kept."
            kind = _UnreachableError if status == HTTPStatus.TOO_MANY_REQUESTS or status >= 500 else AccessError
            return kind.of(f"the Hub answers HTTP {status} for {self.name}", remedy=later)
        if isinstance(error, OfflineModeIsEnabled):
            return _UnreachableError.of(
                f"HF_HUB_OFFLINE forbids access to the Hub for {self.name}", remedy=f"Unset it. {_OR_A_FOLDER}"
            )
        if type(error) is OSError:  # raised by huggingface_hub if fewer or more bytes arrive than announced
            return _UnreachableError.of(
                f"a download from {self.name} was interrupted", remedy="Run the command again: downloaded data is kept."
            )
        return _UnreachableError.of(
            f"cannot reach the Hub for {self.name} ({str(error) or type(error).__name__})",
            remedy=f"Check the connection and HF_ENDPOINT, and run the command again: downloaded data is kept. "
            f"{_OR_A_FOLDER}",
        )


class _UnreachableError(AccessError):
    """The Hub could not be reached, or its answer does not show whether the repository is accessible."""


ModelLocation = ModelFolder | Hub


def base_name(options: ModelOptions) -> str:
    """Name of the base model for messages: the flavour's title, or the folder, file or Hub id in `options`."""
    name = options.pretrained_model_name_or_path
    flavour = FLAVOURS[options.model_flavour]
    if name in (None, flavour.repo):
        return flavour.title
    return name if Hub.is_id(name) and not os.path.exists(name) else Path(name).name


def missing_download(options: ModelOptions, preview: str | None = None) -> int:
    """Approximate bytes of weights that a run still has to download. Reads the cache, without the network.

    Args:
        preview: Hub id of a second model of the same size, of which only the transformer is used.
    """
    flavour = FLAVOURS[options.model_flavour]
    base = options.pretrained_model_name_or_path or flavour.repo
    folder_base = flavour.repo if base is not None and is_weight_file(base) else base
    locations = {
        "transformer": options.pretrained_transformer_model_name_or_path or base,
        "vae": options.pretrained_vae_model_name_or_path or folder_base,
        "text_encoder": options.pretrained_text_encoder_model_name_or_path or folder_base,
    }
    single: Collection[str] = ()
    if any(location is not None and is_weight_file(location) for location in locations.values()):
        from simpletuner.flux2.single import single_files  # imports torch, which `doctor` avoids

        single = single_files(options)
    downloads = [(component, locations[component]) for component in flavour.downloads if component not in single]
    downloads += [("transformer", preview)] if flavour.downloads and preview != locations["transformer"] else []
    missing = 0
    for component, location in downloads:
        size = flavour.downloads[component]
        if location is not None and Hub.is_id(location) and not os.path.exists(with_home(location)):
            missing += max(0, size - _cached_bytes(options, location, component))
    return missing


def _cached_bytes(options: ModelOptions, repo: str, component: str) -> int:
    """Size of the component's complete weight files in the Hub's cache."""
    root = _repo_cache(options, repo)
    if not os.path.isdir(root):  # or it is not readable, which `doctor` reports
        return 0
    files = root.glob(f"snapshots/{_recorded_commit(options, repo) or '*'}/{component}/*.safetensors")
    return sum(file.stat().st_size for file in {file.resolve() for file in files} if os.path.isfile(file))


def _recorded_commit(options: ModelOptions, repo: str) -> str | None:
    """The commit that the cache records for `options.revision`, or else the revision itself, which may be None."""
    ref = _ref(options, repo)
    return ref.read_text(encoding="ascii").strip() if os.path.isfile(ref) else options.revision


def _ref(options: ModelOptions, repo: str) -> Path:
    """The cache file that records the branch's commit."""
    return _repo_cache(options, repo) / "refs" / (options.revision or "main")


def _repo_cache(options: ModelOptions, repo: str) -> Path:
    """The folder of `repo` in the Hub cache."""
    return hub_cache(options) / f"models--{repo.replace('/', '--')}"


def _partial(blob: Path) -> Path:
    """The partial file of an interrupted download of `blob`."""
    return blob.with_name(f"{blob.name}.incomplete")


def cached_snapshot(options: ModelOptions, repo: str) -> Path:
    """The folder in the Hub cache with the files of `repo`, at the last recorded commit of `revision`."""
    return _repo_cache(options, repo) / "snapshots" / (_recorded_commit(options, repo) or "none")


def hub_cache(options: ModelOptions) -> Path:
    """The folder for downloads from the Hub."""
    from huggingface_hub import constants

    return Path(with_home(options.cache_dir or constants.HF_HUB_CACHE))


def fetch(files: Sequence[tuple[ModelLocation, str]], report: ReportLine) -> None:
    """Download the `files` that are on the Hub and not in the cache, after reporting their size.

    Raises:
        AccessError: see `Hub`.
        DiskError: the downloads are larger than the free disk space.
    """
    repos = dict.fromkeys(location for location, _ in files if isinstance(location, Hub))
    absent = {repo: repo.absent([name for location, name in files if location is repo]) for repo in repos}
    total = sum(size for sizes in absent.values() for size in sizes.values())
    for repo, sizes in absent.items():
        if not any(sizes.values()):
            continue
        free = free_disk_bytes(repo.cache)
        count = sum(size > 0 for size in sizes.values())
        report(
            f"To download from {repo.name}: {format_size(sum(sizes.values()))} in "
            f"{count} file{'s' if count > 1 else ''}, to {repo.cache} ({format_size(free)} free)."
        )
        if total > free:
            raise DiskError.of(
                f"{format_size(total)} to download and {format_size(free)} free in {repo.cache}",
                remedy="Free some space, or choose another disk with --cache_dir.",
            )
    for repo, sizes in absent.items():
        for name in sizes:
            repo.path(name)
        repo.keep_commit()
