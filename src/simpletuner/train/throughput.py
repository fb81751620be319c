"""How fast a step was: images, FLOP and the share of what the device could do, from shapes and seconds."""

from dataclasses import dataclass, replace
from functools import cache, partial

import torch

from simpletuner.config.data_sheets import DENSE_BF16_FLOP_PER_S
from simpletuner.config.run import RunConfig
from simpletuner.data.batch import GlobalBatch
from simpletuner.flux2.activations import Pass
from simpletuner.flux2.arithmetic import PassFlop, attached_adapters, sampling_flop, training_flop
from simpletuner.flux2.footprint import recomputed_blocks
from simpletuner.flux2.routes import Route
from simpletuner.flux2.transformer import Flux2Transformer
from simpletuner.train.preservation import Preservation
from simpletuner.train.rollout import Rollout


def data_sheet_rate(device: torch.device) -> float | None:
    """Dense bf16 FLOP/s that the data sheet of `device` states; None on a CPU and where no figure is known."""
    return DENSE_BF16_FLOP_PER_S.get(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


@dataclass(frozen=True)
class Throughput:
    """Rates of one step."""

    images_per_s: float
    """Over all processes."""
    tflop_per_s: float
    """Model TFLOP/s of this process's device."""
    mfu: float | None
    """Model FLOP utilization, 0 to 1; None without a data-sheet rate."""
    hfu: float | None
    """Hardware FLOP utilization."""


class FlopMeter:
    """Counts what a run's steps compute. Reads shapes only: no tensor's values, nothing from a device.

    Args:
        transformer: with its adapters attached.
        rate: FLOP/s that utilization is measured against; None where unknown.
        is_compiled: whether the blocks are.
    """

    def __init__(
        self,
        config: RunConfig,
        transformer: Flux2Transformer,
        rollout: Rollout | None,
        rate: float | None,
        *,
        is_compiled: bool = False,
        preservation: Preservation | None = None,
    ) -> None:
        self._passing = Pass(
            spec=transformer.spec,
            dtype=transformer.dtype,
            batch=1,
            text=0,
            image=0,
            is_autocast=config.is_autocast,
            is_full=config.model_type == "full",
            recomputed=recomputed_blocks(config, transformer.spec.blocks),
            reference_attention=config.reference_attention,
        )
        adapters = attached_adapters(transformer)
        self._training = cache(partial(training_flop, adapters=adapters, is_compiled=is_compiled))
        self._sampling = cache(partial(sampling_flop, adapters=adapters))
        self._base = cache(partial(sampling_flop, adapters={}))
        self._rollout = rollout
        self._preservation = preservation
        self._rate = rate

    def flop(self, whole: GlobalBatch) -> PassFlop:
        """FLOP of this process's part of `whole`. Passes without gradients, of a rollout or for the base model's
        predictions, are counted: the method needs their results, so they are work and no recompute.
        """
        total = PassFlop(0, 0)
        for batch in whole.batches:
            count, _, height, width = batch.latents.shape
            condition = batch.condition
            passing = replace(
                self._passing,
                text=condition.context.index.shape[1],
                image=height * width,
                references=0 if condition.references is None else condition.references.tokens.shape[1],
            )
            # Masks may force more tokens than a route keeps.
            routes = tuple(Route(each.start, each.end, each.kept.shape[1] / passing.image) for each in batch.choices)
            routed = replace(passing, routes=routes)
            trained, predicted = (1, 0) if self._preservation is None else self._preservation.passes(batch)
            total += self._training(routed) * count * trained
            total += self._base(routed) * count * predicted
            if self._rollout is not None:
                walked, unrolled = self._rollout.sampled(batch)
                total += self._sampling(passing) * walked
                total += self._sampling(routed) * unrolled
        return total

    def throughput(self, whole: GlobalBatch, seconds: float) -> Throughput:
        """The rates of a step on `whole` that took `seconds`."""
        flop = self.flop(whole)
        return Throughput(
            images_per_s=whole.size / seconds,
            tflop_per_s=flop.model / seconds / 1e12,
            mfu=None if self._rate is None else flop.model / seconds / self._rate,
            hfu=None if self._rate is None else flop.hardware / seconds / self._rate,
        )
