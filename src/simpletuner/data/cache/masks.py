"""The cache of masks: the loss weight of each latent, computed once from the mask's file, without a model."""

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
from simpletuner.data.ahead import prefetched_map
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
    """How to read the masks of one dataset, and the store of their weights."""

    kind: MaskKind
    store: Store

    @classmethod
    def all_of(cls, datasets: Datasets) -> dict[str, "MaskSource"]:
        """Mask sources by the id of the dataset that contains the mask files: a conditioning set, or with `mask_source`
        alpha the image dataset itself.
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
        """The cache key of a mask's weights. Options such as `masked_loss_floor` apply later and do not change it."""
        return crop_key(mask, kind="mask", version=1, levels=self.kind)

    def read(self, mask: Crop) -> Float[Tensor, "h w"]:
        """Read the cached weight of each latent, in [0, 1].

        Raises:
            DataError: the cache file is missing or damaged.
        """
        return self.store.read(self.key(mask))["mask"]

    def make(self, mask: Crop) -> Float[Tensor, "h w"]:
        """Compute the weight of each latent from the mask's file.

        Raises:
            DataError: the file changed since the scan, or does not fit into memory.
        """
        return latent_weights(rendered_crop(mask, lambda data: render_mask(data, mask.geometry, self.kind)))


def latent_weights(levels: UInt8[np.ndarray, "H W"]) -> Float[Tensor, "h w"]:
    """The mean gray level of the 16×16 pixels of each latent, where white is 1 and black 0, exactly."""
    # fp32 represents the sums of 256 bytes exactly.
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
    """Compute the weights of every mask that its store lacks. All ranks of `world` call it, with equal masks, and each
    computes a share. A file is decoded once.

    Args:
        workers: threads of this rank that decode.
        verify: read every cache file, also those that an earlier check verified.
        report: called with (masks made, masks to make) over all ranks, as estimated by `whole_progress`.

    Raises:
        DataError: a file changed since the scan; the message names it.
        DiskError: no space.
    """
    started = time.monotonic()
    distinct = list({(mask.dataset, sources[mask.dataset].key(mask)): mask for mask in masks}.values())

    def plan() -> tuple[list[int], int, int]:
        """Indices of the masks to make, and the numbers of sound and damaged ones."""
        for store in {sources[mask.dataset].store for mask in distinct}:
            store.sweep()
        entries = [(sources[mask.dataset].store, sources[mask.dataset].key(mask)) for mask in distinct]
        states = check_all(entries, verify=verify)
        todo = [index for index, state in enumerate(states) if state != "sound"]
        return todo, states.count("sound"), states.count("damaged")

    # Only rank 0 checks: a rank that checks later would find files of faster ranks.
    todo, sound, damaged = world.run_on_main("the masks to make", plan)
    share = [distinct[index] for index in share_of(todo, world)]
    if share:
        _make(share, sources, workers, whole_progress(report, len(share), len(todo)))
    if todo:
        world.barrier("the end of making masks")
    return FillReport(len(todo), sound, damaged, time.monotonic() - started)


def _make(
    masks: Sequence[Crop], sources: Mapping[str, MaskSource], workers: int, report: Callable[[int], None]
) -> None:
    """Compute the weights of `masks` and write them. `report` is called with the number of masks made."""
    report(0)
    weights_of_masks = prefetched_map(
        lambda mask: sources[mask.dataset].make(mask), masks, workers=workers, ahead=2 * workers
    )
    with closing(weights_of_masks):
        for done, (mask, weights) in enumerate(zip(masks, weights_of_masks, strict=True), start=1):
            source = sources[mask.dataset]
            source.store.write(source.key(mask), {"mask": weights}, {"kind": "mask", "content": mask.content})
            report(done)
