"""The cache of latents: the crop of each image, encoded once."""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float, UInt8
from torch import Tensor

from simpletuner.base.errors import DataError
from simpletuner.base.files import sha256_bytes, sha256_json
from simpletuner.config.datasets import FolderDataset
from simpletuner.data.ahead import prefetched_map
from simpletuner.data.cache.report import FillReport, share_of, whole_progress
from simpletuner.data.cache.store import Store, check_all
from simpletuner.data.geometry import Size
from simpletuner.data.manifest import Manifest
from simpletuner.data.pixels import FILE_LIMIT, PIXELS_VERSION, render
from simpletuner.data.rejected import Rejected
from simpletuner.data.sample import Crop
from simpletuner.memory.world import World

Encode = Callable[[Float[Tensor, "b 3 H W"]], Float[Tensor, "b 128 h w"]]
"""Pixels in [-1, 1], fp32, to latents with h = H/16."""

StoreOf = Callable[[FolderDataset], Store]


def latent_key(crop: Crop, encoder: str) -> str:
    """The cache key of an image's crop. `encoder` is the fingerprint of the VAE's weights, precision and tiling."""
    alpha = {} if crop.is_flattened else {"alpha": "passed over"}
    return crop_key(crop, kind="latent", version=1, encoder=encoder, **alpha)


def crop_key(crop: Crop, **facts: str | int) -> str:
    """A cache key of a result computed from a crop: a hash of everything that determines its pixels, and of `facts`."""
    return sha256_json({"pixels": PIXELS_VERSION, "content": crop.content, **vars(crop.geometry), **facts})


def read_latent(store: Store, crop: Crop, encoder: str) -> Float[Tensor, "128 h w"]:
    """Read the cached latent of an image.

    Raises:
        DataError: the cache file is missing or damaged.
    """
    return store.read(latent_key(crop, encoder))["latent"]


def write_latent(store: Store, crop: Crop, encoder: str, latent: Float[Tensor, "128 h w"]) -> None:
    """Cache the latent of an image.

    Raises:
        DataError: it is not finite.
        DiskError: no space.
    """
    if not torch.isfinite(latent).all():
        raise DataError.of(f"{crop.location}: the VAE returned numbers that are not finite")
    store.write(latent_key(crop, encoder), {"latent": latent}, {"kind": "latent", "content": crop.content})


def encode_crop(crop: Crop, encode: Encode) -> Float[Tensor, "128 h w"]:
    """Encode one image. Returns its latent in fp32 on the CPU.

    Raises:
        DataError: the file has changed since `crop` was made.
    """
    return encode(_tensor([pixels_of(crop)]))[0].float().cpu()


def all_batches(manifests: Sequence[Manifest], batch_size: int) -> Iterator[tuple[FolderDataset, list[Crop]]]:
    """Yield every distinct crop once, in batches of one dataset and one size: the images of each manifest, then its
    references. The batches depend only on the manifests.

    Copies of an image within a dataset, and across datasets with the same cache folder, have one latent.
    """
    yielded: set[tuple[str, str]] = set()
    for manifest in manifests:
        images = [[manifest.samples[index] for index in members] for members in manifest.buckets.values()]
        for dataset, buckets in ((manifest.image_set, images), *_reference_buckets(manifest)):
            for members in buckets:
                distinct = []
                for crop in members:
                    folder_and_key = (dataset.cache_dir_vae, latent_key(crop, ""))
                    if folder_and_key not in yielded:
                        yielded.add(folder_and_key)
                        distinct.append(crop)
                for start in range(0, len(distinct), batch_size):
                    yield dataset, distinct[start : start + batch_size]


def _reference_buckets(manifest: Manifest) -> Iterator[tuple[FolderDataset, Iterable[Sequence[Crop]]]]:
    """The references of a manifest by dataset and by target size, sorted."""
    for conditioning_set in manifest.conditions:
        buckets: dict[Size, list[Crop]] = {}
        for sample in manifest.samples:
            for reference in sample.references:
                if reference.dataset == conditioning_set.id:
                    buckets.setdefault(reference.geometry.target, []).append(reference)
        yield conditioning_set, [members for _, members in sorted(buckets.items())]


