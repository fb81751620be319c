"""The latent cache: filled in batches that depend on the set alone, so that nothing shows where it was interrupted."""

import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from jaxtyping import Float
from PIL import Image
from tests.thread_ranks import ALONE, on_ranks
from torch import Tensor

from simpletuner.base.errors import DataError
from simpletuner.base.storage import LocalStorage
from simpletuner.config.datasets import ImageSet
from simpletuner.data.cache.latents import Encode, all_batches, fill_latents, latent_key, read_latent
from simpletuner.data.cache.report import FillReport
from simpletuner.data.cache.store import Store
from simpletuner.data.manifest import Manifest
from simpletuner.data.pixels import render
from simpletuner.memory.world import World

Scanned = Callable[..., Manifest]
Save = Callable[..., Path]


class BatchVae:
    """Every latent depends a little on its whole batch, as in bf16; so a batch that was put together
    otherwise shows."""

    def __init__(self) -> None:
        self.batches: list[Float[Tensor, "b 3 H W"]] = []

    def __call__(self, images: Float[Tensor, "b 3 H W"]) -> Float[Tensor, "b 128 h w"]:
        self.batches.append(images)
        small = torch.nn.functional.avg_pool2d(images, 16).mean(1, keepdim=True)
        return small.expand(-1, 128, -1, -1) + 0.01 * images.mean()


def fill(manifests: list[Manifest], encode: Encode, *, batch_size: int = 3, world: World = ALONE) -> FillReport:
    return fill_latents(
        manifests,
        lambda image_set: Store(LocalStorage(Path(image_set.cache_dir_vae))),
        "vae",
        lambda: encode,
        batch_size=batch_size,
        workers=2,
        report=lambda _done, _total: None,
        world=world,
    )


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.rglob("*.safetensors")}


@pytest.fixture
def manifest(save: Save, scanned: Scanned) -> Manifest:
    """Eight pictures in two buckets."""
    for number in range(5):
        save(f"wide-{number}.png", (128, 64), f"rgb({40 * number}, 0, 0)")
    for number in range(3):
        save(f"tall-{number}.png", (64, 128), f"rgb(0, {40 * number}, 0)")
    return scanned()


def test_a_latent_is_the_encoders_of_the_crop(manifest: Manifest) -> None:
    vae = BatchVae()
    report = fill([manifest], vae)
    assert (report.encoded, report.existing, report.damaged) == (8, 0, 0)
    assert [len(batch) for batch in vae.batches] == [3, 3, 2]
    store = Store(LocalStorage(Path(manifest.image_set.cache_dir_vae)))
    sample = manifest.samples[0]
    crop = torch.from_numpy(render(sample.read(), sample.geometry))
    assert torch.equal(vae.batches[0][0], crop.permute(2, 0, 1) / 127.5 - 1)
    assert torch.equal(read_latent(store, sample, "vae"), vae(vae.batches[0])[0])
    assert read_latent(store, sample, "vae").shape == (128, 5, 3)


def test_black_is_minus_one_and_white_is_one(folder: Path, scanned: Scanned) -> None:
    image = np.zeros((64, 64, 3), np.uint8)
    image[:32] = 255
    Image.fromarray(image).save(folder / "a.png")
    vae = BatchVae()
    fill([scanned()], vae)
    assert vae.batches[0].unique().tolist() == [-1.0, 1.0]


def test_a_full_cache_needs_no_encoder(manifest: Manifest) -> None:
    fill([manifest], BatchVae())

    def no_encoder() -> Encode:
        raise AssertionError("loaded")

    store = Store(LocalStorage(Path(manifest.image_set.cache_dir_vae)))
    report = fill_latents(
        [manifest], lambda _: store, "vae", no_encoder, batch_size=3, workers=2, report=lambda *_: None, world=ALONE
    )
    assert (report.encoded, report.existing) == (0, 8)


