"""Looking at a run while it trains: pictures of the prompts, and the loss on held-out pictures.

Both are shared out over the ranks. All ranks call the same methods at the same points.
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
from simpletuner.train.preview import DrawingModel, evaluating
from simpletuner.train.trained import Trainable

SHEET_COLUMNS = 8
MAX_FAILURES = 3
"""Images in a row that cannot be made before no more are tried."""


@dataclass(frozen=True)
class HeldOutLoss:
    """The loss on samples that are not trained on, at fixed sigmas and fixed noise.

    Rank r measures samples r, r + size, ... The losses are added in the order of the samples, so that the sums are the
    same bits on any number of ranks.
    """

    denoise: Denoiser
    count: int
    """Held-out samples."""
    load: Callable[[int], Mapping[float, Batch]]
    """One of them, as a batch of one for each sigma."""
    world: World
    is_sharded: bool = False
    """Whether each model call is made by all ranks together: those without a sample repeat one."""

    @torch.no_grad()
    def __call__(self, report: Callable[[int, int], None]) -> dict[float, float]:
        """Mean squared velocity error over the samples, weighted by their masks, at each sigma: the same on every
        rank.
        """
        losses = self._losses(report)
        self.world.barrier("the held-out loss")
        shares = self.world.gather_json(losses)
        sums: dict[float, float] = {}
        for index in range(self.count):
            for sigma, loss in shares[index % self.world.size][index // self.world.size]:
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
    """A model whose calls are counted."""

    ready: Callable[[], Denoise]
    """Returns the model, and may load it."""
    started: int = 0
    done: int = 0

    def opened(self) -> Denoise:
        """The model."""
        denoise = self.ready()

        def counted(latents: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
            self.started += 1
            velocity = denoise(latents, sigma, condition)
            self.done += 1
            return velocity

        return counted


@dataclass
class Painter:
    """Draws the validation prompts with the model as it is, or on another one with its LoRA.

    An image that cannot be made, or a sheet, costs that one: a notice says why. After `MAX_FAILURES` in a row no more
    are drawn. What is trained, and its optimizer, are as they were.

    Each rank that sees the run's folder draws a share of the images and saves it. Rank 0 decides which are wanted,
    hears of those that failed on any rank, makes the sheet and returns the event; the other ranks return None. Where
    each model call is made by all ranks together, an image whose calls cannot be finished ends the run.
    """

    run: RunDirectory
    options: ValidationOptions
    scales: GuidanceScales
    """What the options' guidance means for this model."""
    both_at_once: frozenset[tuple[int, int]]
    """Sizes of images whose two predictions of guidance share a pass, by the plan."""
    seed: int
    model: DrawingModel
    trained: Trainable
    ema: Ema | None
    """The average, if pictures are made of it."""
    has_live: bool
    """Whether pictures are made of what is trained itself; if not, only of the average."""
    decode: Callable[[], Decode]
    """Loads the VAE's decoder; called when the first picture is due."""
    prompts: Mapping[str, Prompt]
    context: Callable[[str], TextContext]
    """A prompt's context, from the cache."""
    references: Callable[[Prompt], References | None]
    """A prompt's references, from the cache."""
    reference_crops: Mapping[str, Crop]
    """The reference images of all prompts, by path."""
    world: World
    notice: Callable[[str], None]
    """Tells the user what could not be drawn."""
    drawn: set[int]
    """Steps whose sheet the events name (`drawn_steps`)."""
    is_sharded: bool = False
    """Whether each model call is made by all ranks together: those without an image repeat one."""
    failures: int = 0
    """Images in a row, up to now, that could not be made, the ranks one after the other. Rank 0 counts."""

    @property
    def count(self) -> int:
        """Pictures of one view: the rows of the sheet."""
        return len(self.prompts) * len(self.options.sizes) * self.options.num_validation_images

    @property
    def keeps_base(self) -> bool:
        """Whether the base model's pictures can be drawn at any time, and not only before the first step."""
        return self.trained.disabled() is not None

    @property
    def lacks_base(self) -> bool:
        """Whether the base model's pictures are wanted and not there yet. All ranks ask, and rank 0 looks."""
        return self.world.decide([self.world.is_main and bool(self._missing_of_base())])[0]

    def is_complete(self, step: int) -> bool:
        """Whether the sheet of `step` is there and the events name it. All ranks ask, and rank 0 looks."""
        return self.world.decide([self._has_sheet(step)])[0]

    def base(self, step: int, report: Callable[[int, int], None]) -> ValidationEvent | None:
        """Draw the base model's pictures and their sheet, as step 0: all before the first step, what is missing later.
        None if nothing is missing, or it cannot be drawn any more at `step`.
        """
        wanted = self._agreed(0, self._wanted_of_base(step) if self.world.is_main else None)
        if wanted is None:
            return None
        is_as_it_is = step == 0 and self.options.disable_benchmark
        with (None if is_as_it_is else self.trained.disabled()) or contextlib.nullcontext():
            return self._drawn(0, wanted, report)

    def draw(self, step: int, report: Callable[[int, int], None]) -> ValidationEvent | None:
        """Draw every prompt into the folder of `step`, with what is trained and its average as they are wanted, and
        the sheet of all steps so far. Step 0 is drawn as the model is, without an average. None if no picture could be
        made.
        """
        wanted = self._agreed(step, self._planned(step))
        return None if wanted is None else self._drawn(step, wanted, report)

    def _wanted_of_base(self, step: int) -> list[Picture] | None:
        """The base model's pictures that are to be drawn at `step`; none where only the sheet is. None if neither."""
        if step == 0:
            return self._planned(0)
        missing = self._missing_of_base()
        if missing:
            return missing if self.keeps_base else None
        return None if self.options.disable_benchmark or self._has_sheet(0) else []

    def _agreed(self, step: int, wanted: list[Picture] | None) -> list[Picture] | None:
        """Rank 0's `wanted` of the pictures of `step`. None if there is nothing to make, or too much failed before."""
        planned = self._planned(step)
        agreed = None
        if wanted is not None and self.failures < MAX_FAILURES:
            agreed = [planned.index(picture) for picture in wanted], sorted(self.both_at_once)
        agreed = self.world.broadcast_json(agreed)
        if agreed is None:
            return None
        indices, both = agreed
        self.both_at_once = frozenset((width, height) for width, height in both)
        return [planned[index] for index in indices]

    def _drawn(self, step: int, wanted: list[Picture], report: Callable[[int, int], None]) -> ValidationEvent | None:
        """Draw `wanted`, then the sheet of `step`. The event lists every picture of that step that is there."""
        attempts = self._draw_share(wanted, report)
        self.world.barrier("the validation images")
        by_rank = self.world.gather_json(attempts)
        if not self.world.is_main:
            return None
        reasons: dict[str, str | None] = dict(attempt for share in by_rank for attempt in share)
        if not self.world.is_alone:
            for path, reason in reasons.items():
                self._count(self.run.root / path, reason)
        made = [picture for picture in wanted if reasons.get(picture.path, "not tried") is None]
        sheet = sheet_of(self.run, step)
        has_sheet = (made or not wanted) and self._attempt(partial(self._make_sheet, step), sheet)
        if has_sheet:
            self.drawn.add(step)
        elif not made:
            return None
        return ValidationEvent(
            step=step,
            pictures=tuple(each for each in self._planned(step) if each in made or each not in wanted),
            sheet=str(sheet.relative_to(self.run.root)) if has_sheet else None,
        )

    def _draw_share(self, wanted: list[Picture], report: Callable[[int, int], None]) -> list[tuple[str, str | None]]:
        """Draw this rank's share of `wanted`, until `MAX_FAILURES` of it in a row fail. Returns the path of each
        picture that was tried, and why it could not be made; None for those that are.
        """
        steps = self.options.validation_num_inference_steps
        attempts: list[tuple[str, str | None]] = []
        failures, before = self.failures, 0
        with contextlib.ExitStack() as stack:

            @cache
            def ready() -> Denoiser:
                """The model, from the first image on: if it cannot be loaded, that costs the image alone."""
                denoise = stack.enter_context(self.model.ready())
                stack.callback(ready.cache_clear)
                return denoise

            for pictures in self._rounds(wanted):
                progress = partial(_overall, report, before * steps, len(pictures), len(wanted) * steps)
                before += len(pictures)
                with self._view_of(pictures[0], by_all=True):
                    if self.world.rank < len(pictures) and failures < MAX_FAILURES:
                        picture = pictures[self.world.rank]
                        reason = self._try(picture, pictures, ready, progress)
                        failures = 0 if reason is None else failures + 1
                        attempts.append((picture.path, reason))
                        if self.world.is_alone:
                            self._count(self.run.root / picture.path, reason)
                    elif self._in_step:
                        self._repeat(pictures, ready)
        return attempts

    @property
    def _in_step(self) -> bool:
        """Whether other ranks wait for each model call of this one."""
        return self.is_sharded and not self.world.is_alone

    @property
    def _shares_trained(self) -> bool:
        return self.trained.shards is not None

    def _rounds(self, wanted: list[Picture]) -> list[list[Picture]]:
        """What the ranks draw at the same time: rank r the r-th of each round. The larger pictures come first, so that
        no rank draws all of them. Where ranks call the model together, or share out what is trained, a round is of one
        view: the model computes with the average on all of them or on none.
        """
        size = self.world.writing_ranks
        views = [wanted]
        if size > 1:
            views = [sorted(wanted, key=lambda picture: -picture.width * picture.height)]
        if self.is_sharded or self._shares_trained:
            views = [[each for each in views[0] if each.is_ema == is_ema] for is_ema in (False, True)]
        return [view[start : start + size] for view in views for start in range(0, len(view), size)]

    def _try(
        self,
        picture: Picture,
        pictures: Sequence[Picture],
        ready: Callable[[], Denoiser],
        report: Callable[[int, int], None],
    ) -> str | None:
        """Make an image of a round. Returns why it cannot be made; None if it is."""
        calls = CountedCalls(ready)
        reporting = False

        def reported(done: int, total: int) -> None:
            nonlocal reporting
            reporting = True
            report(done, total)
            reporting = False

        def is_fatal() -> bool:
            """Whether `report` ends the run, or other ranks wait in a model call that this one cannot make any more."""
            return reporting or (self._in_step and calls.started > 0 and calls.done < self._calls(pictures))

        both = self._draws_both(pictures if self._in_step else [picture])
        reason = failure_reason(lambda: self._make(picture, calls.opened, both, reported), is_fatal)
        if reason is not None:
            release_memory(self.world.device)  # outside of the handler, whose traceback holds what was computed
            if self._in_step and not calls.started:
                self._repeat(pictures, ready)
        return reason

    def _repeat(self, pictures: Sequence[Picture], ready: Callable[[], Denoiser]) -> None:
        """Make the model calls of a round without an image, for the other ranks."""
        with self._view_of(pictures[0]):
            self._image(ready(), lambda latents: latents[:, :3], pictures[0], self._draws_both(pictures))

    def _draws_both(self, pictures: Sequence[Picture]) -> bool:
        """Whether the two predictions of guidance share a pass for each of `pictures`."""
        return all((each.width, each.height) in self.both_at_once for each in pictures)

    def _calls(self, pictures: Sequence[Picture]) -> int:
        """Model calls of each rank in a round of `pictures`."""
        is_one = self.scales.real == 1.0 or self._draws_both(pictures)
        return self.options.validation_num_inference_steps * (1 if is_one else 2)

    def _attempt(self, make: Callable[[], None], path: Path) -> bool:
        """Make an image, unless too many failed. Returns whether it is made; if not, a notice says why."""
        if self.failures >= MAX_FAILURES:
            return False
        reason = failure_reason(make)
        if reason is not None:
            release_memory(self.world.device)  # outside of the handler, whose traceback holds what was computed
        self._count(path, reason)
        return reason is None

    def _count(self, path: Path, reason: str | None) -> None:
        """Count an image that was tried; a notice says why it could not be made."""
        if reason is None:
            self.failures = 0 if self.failures < MAX_FAILURES else self.failures
            return
        self.failures += 1
        text = f"{path} could not be made: {reason} Training goes on without it."
        if self.failures == MAX_FAILURES:
            text += (
                f" {MAX_FAILURES} images in a row failed: none are drawn until the next start of this run. Before it, "
                "mend what is said above, or give --validation_disable."
            )
        self.notice(text)

    def _view_of(self, picture: Picture, *, by_all: bool = False) -> contextlib.AbstractContextManager[None]:
        """A block in which the model is what `picture` shows. Ranks that share out what is trained enter it all
        together, for a round (`by_all`); the others for an image each, which alone is lost if it cannot be entered.
        """
        is_due = picture.is_ema and by_all == self._shares_trained
        return self.ema.applied() if is_due and self.ema else contextlib.nullcontext()

    def _make(
        self, picture: Picture, ready: Callable[[], Denoise], both: bool, report: Callable[[int, int], None]
    ) -> None:
        path = self.run.root / picture.path
        for folder in reversed(path.parents):
            if folder.is_relative_to(self.run.validations):
                folder.mkdir(exist_ok=True)  # one by one: an error then names what lies in the way
        with self._view_of(picture):
            image = self._image(ready(), self.decode(), picture, both, report)
        _save(image, path, self._parameters(picture))

    def _image(
        self,
        denoise: Denoise,
        decode: Decode,
        picture: Picture,
        both: bool,
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
            both_at_once=both,
            report=report,
        )
        return image

    def _condition(self, picture: Picture, text: str) -> Condition:
        """`text` with the references of `picture`."""
        condition = Condition.at(self.context(text), self.scales.embedded, self.references(self.prompts[picture.name]))
        return condition.mapped(lambda tensor: tensor.to(self.world.device))

    def _planned(self, step: int) -> list[Picture]:
        """The live pictures, then the average's."""
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
        """What the picture was made with, as it is kept inside the file."""
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
        """Whether the sheet of `step` is there and the events name it."""
        return step in self.drawn and sheet_of(self.run, step).is_file()

    def _missing_of_base(self) -> list[Picture]:
        """The base model's pictures that are wanted, and are not there as they would be drawn now."""
        wanted = [] if self.options.disable_benchmark else self._planned(0)
        return [picture for picture in wanted if not self._is_drawn(picture)]

    def _is_drawn(self, picture: Picture) -> bool:
        """Whether the picture is there, whole, and was made with the parameters of now."""
        image = _read(self.run.root / picture.path, picture)
        if image is None:
            return False
        said = image.info.get("parameters") if image.format == "PNG" else image.getexif().get(_EXIF_DESCRIPTION)
        return bool(said == self._parameters(picture))

    def _make_sheet(self, step: int) -> None:
        """Rows are prompts, columns are steps: references where there are any, the base, then the latest, at most
        `SHEET_COLUMNS`. An average stands to the right of what it averages. What is no readable picture leaves an
        empty cell.
        """
        folders = (folder for folder in self.run.validations.iterdir() if folder.is_dir())
        matches = (_STEP_FOLDER.fullmatch(folder.name) for folder in folders)
        steps = sorted(past for match in matches if match and (past := int(match[1])) <= step)
        if len(steps) > SHEET_COLUMNS:
            steps = [steps[0], *steps[1 - SHEET_COLUMNS :]]
        columns: list[list[Picture]] = []
        heads: list[str] = []
        for past in steps:
            planned = self._planned(past)
            for start in range(0, len(planned), self.count):
                columns.append(planned[start : start + self.count])
                name = "base" if past == 0 else f"step {past}"
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
        """The references of `picture` side by side; None where there are none, or a file has changed."""
        try:
            images = [pixels_of(self.reference_crops[path]) for path in picture.references]
        except DataError:
            return None
        return side_by_side([Image.fromarray(image) for image in images]) if images else None


