"""Try a LoRA: generate images for prompts with `simpletuner sample --serve`."""

import asyncio
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter
from pydantic import BaseModel, Field

from simpletuner.base.imagefiles import IMAGE_SUFFIXES
from simpletuner.config.datasets import MAX_REFERENCES
from simpletuner.runs.layout import LORA_NAME
from simpletuner.server.body import RequestBody
from simpletuner.server.context import InContext, ServerContext
from simpletuner.server.faults import Fault
from simpletuner.server.roots import Roots
from simpletuner.server.runs import RunName, path_in_run, run_at
from simpletuner.server.sampler import run_on_sampler_gpu
from simpletuner.server.series import DamagedText, decoded
from simpletuner.server.thumbnails import picture_type
from simpletuner.server.work import CommandJob

router = APIRouter()

FOLDER = "samples"
"""Folder for the images, below the run or, without a run, below the workspace."""
MAX_LISTED = 500
"""Images that the list holds, the newest first."""

PromptText = Annotated[str, Field(min_length=1, max_length=4000, pattern=r"^[^\x00]*$")]
Side = Annotated[int, Field(ge=16, le=2048, multiple_of=16)]
Strength = Annotated[float, Field(ge=-10, le=10, allow_inf_nan=False)]


class WeightedLora(RequestBody):
    """A LoRA and its strength."""

    path: str = Field(max_length=4096)
    """A .safetensors file, or a folder that contains one, such as a checkpoint's."""
    strength: Strength = 1.0


class SampleJobRequest(RequestBody):
    """Images to generate."""

    run: str | None = Field(default=None, max_length=4096)
    """The run whose model generates the images; its finished LoRA is used unless `loras` names others."""
    prompts: list[PromptText] = Field(min_length=1, max_length=8)
    seed: int = Field(default=42, ge=0, lt=2**32)
    width: Side = 1024
    height: Side = 1024
    steps: int | None = Field(default=None, ge=1, le=500)
    """By default the model's own value."""
    guidance: float | None = Field(default=None, ge=0, le=100, allow_inf_nan=False)
    """By default the model's own value."""
    count: int = Field(default=1, ge=1, le=16)
    """Images per prompt, with the seeds `seed`, `seed` + 1 and so on."""
    loras: list[WeightedLora] | None = Field(default=None, max_length=8)
    """An empty list means the base model; null means the run's finished LoRA."""
    references: list[Annotated[str, Field(max_length=4096)]] = Field(default=[], max_length=MAX_REFERENCES)
    """Reference images for each generated image, in this order."""
    strengths: list[Strength] = Field(default=[], max_length=12)
    """Generate each image once at each of these factors for the strengths of all LoRAs; 0 is the base model."""


class SampleFile(BaseModel):
    """An image generated earlier, with the parameters that its file records."""

    path: str
    prompt: str | None = None
    seed: int | None = None
    width: int
    height: int
    steps: int | None = None
    guidance: float | None = None
    loras: list[dict[str, Any]] = []
    """Name, sha256 and strength of each."""
    references: list[dict[str, str]] = []
    """Name and sha256 of each reference image."""


@router.post("/jobs/sample", status_code=202)
async def sample(context: InContext, body: SampleJobRequest) -> CommandJob:
    """Generate images. The job's result is {"pictures": [paths]}, and grows while it runs."""
    request = sample_request(context, body)
    run = await asyncio.to_thread(run_on_sampler_gpu, context.roots)
    if run is not None:
        raise Fault.of(
            409,
            f"{run} is training and uses the memory that sampling needs",
            remedy="Wait until it has ended, or stop it. Its validation images show its progress.",
        )
    display_path = partial(_display_path, context.roots)
    return context.jobs.begin("sample", partial(context.sampler.sample, request=request, display_path=display_path))


@router.get("/run/samples")
def samples(context: InContext, run: RunName) -> list[SampleFile]:
    """The images generated with a run, newest first."""
    directory = run_at(context.roots, run)
    folder = path_in_run(context.roots, directory, directory.root / FOLDER)
    paths = [path for path in folder.glob("*.png") if path.is_file() and not path.is_symlink()]
    paths.sort(key=lambda path: path.stat().st_mtime, reverse=True)
    images = (_sampled_image(path, context.roots.display_path(path)) for path in paths[:MAX_LISTED])
    return [image for image in images if image is not None]


def sample_request(context: ServerContext, body: SampleJobRequest) -> dict[str, Any]:
    """Build the request for `simpletuner sample --serve`.

    Raises:
        Fault: 403, a path lies outside the roots; 404, there is no such run; 422, there is no LoRA or image.
    """
    out = context.workspace / FOLDER
    request: dict[str, Any] = {}
    if body.run is not None:
        directory = run_at(context.roots, body.run)
        out = path_in_run(context.roots, directory, directory.root / FOLDER)
        request["run"] = context.roots.display_path(directory.root)
    request |= {
        "out": context.roots.display_path(context.roots.resolve(str(out))),
        "prompt": body.prompts,
        "strength": body.strengths,
        "seed": body.seed,
        "width": body.width,
        "height": body.height,
        "steps": body.steps,
        "guidance": body.guidance,
        "num": body.count,
    }
    if body.loras is not None:
        loras = [(lora_file(context.roots, lora.path), lora.strength) for lora in body.loras]
        request["lora"] = [f"{context.roots.display_path(file)}:{strength}" for file, strength in loras]
    if body.references:
        request["references"] = [
            context.roots.display_path(image_file(context.roots, text)) for text in body.references
        ]
    return {name: value for name, value in request.items() if value is not None}


def image_file(roots: Roots, text: str) -> Path:
    """Return the path of the image file that `text` names.

    Raises:
        Fault: 403, it lies outside the roots; 422, there is no image.
    """
    path = roots.resolve(text)
    if path.suffix.lower() not in IMAGE_SUFFIXES or not path.is_file():
        raise Fault.of(422, f"{text}: there is no image", "an image file")
    return path


def lora_file(roots: Roots, text: str) -> Path:
    """Return the path of the LoRA that `text` names: a file, or a folder that contains one.

    Raises:
        Fault: 403, it lies outside the roots; 422, there is no LoRA.
    """
    path = roots.resolve(text)
    file = roots.resolve(str(path / LORA_NAME)) if path.is_dir() else path
    if file.suffix != ".safetensors" or not file.is_file():
        raise Fault.of(422, f"{text}: there is no LoRA", "a .safetensors file, or a folder that contains one")
    return file


def _display_path(roots: Roots, text: str) -> str:
    """Convert an image path printed by the sampler, relative to the workspace, to the page's form."""
    return roots.display_path((roots.workspace / text).resolve())


def _sampled_image(path: Path, display_path: str) -> SampleFile | None:
    """Return an image with the parameters that its file records; None if the file is not a PNG."""
    # Slow to import, and the first page needs no image.
    from PIL import Image

    try:
        if picture_type(path) != "image/png":
            return None
        with Image.open(path, formats=("PNG",)) as image:
            width, height = image.size
            text = image.info.get("parameters", "{}")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return None
    try:
        parameters = decoded(str(text))
        scalars = {name: parameters.get(name) for name in ("prompt", "seed", "steps", "guidance")}
        lists = {name: parameters.get(name, []) for name in ("loras", "references")}
        return SampleFile(path=display_path, width=width, height=height, **lists, **scalars)
    except (DamagedText, ValueError, AttributeError):  # written by another program
        return SampleFile(path=display_path, width=width, height=height)
