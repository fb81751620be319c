"""Validate a run while it trains: generate images of the validation prompts, and compute the held-out loss.

Both are distributed over the ranks. All ranks call the same methods at the same points.
"""

import contextlib
import errno
import json
import os
import re
import struct
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import torch
from PIL import Image, PngImagePlugin
from torch import Tensor

from simpletuner.base.errors import DataError, Stopped, UserError
from simpletuner.base.files import file_problem
from simpletuner.config.flavours import GuidanceScales
from simpletuner.config.options.validation import ValidationOptions
from simpletuner.config.prompts import Prompt
from simpletuner.data.batch import Batch
from simpletuner.data.cache.latents import pixels_of
from simpletuner.data.sample import Crop
from simpletuner.data.sheet import contact_sheet, side_by_side
from simpletuner.flow.condition import Condition, Denoise, References, TextContext
from simpletuner.flow.loss import flow_loss
from simpletuner.flux2.denoiser import Denoiser
from simpletuner.flux2.generate import Decode, generate
from simpletuner.memory.exhausted import exhausted_memory, first_line
from simpletuner.memory.free import release_memory
from simpletuner.memory.world import World
from simpletuner.runs.events import Picture, ValidationEvent, read_events
from simpletuner.runs.layout import EMA_FOLDER, RunDirectory
from simpletuner.train.ema import Ema
from simpletuner.train.preview import SamplingModel, evaluating
from simpletuner.train.trained import Trainable

SHEET_COLUMNS = 8
MAX_FAILURES = 3
"""After this number of consecutive failed images, no more are tried."""


