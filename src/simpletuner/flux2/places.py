"""Folders that weights come from: on this disk, or on the Hub, where only what is asked for is downloaded."""

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
from simpletuner.base.machine import disk_room
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
        """For a run's record: says nothing about this machine."""
        self.label = str(root)
        """For the user's eyes."""

    def has(self, name: str) -> bool:
        """Whether there is a file `name`, relative, with forward slashes."""
        return (self.root / name).is_file()

    def path(self, name: str) -> Path:
        """The file `name` on this disk."""
        return self.root / name


@dataclass(frozen=True)
class HubFile:
    """A file of a repository: its size in bytes, and the name of its content in the cache."""

    size: int
    etag: str
    """The sha256 of a large file, git's hash of a small one."""

    @property
    def is_large(self) -> bool:
        return len(self.etag) == _SHA256_DIGITS


class Hub:
    """A model repository at one commit; like a `ModelFolder`, but `path` downloads what is not here yet.

    Downloads lie where huggingface_hub keeps its own. Without an answer from the Hub, what was downloaded before
    is used, with a notice.

    Raises (all methods):
        AccessError: not logged in, no access, no such repository or revision, no connection, a damaged download.
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
        """Whether `text` could be owner/name on the Hub."""
        return cls._ID.fullmatch(text) is not None

    @property
    def cache(self) -> Path:
        """Where downloads go."""
        return hub_cache(self._options)

    @property
    def _folder(self) -> Path:
        """This repository's part of the cache."""
        return _repo_cache(self._options, self.name)

    @property
    def commit(self) -> str | None:
        return self._listing[0]

    def has(self, name: str) -> bool:
        files = self._listing[1]
        return self._offline.has(name) if self._offline is not None else name in files

    def path(self, name: str) -> Path:
        commit, _ = self._listing
        if self._offline is not None:
            return self._offline.path(name)
        file = self._folder / "snapshots" / commit / name
        return file if file.is_file() else self._download(name)

    def check_access(self) -> str:
        """Ask whether the files may be downloaded: a gated repository is listed for everyone. Returns the commit."""
        from huggingface_hub import get_hf_file_metadata, hf_hub_url

        commit, files = self._listing
        name = next((name for name in files if name.endswith(".safetensors")), None)
        if name is not None:
            with self._explained():
                get_hf_file_metadata(hf_hub_url(self.name, name, revision=commit, endpoint=self._endpoint))
        return commit

    def absent(self, names: Sequence[str]) -> dict[str, int]:
        """Those of `names` that are not here at this commit, each with the bytes still to be downloaded: 0 where
        another commit had the same file, fewer than its size where an earlier download was cut off.
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
        """Record in the cache which commit the branch is at, for a start without a network. To be called when all
        that is needed is here: until then an older commit that is complete serves better.
        """
        commit, _ = self._listing
        if self._offline is None and _kept_commit(self._options, self.name) != commit:
            with contextlib.suppress(DiskError):  # a cache that may only be read
                ref = _ref(self._options, self.name)
                write_atomic(ref, commit.encode())

    @functools.cached_property
    def _listing(self) -> tuple[str, dict[str, HubFile]]:
        """The commit, and its files by name."""
        from huggingface_hub import HfApi, constants

        try:
            with self._explained():
                info = interruptible(
                    lambda: HfApi(endpoint=self._endpoint).model_info(
                        self.name,
                        revision=self._revision,
                        files_metadata=True,
                        timeout=constants.HF_HUB_ETAG_TIMEOUT,
                    )
                )
        except _UnreachableError as error:
            commit = _kept_commit(self._options, self.name)
            kept = self._folder / "snapshots" / str(commit)
            if commit is None or not kept.is_dir():
                raise
            found = error.problems[0].found
            self._report(f"{found[0].upper()}{found[1:]}: going on with what was downloaded before.")
            self._offline = ModelFolder(kept)
            self._offline.label = self.label = f"the download of {self.name} in {kept}"
            return commit, {}
        return str(info.sha), {
            sibling.rfilename: HubFile(
                sibling.size or 0, sibling.lfs.sha256 if sibling.lfs is not None else sibling.blob_id or ""
            )
            for sibling in info.siblings or []
        }

    def _remaining(self, file: HubFile) -> int:
        """How many bytes of `file` the cache lacks."""
        blob = self._folder / "blobs" / file.etag
        partial = _partial(blob)
        if blob.is_file():
            return 0
        return max(0, file.size - (partial.stat().st_size if partial.is_file() else 0))

    def _download(self, name: str) -> Path:
        from huggingface_hub import hf_hub_download

        commit, files = self._listing

        def download() -> str:
            if files[name].is_large:
                self._download_large(name, commit, files[name])
            return hf_hub_download(self.name, name, revision=commit, cache_dir=self.cache, endpoint=self._endpoint)

        with file_errors_reported(self.cache), self._explained():
            return Path(interruptible(download))

    def _download_large(self, name: str, commit: str, file: HubFile) -> None:
        """Put the content of `name` into the cache: the rest of it where an earlier start was cut off.

        huggingface_hub's own download would start over, leave what it had of a killed one, and check sizes only. It
        still does what the Hub offers over Xet, which is faster over HTTP's single connection and checks itself.
        """
        from huggingface_hub import get_hf_file_metadata, hf_hub_url
        from huggingface_hub.file_download import http_get
        from huggingface_hub.utils._fixes import WeakFileLock
        from huggingface_hub.utils._headers import build_hf_headers
        from huggingface_hub.utils._runtime import is_xet_available

        url = hf_hub_url(self.name, name, revision=commit, endpoint=self._endpoint)
        answer = get_hf_file_metadata(url, endpoint=self._endpoint, retry_on_errors=True)
        blob = self._folder / "blobs" / file.etag
        lock = self.cache / ".locks" / self._folder.name / f"{file.etag}.lock"
        for folder in (blob.parent, lock.parent):
            folder.mkdir(parents=True, exist_ok=True)
        with WeakFileLock(lock):  # huggingface_hub's own: no process downloads this file meanwhile
            for left in blob.parent.glob(f"{file.etag}.*.incomplete"):
                left.unlink()
            if blob.is_file() or (answer.xet_file_data is not None and is_xet_available()):
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
                    "Start again: it is downloaded anew, and files that are complete are kept.",
                )
            partial.rename(blob)

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """Turn huggingface_hub's errors below this block into ours. They name no token, nor do ours."""
        from huggingface_hub.errors import FileMetadataError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

        # The HTTP library's own root, whichever library this version of huggingface_hub uses.
        http_error: type[BaseException] = HfHubHTTPError.__bases__[0]
        try:
            yield
        except HFValidationError as error:
            raise AccessError.of(f"{self.name} is no Hub id: {error}", remedy="Check the spelling.") from error
        except (FileMetadataError, KeyError, TypeError, json.JSONDecodeError) as error:
            raise self._no_hub() from error
        except (OSError, http_error) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise  # the disk's, not the Hub's
            # Of a small file that it cannot get, huggingface_hub says that it is not in the cache.
            reason = error.__cause__ if isinstance(error, LocalEntryNotFoundError) else None
            raise self._explanation(reason or error) from error

    def _no_hub(self) -> "_UnreachableError":
        return _UnreachableError.of(
            f"{self._endpoint or 'https://huggingface.co'} does not answer as the Hub does for {self.name}",
            remedy="Check HF_ENDPOINT, and whether a proxy or a login page stands between. " + _OR_A_FOLDER,
        )

    def _explanation(self, error: BaseException) -> AccessError:
        """What an error of huggingface_hub or of its HTTP library means to the user."""
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
                f"{self.name} is neither a folder here nor a repository on the Hub that you may see",
                remedy=f"Check the spelling; {log_in} if it is private.",
            )
        if isinstance(error, FileMetadataError):
            return self._no_hub()
        if isinstance(error, HfHubHTTPError):
            status = error.response.status_code
            if status in (401, 403):
                refused = "wants a login" if get_token() is None else "refuses your token"
                return AccessError.of(
                    f"the Hub {refused} for {self.name} (HTTP {status})", remedy=f"{log_in[0].upper()}{log_in[1:]}."
                )
            later = "Try again later: what has been downloaded is kept."
            kind = _UnreachableError if status == HTTPStatus.TOO_MANY_REQUESTS or status >= 500 else AccessError
            return kind.of(f"the Hub answers HTTP {status} for {self.name}", remedy=later)
        if isinstance(error, OfflineModeIsEnabled):
            return _UnreachableError.of(
                f"HF_HUB_OFFLINE forbids to ask the Hub for {self.name}", remedy=f"Unset it. {_OR_A_FOLDER}"
            )
        if type(error) is OSError:  # of huggingface_hub: another number of bytes came than was announced
            return _UnreachableError.of(
                f"a download from {self.name} broke off", remedy="Start again: what has been downloaded is kept."
            )
        return _UnreachableError.of(
            f"cannot reach the Hub for {self.name} ({str(error) or type(error).__name__})",
            remedy=f"Check the connection and HF_ENDPOINT, and start again: what has been downloaded is kept. "
            f"{_OR_A_FOLDER}",
        )


