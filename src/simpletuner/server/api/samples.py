"""Trying a LoRA: pictures of prompts, drawn by `simpletuner sample --serve`."""

import asyncio
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter
from pydantic import BaseModel, Field

from simpletuner.base.imagefiles import PICTURE_SUFFIXES
from simpletuner.config.datasets import MOST_REFERENCES
from simpletuner.runs.layout import LORA_NAME
from simpletuner.server.body import RequestBody
from simpletuner.server.context import Context, InContext
from simpletuner.server.faults import Fault
from simpletuner.server.roots import Roots
from simpletuner.server.runs import RunName, part_of, run_at
from simpletuner.server.sampler import run_in_the_way
from simpletuner.server.series import Damaged, decoded
from simpletuner.server.thumbnails import picture_type
from simpletuner.server.work import CommandJob

router = APIRouter()

FOLDER = "samples"
"""Below a run: where its pictures go; without a run, below the workspace."""
KEPT = 500
"""Pictures that are listed, the newest first."""

PromptText = Annotated[str, Field(min_length=1, max_length=4000, pattern=r"^[^\x00]*$")]
Side = Annotated[int, Field(ge=16, le=2048, multiple_of=16)]
Strength = Annotated[float, Field(ge=-10, le=10, allow_inf_nan=False)]


class ActingLora(RequestBody):
    """A LoRA and how strongly it acts."""

    path: str = Field(max_length=4096)
    """A .safetensors file, or a folder that holds one such as a checkpoint's."""
    strength: Strength = 1.0


class ToDraw(RequestBody):
    """What to draw."""

    run: str | None = Field(default=None, max_length=4096)
    """Whose model draws, and whose finished LoRA acts unless `loras` names others."""
    prompts: list[PromptText] = Field(min_length=1, max_length=8)
    seed: int = Field(default=42, ge=0, lt=2**32)
    width: Side = 1024
    height: Side = 1024
    steps: int | None = Field(default=None, ge=1, le=500)
    """By default what suits the model."""
    guidance: float | None = Field(default=None, ge=0, le=100, allow_inf_nan=False)
    """By default what suits the model."""
    count: int = Field(default=1, ge=1, le=16)
    """Pictures of each prompt, with the seeds `seed`, `seed` + 1 and so on."""
    loras: list[ActingLora] | None = Field(default=None, max_length=8)
    """An empty list is the base model; null, the run's finished LoRA."""
    references: list[Annotated[str, Field(max_length=4096)]] = Field(default=[], max_length=MOST_REFERENCES)
    """Image files that each picture is drawn with, in this order."""
    strengths: list[Strength] = Field(default=[], max_length=12)
    """Draw each picture once at each of these; they multiply the strengths of all LoRAs, and 0 is the base model."""


class DrawnPicture(BaseModel):
    """A picture that was drawn before, and what it was drawn from as far as it tells."""

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
async def sample(here: InContext, wanted: ToDraw) -> CommandJob:
    """Draw pictures. The result is {"pictures": [their paths]}, and grows as they come."""
    request = sample_request(here, wanted)
    run = await asyncio.to_thread(run_in_the_way, here.roots)
    if run is not None:
        raise Fault.of(
            409,
            f"{run} is training, and has the memory that drawing would take",
            remedy="Wait until it has ended, or stop it. Its validation pictures show how far it is.",
        )
    shown = partial(_shown, here.roots)
    return here.jobs.begin("sample", partial(here.sampler.draw, request=request, shown=shown))


@router.get("/run/samples")
def samples(here: InContext, run: RunName) -> list[DrawnPicture]:
    """The pictures that were drawn with a run, newest first."""
    directory = run_at(here.roots, run)
    folder = part_of(here.roots, directory, directory.root / FOLDER)
    found = [path for path in folder.glob("*.png") if path.is_file() and not path.is_symlink()]
    found.sort(key=lambda path: path.stat().st_mtime, reverse=True)
    told = (_told(path, here.roots.shown(path)) for path in found[:KEPT])
    return [one for one in told if one is not None]


def sample_request(here: Context, wanted: ToDraw) -> dict[str, Any]:
    """What `simpletuner sample --serve` is asked for.

    Raises:
        Fault: 403, a path outside the roots; 404, no such run; 422, no LoRA or image is there.
    """
    out = here.workspace / FOLDER
    request: dict[str, Any] = {}
    if wanted.run is not None:
        directory = run_at(here.roots, wanted.run)
        out = part_of(here.roots, directory, directory.root / FOLDER)
        request["run"] = here.roots.shown(directory.root)
    request |= {
        "out": here.roots.shown(here.roots.resolve(str(out))),
        "prompt": wanted.prompts,
        "strength": wanted.strengths,
        "seed": wanted.seed,
        "width": wanted.width,
        "height": wanted.height,
        "steps": wanted.steps,
        "guidance": wanted.guidance,
        "num": wanted.count,
    }
    if wanted.loras is not None:
        loras = [(lora_file(here.roots, lora.path), lora.strength) for lora in wanted.loras]
        request["lora"] = [f"{here.roots.shown(file)}:{strength}" for file, strength in loras]
    if wanted.references:
        request["references"] = [here.roots.shown(image_file(here.roots, text)) for text in wanted.references]
    return {name: value for name, value in request.items() if value is not None}


def image_file(roots: Roots, text: str) -> Path:
    """The image file that `text` names.

    Raises:
        Fault: 403, it lies outside the roots; 422, none is there.
    """
    path = roots.resolve(text)
    if path.suffix.lower() not in PICTURE_SUFFIXES or not path.is_file():
        raise Fault.of(422, f"{text}: no image is there", "an image file")
    return path


def lora_file(roots: Roots, text: str) -> Path:
    """The LoRA that `text` names: a file, or a folder that holds one.

    Raises:
        Fault: 403, it lies outside the roots; 422, none is there.
    """
    path = roots.resolve(text)
    file = roots.resolve(str(path / LORA_NAME)) if path.is_dir() else path
    if file.suffix != ".safetensors" or not file.is_file():
        raise Fault.of(422, f"{text}: no LoRA is there", "a .safetensors file, or a folder with one")
    return file


def _shown(roots: Roots, text: str) -> str:
    """A picture's path as the page has it, of what the sampler says, which works in the workspace."""
    return roots.shown((roots.workspace / text).resolve())


def _told(path: Path, shown: str) -> DrawnPicture | None:
    """A picture with what it says of itself; None where it is none."""
    # Takes a moment to import: the first page needs none.
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
        known = {name: parameters.get(name) for name in ("prompt", "seed", "steps", "guidance")}
        told = {name: parameters.get(name, []) for name in ("loras", "references")}
        return DrawnPicture(path=shown, width=width, height=height, **told, **known)
    except (Damaged, ValueError, AttributeError):  # another program's parameters
        return DrawnPicture(path=shown, width=width, height=height)
