"""One micro-batch out of the caches."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from simpletuner.base.errors import DataError
from simpletuner.data.cache.contexts import context_key
from simpletuner.data.cache.latents import latent_key
from simpletuner.data.cache.store import Store
from simpletuner.data.collate import Batch, caption_of, load_batch
from simpletuner.data.manifest import Manifest
from simpletuner.data.sample import Sample


def test_a_batch_is_stacked_from_the_caches(
    tmp_path: Path, save: Callable[..., Path], scanned: Callable[..., Manifest]
) -> None:
    save("a.png")
    save("b.png", colour="red")
    manifest = scanned()
    latents, contexts = Store(tmp_path / "l"), Store(tmp_path / "c")
    for number, sample in enumerate(manifest.samples):
        latents.write(latent_key(sample, "vae"), {"latent": torch.full((128, 4, 5), float(number))}, {})
    for number, prompt in enumerate(("a", "")):
        rows = torch.full((1 + number, 6), 1.0 + number)
        tensors = {"rows": rows, "pad": torch.zeros(6), "length": torch.tensor(4)}
        contexts.write(context_key(prompt, "text"), tensors, {})

    def load(samples: tuple[Sample, ...], prompts: list[str]) -> Batch:
        return load_batch(
            samples,
            prompts,
            latent_store=latents,
            latent_encoder="vae",
            context_store=contexts,
            context_encoder="text",
        )

    batch = load(manifest.samples, ["a", ""])
    assert batch.latents.shape == (2, 128, 4, 5)
    assert batch.latents[:, 0, 0, 0].tolist() == [0, 1]
    assert batch.context[:, :, 0].tolist() == [[0, 0, 0, 1], [0, 0, 2, 2]]
    assert batch.names == ("photos/a.png", "photos/b.png")
    with pytest.raises(DataError, match="is missing"):
        load(manifest.samples[:1], ["never encoded"])


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
