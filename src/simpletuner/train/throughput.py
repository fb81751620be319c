"""Throughput of a step: images/s, FLOP/s and utilization of the device, from shapes and seconds."""

from dataclasses import dataclass, replace
from functools import cache, partial

import torch

from simpletuner.config.data_sheets import DENSE_BF16_FLOP_PER_S
from simpletuner.config.run import RunConfig
from simpletuner.data.batch import GlobalBatch
from simpletuner.flux2.activations import TransformerPass
from simpletuner.flux2.arithmetic import PassFlop, attached_adapters, sampling_flop, training_flop
from simpletuner.flux2.footprint import recomputed_blocks
from simpletuner.flux2.routes import Route
from simpletuner.flux2.transformer import Flux2Transformer
from simpletuner.train.preservation import Preservation
from simpletuner.train.rollout import Rollout


def data_sheet_rate(device: torch.device) -> float | None:
    """Dense bf16 FLOP/s in the data sheet of `device`; None for a CPU or an unknown device."""
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
    """Hardware FLOP utilization, which counts recomputed work too; None without a data-sheet rate."""


class FlopMeter:
    """Counts the FLOP of a run's steps. Reads shapes only: no tensor values, so it never waits for a device.

    Args:
        transformer: the transformer with its adapters attached.
        rate: FLOP/s that utilization refers to; None if unknown.
        is_compiled: whether the blocks are compiled.
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
        self._transformer_pass = TransformerPass(
            spec=transformer.spec,
            dtype=transformer.dtype,
            batch=1,
            text_tokens=0,
            image_tokens=0,
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

    def flop(self, global_batch: GlobalBatch) -> PassFlop:
        """FLOP of this process's micro-batches of `global_batch`. Passes without gradients, for rollouts or the base
        model's predictions, count as model FLOP, not as recompute: the method needs their results.
        """
        total = PassFlop(0, 0)
        for batch in global_batch.batches:
            count, _, height, width = batch.latents.shape
            condition = batch.condition
            transformer_pass = replace(
                self._transformer_pass,
                text_tokens=condition.context.index.shape[1],
                image_tokens=height * width,
                reference_tokens=0 if condition.references is None else condition.references.tokens.shape[1],
            )
            # Masks may force TREAD to keep more tokens than the route's ratio.
            routes = tuple(
                Route(each.start, each.end, each.kept_tokens.shape[1] / transformer_pass.image_tokens)
                for each in batch.choices
            )
            routed = replace(transformer_pass, routes=routes)
            trained, predicted = (1, 0) if self._preservation is None else self._preservation.passes(batch)
            total += self._training(routed) * count * trained
            total += self._base(routed) * count * predicted
            if self._rollout is not None:
                in_solver, unrolled = self._rollout.sampled(batch)
                total += self._sampling(transformer_pass) * in_solver
                total += self._sampling(routed) * unrolled
        return total

    def throughput(self, global_batch: GlobalBatch, seconds: float) -> Throughput:
        """The throughput of a step on `global_batch` that took `seconds`."""
        flop = self.flop(global_batch)
        return Throughput(
            images_per_s=global_batch.size / seconds,
            tflop_per_s=flop.model / seconds / 1e12,
            mfu=None if self._rate is None else flop.model / seconds / self._rate,
            hfu=None if self._rate is None else flop.hardware / seconds / self._rate,
        )