class _UnreachableError(AccessError):
    """The Hub gave no answer that says anything about the repository."""


ModelLocation = ModelFolder | Hub


def base_name(options: ModelOptions) -> str:
    """The base model as a sentence names it: the flavour's title, or the folder, file or Hub id that was given."""
    given = options.pretrained_model_name_or_path
    flavour = FLAVOURS[options.model_flavour]
    if given in (None, flavour.repo):
        return flavour.title
    return given if Hub.is_id(given) and not os.path.exists(given) else Path(given).name


def missing_download(options: ModelOptions, preview: str | None = None) -> int:
    """About how many bytes of weights a start still has to download. Looks into the cache, asks nobody.

    Args:
        preview: Hub id of another model of the same size, of which only the transformer is used.
    """
    flavour = FLAVOURS[options.model_flavour]
    base = options.pretrained_model_name_or_path or flavour.repo
    rest = flavour.repo if base is not None and is_weight_file(base) else base
    places = {
        "transformer": options.pretrained_transformer_model_name_or_path or base,
        "vae": options.pretrained_vae_model_name_or_path or rest,
        "text_encoder": options.pretrained_text_encoder_model_name_or_path or rest,
    }
    single: Collection[str] = ()
    if any(place is not None and is_weight_file(place) for place in places.values()):
        from simpletuner.flux2.single import single_files  # torch, which `doctor` does without

        single = single_files(options)
    wanted = [(component, places[component]) for component in flavour.downloads if component not in single]
    wanted += [("transformer", preview)] if flavour.downloads and preview != places["transformer"] else []
    missing = 0
    for component, place in wanted:
        needed = flavour.downloads[component]
        if place is not None and Hub.is_id(place) and not os.path.exists(with_home(place)):
            missing += max(0, needed - _cached_bytes(options, place, component))
    return missing


