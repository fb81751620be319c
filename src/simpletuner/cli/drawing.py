"""What `simpletuner sample` does once its request is known to be good."""

import io
import itertools
import json
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from jaxtyping import Float
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from simpletuner.base.console import complain
from simpletuner.base.errors import AccessError, CheckpointError, MemoryBudgetError
from simpletuner.base.files import file_errors_reported, sha256_file, write_atomic
from simpletuner.cli.progress import ReportSteps
from simpletuner.cli.sample import FROM_RUN, SampleConfig, Wanted
from simpletuner.config.flavours import flavour_of_base, sibling
from simpletuner.data.cache.latents import encode_crop, latent_key
from simpletuner.data.references import reference_crops
from simpletuner.data.sample import Crop
from simpletuner.flow.condition import Condition, References, TextContext
from simpletuner.flux2.components import check_precisions, load_base, open_autoencoder, open_text_encoder
from simpletuner.flux2.denoiser import Denoiser
from simpletuner.flux2.dialects import AdapterFile
from simpletuner.flux2.export import LoadedLora, attach_saved
from simpletuner.flux2.fixed import attach_fixed, check_fixed, read_for_drawing
from simpletuner.flux2.generate import fits_both, generate
from simpletuner.flux2.load import checked_skeleton
from simpletuner.flux2.lora import AdapterLayer, detach
from simpletuner.flux2.source import Source, locate
from simpletuner.flux2.text import control_token_notice
from simpletuner.flux2.tokens import reference_tokens
from simpletuner.flux2.transformer import Flux2Transformer
from simpletuner.memory.device import choose_device
from simpletuner.memory.exhausted import exhausted_memory, first_line
from simpletuner.memory.free import release_memory
from simpletuner.runs.layout import LORA_NAME
from simpletuner.train.placement import open_decoder, stream_blocks

CONTEXTS_KEPT = 32
"""Encoded prompts, in host memory: one of dev has 16 MB."""
_NAME_LENGTH = 40


@dataclass(frozen=True)
class Drawing:
    """A picture that was written, and what it was made from."""

    path: Path
    parameters: Mapping[str, Any]
    """As the picture has them inside: no path of this machine."""

    @property
    def described(self) -> dict[str, Any]:
        """Everything, for JSON."""
        return {"path": str(self.path), **self.parameters}


class Sampler:
    """Draws for one request after another. What a request needs is loaded once and kept for the next ones; one that
    asks for another model, or holds it in another way, lets it go first.

    The pictures are those of a new process, bit for bit.
    """

    def __init__(self) -> None:
        self._device = choose_device()
        self._base: _Base | None = None

    def draw(self, config: SampleConfig, loras: Sequence[Wanted], report: ReportSteps) -> Iterator[Drawing]:
        """Draw every picture of `config` and yield each as soon as it is written.

        One after the other, the text encoder and then the transformer are loaded; the first is freed before.

        Raises:
            ConfigError: this machine cannot run a precision, or a reference is no image that can be one.
            AccessError: the model cannot be reached.
            CheckpointError: a LoRA cannot be read or is of another model.
            MemoryBudgetError: something does not fit.
            DiskError: no space for a picture.
        """
        found = reference_crops(config.references)
        crops = [found[path] for path in config.references]
        if self._base is not None and not self._base.suits(config):
            self.release()
        if self._base is None:
            self._base = _Base(config, self._device)
        try:
            yield from self._base.pictures(config, loras, crops, report)
        except (MemoryError, RuntimeError) as error:
            if exhausted_memory(error) is None:
                raise
            self._base = None
            raise MemoryBudgetError.of(
                first_line(error), remedy="Take a smaller --width and --height, or a machine with more memory."
            ) from error

    def release(self) -> None:
        """Free the model."""
        self._base = None
        release_memory(self._device)