def test_a_batch_that_lacks_one_is_made_again_whole(manifest: Manifest) -> None:
    folder = Path(manifest.image_set.cache_dir_vae)
    fill([manifest], BatchVae())
    whole = files(folder)
    store = Store(LocalStorage(folder))
    store.storage.local_path(store.name(latent_key(manifest.samples[4], "vae"))).unlink()
    damaged = store.storage.local_path(store.name(latent_key(manifest.samples[0], "vae")))
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"\x7f")
    report = fill([manifest], BatchVae())
    assert (report.encoded, report.existing, report.damaged) == (6, 6, 1)
    assert files(folder) == whole


def test_the_key_holds_all_that_decides_a_latent(manifest: Manifest, scanned: Scanned) -> None:
    sample = manifest.samples[0]
    keys = {latent_key(sample, "vae"), latent_key(sample, "other vae"), latent_key(manifest.samples[1], "vae")}
    for options in ({"resolution": 80}, {"crop": True, "crop_style": "corner"}, {"crop": True, "crop_style": "center"}):
        keys.add(latent_key(scanned(**options).samples[0], "vae"))
    assert len(keys) == 6
    assert latent_key(scanned(repeats=3, caption_strategy="filename").samples[0], "vae") in keys


def test_a_new_resolution_rebuilds_only_what_it_changes(manifest: Manifest, scanned: Scanned) -> None:
    fill([manifest], BatchVae())
    assert fill([scanned(resolution=80)], BatchVae()).encoded == 8
    assert fill([manifest], BatchVae()).encoded == 0


def test_copies_are_encoded_once(save: Save, scanned: Scanned) -> None:
    for name in ("a.png", "b.png", "c.png"):
        save(name)
    train, held_out = scanned(), scanned(id="held-out", dataset_type="eval")
    assert fill([train, held_out], BatchVae()).encoded == 1
    apart = scanned(id="apart", cache_dir_vae="apart")
    assert sum(len(batch) for _, batch in all_batches([train, apart], 3)) == 2


def test_a_file_that_changed_after_the_scan_is_named(manifest: Manifest, save: Save) -> None:
    save("wide-3.png", (128, 64), "white")
    with pytest.raises(DataError, match=r"wide-3\.png changed while this was running: its content is diff"):
        fill([manifest], BatchVae())
    save("wide-3.png").unlink()
    with pytest.raises(DataError, match=r"wide-3\.png changed while .* No such file"):
        fill([manifest], BatchVae())
    os.mkfifo(Path(manifest.samples[-1].images.text("wide-3.png")))
    with pytest.raises(DataError, match=r"wide-3\.png changed while .* neither a file nor a link to one"):
        fill([manifest], BatchVae())


def test_a_latent_that_is_not_finite_is_named_and_not_kept(manifest: Manifest) -> None:
    with pytest.raises(DataError, match=r"tall-0\.png: the VAE returned numbers that are not finite"):
        fill([manifest], lambda images: torch.full((images.shape[0], 128, 5, 3), torch.nan))
    assert files(Path(manifest.image_set.cache_dir_vae)) == {}


def test_pictures_are_prepared_a_bounded_distance_ahead(folder: Path, save: Save, scanned: Scanned) -> None:
    """All pictures vanish while the first batch of four is encoded: the first that is missed is beyond what was ahead,
    and not beyond a batch and two a thread."""
    for number in range(40):
        save(f"{number:02}.png", (64, 64), f"rgb({number}, 0, 0)")
    found = scanned()

    def encode(images: Float[Tensor, "b 3 H W"]) -> Float[Tensor, "b 128 h w"]:
        time.sleep(0.2)
        shutil.rmtree(folder, ignore_errors=True)
        return torch.zeros(images.shape[0], 128, 4, 4)

    with pytest.raises(DataError, match=r"/\d\d\.png changed while") as caught:
        fill([found], encode, batch_size=4)
    missed = re.search(r"/(\d\d)\.png", str(caught.value))
    assert missed is not None
    assert 8 <= int(missed[1]) <= 4 + 4 + 2 * 2