_STEP_FOLDER = re.compile(r"step-(\d{6,})")
_EXIF_DESCRIPTION = 0x010E


def _overall(
    report: Callable[[int, int], None], before: int, at_once: int, total: int, done: int, _of_this_one: int
) -> None:
    """Progress over all pictures, from the progress within one of those that are drawn at once."""
    report(before + at_once * done, total)


def drawn_steps(run: RunDirectory) -> set[int]:
    """Steps whose sheet the events name; not those of which a checkpoint was saved again since, by other weights."""
    return _steps_with(run, "sheet")


def measured_steps(run: RunDirectory) -> set[int]:
    """Steps whose drift the events have; not those of which a checkpoint was saved again since, by other weights."""
    return _steps_with(run, "drift", "ema_drift")


def _steps_with(run: RunDirectory, *keys: str) -> set[int]:
    """Steps of the events that have one of `keys`, as `drawn_steps` says."""
    steps: set[int] = set()
    for event in read_events(run.events, kinds=("checkpoint", "validation")):
        step = event.get("step")
        if isinstance(step, int) and any(event.get(key) is not None for key in keys):
            steps.add(step)
        elif event.get("state") == "saved":
            steps -= {step}
    return steps


def sheet_of(run: RunDirectory, step: int) -> Path:
    """The contact sheet of the pictures of `step`."""
    return run.validation(step) / "sheet.png"


def failure_reason(make: Callable[[], None], is_fatal: Callable[[], bool] = lambda: False) -> str | None:
    """Why `make` failed: a user's error, the file system or memory. None if it did not. Raised are a bug, a stop, and
    after a failure that `is_fatal` all.
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
        if isinstance(error, OSError):  # an encoder's of Pillow
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
"""What Pillow raises for a damaged file."""


def _read(path: Path, picture: Picture) -> Image.Image | None:
    """The whole image in a file of the size of `picture`; None where that is missing, damaged or of another size."""
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
    """Write through a temporary name, so that a page never shows half a picture."""
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
