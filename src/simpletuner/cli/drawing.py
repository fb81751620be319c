"""What `simpletuner sample` does once its request is known to be good."""

import contextlib
import io
import itertools
import json
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from simpletuner.base.console import complain
from simpletuner.base.errors import MemoryBudgetError
from simpletuner.base.files import sha256_file, write_atomic
from simpletuner.cli.sample import SampleConfig, Wanted
from simpletuner.flow.condition import Condition
from simpletuner.flux2.components import check_precisions, load_base, open_text_encoder
from simpletuner.flux2.denoiser import Denoiser
from simpletuner.flux2.export import LoadedLora, attach_saved, read_lora
from simpletuner.flux2.generate import generate
from simpletuner.flux2.load import checked_skeleton
from simpletuner.flux2.source import Source, locate
from simpletuner.memory.device import choose_device
from simpletuner.memory.exhausted import exhausted_memory, first_line
from simpletuner.memory.free import release_memory
from simpletuner.train.placement import open_decoder, stream_blocks

_NAME_LENGTH = 40


def draw_samples(config: SampleConfig, loras: Sequence[Wanted]) -> Iterator[Path]:
    """Draw every picture of `config` and give the path of each as soon as it is written.

    One after the other, the text encoder and then the transformer are in memory. Progress goes to standard error.

    Raises:
        ConfigError: this machine cannot run a precision.
        AccessError: the model cannot be reached.
        CheckpointError: a LoRA cannot be read or is of another model.
        MemoryBudgetError: something does not fit.
        DiskError: no space for a picture.
    """
    device = choose_device()
    check_precisions(config, device)
    source = locate(config, report=_say)
    saved = [read_lora(lora.path) for lora in loras]
    _check_fit(source, saved)
    try:
        yield from _Drawing(config, source, device).pictures(loras, saved)
    except (MemoryError, RuntimeError) as error:
        if exhausted_memory(error) is None:
            raise
        raise MemoryBudgetError.of(
            first_line(error), remedy="Take a smaller --width and --height, or a machine with more memory."
        ) from error


def _say(text: str) -> None:
    complain(text)


def _check_fit(source: Source, saved: Sequence[LoadedLora]) -> None:
    """Find a LoRA of another model out before gigabytes are read: on a transformer without weights."""
    skeleton = checked_skeleton(source)
    for lora in saved:
        attach_saved(skeleton, lora)
        trained_on = lora.metadata.get("base_model")
        if trained_on not in (None, source.name):
            _say(f"{lora.path.name} was trained on {trained_on}; drawing with {source.name}.")


class _Drawing:
    """One request, phase by phase."""

    def __init__(self, config: SampleConfig, source: Source, device: torch.device) -> None:
        self.config = config
        self.source = source
        self.device = device
        self.steps = config.steps or source.flavour.steps
        self.guidance = source.flavour.guidance if config.guidance is None else config.guidance

    def pictures(self, loras: Sequence[Wanted], saved: Sequence[LoadedLora]) -> Iterator[Path]:
        conditions = self.conditions()
        negative = conditions.pop() if self.config.guidance_real != 1.0 else None
        transformer = load_base(self.config, self.config, self.source, self.device, report=_say)
        for lora, content in zip(loras, saved, strict=True):
            attach_saved(transformer, content, strength=lora.strength)
        stream_blocks(transformer, self.config, self.device)
        decode = open_decoder(self.config, self.config, self.source, self.device)
        acting = [
            {"name": lora.path.name, "sha256": sha256_file(content.path), "strength": lora.strength}
            for lora, content in zip(loras, saved, strict=True)
        ]
        total = len(conditions) * self.config.num * self.steps
        with _lines(total) if self.config.progress else _bar(total) as report:
            for prompt, condition in zip(self.config.prompt, conditions, strict=True):
                for seed in range(self.config.seed, self.config.seed + self.config.num):
                    (image,) = generate(
                        Denoiser(transformer.eval()),
                        decode(),
                        condition,
                        width=self.config.width,
                        height=self.config.height,
                        steps=self.steps,
                        seed=seed,
                        real_guidance=self.config.guidance_real,
                        negative=negative,
                        report=report,
                    )
                    yield self.keep(image, prompt, seed, acting)

    def conditions(self) -> list[Condition]:
        """The condition of each prompt, then, where there is real guidance, of the negative one. Each is encoded by
        itself, so it does not depend on what else is asked for."""
        folder = Path(tempfile.gettempdir())
        encoder = open_text_encoder(
            self.config, self.config, self.config, self.source, self.device, folder=folder, say=_say
        )
        prompts = [*self.config.prompt, *([self.config.negative] if self.config.guidance_real != 1.0 else [])]
        encoded = encoder.encode_batches([[prompt] for prompt in prompts])
        conditions = [Condition.at(context.to(self.device), self.guidance) for batch in encoded for context in batch]
        for prompt in encoder.truncated:
            _say(f"Longer than {self.source.text_length} tokens, and shortened: {prompt[:60]}…")
        del encoder
        release_memory(self.device)
        return conditions

    def keep(self, image: Image.Image, prompt: str, seed: int, acting: Sequence[Mapping[str, object]]) -> Path:
        """Write `image` as PNG with what it was made from inside: no path of this machine."""
        parameters = {
            "prompt": prompt,
            "width": image.width,
            "height": image.height,
            "seed": seed,
            "steps": self.steps,
            "guidance": self.guidance,
            "guidance_real": self.config.guidance_real,
            "negative_prompt": self.config.negative,
            "model": self.source.name,
            "loras": acting,
        }
        info = PngInfo()
        info.add_itxt("parameters", json.dumps(parameters, ensure_ascii=False))
        buffer = io.BytesIO()
        image.save(buffer, "PNG", pnginfo=info)
        stem = re.sub(r"\W+", "-", prompt.lower())[:_NAME_LENGTH].strip("-") or "picture"
        path = _free(Path(self.config.out) / f"{stem}_{image.width}x{image.height}_{seed}.png")
        write_atomic(path, buffer.getvalue(), sync=False)
        return path


@contextlib.contextmanager
def _bar(total: int) -> Iterator[Callable[[int, int], None]]:
    # Takes a moment to import: only where there is progress to show.
    from tqdm import tqdm

    with tqdm(total=total, desc="drawing", unit="step", disable=None) as bar:

        def report(*_: int) -> None:
            bar.update()

        yield report


@contextlib.contextmanager
def _lines(total: int) -> Iterator[Callable[[int, int], None]]:
    done = itertools.count(1)

    def report(*_: int) -> None:
        _say(json.dumps({"what": "drawing", "done": next(done), "total": total}))

    yield report


def _free(path: Path) -> Path:
    """`path`, or the first of path-2, path-3, … that is not there."""
    found, number = path, 1
    while found.exists():
        number += 1
        found = path.with_stem(f"{path.stem}-{number}")
    return found