class _Base:
    """A base model: its contexts, its transformer with LoRAs on it and its decoder, each from when it is needed."""

    def __init__(self, config: SampleConfig, device: torch.device) -> None:
        check_precisions(config, device)
        self.device = device
        self.options = _model_options(config)
        self.source: Source = locate(config, report=complain)
        if self.source.distillation_warning is not None:
            complain(self.source.distillation_warning)
        self.files = _stamps(self.source)
        self.contexts: dict[str, TextContext] = {}
        self.reference_latents: dict[str, Float[Tensor, "128 h w"]] = {}
        self.transformer: Flux2Transformer | None = None
        self.decode = open_decoder(config, config, self.source, device)
        self.loras = _AttachedLoras()

    def suits(self, config: SampleConfig) -> bool:
        """Whether `config` asks for this model, its files are the same and it is held in the same way."""
        return self.options == _model_options(config) and self.files == _stamps(self.source)

    def pictures(
        self, config: SampleConfig, loras: Sequence[Wanted], crops: Sequence[Crop], report: ReportSteps
    ) -> Iterator[Drawing]:
        flavour = self.source.flavour
        steps = config.steps or flavour.steps
        guidance = flavour.guidance if config.guidance is None else config.guidance
        scales = flavour.scales(guidance, config.guidance_real)
        is_steered = scales.real != 1.0
        self.loras.check(loras, self.source)
        contexts = self.encoded(config, [*config.prompt, *([config.negative] if is_steered else [])])
        references = self.referred(config, crops)
        conditions = {
            prompt: Condition.at(context.to(self.device), scales.embedded, references)
            for prompt, context in contexts.items()
        }
        transformer = self.loaded(config)
        self.loras.attach(transformer)
        factors = config.strength or (1.0,)
        seeds = range(config.seed, config.seed + config.num)
        total = len(config.prompt) * len(seeds) * len(factors) * steps
        size = (config.width, config.height)
        both_at_once = is_steered and fits_both(
            transformer,
            self.source.text_length,
            size,
            self.device,
            references=0 if references is None else references.tokens.shape[1],
        )
        done = itertools.count(1)
        report(0, total)
        for prompt, seed, factor in itertools.product(config.prompt, seeds, factors):
            acting = self.loras.act([lora.strength * factor for lora in loras])
            (image,) = generate(
                Denoiser(transformer.eval(), config.reference_attention),
                self.decode(),
                conditions[prompt],
                width=config.width,
                height=config.height,
                steps=steps,
                seed=seed,
                real_guidance=scales.real,
                negative=conditions[config.negative] if is_steered else None,
                both_at_once=both_at_once,
                report=lambda *_: report(next(done), total),
            )
            parameters = {
                "prompt": prompt,
                "width": image.width,
                "height": image.height,
                "seed": seed,
                "steps": steps,
                "guidance": guidance,
                "guidance_real": config.guidance_real,
                "negative_prompt": config.negative,
                "model": self.source.name,
                "loras": acting,
                **({"references": _described(crops)} if crops else {}),
                **({"both_at_once": True} if both_at_once else {}),  # last bits depend on it
            }
            yield Drawing(_written(image, parameters, Path(config.out)), parameters)

    def encoded(self, config: SampleConfig, prompts: Sequence[str]) -> dict[str, TextContext]:
        """The context of each prompt. Each is encoded by itself, so it does not depend on what else is asked for."""
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self.contexts]
        if new:
            made = self._encode(config, new)
            if made is None:  # beside the transformer
                self._drop_transformer()
                made = self._encode(config, new)
            assert made is not None
            self.contexts |= dict(zip(new, made, strict=True))
        wanted = {prompt: self.contexts.pop(prompt) for prompt in dict.fromkeys(prompts)}
        self.contexts |= wanted
        for forgotten in list(self.contexts)[: -max(CONTEXTS_KEPT, len(wanted))]:
            del self.contexts[forgotten]
        return wanted

    def referred(self, config: SampleConfig, crops: Sequence[Crop]) -> References | None:
        """The reference images as tokens on the device. Latents of the last request are kept for the next one."""
        lacking = [crop for crop in crops if latent_key(crop, "") not in self.reference_latents]
        if lacking:
            encode = open_autoencoder(config, config, self.source, self.device, "encode").encode
            self.reference_latents |= {latent_key(crop, ""): encode_crop(crop, encode) for crop in lacking}
            del encode
            release_memory(self.device)
        self.reference_latents = {key: self.reference_latents[key] for key in (latent_key(crop, "") for crop in crops)}
        if not crops:
            return None
        references = reference_tokens([self.reference_latents[latent_key(crop, "")] for crop in crops])
        return references.mapped(lambda tensor: tensor.to(self.device))

    def _encode(self, config: SampleConfig, prompts: Sequence[str]) -> list[TextContext] | None:
        """The contexts of `prompts`; None where there is not enough memory beside the transformer."""
        try:
            folder = Path(tempfile.gettempdir())
            encoder = open_text_encoder(config, config, config, self.source, self.device, folder=folder, say=complain)
            encoded = encoder.encode_batches([[prompt] for prompt in prompts])
            contexts = [context.to(torch.device("cpu")) for batch in encoded for context in batch]
        except (MemoryError, RuntimeError) as error:
            if self.transformer is None or exhausted_memory(error) is None:
                raise
            return None
        for prompt in encoder.truncated:
            complain(f"Longer than {self.source.text_length} tokens, and shortened: {prompt[:60]}…")
        if encoder.control_tokens:
            complain(control_token_notice(encoder.control_tokens))
        del encoder, encoded
        release_memory(self.device)
        return contexts

    def loaded(self, config: SampleConfig) -> Flux2Transformer:
        """The transformer, where the options of offloading want it."""
        if self.transformer is None:
            transformer = load_base(config, config, self.source, self.device, report=complain)
            stream_blocks(transformer, config, self.device)
            self.transformer = transformer
        return self.transformer

    def _drop_transformer(self) -> None:
        self.transformer = None
        self.loras.forget()
        release_memory(self.device)


