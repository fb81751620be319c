"""The cache of masks: the weight of each latent in the loss, made once from the mask's file. No model takes part."""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass

import numpy as np
import torch
from einops import reduce
from jaxtyping import Float, UInt8
from torch import Tensor

from simpletuner.config.datasets import Datasets
from simpletuner.data.ahead import map_ahead
from simpletuner.data.cache.latents import crop_key, rendered_crop
from simpletuner.data.cache.report import FillReport, share_of, whole_progress
from simpletuner.data.cache.store import Store, check_all
from simpletuner.data.geometry import ALIGNMENT
from simpletuner.data.pixels import MaskKind, render_mask
from simpletuner.data.sample import Crop
from simpletuner.data.storages import latent_storage
from simpletuner.memory.world import World


@dataclass(frozen=True)
class MaskSource:
    """How the masks of one set are read, and where their weights are kept."""

    kind: MaskKind
    store: Store

    @classmethod
    def all_of(cls, datasets: Datasets) -> dict[str, "MaskSource"]:
        """By the id of the set that the mask's file lies in: a conditioning set, or with `mask_source` alpha the image
        set itself.
        """
        sources = {}
        for conditioning_set in datasets.conditioning_sets:
            kind = conditioning_set.conditioning_type
            if kind in {"mask", "segmentation"}:
                sources[conditioning_set.id] = cls(kind, Store(latent_storage(conditioning_set)))
        for image_set in (*datasets.train_sets, *datasets.eval_sets):
            if image_set.mask_source == "alpha":
                sources[image_set.id] = cls("alpha", Store(latent_storage(image_set)))
        return sources

    def key(self, mask: Crop) -> str:
        """The cache key of a mask's weights. Options such as `masked_loss_floor` act later, and change no key."""
        return crop_key(mask, kind="mask", version=1, levels=self.kind)

    def read(self, mask: Crop) -> Float[Tensor, "h w"]:
        """The cached weight of each latent, in [0, 1].

        Raises:
            DataError: it is not there, or was damaged.
        """
        return self.store.read(self.key(mask))["mask"]

    def make(self, mask: Crop) -> Float[Tensor, "h w"]:
        """The same from the mask's file.

        Raises:
            DataError: the file changed since the scan, or does not fit into memory.
        """
        return latent_weights(rendered_crop(mask, lambda data: render_mask(data, mask.geometry, self.kind)))


def latent_weights(levels: UInt8[np.ndarray, "H W"]) -> Float[Tensor, "h w"]:
    """The mean gray level of the 16×16 pixels of each latent, as a part of white. White is 1 and black 0, exactly."""
    # Sums of 256 bytes are whole numbers that fp32 holds.
    sums = reduce(torch.from_numpy(levels).float(), "(h y) (w x) -> h w", "sum", y=ALIGNMENT, x=ALIGNMENT)
    return sums / (255 * ALIGNMENT**2)


def fill_masks(
    masks: Iterable[Crop],
    sources: Mapping[str, MaskSource],
    *,
    workers: int,
    verify: bool = False,
    report: Callable[[int, int], None],
    world: World,
) -> FillReport:
    """Make the weights of every mask whose store lacks them. All ranks of `world` call it, with equal masks, and each
    makes a share. A file is decoded once.

    Args:
        workers: threads of this rank that decode.
        verify: read every cache file, also those that an earlier check left as they are.
        report: called with (masks made, masks to make), of all ranks: `whole_progress`.

    Raises:
        DataError: a file changed since the scan; it is named.
        DiskError: no space.
    """
    started = time.monotonic()
    distinct = list({(mask.dataset, sources[mask.dataset].key(mask)): mask for mask in masks}.values())

    def plan() -> tuple[list[int], int, int]:
        """Indices of the masks to make, and how many are sound and damaged."""
        for store in {sources[mask.dataset].store for mask in distinct}:
            store.sweep()
        wanted = [(sources[mask.dataset].store, sources[mask.dataset].key(mask)) for mask in distinct]
        states = check_all(wanted, verify=verify)
        todo = [index for index, state in enumerate(states) if state != "sound"]
        return todo, states.count("sound"), states.count("damaged")

    # Whoever looked later would find what others have written meanwhile.
    todo, found, damaged = world.from_main("the masks to make", plan)
    share = [distinct[index] for index in share_of(todo, world)]
    if share:
        _make(share, sources, workers, whole_progress(report, len(share), len(todo)))
    if todo:
        world.barrier("the end of making masks")
    return FillReport(len(todo), found, damaged, time.monotonic() - started)


def _make(
    masks: Sequence[Crop], sources: Mapping[str, MaskSource], workers: int, report: Callable[[int], None]
) -> None:
    """Make `masks` and write them. `report` is called with how many are made."""
    report(0)
    made = map_ahead(lambda mask: sources[mask.dataset].make(mask), masks, workers=workers, ahead=2 * workers)
    with closing(made):
        for done, (mask, weights) in enumerate(zip(masks, made, strict=True), start=1):
            source = sources[mask.dataset]
            source.store.write(source.key(mask), {"mask": weights}, {"kind": "mask", "content": mask.content})
            report(done)
