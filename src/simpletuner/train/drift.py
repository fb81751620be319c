"""Measure the drift: how far training has changed images that it should not affect."""

import contextlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from jaxtyping import Float
from torch import Tensor

from simpletuner.base.errors import UserError
from simpletuner.base.files import file_errors_reported
from simpletuner.base.tensorfile import read_metadata
from simpletuner.config.flavours import GuidanceScales
from simpletuner.config.options.validation import ValidationOptions
from simpletuner.flow.condition import Condition, TextContext
from simpletuner.flux2.generate import initial_noise, sample_latents
from simpletuner.memory.tensors import load_tensors, save_tensors
from simpletuner.memory.world import World
from simpletuner.train.ema import Ema
from simpletuner.train.preview import SamplingModel
from simpletuner.train.trained import Trainable

DRIFT_STEPS = 8
"""Maximum number of sampler steps; the compared images need not be fully sampled."""


def drift_of(latents: Float[Tensor, "..."], base: Float[Tensor, "..."]) -> float:
    """RMS of the difference over the RMS of `base`: 0 for equal latents, about 1 for images of different noise."""
    return float((latents.double() - base.double()).norm() / base.double().norm())


@dataclass(frozen=True)
class DriftMeter:
    """Samples `validation_drift_prompts` with the trained weights and compares the final latents with the base model's
    for the same noise. The base's latents are sampled before the first step and stored in the run directory, because
    full training overwrites the base model.

    Of `count` ranks with access to the run directory, rank r samples prompts r, r + count, ... All ranks call the same
    methods.
    """

    folder: Path
    """Stores the base model's latents, a file per prompt."""
    options: ValidationOptions
    scales: GuidanceScales
    """The guidance scales of the options, for this model."""
    seed: int
    model: SamplingModel
    trained: Trainable
    ema: Ema | None
    """The moving average, if its drift is measured; else None."""
    has_live: bool
    """Whether the drift of the trained weights is measured; if not, only that of the average."""
    context: Callable[[str], TextContext]
    """Reads the context of a prompt from the cache."""
    world: World
    is_sharded: bool = False
    """Whether all ranks must make each model call together; a rank without a prompt repeats one."""
    steps_with_drift: frozenset[int] = frozenset()
    """Steps whose drift is in the events: `validate.steps_with_drift`."""

    @property
    def prompts(self) -> tuple[str, ...]:
        """The distinct prompts."""
        return tuple(dict.fromkeys(self.options.validation_drift_prompts or ()))

    @property
    def lacks_base(self) -> bool:
        """Whether latents of the base model are missing or made with other parameters. All ranks call it; rank 0
        checks.
        """
        is_lacking = self.world.is_main and any(self._base(index) is None for index in range(len(self.prompts)))
        return self.world.decide([is_lacking])[0]

    def is_measured(self, step: int) -> bool:
        """Whether the events have the drift of `step`. All ranks call it; rank 0 decides."""
        return self.world.decide([step in self.steps_with_drift])[0]

    def ensure_base(self, step: int, report: Callable[[int, int], None]) -> bool:
        """Sample and store the base model's latents: always at step 0, as an earlier start may have had another base;
        later only if they are missing. Returns whether they exist; full training has no base model after its first
        step.
        """
        if step > 0 and not self.lacks_base:
            return True
        base_model = self.trained.disabled()
        if base_model is None and step > 0:
            return False
        if self.world.is_main:
            with file_errors_reported(self.folder):
                self.folder.mkdir(parents=True, exist_ok=True)
        self.world.barrier("the drift folder")
        with base_model or contextlib.nullcontext():
            self._sample(self._store, report)
        self.world.barrier("the base model's latents")
        return True

    def __call__(self, report: Callable[[int, int], None]) -> dict[str, dict[str, float]]:
        """The drift of each prompt, for the trained weights (`live`), their average (`ema`), or both, as configured."""
        drifts = {}
        if self.has_live:
            drifts["live"] = self._measured(report)
        if self.ema is not None:
            with self.ema.applied():
                drifts["ema"] = self._measured(report)
        return drifts

    def _measured(self, report: Callable[[int, int], None]) -> dict[str, float]:
        drifts: dict[str, float] = {}

        def compare(index: int, latents: Tensor) -> None:
            base = self._base(index)
            assert base is not None  # `ensure_base` has checked it
            drifts[self.prompts[index]] = drift_of(latents, base)

        self._sample(compare, report)
        self.world.barrier("the drift")
        merged = {prompt: drift for each in self.world.gather_json(drifts) for prompt, drift in each.items()}
        return {prompt: merged[prompt] for prompt in self.prompts}

    def _sample(self, handle: Callable[[int, Tensor], None], report: Callable[[int, int], None]) -> None:
        """Call `handle` with the index and the final latents (fp32, on the CPU) of each prompt of this rank."""
        prompts, count = self.prompts, self.world.writing_ranks
        noise = self._noise()
        with self.model.ready() as denoise:
            for first in range(0, len(prompts), count):
                index = first + self.world.rank
                has_prompt = self.world.rank < count and index < len(prompts)
                if has_prompt or self.is_sharded:
                    latents = sample_latents(
                        denoise,
                        noise,
                        self._condition(prompts[index if has_prompt else first]),
                        steps=self._steps,
                        real_guidance=self.scales.real,
                        negative=None
                        if self.scales.real == 1.0
                        else self._condition(self.options.validation_negative_prompt),
                    )
                    if has_prompt:
                        handle(index, latents.float().cpu())
                report(min(first + count, len(prompts)), len(prompts))

    @property
    def _steps(self) -> int:
        return min(self.options.validation_num_inference_steps, DRIFT_STEPS)

    def _noise(self) -> Float[Tensor, "1 128 h w"]:
        width, height = self.options.sizes[0]
        return initial_noise(self._first_seed, width=width, height=height).to(self.world.device)

    @property
    def _first_seed(self) -> int:
        return self.seed if self.options.validation_seed is None else self.options.validation_seed

    def _condition(self, prompt: str) -> Condition:
        return Condition.at(self.context(prompt).to(self.world.device), self.scales.embedded)

    def _store(self, index: int, latents: Tensor) -> None:
        with file_errors_reported(self._path(index)):
            save_tensors(self._path(index), {"latents": latents}, {"parameters": self._parameters(index)})

    def _base(self, index: int) -> Tensor | None:
        """The base model's latents of a prompt; None if they are missing, damaged or made with other parameters."""
        path = self._path(index)
        try:
            if not path.is_file() or read_metadata(path).get("parameters") != self._parameters(index):
                return None
            return load_tensors(path)["latents"].clone()
        except (UserError, OSError, KeyError):
            return None

    def _path(self, index: int) -> Path:
        return self.folder / f"{index:03}.safetensors"

    def _parameters(self, index: int) -> str:
        """Everything besides the weights that determines a prompt's latents, as JSON."""
        return json.dumps(
            {
                "prompt": self.prompts[index],
                "size": self.options.sizes[0],
                "seed": self._first_seed,
                "steps": self._steps,
                "guidance": self.scales.embedded,
                "guidance_real": self.scales.real,
                "negative_prompt": self.options.validation_negative_prompt,
                "model": self.model.name,
            },
            ensure_ascii=False,
        )