@dataclass(frozen=True)
class _LoraFile:
    """A LoRA's file as it was when it was read."""

    path: Path
    size: int
    modified_ns: int

    @classmethod
    def at(cls, path: Path) -> Self:
        file = path / LORA_NAME if path.is_dir() else path
        with file_errors_reported(file, CheckpointError, doing="read"):
            found = file.stat()
        return cls(file, found.st_size, found.st_mtime_ns)


@dataclass(frozen=True)
class _AttachedLora:
    """A LoRA, or an adapter of another kind, on a transformer."""

    file: _LoraFile
    sha256: str
    layers: Mapping[str, AdapterLayer]
    scales: Mapping[str, float]
    """Of each layer, at a strength of 1."""


class _AttachedLoras:
    """The LoRAs on a transformer. Those of the last request stay until other files are wanted."""

    def __init__(self) -> None:
        self._wanted: list[_LoraFile] = []
        self._contents: list[LoadedLora | AdapterFile] = []
        """Of what is wanted, until it is attached."""
        self._attached: list[_AttachedLora] = []

    def check(self, loras: Sequence[Wanted], source: Source) -> None:
        """Read the files of `loras`, as far as they are not attached. One of another model is found out before
        gigabytes are read: on a transformer without weights.
        """
        self._wanted = [_LoraFile.at(lora.path) for lora in loras]
        self._contents = []
        if self._are_attached():
            return
        contents = [read_for_drawing(file.path) for file in self._wanted]
        skeleton = checked_skeleton(source)
        for lora in contents:
            if isinstance(lora, LoadedLora):
                attach_saved(skeleton, lora)
                trained_on, unused = lora.metadata.get("base_model"), lora.unused
            else:
                check_fixed(skeleton, lora)
                trained_on, unused = lora.header.get("simpletuner.base_model"), len(lora.unread)
            if unused:
                complain(f"{lora.path.name} has {unused} tensors for a text encoder, which draws without them.")
            if trained_on not in (None, source.name) and not _are_siblings(trained_on, source):
                complain(f"{lora.path.name} was trained on {trained_on}; drawing with {source.name}.")
        self._contents = contents

    def attach(self, transformer: Flux2Transformer) -> None:
        """Put what was checked on `transformer`, in place of what is on it."""
        if self._are_attached():
            return
        contents = self._contents or [read_for_drawing(file.path) for file in self._wanted]
        self._contents = []
        while self._attached:
            detach(transformer, self._attached.pop().layers)
        for file, content in zip(self._wanted, contents, strict=True):
            layers: Mapping[str, AdapterLayer]
            if isinstance(content, LoadedLora):
                layers = attach_saved(transformer, content).layers
            else:
                layers = attach_fixed(transformer, content)
            scales = {name: layer.scale for name, layer in layers.items()}
            self._attached.append(_AttachedLora(file, sha256_file(file.path), layers, scales))

    def _are_attached(self) -> bool:
        return [lora.file for lora in self._attached] == self._wanted

    def act(self, strengths: Sequence[float]) -> list[dict[str, object]]:
        """Let each LoRA act at its strength, and return what acts. At 0 its layers are the bare ones."""
        for lora, strength in zip(self._attached, strengths, strict=True):
            for name, layer in lora.layers.items():
                layer.scale = lora.scales[name] * strength
                layer.is_enabled = strength != 0
        return [
            {"name": lora.file.path.name, "sha256": lora.sha256, "strength": strength}
            for lora, strength in zip(self._attached, strengths, strict=True)
        ]

    def forget(self) -> None:
        """The transformer they were on is gone."""
        self._attached = []


