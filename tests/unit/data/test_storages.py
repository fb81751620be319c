"""A set whose images and caches lie in an object store: scanned, filled and read as one in a folder."""

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem
from jaxtyping import Float
from tests.thread_ranks import ALONE
from torch import Tensor

from simpletuner.base.errors import DataError
from simpletuner.config.datasets import ImageSet, TextStore
from simpletuner.data.batch import read_contexts, read_latents
from simpletuner.data.cache.contexts import fill_contexts
from simpletuner.data.cache.latents import Encode, fill_latents
from simpletuner.data.cache.report import FillReport
from simpletuner.data.cache.store import Store
from simpletuner.data.manifest import Manifest, count_new, scan
from simpletuner.data.storages import image_storage, latent_storage, text_storage
from simpletuner.flow.condition import TextContext
from simpletuner.flux2.text import LeftPaddedCodec, left_padded

CODEC = LeftPaddedCodec("text")


class LetterEncoder:
    """One row a letter."""

    def lengths(self, prompts: Sequence[str]) -> list[int]:
        return [len(prompt) for prompt in prompts]

    def encode_batches(
        self, batches: Sequence[Sequence[str]], _report: Callable[[float], None]
    ) -> Iterator[list[TextContext]]:
        for batch in batches:
            rows = [torch.tensor([[float(ord(letter))] for letter in prompt]) for prompt in batch]
            yield [left_padded(each, torch.zeros(1), 16) for each in rows]


def vae(images: Float[Tensor, "b 3 H W"]) -> Float[Tensor, "b 128 h w"]:
    return torch.nn.functional.avg_pool2d(images, 16).mean(1, keepdim=True).expand(-1, 128, -1, -1)


def never() -> Encode:
    raise AssertionError("loaded")


def fill(manifest: Manifest, load: Callable[[], Encode]) -> FillReport:
    return fill_latents(
        [manifest],
        lambda image_set: Store(latent_storage(image_set)),
        "vae",
        load,
        batch_size=2,
        workers=2,
        report=lambda *_: None,
        world=ALONE,
    )


def scanned(image_set: ImageSet) -> Manifest:
    return scan(image_set, seed=1, workers=2)


@pytest.fixture
def local(folder: Path, save: Callable[..., Path], make_set: Callable[..., ImageSet]) -> ImageSet:
    """Three images with captions, one of them odd, and two files that are left out."""
    for name, color in {"a": "red", "sub/b #1 ü": "blue", "c": "green"}.items():
        save(f"{name}.png", color=color).with_suffix(".txt").write_text(f"{color}\nit is {color}", encoding="utf-8")
    (folder / "bad.png").write_bytes(b"bad")
    (folder / "clip.mp4").touch()
    return make_set(caption_strategy="textfile")


@pytest.fixture
def remote(local: ImageSet, make_set: Callable[..., ImageSet], monkeypatch: pytest.MonkeyPatch) -> ImageSet:
    """The same files in memory."""
    monkeypatch.setattr(MemoryFileSystem, "store", {})
    monkeypatch.setattr(MemoryFileSystem, "pseudo_dirs", [""])
    places = {"instance_data_dir": "memory://images", "cache_dir_vae": "memory://cache"}
    image_set = make_set(caption_strategy="textfile", **places)
    for file in image_storage(local).list():
        image_storage(image_set).write(file.name, image_storage(local).read(file.name))
    return image_set


def test_a_scan_finds_what_it_finds_in_a_folder(local: ImageSet, remote: ImageSet) -> None:
    here, there = scanned(local), scanned(remote)
    assert len(here.samples) == 3
    assert there.summary() == here.summary()
    assert there.samples[2].location == "memory://images/sub/b #1 ü.png"
    assert count_new(remote) == 0
    image_storage(remote).write("a.png", here.samples[1].read())
    assert count_new(remote) == 1
    assert scanned(remote).fingerprint != here.fingerprint


def test_the_index_and_the_ledger_are_kept_beside_the_cache(remote: ImageSet, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = scanned(remote)
    fill(manifest, lambda: vae)
    monkeypatch.setattr("time.time", lambda: 4e9)  # no file is young any more
    assert fill(manifest, never).existing == 3
    files = {file.name: file for file in latent_storage(remote).list()}
    index, ledger = (next(name for name in files if name.startswith(start)) for start in ("scan-", "verified"))
    assert len(json.loads(latent_storage(remote).read(index))["files"]) == 4
    assert len(json.loads(latent_storage(remote).read(ledger))["files"]) == 3


def test_latents_and_contexts_are_those_of_a_folder(local: ImageSet, remote: ImageSet, tmp_path: Path) -> None:
    batches = []
    for image_set, cache in ((local, str(tmp_path / "text")), (remote, "memory://text")):
        manifest, texts = scanned(image_set), Store(text_storage(TextStore(id="text", cache_dir=cache)))
        prompts = [caption for sample in manifest.samples for caption in sample.captions]
        for encoded in (3, 0):
            assert fill(manifest, lambda: vae).encoded == encoded
            sizes = {"batch_size": 2, "write_batch_size": 3}
            report = fill_contexts(prompts, texts, CODEC, LetterEncoder, **sizes, report=lambda *_: None, world=ALONE)
            assert report.encoded == 2 * encoded
        latents = read_latents(Store(latent_storage(image_set)), manifest.samples, "vae")
        batches.append((latents, read_contexts(texts, prompts, CODEC).expanded()))
    (latents, contexts), (remote_latents, remote_contexts) = batches
    assert torch.equal(remote_latents, latents)
    assert torch.equal(remote_contexts, contexts)


def test_a_missing_or_changed_image_is_named_by_its_url(remote: ImageSet) -> None:
    manifest = scanned(remote)
    image_storage(remote).remove("a.png")
    with pytest.raises(DataError, match=r"^memory://images/a\.png changed while this was running: "):
        fill(manifest, lambda: vae)
    with pytest.raises(DataError, match=r"^cache file memory://cache/\w\w/\w+\.safetensors is missing"):
        read_latents(Store(latent_storage(remote)), manifest.samples, "vae")


def test_a_missing_place_is_an_error(make_set: Callable[..., ImageSet]) -> None:
    with pytest.raises(DataError, match="instance_data_dir = 'memory://nowhere': no such folder"):
        scanned(make_set(instance_data_dir="memory://nowhere"))
