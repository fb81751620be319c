"""How far training has moved images that it should leave alone."""

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
from simpletuner.train.preview import DrawingModel
from simpletuner.train.trained import Trainable

DRIFT_STEPS = 8
"""Sampler steps at most: what is compared need not be a finished image."""


def drift_of(latents: Float[Tensor, "..."], base: Float[Tensor, "..."]) -> float:
    """RMS of the difference over the RMS of `base`: 0 for equal latents, about 1 for images of different noise."""
    return float((latents.double() - base.double()).norm() / base.double().norm())


@dataclass(frozen=True)
class DriftMeter:
    """Draws `validation_drift_prompts` with what is trained, and compares the final latents with the base model's, of
    the same noise. The base's are drawn before the first step and kept in the run: full training cannot draw them
    again.

    Rank r draws prompts r, r + count, ... of `count` ranks that see the run's folder. All ranks call the same methods.
    """

    folder: Path
    """Keeps the base model's latents, a file for each prompt."""
    options: ValidationOptions
    scales: GuidanceScales
    """What the options' guidance means for this model."""
    seed: int
    model: DrawingModel
    trained: Trainable
    ema: Ema | None
    """The average, if it is measured."""
    has_live: bool
    """Whether what is trained itself is measured; if not, only its average."""
    context: Callable[[str], TextContext]
    """A prompt's context, from the cache."""
    world: World
    is_sharded: bool = False
    """Whether each model call is made by all ranks together: those without a prompt repeat one."""
    measured: frozenset[int] = frozenset()
    """Steps whose drift the events have (`measured_steps`)."""

    @property
    def prompts(self) -> tuple[str, ...]:
        """Each prompt once."""
        return tuple(dict.fromkeys(self.options.validation_drift_prompts or ()))

    @property
    def lacks_base(self) -> bool:
        """Whether latents of the base model are missing, or were made otherwise. All ranks ask, and rank 0 looks."""
        is_lacking = self.world.is_main and any(self._base(index) is None for index in range(len(self.prompts)))
        return self.world.decide([is_lacking])[0]

    def is_measured(self, step: int) -> bool:
        """Whether the events have the drift of `step`. All ranks ask, and rank 0 looks."""
        return self.world.decide([step in self.measured])[0]

    def keep_base(self, step: int, report: Callable[[int, int], None]) -> bool:
        """Draw the base model's latents, at step 0 always, since an earlier start may have had another base; later if
        they are missing. Returns whether they are there: after the first step of full training the base model is gone.
        """
        if step > 0 and not self.lacks_base:
            return True
        disabled = self.trained.disabled()
        if disabled is None and step > 0:
            return False
        if self.world.is_main:
            with file_errors_reported(self.folder):
                self.folder.mkdir(parents=True, exist_ok=True)
        self.world.barrier("the folder of the drift")
        with disabled or contextlib.nullcontext():
            self._draw(self._keep, report)
        self.world.barrier("the base model's latents")
        return True

    def __call__(self, report: Callable[[int, int], None]) -> dict[str, dict[str, float]]:
        """Drift of each prompt: of what is trained (`live`) and of its average (`ema`), as they are wanted."""
        drifts = {}
        if self.has_live:
            drifts["live"] = self._measured(report)
        if self.ema is not None:
            with self.ema.applied():
                drifts["ema"] = self._measured(report)
        return drifts

    def _measured(self, report: Callable[[int, int], None]) -> dict[str, float]:
        share: dict[str, float] = {}

        def compare(index: int, latents: Tensor) -> None:
            base = self._base(index)
            assert base is not None  # keep_base has looked
            share[self.prompts[index]] = drift_of(latents, base)

        self._draw(compare, report)
        self.world.barrier("the drift")
        merged = {prompt: drift for each in self.world.gather_json(share) for prompt, drift in each.items()}
        return {prompt: merged[prompt] for prompt in self.prompts}

    def _draw(self, take: Callable[[int, Tensor], None], report: Callable[[int, int], None]) -> None:
        """Call `take` with the index and the final latents of each prompt of this rank, fp32 on the CPU."""
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
                        take(index, latents.float().cpu())
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

    def _keep(self, index: int, latents: Tensor) -> None:
        with file_errors_reported(self._path(index)):
            save_tensors(self._path(index), {"latents": latents}, {"parameters": self._parameters(index)})

    def _base(self, index: int) -> Tensor | None:
        """The base model's latents of a prompt; None where they are missing, damaged or made otherwise."""
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
        """Everything that decides a prompt's latents beside the weights."""
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
