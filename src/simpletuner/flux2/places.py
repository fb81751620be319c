"""Folders that weights come from: on this disk, or on the Hub, where only what is asked for is downloaded."""

import contextlib
import functools
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from simpletuner.base.errors import AccessError, DiskError
from simpletuner.base.files import file_errors_reported, with_home
from simpletuner.base.machine import disk_room
from simpletuner.base.sizes import format_size
from simpletuner.config.flavours import FLAVOURS
from simpletuner.config.options.model import ModelOptions
from simpletuner.runs.process import interruptible

ReportLine = Callable[[str], None]


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


class Hub:
    """A model repository at one commit; like a `ModelFolder`, but `path` downloads what is not here yet.

    Without an answer from the Hub, what was downloaded before serves, and the user is told.

    Raises (all methods):
        AccessError: not logged in, no access, no such repository or revision, no connection.
    """

    _ID = re.compile(r"[\w.-]+/[\w.-]+")

    def __init__(self, repo: str, options: ModelOptions, report: ReportLine, environ: Mapping[str, str]) -> None:
        self.name = self.label = repo
        self._revision = options.revision
        self._options = options
        self._endpoint = environ.get("HF_ENDPOINT")
        self._report = report
        self._ref_is_kept = False
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
    def commit(self) -> str | None:
        return self._listing[0]

    def has(self, name: str) -> bool:
        files = self._listing[1]
        return self._offline.has(name) if self._offline is not None else name in files

    def path(self, name: str) -> Path:
        commit, _ = self._listing
        if self._offline is not None:
            return self._offline.path(name)
        if not self._ref_is_kept:
            # Once by the branch's name: so the cache knows, without a network, which commit that was.
            self._download(name, self._revision)
            self._ref_is_kept = True
        return self._download(name, commit)

    def absent(self, names: Sequence[str]) -> dict[str, int]:
        """Those of `names` that are still to be downloaded, with their sizes in bytes."""
        from huggingface_hub import try_to_load_from_cache

        commit, sizes = self._listing
        if self._offline is not None:
            return {}
        return {
            name: sizes[name]
            for name in names
            if not isinstance(try_to_load_from_cache(self.name, name, self.cache, commit), str)
        }

    @functools.cached_property
    def _listing(self) -> tuple[str, dict[str, int]]:
        """The commit, and the size in bytes of each file."""
        from huggingface_hub import HfApi, snapshot_download
        from huggingface_hub.errors import LocalEntryNotFoundError

        try:
            with self._explained():
                info = HfApi(endpoint=self._endpoint).model_info(
                    self.name, revision=self._revision, files_metadata=True
                )
        except _Unreachable as error:
            try:
                kept = snapshot_download(
                    self.name, revision=self._revision, cache_dir=self.cache, local_files_only=True
                )
            except LocalEntryNotFoundError:
                raise error from None
            self._report(f"The Hub does not answer: going on with what was downloaded of {self.name} before.")
            self._offline = ModelFolder(Path(kept))
            self._offline.label = f"the download of {self.name} in {kept}"
            self.label = self._offline.label
            return self._offline.name, {}
        siblings = info.siblings or []
        return str(info.sha), {sibling.rfilename: sibling.size or 0 for sibling in siblings}

    def _download(self, name: str, revision: str | None) -> Path:
        from huggingface_hub import hf_hub_download

        with file_errors_reported(self.cache), self._explained():
            return Path(
                interruptible(
                    lambda: hf_hub_download(
                        self.name, name, revision=revision, cache_dir=self.cache, endpoint=self._endpoint
                    )
                )
            )

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """Turn huggingface_hub's errors below this block into ours. They name no token, nor do ours."""
        from huggingface_hub import get_token
        from huggingface_hub.errors import (
            GatedRepoError,
            HfHubHTTPError,
            LocalEntryNotFoundError,
            OfflineModeIsEnabled,
            RepositoryNotFoundError,
            RevisionNotFoundError,
        )

        # The HTTP library's own root, whichever library this version of huggingface_hub uses.
        no_http_answer: type[BaseException] = HfHubHTTPError.__bases__[0]
        page = f"https://huggingface.co/{self.name}"
        log_in = "Log in with `hf auth login` (or set HF_TOKEN)"
        try:
            yield
        except GatedRepoError as error:
            if get_token() is None:
                raise AccessError.of(
                    f"{self.name} is gated and you are not logged in",
                    remedy=f"Accept its licence on {page}, then {log_in[0].lower()}{log_in[1:]}.",
                ) from error
            raise AccessError.of(
                f"{self.name} is gated and your account has no access to it",
                remedy=f"Accept its licence on {page} with the account of your token.",
            ) from error
        except RevisionNotFoundError as error:
            raise AccessError.of(
                f"revision = {self._revision}: {self.name} has no such branch, tag or commit"
            ) from error
        except RepositoryNotFoundError as error:
            raise AccessError.of(
                f"{self.name} is neither a folder here nor a repository on the Hub that you may see",
                remedy=f"Check the spelling. {log_in} if it is private.",
            ) from error
        except HfHubHTTPError as error:
            status = error.response.status_code
            if status in (401, 403):
                raise AccessError.of(
                    f"the Hub refuses your token for {self.name} (HTTP {status})", remedy=f"{log_in} again."
                ) from error
            raise AccessError.of(
                f"the Hub answers HTTP {status} for {self.name}",
                remedy="Try again later: files that are complete are kept.",
            ) from error
        except (LocalEntryNotFoundError, OfflineModeIsEnabled, no_http_answer) as error:
            raise _Unreachable.of(
                f"cannot reach the Hub for {self.name}",
                remedy="Check the connection, HF_ENDPOINT and HF_HUB_OFFLINE, and start again: files that "
                "are complete are kept. Or give a local folder as pretrained_model_name_or_path.",
            ) from error
        except OSError as error:
            if error.errno is not None:
                raise  # the disk's, not the Hub's
            raise _Unreachable.of(
                f"a download from {self.name} broke off",
                remedy="Start again: files that are complete are kept.",
            ) from error