@dataclass(frozen=True)
class HeldOutLoss:
    """The loss on held-out samples, at fixed sigmas and with fixed noise.

    Rank r computes samples r, r + size, ... Losses are summed in the order of the samples, so the result is
    bit-identical for any number of ranks.
    """

    denoise: Denoiser
    count: int
    """Number of held-out samples."""
    load: Callable[[int], Mapping[float, Batch]]
    """Loads the sample of an index, as a batch of one for each sigma."""
    world: World
    is_sharded: bool = False
    """Whether all ranks must make each model call together; a rank without a sample repeats one."""

    @torch.no_grad()
    def __call__(self, report: Callable[[int, int], None]) -> dict[float, float]:
        """The mean squared velocity error over the samples, weighted by their masks, by sigma. Equal on every rank."""
        losses = self._losses(report)
        self.world.barrier("the held-out loss")
        losses_by_rank = self.world.gather_json(losses)
        sums: dict[float, float] = {}
        for index in range(self.count):
            for sigma, loss in losses_by_rank[index % self.world.size][index // self.world.size]:
                sums[sigma] = sums.get(sigma, 0.0) + loss
        return {sigma: total / self.count for sigma, total in sums.items()}

    def _losses(self, report: Callable[[int, int], None]) -> list[list[tuple[float, float]]]:
        """(sigma, loss) of each sample of this rank."""
        losses = []
        with evaluating(self.denoise):
            for first in range(0, self.count, self.world.size):
                index = first + self.world.rank
                has_sample = index < self.count
                if has_sample or self.is_sharded:
                    batches = self.load(index if has_sample else first)
                    by_sigma = [(sigma, self._loss(batch.to(self.world.device))) for sigma, batch in batches.items()]
                    losses += [by_sigma] * has_sample
                report(min(first + self.world.size, self.count), self.count)
        return losses

    def _loss(self, batch: Batch) -> float:
        loss = flow_loss(
            self.denoise, batch.latents, batch.condition, sigma=batch.sigma, noise=batch.noise, weight=batch.masks
        )
        return loss.item()


@dataclass
class CountedCalls:
    """Counts the started and finished calls of a model."""

    ready: Callable[[], Denoise]
    """Returns the model, and may load it."""
    started: int = 0
    done: int = 0

    def counted(self) -> Denoise:
        """The model, which counts its calls."""
        denoise = self.ready()

        def denoise_and_count(latents: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
            self.started += 1
            velocity = denoise(latents, sigma, condition)
            self.done += 1
            return velocity

        return denoise_and_count


@dataclass
class ValidationSampler:
    """Generates images of the validation prompts with the trained model, or with another model and its LoRA.

    If an image or a contact sheet fails, only that one is missing, and a notice gives the reason. After `MAX_FAILURES`
    consecutive failures no more are generated. Trainable parameters and optimizer stay unchanged.

    Each rank with access to the run directory generates and saves a share of the images. Rank 0 decides which images to
    generate, collects the failures of all ranks, makes the sheet and returns the event; other ranks return None. If all
    ranks must make each model call together, an image whose calls cannot be completed ends the run.
    """

    run: RunDirectory
    options: ValidationOptions
    scales: GuidanceScales
    """The guidance scales of the options, for this model."""
    both_at_once: frozenset[tuple[int, int]]
    """Image sizes for which one pass computes both predictions of guidance, per the memory plan."""
    seed: int
    model: SamplingModel
    trained: Trainable
    ema: Ema | None
    """The moving average, if it generates images; else None."""
    has_live: bool
    """Whether the trained weights generate images; if not, only the average does."""
    decode: Callable[[], Decode]
    """Loads the VAE decoder; called when the first image is due."""
    prompts: Mapping[str, Prompt]
    context: Callable[[str], TextContext]
    """Reads the context of a prompt from the cache."""
    references: Callable[[Prompt], References | None]
    """Reads the references of a prompt from the cache."""
    reference_crops: Mapping[str, Crop]
    """The reference images of all prompts, by path."""
    world: World
    notice: Callable[[str], None]
    """Notifies the user of failed images."""
    steps_with_sheet: set[int]
    """Steps whose contact sheet is in the events: the function `steps_with_sheet`."""
    is_sharded: bool = False
    """Whether all ranks must make each model call together; a rank without an image repeats one."""
    failures: int = 0
    """Consecutive failed images so far, over the ranks in order. Rank 0 counts them."""

    @property
    def count(self) -> int:
        """Images of one view, which are the rows of the contact sheet."""
        return len(self.prompts) * len(self.options.sizes) * self.options.num_validation_images

    @property
    def keeps_base(self) -> bool:
        """Whether the base model's images can be generated at any time, not only before the first step."""
        return self.trained.disabled() is not None

    @property
    def lacks_base(self) -> bool:
        """Whether images of the base model are enabled but missing. All ranks call it; rank 0 checks the files."""
        return self.world.decide([self.world.is_main and bool(self._missing_base_images())])[0]

    def is_complete(self, step: int) -> bool:
        """Whether the contact sheet of `step` exists and is in the events. All ranks call it; rank 0 checks."""
        return self.world.decide([self._has_sheet(step)])[0]

    def sample_base(self, step: int, report: Callable[[int, int], None]) -> ValidationEvent | None:
        """Generate the base model's images and contact sheet, as step 0: all of them before the first step, missing
        ones later. Returns None if nothing is missing, or if the base model is no longer available at `step`.
        """
        requested = self._agreed(0, self._base_requests(step) if self.world.is_main else None)
        if requested is None:
            return None
        uses_current_weights = step == 0 and self.options.disable_benchmark
        with (None if uses_current_weights else self.trained.disabled()) or contextlib.nullcontext():
            return self._sample_all(0, requested, report)

    def sample(self, step: int, report: Callable[[int, int], None]) -> ValidationEvent | None:
        """Generate images of every prompt into the folder of `step`, with the trained weights, their average or both,
        and the contact sheet of all steps so far. Step 0 uses the current weights, without an average. Returns None if
        all images failed.
        """
        requested = self._agreed(step, self._planned(step))
        return None if requested is None else self._sample_all(step, requested, report)

    def _base_requests(self, step: int) -> list[Picture] | None:
        """The base model's images to generate at `step`; empty if only the sheet is missing, None if nothing is."""
        if step == 0:
            return self._planned(0)
        missing = self._missing_base_images()
        if missing:
            return missing if self.keeps_base else None
        return None if self.options.disable_benchmark or self._has_sheet(0) else []

    def _agreed(self, step: int, requested: list[Picture] | None) -> list[Picture] | None:
        """Rank 0's `requested` images of `step`, on all ranks. None if it requests none or too many images failed."""
        planned = self._planned(step)
        agreed = None
        if requested is not None and self.failures < MAX_FAILURES:
            agreed = [planned.index(picture) for picture in requested], sorted(self.both_at_once)
        agreed = self.world.broadcast_json(agreed)
        if agreed is None:
            return None
        indices, sizes = agreed
        self.both_at_once = frozenset((width, height) for width, height in sizes)
        return [planned[index] for index in indices]

    def _sample_all(
        self, step: int, requested: list[Picture], report: Callable[[int, int], None]
    ) -> ValidationEvent | None:
        """Generate `requested`, then the contact sheet of `step`. The event lists every existing image of that step."""
        attempts = self._sample_share(requested, report)
        self.world.barrier("the validation images")
        by_rank = self.world.gather_json(attempts)
        if not self.world.is_main:
            return None
        reasons: dict[str, str | None] = dict(attempt for share in by_rank for attempt in share)
        if not self.world.is_alone:
            for path, reason in reasons.items():
                self._count_outcome(self.run.root / path, reason)
        generated = [picture for picture in requested if reasons.get(picture.path, "not tried") is None]
        sheet = sheet_of(self.run, step)
        has_sheet = (generated or not requested) and self._attempt(partial(self._make_sheet, step), sheet)
        if has_sheet:
            self.steps_with_sheet.add(step)
        elif not generated:
            return None
        return ValidationEvent(
            step=step,
            pictures=tuple(each for each in self._planned(step) if each in generated or each not in requested),
            sheet=str(sheet.relative_to(self.run.root)) if has_sheet else None,
        )

    def _sample_share(
        self, requested: list[Picture], report: Callable[[int, int], None]
    ) -> list[tuple[str, str | None]]:
        """Generate this rank's share of `requested`, until `MAX_FAILURES` consecutive images fail. Returns the path of
        each image that was tried, with the reason of its failure, or None if it succeeded.
        """
        steps = self.options.validation_num_inference_steps
        attempts: list[tuple[str, str | None]] = []
        failures, before = self.failures, 0
        with contextlib.ExitStack() as stack:

            @cache
            def ready() -> Denoiser:
                """The model, loaded for the first image: if loading fails, only that image fails."""
                denoise = stack.enter_context(self.model.ready())
                stack.callback(ready.cache_clear)
                return denoise

            for pictures in self._rounds(requested):
                progress = partial(_overall, report, before * steps, len(pictures), len(requested) * steps)
                before += len(pictures)
                with self._view_of(pictures[0], by_all=True):
                    if self.world.rank < len(pictures) and failures < MAX_FAILURES:
                        picture = pictures[self.world.rank]
                        reason = self._try(picture, pictures, ready, progress)
                        failures = 0 if reason is None else failures + 1
                        attempts.append((picture.path, reason))
                        if self.world.is_alone:
                            self._count_outcome(self.run.root / picture.path, reason)
                    elif self._in_lockstep:
                        self._repeat(pictures, ready)
        return attempts

    @property
    def _in_lockstep(self) -> bool:
        """Whether other ranks wait for each model call of this rank."""
        return self.is_sharded and not self.world.is_alone

    @property
    def _shards_trainable(self) -> bool:
        """Whether each rank holds a part of the trainable parameters."""
        return self.trained.shards is not None

    def _rounds(self, requested: list[Picture]) -> list[list[Picture]]:
        """Group the images into rounds: rank r generates the r-th image of each round. Larger images come first, so
        that no rank gets all of them. Where the model or its trainable parameters are sharded, all images of a round
        use the trained weights, or all use the average.
        """
        size = self.world.writing_ranks
        views = [requested]
        if size > 1:
            views = [sorted(requested, key=lambda picture: -picture.width * picture.height)]
        if self.is_sharded or self._shards_trainable:
            views = [[each for each in views[0] if each.is_ema == is_ema] for is_ema in (False, True)]
        return [view[start : start + size] for view in views for start in range(0, len(view), size)]

    def _try(
        self,
        picture: Picture,
        pictures: Sequence[Picture],
        ready: Callable[[], Denoiser],
        report: Callable[[int, int], None],
    ) -> str | None:
        """Generate an image of a round. Returns the reason of its failure, or None."""
        calls = CountedCalls(ready)
        is_reporting = False

        def guarded_report(done: int, total: int) -> None:
            nonlocal is_reporting
            is_reporting = True
            report(done, total)
            is_reporting = False

        def is_fatal() -> bool:
            """Whether `report` raised, or other ranks wait in a model call that this rank can no longer make."""
            return is_reporting or (self._in_lockstep and calls.started > 0 and calls.done < self._calls(pictures))

        shares_pass = self._shares_pass(pictures if self._in_lockstep else [picture])
        reason = failure_reason(lambda: self._make(picture, calls.counted, shares_pass, guarded_report), is_fatal)
        if reason is not None:
            release_memory(self.world.device)  # outside the except block, whose traceback references tensors
            if self._in_lockstep and not calls.started:
                self._repeat(pictures, ready)
        return reason

    def _repeat(self, pictures: Sequence[Picture], ready: Callable[[], Denoiser]) -> None:
        """Make the model calls of a round without saving an image, because other ranks wait for them."""
        with self._view_of(pictures[0]):
            self._image(ready(), lambda latents: latents[:, :3], pictures[0], self._shares_pass(pictures))

    def _shares_pass(self, pictures: Sequence[Picture]) -> bool:
        """Whether one pass computes both predictions of guidance for each of `pictures`."""
        return all((each.width, each.height) in self.both_at_once for each in pictures)

    def _calls(self, pictures: Sequence[Picture]) -> int:
        """Model calls of each rank in a round of `pictures`."""
        is_single = self.scales.real == 1.0 or self._shares_pass(pictures)
        return self.options.validation_num_inference_steps * (1 if is_single else 2)

    def _attempt(self, make: Callable[[], None], path: Path) -> bool:
        """Make an image, unless too many failed. Returns whether it succeeded; if not, a notice gives the reason."""
        if self.failures >= MAX_FAILURES:
            return False
        reason = failure_reason(make)
        if reason is not None:
            release_memory(self.world.device)  # outside the except block, whose traceback references tensors
        self._count_outcome(path, reason)
        return reason is None

    def _count_outcome(self, path: Path, reason: str | None) -> None:
        """Count the consecutive failures, after an image was tried; a notice gives the reason of a failure."""
        if reason is None:
            self.failures = 0 if self.failures < MAX_FAILURES else self.failures
            return
        self.failures += 1
        text = f"{path} could not be made: {reason} Training continues without it."
        if self.failures == MAX_FAILURES:
            text += (
                f" {MAX_FAILURES} images in a row failed: no more are made until the run is resumed. Before you resume "
                "it, fix the cause, or give --validation_disable."
            )
        self.notice(text)

    def _view_of(self, picture: Picture, *, by_all: bool = False) -> contextlib.AbstractContextManager[None]:
        """A context in which the model has the weights that `picture` shows. Ranks with sharded trainable parameters
        enter it together, once for each round (`by_all`). Other ranks enter it for each image, so that an error in it
        loses only that image.
        """
        is_due = picture.is_ema and by_all == self._shards_trainable
        return self.ema.applied() if is_due and self.ema else contextlib.nullcontext()

    def _make(
        self, picture: Picture, ready: Callable[[], Denoise], shares_pass: bool, report: Callable[[int, int], None]
    ) -> None:
        path = self.run.root / picture.path
        for folder in reversed(path.parents):
            if folder.is_relative_to(self.run.validations):
                folder.mkdir(exist_ok=True)  # one by one, so that an error names the path that blocks it
        with self._view_of(picture):
            image = self._image(ready(), self.decode(), picture, shares_pass, report)
        _save(image, path, self._parameters(picture))

    def _image(
        self,
        denoise: Denoise,
        decode: Decode,
        picture: Picture,
        shares_pass: bool,
        report: Callable[[int, int], None] = lambda done, total: None,
    ) -> Image.Image:
        real = self.scales.real
        (image,) = generate(
            denoise,
            decode,
            self._condition(picture, picture.prompt),
            width=picture.width,
            height=picture.height,
            steps=self.options.validation_num_inference_steps,
            seed=picture.seed,
            real_guidance=real,
            negative=None if real == 1.0 else self._condition(picture, self.options.validation_negative_prompt),
            both_at_once=shares_pass,
            report=report,
        )
        return image

    def _condition(self, picture: Picture, text: str) -> Condition:
        """The condition of `text` with the references of `picture`, on the device."""
        condition = Condition.at(self.context(text), self.scales.embedded, self.references(self.prompts[picture.name]))
        return condition.mapped(lambda tensor: tensor.to(self.world.device))

    def _planned(self, step: int) -> list[Picture]:
        """The images to generate for `step`: of the trained weights, then of the average."""
        is_base = step == 0
        views = [False] * (self.has_live or is_base) + [True] * (self.ema is not None and not is_base)
        return [picture for is_ema in views for picture in self._view(step, is_ema)]

    def _view(self, step: int, is_ema: bool) -> list[Picture]:
        first = self.seed if self.options.validation_seed is None else self.options.validation_seed
        folder = self.run.validation(step).relative_to(self.run.root) / (EMA_FOLDER if is_ema else "")
        return [
            Picture(
                name=name,
                prompt=prompt.text,
                references=prompt.references,
                path=str(folder / f"{name}_{width}x{height}_{index}.{self.options.validation_image_format}"),
                width=width,
                height=height,
                seed=first + index,
                is_ema=is_ema,
            )
            for name, prompt in self.prompts.items()
            for width, height in self.options.sizes
            for index in range(self.options.num_validation_images)
        ]

    def _parameters(self, picture: Picture) -> str:
        """The sampling parameters of the image, as JSON stored in its file."""
        return json.dumps(
            {
                "prompt": picture.prompt,
                "seed": picture.seed,
                "steps": self.options.validation_num_inference_steps,
                "guidance": self.options.validation_guidance,
                "guidance_real": self.options.validation_guidance_real,
                "negative_prompt": self.options.validation_negative_prompt,
                **({} if self.model.name is None else {"model": self.model.name}),
                **({"references": self._contents(picture)} if picture.references else {}),
            },
            ensure_ascii=False,
        )

    def _contents(self, picture: Picture) -> list[str]:
        """The sha256 of each reference image."""
        return [self.reference_crops[path].content for path in picture.references]

    def _has_sheet(self, step: int) -> bool:
        """Whether the contact sheet of `step` exists and is in the events."""
        return step in self.steps_with_sheet and sheet_of(self.run, step).is_file()

    def _missing_base_images(self) -> list[Picture]:
        """The base model's images that are enabled, but missing or made with other sampling parameters."""
        planned = [] if self.options.disable_benchmark else self._planned(0)
        return [picture for picture in planned if not self._is_current(picture)]

    def _is_current(self, picture: Picture) -> bool:
        """Whether the image's file is undamaged and was made with the current sampling parameters."""
        image = _read(self.run.root / picture.path, picture)
        if image is None:
            return False
        recorded = image.info.get("parameters") if image.format == "PNG" else image.getexif().get(_EXIF_DESCRIPTION)
        return bool(recorded == self._parameters(picture))

    def _make_sheet(self, step: int) -> None:
        """Write the contact sheet of `step`: a row per prompt, size and seed, and a column per step. Columns are the
        references if there are any, the base model, then the latest steps, `SHEET_COLUMNS` steps at most. The average's
        column is to the right of the trained weights'. A missing or unreadable image leaves an empty cell.
        """
        folders = (folder for folder in self.run.validations.iterdir() if folder.is_dir())
        matches = (_STEP_FOLDER.fullmatch(folder.name) for folder in folders)
        steps = sorted(past_step for match in matches if match and (past_step := int(match[1])) <= step)
        if len(steps) > SHEET_COLUMNS:
            steps = [steps[0], *steps[1 - SHEET_COLUMNS :]]
        columns: list[list[Picture]] = []
        heads: list[str] = []
        for past_step in steps:
            planned = self._planned(past_step)
            for start in range(0, len(planned), self.count):
                columns.append(planned[start : start + self.count])
                name = "base" if past_step == 0 else f"step {past_step}"
                heads.append(f"{name}, average" if planned[start].is_ema else name)
        rows = [
            [_read(self.run.root / column[row].path, column[row]) for column in columns] for row in range(self.count)
        ]
        if any(picture.references for picture in columns[0]):
            heads.insert(0, "references")
            rows = [[self._references_image(picture), *row] for picture, row in zip(columns[0], rows, strict=True)]
        labels = [picture.prompt for picture in columns[0]]
        _save(contact_sheet(rows, labels, heads), sheet_of(self.run, step), "")

    def _references_image(self, picture: Picture) -> Image.Image | None:
        """The references of `picture` side by side; None if there are none, or if a file has changed."""
        try:
            images = [pixels_of(self.reference_crops[path]) for path in picture.references]
        except DataError:
            return None
        return side_by_side([Image.fromarray(image) for image in images]) if images else None


_STEP_FOLDER = re.compile(r"step-(\d{6,})")
_EXIF_DESCRIPTION = 0x010E


def _overall(
    report: Callable[[int, int], None], before: int, round_size: int, total: int, done: int, _image_total: int
) -> None:
    """Report progress over all images, from the progress `done` within one image of the current round."""
    report(before + round_size * done, total)


def steps_with_sheet(run: RunDirectory) -> set[int]:
    """Steps whose contact sheet is in the events; without steps whose checkpoint was saved again later, with other
    weights.
    """
    return _steps_with(run, "sheet")


def steps_with_drift(run: RunDirectory) -> set[int]:
    """Steps whose drift is in the events; without steps whose checkpoint was saved again later, with other weights."""
    return _steps_with(run, "drift", "ema_drift")


def _steps_with(run: RunDirectory, *keys: str) -> set[int]:
    """Steps with a validation event that has one of `keys`; see `steps_with_sheet`."""
    steps: set[int] = set()
    for event in read_events(run.events, kinds=("checkpoint", "validation")):
        step = event.get("step")
        if isinstance(step, int) and any(event.get(key) is not None for key in keys):
            steps.add(step)
        elif event.get("state") == "saved":
            steps -= {step}
    return steps


def sheet_of(run: RunDirectory, step: int) -> Path:
    """The path of the contact sheet of `step`."""
    return run.validation(step) / "sheet.png"


def failure_reason(make: Callable[[], None], is_fatal: Callable[[], bool] = lambda: False) -> str | None:
    """Call `make`; return the reason if it fails with a user error, a file-system error or a lack of memory, else None.
    Other errors and stop requests are raised, and every error if `is_fatal` returns True.
    """
    try:
        make()
    except Stopped:
        raise
    except (UserError, OSError, MemoryError, RuntimeError) as error:
        if is_fatal():
            raise
        if isinstance(error, UserError):
            return str(error)
        problem = file_problem(error, doing="write") if isinstance(error, OSError) else None
        if problem is not None:
            return str(problem)
        if exhausted_memory(error) is not None:
            return f"{first_line(error).rstrip('.')}. A lower --validation_resolution takes less memory."
        if isinstance(error, OSError):  # raised by an image encoder of Pillow
            return f"{error}."
        raise
    return None


_UNREADABLE = (
    OSError,
    SyntaxError,
    ValueError,
    LookupError,
    TypeError,
    EOFError,
    OverflowError,
    MemoryError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)
"""Exceptions that Pillow raises for damaged files."""


def _read(path: Path, picture: Picture) -> Image.Image | None:
    """Read the image at `path`; None if it is missing, damaged, or has another size than `picture`."""
    try:
        if not path.is_file():
            return None
        with Image.open(path, formats=("PNG", "JPEG")) as image:
            if image.size != (picture.width, picture.height):
                return None
            image.load()
            return image
    except _UNREADABLE:
        return None


def _save(image: Image.Image, path: Path, parameters: str) -> None:
    """Write to a temporary file and rename it, so that a page never shows half an image."""
    part = path.with_name(f".{path.stem}.part{path.suffix}")
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    try:
        if path.suffix == ".png":
            info = PngImagePlugin.PngInfo()
            info.add_itxt("parameters", parameters)
            image.save(part, pnginfo=info)
        else:
            exif = Image.Exif()
            exif[_EXIF_DESCRIPTION] = parameters
            image.save(part, quality=95, exif=exif)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
