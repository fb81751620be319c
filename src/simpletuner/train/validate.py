"""Looking at a run while it trains: pictures of the prompts, and the loss on held-out pictures."""

import contextlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from jaxtyping import Float
from PIL import Image, PngImagePlugin
from torch import Tensor

from simpletuner.config.options.validation import ValidationOptions
from simpletuner.data.batch import Batch
from simpletuner.data.sheet import contact_sheet
from simpletuner.flow.condition import Condition, TextContext
from simpletuner.flow.loss import flow_loss
from simpletuner.flux2.denoiser import Denoiser
from simpletuner.flux2.generate import generate
from simpletuner.runs.events import Picture, ValidationEvent
from simpletuner.runs.layout import EMA_FOLDER, RunDirectory
from simpletuner.train.ema import Ema
from simpletuner.train.trained import Trained

SHEET_COLUMNS = 8


@dataclass(frozen=True)
class HeldOutLoss:
    """The loss on samples that are not trained on, at fixed sigmas and fixed noise."""

    denoise: Denoiser
    count: int
    """Held-out samples."""
    load: Callable[[int], Mapping[float, Batch]]
    """One of them, as a batch of one for each sigma."""
    device: torch.device

    @torch.no_grad()
    def __call__(self, report: Callable[[int, int], None]) -> dict[float, float]:
        """Mean squared velocity error over the samples, at each sigma."""
        sums: dict[float, float] = {}
        self.denoise.transformer.eval()
        for index in range(self.count):
            for sigma, batch in self.load(index).items():
                sums[sigma] = sums.get(sigma, 0.0) + self._loss(batch.to(self.device))
            report(index + 1, self.count)
        self.denoise.transformer.train()
        return {sigma: total / self.count for sigma, total in sums.items()}

    def _loss(self, batch: Batch) -> float:
        loss = flow_loss(self.denoise, batch.latents, batch.condition, sigma=batch.sigma, noise=batch.noise)
        return loss.item()


@dataclass(frozen=True)
class Painter:
    """Draws the validation prompts with the model as it is."""

    run: RunDirectory
    options: ValidationOptions
    seed: int
    denoise: Denoiser
    trained: Trained
    ema: Ema | None
    """The average, if pictures are made of it."""
    has_live: bool
    """Whether pictures are made of what is trained itself; if not, only of the average."""
    decode: Callable[[], Callable[[Float[Tensor, "b 128 h w"]], Float[Tensor, "b 3 H W"]]]
    """Loads the VAE's decoder; called when the first picture is due."""
    prompts: Mapping[str, str]
    context: Callable[[str], TextContext]
    """A prompt's context, from the cache."""
    device: torch.device

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
        """Whether the base model's pictures are wanted and not there yet."""
        wanted = [] if self.options.disable_benchmark else self._planned(0)
        return not all(self._is_drawn(picture) for picture in wanted)

    def base(self, step: int, report: Callable[[int, int], None]) -> ValidationEvent | None:
        """The base model's pictures, as step 0. None if they are there, or cannot be drawn any more at `step`."""
        if not self.lacks_base:
            return None
        disabled = self.trained.disabled()
        if disabled is None and step > 0:
            return None
        with disabled or contextlib.nullcontext():
            return self.draw(0, report)

    def draw(self, step: int, report: Callable[[int, int], None]) -> ValidationEvent:
        """Draw every prompt into the folder of `step`, with what is trained and its average as they are wanted, and
        the sheet of all steps so far. Step 0 is drawn as the model is, without an average.
        """
        self.denoise.transformer.eval()
        planned = self._planned(step)
        calls = self.options.validation_num_inference_steps
        for index, picture in enumerate(planned):
            with self.ema.applied() if picture.is_ema and self.ema else contextlib.nullcontext():
                image = self._image(picture, partial(_overall, report, index * calls, len(planned) * calls))
            path = self.run.root / picture.path
            path.parent.mkdir(parents=True, exist_ok=True)
            _save(image, path, self._parameters(picture))
        self.denoise.transformer.train()
        sheet = self._sheet(step)
        return ValidationEvent(step=step, pictures=tuple(planned), sheet=sheet)

    def _image(self, picture: Picture, report: Callable[[int, int], None]) -> Image.Image:
        real = self.options.validation_guidance_real
        (image,) = generate(
            self.denoise,
            self.decode(),
            self._condition(picture.prompt),
            width=picture.width,
            height=picture.height,
            steps=self.options.validation_num_inference_steps,
            seed=picture.seed,
            real_guidance=real,
            negative=None if real == 1.0 else self._condition(self.options.validation_negative_prompt),
            report=report,
        )
        return image

    def _condition(self, prompt: str) -> Condition:
        return Condition.at(self.context(prompt).to(self.device), self.options.validation_guidance)

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
                prompt=prompt,
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
            },
            ensure_ascii=False,
        )

    def _is_drawn(self, picture: Picture) -> bool:
        path = self.run.root / picture.path
        if not path.exists():
            return False
        with Image.open(path) as image:
            if path.suffix == ".png":
                return image.info.get("parameters") == self._parameters(picture)
            return bool(image.getexif().get(_EXIF_DESCRIPTION) == self._parameters(picture))

    def _sheet(self, step: int) -> str:
        """Rows are prompts, columns are steps: the base first, then the latest, at most `SHEET_COLUMNS`. An average
        stands to the right of what it averages.
        """
        folders = sorted(folder for folder in self.run.validations.glob("step-*") if folder.is_dir())
        steps = [int(folder.name.removeprefix("step-")) for folder in folders]
        steps = [past for past in steps if past <= step]
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
        rows = [[_open(self.run.root / column[row].path) for column in columns] for row in range(self.count)]
        labels = [picture.prompt for picture in columns[0]]
        sheet = contact_sheet(rows, labels, heads)
        path = self.run.validation(step) / "sheet.png"
        _save(sheet, path, "")
        return str(path.relative_to(self.run.root))


_EXIF_DESCRIPTION = 0x010E


def _overall(report: Callable[[int, int], None], before: int, total: int, done: int, _of_this_one: int) -> None:
    """Progress over all pictures, from the progress within one."""
    report(before + done, total)


def _open(path: Path) -> Image.Image | None:
    if not path.exists():
        return None
    with Image.open(path) as image:
        return image.convert("RGB")


def _save(image: Image.Image, path: Path, parameters: str) -> None:
    """Write through a temporary name, so that a page never shows half a picture."""
    part = path.with_name(f".{path.stem}.part{path.suffix}")
    if path.suffix == ".png":
        info = PngImagePlugin.PngInfo()
        info.add_itxt("parameters", parameters)
        image.save(part, pnginfo=info)
    else:
        exif = Image.Exif()
        exif[_EXIF_DESCRIPTION] = parameters
        image.save(part, quality=95, exif=exif)
    part.replace(path)