KILLED = """
    import sys, time
    from pathlib import Path
    import torch
    from simpletuner.config.datasets import ImageSet
    from simpletuner.data.cache.latents import fill_latents
    from simpletuner.data.cache.store import Store
    from simpletuner.data.manifest import scan
    from simpletuner.data.storages import latent_storage
    from simpletuner.memory.world import World

    image_set = ImageSet.model_validate_json(sys.argv[1])
    def encode(images):
        time.sleep(0.05)
        small = torch.nn.functional.avg_pool2d(images, 16).mean(1, keepdim=True)
        return small.expand(-1, 128, -1, -1) + 0.01 * images.mean()
    manifest = scan(image_set, seed=42, workers=2, report=lambda *_: None)
    print("scanned", flush=True)
    fill_latents([manifest], lambda s: Store(latent_storage(s)), "vae", lambda: encode,
                 batch_size=3, workers=2, report=lambda done, total: print(done, flush=True),
                 world=World(0, 1, torch.device("cpu")))
"""


def test_a_fill_that_is_killed_leaves_no_trace(
    tmp_path: Path, save: Save, make_set: Callable[..., ImageSet], scanned: Scanned
) -> None:
    for number in range(30):
        save(f"{number:02}.png", (128, 64) if number % 3 else (64, 128), f"rgb({8 * number}, 0, 0)")
    image_set = make_set()
    command = [sys.executable, "-c", textwrap.dedent(KILLED), image_set.model_dump_json()]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.strip() == "13":  # one batch into the second bucket
                os.kill(process.pid, signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    killed = files(Path(image_set.cache_dir_vae))
    assert 13 <= len(killed) < 30
    assert fill([scanned()], BatchVae()).existing == len(killed)

    elsewhere = scanned(cache_dir_vae=str(tmp_path / "uninterrupted"))
    fill([elsewhere], BatchVae())
    assert files(Path(image_set.cache_dir_vae)) == files(tmp_path / "uninterrupted")


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_share_out_the_batches_of_one_process(manifest: Manifest, scanned: Scanned, ranks: int) -> None:
    alone = BatchVae()
    fill([manifest], alone)
    assert not torch.distributed.is_initialized()
    whole = files(Path(manifest.image_set.cache_dir_vae))
    shutil.rmtree(manifest.image_set.cache_dir_vae)
    encoders = [BatchVae() for _ in range(ranks)]
    reports = on_ranks(ranks, lambda world: fill([scanned()], encoders[world.rank], world=world))
    assert files(Path(manifest.image_set.cache_dir_vae)) == whole
    assert sum(len(each.batches) for each in encoders) == len(alone.batches), "none twice"
    for rank, each in enumerate(encoders):
        shares = alone.batches[rank::ranks]
        assert all(map(torch.equal, each.batches, shares))
        assert len(each.batches) == len(shares)
    assert {(r.encoded, r.existing, r.damaged) for r in reports} == {(len(manifest.samples), 0, 0)}


def test_ranks_make_only_what_is_missing(manifest: Manifest) -> None:
    fill([manifest], BatchVae())
    folder = Path(manifest.image_set.cache_dir_vae)
    whole = files(folder)
    store = Store(LocalStorage(folder))
    store.storage.local_path(store.name(latent_key(manifest.samples[0], "vae"))).unlink()
    store.storage.local_path(store.name(latent_key(manifest.samples[-1], "vae"))).write_bytes(b"damaged")
    encoders = [BatchVae() for _ in range(3)]
    reports = on_ranks(3, lambda world: fill([manifest], encoders[world.rank], world=world))
    assert [len(each.batches) for each in encoders] == [1, 1, 0]
    assert {(r.existing, r.damaged) for r in reports} == {(len(manifest.samples) - 2, 1)}
    assert files(folder) == whole


def test_a_picture_that_changed_is_named_by_the_rank_that_needs_it(manifest: Manifest, save: Save) -> None:
    """The last batch is the second rank's."""
    save(manifest.samples[-1].name, (128, 64), "white")
    with pytest.raises(DataError, match=f"{manifest.samples[-1].name} changed while"):
        on_ranks(2, lambda world: fill([manifest], BatchVae(), world=world))