def _described(crops: Sequence[Crop]) -> list[dict[str, str]]:
    """The reference images, for a picture's parameters."""
    return [{"name": Path(crop.name).name, "sha256": crop.content} for crop in crops]


def _are_siblings(trained_on: str, source: Source) -> bool:
    """Whether a LoRA's base model and the one that draws are base and distilled weights of one size."""
    other = sibling(source.flavour)
    # A download of one's own has the repository's name.
    return other is not None and (flavour_of_base(trained_on) is other or other.title == trained_on)


def _model_options(config: SampleConfig) -> dict[str, Any]:
    """What must not change for a loaded model to be used again."""
    return config.model_dump(include=set(FROM_RUN) - {"model_type", "seed", "verify_base"})


def _stamps(source: Source) -> list[tuple[Path, int, int]]:
    """Path, size and time of each file of weights."""
    stamps = []
    for file in (*source.transformer.files, *source.vae.files, *source.text_encoder.files):
        with file_errors_reported(file, AccessError, doing="read"):
            found = file.stat()
        stamps.append((file, found.st_size, found.st_mtime_ns))
    return stamps


def _written(image: Image.Image, parameters: Mapping[str, Any], folder: Path) -> Path:
    """Write `image` as PNG with its parameters inside; returns its path, which was free."""
    info = PngInfo()
    info.add_itxt("parameters", json.dumps(parameters, ensure_ascii=False))
    buffer = io.BytesIO()
    image.save(buffer, "PNG", pnginfo=info)
    stem = re.sub(r"\W+", "-", parameters["prompt"].lower())[:_NAME_LENGTH].strip("-") or "picture"
    path = _free(folder / f"{stem}_{image.width}x{image.height}_{parameters['seed']}.png")
    write_atomic(path, buffer.getvalue(), sync=False)
    return path


def _free(path: Path) -> Path:
    """`path`, or the first of path-2, path-3, … that is not there."""
    found, number = path, 1
    while found.exists():
        number += 1
        found = path.with_stem(f"{path.stem}-{number}")
    return found
