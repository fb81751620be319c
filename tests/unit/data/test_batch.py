"""One micro-batch out of the caches."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from simpletuner.base.errors import DataError
from simpletuner.base.storage import LocalStorage
from simpletuner.data.batch import caption_of, read_contexts, read_latents
from simpletuner.data.cache.contexts import context_key
from simpletuner.data.cache.latents import latent_key
from simpletuner.data.cache.store import Store
from simpletuner.data.manifest import Manifest
from simpletuner.flux2.text import LeftPaddedCodec


def test_a_batch_is_stacked_from_the_caches(
    tmp_path: Path, save: Callable[..., Path], scanned: Callable[..., Manifest]
) -> None:
    save("a.png")
    save("b.png", color="red")
    manifest = scanned()
    latents, contexts = Store(LocalStorage(tmp_path / "l")), Store(LocalStorage(tmp_path / "c"))
    codec = LeftPaddedCodec("text")
    for number, sample in enumerate(manifest.samples):
        latents.write(latent_key(sample, "vae"), {"latent": torch.full((128, 4, 5), float(number))}, {})
    for number, prompt in enumerate(("a", "")):
        rows = torch.full((1 + number, 6), 1.0 + number)
        tensors = {"rows": rows, "pad": torch.zeros(6), "length": torch.tensor(4)}
        contexts.write(context_key(prompt, codec), tensors, {})

    stacked = read_latents(latents, manifest.samples, "vae")
    assert stacked.shape == (2, 128, 4, 5)
    assert stacked[:, 0, 0, 0].tolist() == [0, 1]
    both = read_contexts(contexts, ["a", ""], codec)
    assert both.expanded()[:, :, 0].tolist() == [[0, 0, 0, 1], [0, 0, 2, 2]]
    assert len(both.rows) == 2 + 3, "each sample's padding once"
    with pytest.raises(DataError, match="is missing"):
        read_contexts(contexts, ["never encoded"], codec)


def test_a_caption_is_drawn_by_step_and_slot(
    folder: Path, save: Callable[..., Path], scanned: Callable[..., Manifest]
) -> None:
    save("a.png")
    (folder / "a.txt").write_text("one\ntwo\nthree", encoding="utf-8")
    (sample,) = scanned(caption_strategy="textfile").samples
    drawn = Counter(caption_of(sample, 42, step, slot) for step in range(100) for slot in range(3))
    assert drawn.keys() == {"one", "two", "three"}
    assert min(drawn.values()) > 60
    assert [caption_of(sample, 42, step, 0) for step in range(6)] == [
        caption_of(sample, 42, step, 0) for step in range(6)
    ]