def fill_latents(
    manifests: Sequence[Manifest],
    store_of: StoreOf,
    encoder: str,
    load: Callable[[], Encode],
    *,
    batch_size: int,
    workers: int,
    verify: bool = False,
    report: Callable[[int, int], None],
    world: World,
) -> FillReport:
    """Encode every latent that the stores lack. All ranks of `world` call it, with equal manifests, and each encodes a
    share of the batches.

    A batch with a missing latent is encoded again as a whole, so that the bytes are the same after any interruption and
    with any number of ranks. Rank 0 checks the stores. Threads open and crop the next images while a batch is encoded;
    each rank holds at most a batch and two images per thread.

    Args:
        load: loads the encoder; called only on ranks that have a share.
        batch_size: images encoded at once.
        workers: threads of this rank that prepare images.
        verify: read every file, also those that an earlier check verified.
        report: called with (images encoded, images to encode) over all ranks, as estimated by `whole_progress`.

    Raises:
        DataError: a file changed since the scan, or its latent is not finite; the message names the file.
        DiskError: no space; nothing is loaded then.
    """
    started = time.monotonic()
    batches = list(all_batches(manifests, batch_size))

    def plan() -> tuple[list[int], int, int]:
        """Indices of the batches to encode, and the numbers of sound and damaged latents."""
        for store in {store_of(dataset) for dataset, _ in batches}:
            store.sweep()
        entries = [(store_of(dataset), crop) for dataset, batch in batches for crop in batch]
        states = check_all(((store, latent_key(crop, encoder)) for store, crop in entries), verify=verify)
        missing: dict[Store, list[Crop]] = {}
        for (store, crop), state in zip(entries, states, strict=True):
            if state != "sound":
                missing.setdefault(store, []).append(crop)
        for store, crops in missing.items():
            what = f"The latents of {len(crops):,} images"
            store.check_room(sum(map(_latent_bytes, crops)), what, "cache_dir_vae")
        remaining_states = iter(states)
        todo = [
            index for index, (_, batch) in enumerate(batches) if {next(remaining_states) for _ in batch} != {"sound"}
        ]
        return todo, states.count("sound"), states.count("damaged")

    # Only rank 0 checks: a rank that checks later would find files of faster ranks.
    todo, sound, damaged = world.run_on_main("the latents to encode", plan)
    total = sum(len(batches[index][1]) for index in todo)
    share = [batches[index] for index in share_of(todo, world)]
    if share:
        share_size = sum(len(batch) for _, batch in share)
        _encode(share, store_of, encoder, load(), workers, whole_progress(report, share_size, total))
    if todo:
        world.barrier("the end of encoding latents")
    return FillReport(total, sound, damaged, time.monotonic() - started)


def _encode(
    batches: Sequence[tuple[FolderDataset, list[Crop]]],
    store_of: StoreOf,
    encoder: str,
    encode: Encode,
    workers: int,
    report: Callable[[int], None],
) -> None:
    """Encode `batches` and write their latents. `report` is called with the number of encoded images."""
    encoded = 0
    report(encoded)
    pixels = prefetched_map(
        pixels_of,
        (crop for _, batch in batches for crop in batch),
        workers=workers,
        ahead=max(len(batch) for _, batch in batches) + 2 * workers,
    )
    with closing(pixels):
        for dataset, batch in batches:
            latents = encode(_tensor([next(pixels) for _ in batch]))
            for crop, latent in zip(batch, latents.float().cpu(), strict=True):
                write_latent(store_of(dataset), crop, encoder, latent)
            encoded += len(batch)
            report(encoded)


def _latent_bytes(crop: Crop) -> int:
    """Size of a latent: 128 fp32 numbers for each 16 × 16 pixels."""
    width, height = crop.geometry.target
    return (width // 16) * (height // 16) * 128 * 4


def pixels_of(crop: Crop) -> UInt8[np.ndarray, "H W 3"]:
    """Render the pixels of a crop. Raises the errors of `rendered_crop`."""
    return rendered_crop(crop, lambda data: render(data, crop.geometry, is_flattened=crop.is_flattened))


def rendered_crop(crop: Crop, render_file: Callable[[bytes], np.ndarray]) -> np.ndarray:
    """Apply `render_file` to the bytes of the file of `crop`. It runs in threads, so every error names the file.

    Raises:
        DataError: the file changed since the scan, or does not fit into memory.
    """
    try:
        data = crop.read(FILE_LIMIT)
        if sha256_bytes(data) != crop.content:
            raise _changed(crop, "its content is different")
        return render_file(data)
    except OSError as error:
        raise _changed(crop, str(error)) from error
    except Rejected as rejected:  # for lack of memory: the scan decoded the same bytes
        remedy = "Free some memory or shrink the image, then start again."
        raise DataError.of(f"{crop.location}: {rejected}", remedy=remedy) from rejected


def _changed(crop: Crop, change: str) -> DataError:
    return DataError.of(
        f"{crop.location} changed while this was running: {change}",
        remedy="Do not change the dataset during a run; start again.",
    )


def _tensor(arrays: Sequence[UInt8[np.ndarray, "H W 3"]]) -> Float[Tensor, "b 3 H W"]:
    """Convert bytes to fp32 pixels in [-1, 1]: 0 becomes -1 and 255 becomes 1, exactly."""
    pixels = rearrange(torch.from_numpy(np.stack(arrays)), "b h w c -> b c h w")
    return pixels.to(torch.float32, memory_format=torch.contiguous_format) / 127.5 - 1