class _Unreachable(AccessError):
    """The Hub gave no answer at all."""


ModelLocation = ModelFolder | Hub


def base_name(options: ModelOptions) -> str:
    """The base model as a sentence names it: the flavour's title, or the folder, file or Hub id that was given."""
    given = options.pretrained_model_name_or_path
    flavour = FLAVOURS[options.model_flavour]
    if given in (None, flavour.repo):
        return flavour.title
    return given if Hub.is_id(given) and not os.path.exists(given) else Path(given).name


def missing_download(options: ModelOptions) -> int:
    """About how many bytes of weights a start still has to download. Looks into the cache, asks nobody."""
    flavour = FLAVOURS[options.model_flavour]
    base = options.pretrained_model_name_or_path or flavour.repo
    single = base is not None and base.endswith(".safetensors")
    places = {
        "transformer": options.pretrained_transformer_model_name_or_path or base,
        "vae": options.pretrained_vae_model_name_or_path or (flavour.repo if single else base),
        "text_encoder": options.pretrained_text_encoder_model_name_or_path or (flavour.repo if single else base),
    }
    missing = 0
    for component, needed in flavour.downloads.items():
        place = places[component]
        if place is not None and Hub.is_id(place) and not os.path.exists(with_home(place)):
            missing += max(0, needed - _cached_bytes(options, place, component))
    return missing


def _cached_bytes(options: ModelOptions, repo: str, component: str) -> int:
    """Size of the component's complete weight files in the Hub's cache."""
    folder = cached_snapshot(options, repo) / component
    if not os.path.isdir(folder):
        return 0
    return sum(file.stat().st_size for file in folder.glob("*.safetensors") if file.exists())


def cached_snapshot(options: ModelOptions, repo: str) -> Path:
    """Where the Hub's cache keeps the files of a repository, at the commit that `revision` was last seen at."""
    root = hub_cache(options) / f"models--{repo.replace('/', '--')}"
    ref = root / "refs" / (options.revision or "main")
    commit = ref.read_text(encoding="ascii").strip() if os.path.isfile(ref) else options.revision or "none"
    return root / "snapshots" / commit


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
        if not sizes:
            continue
        free = disk_room(repo.cache)
        report(
            f"To download from {repo.name}: {format_size(sum(sizes.values()))} in {len(sizes)} files, "
            f"to {repo.cache} ({format_size(free)} free)."
        )
        if total > free:
            raise DiskError.of(
                f"{format_size(total)} to download and {format_size(free)} free in {repo.cache}",
                remedy="Free some space, or choose another disk with --cache_dir.",
            )
    for repo, sizes in absent.items():
        for name in sizes:
            repo.path(name)