def _cached_bytes(options: ModelOptions, repo: str, component: str) -> int:
    """Size of the component's complete weight files in the Hub's cache."""
    root = _repo_cache(options, repo)
    if not os.path.isdir(root):  # or it may not be looked into, which `doctor` says
        return 0
    files = root.glob(f"snapshots/{_kept_commit(options, repo) or '*'}/{component}/*.safetensors")
    return sum(file.stat().st_size for file in {file.resolve() for file in files} if os.path.isfile(file))


def _kept_commit(options: ModelOptions, repo: str) -> str | None:
    """The commit that the cache records for the branch of `options`; None before a download is complete."""
    ref = _ref(options, repo)
    return ref.read_text(encoding="ascii").strip() if os.path.isfile(ref) else options.revision


def _ref(options: ModelOptions, repo: str) -> Path:
    return _repo_cache(options, repo) / "refs" / (options.revision or "main")


def _repo_cache(options: ModelOptions, repo: str) -> Path:
    return hub_cache(options) / f"models--{repo.replace('/', '--')}"


def _partial(blob: Path) -> Path:
    """What a download that was cut off left of `blob`."""
    return blob.with_name(f"{blob.name}.incomplete")


def cached_snapshot(options: ModelOptions, repo: str) -> Path:
    """Where the Hub's cache keeps the files of a repository, at the commit that `revision` was last seen at."""
    return _repo_cache(options, repo) / "snapshots" / (_kept_commit(options, repo) or "none")


def hub_cache(options: ModelOptions) -> Path:
    """The folder that downloads from the Hub go to."""
    from huggingface_hub import constants

    return Path(with_home(options.cache_dir or constants.HF_HUB_CACHE))


def fetch(wanted: Sequence[tuple[ModelLocation, str]], report: ReportLine) -> None:
    """Download those files of `wanted` that are on the Hub and not here yet, after saying how large they are.

    Raises:
        AccessError: see `Hub`.
        DiskError: they are larger than the free disk space.
    """
    repos = dict.fromkeys(place for place, _ in wanted if isinstance(place, Hub))
    absent = {repo: repo.absent([name for place, name in wanted if place is repo]) for repo in repos}
    total = sum(size for sizes in absent.values() for size in sizes.values())
    for repo, sizes in absent.items():
        if not any(sizes.values()):
            continue
        free = disk_room(repo.cache)
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
