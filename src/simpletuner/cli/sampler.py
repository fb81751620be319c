"""The sampler of `simpletuner sample`: loads the model and generates the images of valid requests."""

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
from simpletuner.base.errors import AccessError, CheckpointError, MemoryBudgetError, UserError
from simpletuner.base.files import file_errors_reported, sha256_file, write_atomic
from simpletuner.cli.progress import ReportSteps
from simpletuner.cli.sample import FROM_RUN, LoraWithStrength, SampleConfig
from simpletuner.config.flavours import flavour_of_base, sibling
from simpletuner.data.cache.latents import encode_crop, latent_key
from simpletuner.data.references import reference_crops
from simpletuner.data.sample import Crop
from simpletuner.flow.condition import Condition, References, TextContext
from simpletuner.flux2.components import check_precisions, load_base, open_autoencoder, open_text_encoder
from simpletuner.flux2.denoiser import Denoiser
from simpletuner.flux2.dialects import AdapterFile
from simpletuner.flux2.export import LoadedLora, attach_saved
from simpletuner.flux2.fixed import attach_fixed, check_fixed, read_for_sampling
from simpletuner.flux2.generate import fits_both_predictions, generate
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

MAX_CACHED_CONTEXTS = 32
"""Maximum number of text contexts that are cached in host memory. A context of dev takes 16 MB."""
_NAME_LENGTH = 40


@dataclass(frozen=True)
class SampledImage:
    """An image that was generated and written, with its parameters."""

    path: Path
    parameters: Mapping[str, Any]
    """The parameters that the PNG file also contains; none is a path on this machine."""

    @property
    def fields(self) -> dict[str, Any]:
        """The path and the parameters, as JSON."""
        return {"path": str(self.path), **self.parameters}


class Sampler:
    """Generates the images of one request after another.

    The model of a request stays loaded for the next requests. A request with another model, or with other precision or
    offload options, frees it first. The images are bit-identical to those of a new process.
    """

    def __init__(self) -> None:
        self._device = choose_device()
        self._model: _LoadedModel | None = None

    def sample(
        self, config: SampleConfig, loras: Sequence[LoraWithStrength], report: ReportSteps
    ) -> Iterator[SampledImage]:
        """Generate every image of `config`; yields each as soon as it is written.

        The text encoder is freed before the transformer is loaded.

        Raises:
            ConfigError: this machine does not support a precision, or a reference cannot be used as an image.
            AccessError: the model is not accessible.
            CheckpointError: a LoRA cannot be read, or does not fit the model.
            MemoryBudgetError: out of memory.
            DiskError: no space for an image.
        """
        crop_of = reference_crops(config.references)
        crops = [crop_of[path] for path in config.references]
        if self._model is not None and not self._model.suits(config):
            self.release()
        if self._model is None:
            self._model = _LoadedModel(config, self._device)
        try:
            yield from self._model.images(config, loras, crops, report)
        except (MemoryError, RuntimeError) as error:
            if exhausted_memory(error) is None:
                raise
            self._model = None
            raise MemoryBudgetError.of(
                first_line(error), remedy="Use a smaller --width and --height, or a machine with more memory."
            ) from error

    def release(self) -> None:
        """Free the model."""
        self._model = None
        release_memory(self._device)


class _LoadedModel:
    """A base model: its text contexts, its transformer with LoRAs, and its decoder, each loaded when first needed."""

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
        """Whether `config` has the same model options as this model, and the model's files are unchanged."""
        return self.options == _model_options(config) and self.files == _stamps(self.source)

    def images(
        self, config: SampleConfig, loras: Sequence[LoraWithStrength], crops: Sequence[Crop], report: ReportSteps
    ) -> Iterator[SampledImage]:
        """Generate, write and yield each image of `config`. `crops` are its reference images."""
        flavour = self.source.flavour
        steps = config.steps or flavour.steps
        guidance = flavour.guidance if config.guidance is None else config.guidance
        scales = flavour.guidance_scales(guidance, config.guidance_real)
        is_steered = scales.real != 1.0
        self.loras.check(loras, self.source)
        contexts = self.contexts_of(config, [*config.prompt, *([config.negative] if is_steered else [])])
        references = self.references_of(config, crops)
        conditions = {
            prompt: Condition.at(context.to(self.device), scales.embedded, references)
            for prompt, context in contexts.items()
        }
        transformer = self.loaded_transformer(config)
        self.loras.attach(transformer)
        factors = config.strength or (1.0,)
        seeds = range(config.seed, config.seed + config.num)
        total = len(config.prompt) * len(seeds) * len(factors) * steps
        size = (config.width, config.height)
        both_at_once = is_steered and fits_both_predictions(
            transformer,
            self.source.text_length,
            size,
            self.device,
            references=0 if references is None else references.tokens.shape[1],
        )
        done = itertools.count(1)
        report(0, total)
        for prompt, seed, factor in itertools.product(config.prompt, seeds, factors):
            active_loras = self.loras.set_strengths([lora.strength * factor for lora in loras])
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
                "loras": active_loras,
                **({"references": _references_as_json(crops)} if crops else {}),
                **({"both_at_once": True} if both_at_once else {}),  # the last bits of the image depend on it
            }
            yield SampledImage(_write_png(image, parameters, Path(config.out)), parameters)

    def contexts_of(self, config: SampleConfig, prompts: Sequence[str]) -> dict[str, TextContext]:
        """The text context of each prompt. Each prompt is encoded alone, so its bits do not depend on the others."""
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self.contexts]
        if new:
            encoded = self._encode(config, new)
            if encoded is None:  # the encoder does not fit beside the transformer
                self._drop_transformer()
                encoded = self._encode(config, new)
            assert encoded is not None
            self.contexts |= dict(zip(new, encoded, strict=True))
        requested = {prompt: self.contexts.pop(prompt) for prompt in dict.fromkeys(prompts)}
        self.contexts |= requested
        for prompt in list(self.contexts)[: -max(MAX_CACHED_CONTEXTS, len(requested))]:
            del self.contexts[prompt]
        return requested

    def references_of(self, config: SampleConfig, crops: Sequence[Crop]) -> References | None:
        """The reference images as tokens on the device. The latents stay cached for the next request."""
        new = [crop for crop in crops if latent_key(crop, "") not in self.reference_latents]
        if new:
            encode = open_autoencoder(config, config, self.source, self.device, "encode").encode
            self.reference_latents |= {latent_key(crop, ""): encode_crop(crop, encode) for crop in new}
            del encode
            release_memory(self.device)
        self.reference_latents = {key: self.reference_latents[key] for key in (latent_key(crop, "") for crop in crops)}
        if not crops:
            return None
        references = reference_tokens([self.reference_latents[latent_key(crop, "")] for crop in crops])
        return references.mapped(lambda tensor: tensor.to(self.device))

    def _encode(self, config: SampleConfig, prompts: Sequence[str]) -> list[TextContext] | None:
        """The text contexts of `prompts`; None if the encoder does not fit into memory beside the transformer."""
        try:
            folder = Path(tempfile.gettempdir())
            encoder = open_text_encoder(
                config, config, config, self.source, self.device, folder=folder, report=complain
            )
            encoded = encoder.encode_batches([[prompt] for prompt in prompts])
            contexts = [context.to(torch.device("cpu")) for batch in encoded for context in batch]
        except (MemoryError, RuntimeError) as error:
            if self.transformer is None or exhausted_memory(error) is None:
                raise
            return None
        for prompt in encoder.truncated:
            complain(f"Truncated to {self.source.text_length} tokens: {prompt[:60]}…")
        if encoder.control_tokens:
            complain(control_token_notice(encoder.control_tokens))
        del encoder, encoded
        release_memory(self.device)
        return contexts

    def loaded_transformer(self, config: SampleConfig) -> Flux2Transformer:
        """The transformer, loaded if necessary and placed in memory according to the offload options."""
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
class _StampedFile:
    """A file of weights with its size and modification time when it was read."""

    path: Path
    size: int
    modified_ns: int

    @classmethod
    def of(cls, file: Path, error_class: type[UserError] = AccessError) -> Self:
        with file_errors_reported(file, error_class, doing="read"):
            stat = file.stat()
        return cls(file, stat.st_size, stat.st_mtime_ns)

    @classmethod
    def of_lora(cls, path: Path) -> Self:
        return cls.of(path / LORA_NAME if path.is_dir() else path, CheckpointError)


@dataclass(frozen=True)
class _AttachedLora:
    """A LoRA or another adapter that is attached to a transformer."""

    file: _StampedFile
    sha256: str
    layers: Mapping[str, AdapterLayer]
    scales: Mapping[str, float]
    """The scale of each layer at a strength of 1."""


class _AttachedLoras:
    """The LoRAs on a transformer. They stay attached until a request names other files."""

    def __init__(self) -> None:
        self._requested: list[_StampedFile] = []
        self._contents: list[LoadedLora | AdapterFile] = []
        """Contents of the requested files, until they are attached."""
        self._attached: list[_AttachedLora] = []

    def check(self, loras: Sequence[LoraWithStrength], source: Source) -> None:
        """Read the files of `loras` unless they are attached, and attach them to a transformer without weights. That
        detects a LoRA of another model before gigabytes of weights are read.
        """
        self._requested = [_StampedFile.of_lora(lora.path) for lora in loras]
        self._contents = []
        if self._are_attached():
            return
        contents = [read_for_sampling(file.path) for file in self._requested]
        skeleton = checked_skeleton(source)
        for lora in contents:
            if isinstance(lora, LoadedLora):
                attach_saved(skeleton, lora)
                trained_on, unused = lora.metadata.get("base_model"), lora.unused
            else:
                check_fixed(skeleton, lora)
                trained_on, unused = lora.header.get("simpletuner.base_model"), len(lora.unread)
            if unused:
                complain(f"{lora.path.name} has {unused} tensors for a text encoder; they are ignored.")
            if trained_on not in (None, source.name) and not _are_siblings(trained_on, source):
                complain(f"{lora.path.name} was trained on {trained_on}; sampling with {source.name}.")
        self._contents = contents

    def attach(self, transformer: Flux2Transformer) -> None:
        """Attach the checked LoRAs to `transformer`, in place of those that are attached."""
        if self._are_attached():
            return
        contents = self._contents or [read_for_sampling(file.path) for file in self._requested]
        self._contents = []
        while self._attached:
            detach(transformer, self._attached.pop().layers)
        for file, content in zip(self._requested, contents, strict=True):
            layers: Mapping[str, AdapterLayer]
            if isinstance(content, LoadedLora):
                layers = attach_saved(transformer, content).layers
            else:
                layers = attach_fixed(transformer, content)
            scales = {name: layer.scale for name, layer in layers.items()}
            self._attached.append(_AttachedLora(file, sha256_file(file.path), layers, scales))

    def _are_attached(self) -> bool:
        return [lora.file for lora in self._attached] == self._requested

    def set_strengths(self, strengths: Sequence[float]) -> list[dict[str, object]]:
        """Set the strength of each LoRA; returns the LoRAs as JSON. A strength of 0 disables the LoRA's layers."""
        for lora, strength in zip(self._attached, strengths, strict=True):
            for name, layer in lora.layers.items():
                layer.scale = lora.scales[name] * strength
                layer.is_enabled = strength != 0
        return [
            {"name": lora.file.path.name, "sha256": lora.sha256, "strength": strength}
            for lora, strength in zip(self._attached, strengths, strict=True)
        ]

    def forget(self) -> None:
        """Forget the attached LoRAs, because their transformer was freed."""
        self._attached = []


def _references_as_json(crops: Sequence[Crop]) -> list[dict[str, str]]:
    """The reference images as JSON, for an image's parameters."""
    return [{"name": Path(crop.name).name, "sha256": crop.content} for crop in crops]


def _are_siblings(trained_on: str, source: Source) -> bool:
    """Whether a LoRA's base model and the sampling model are the base and the distilled weights of the same size."""
    counterpart = sibling(source.flavour)
    # A manually downloaded model is named after its repository.
    return counterpart is not None and (flavour_of_base(trained_on) is counterpart or counterpart.title == trained_on)


def _model_options(config: SampleConfig) -> dict[str, Any]:
    """The options that must be equal for a loaded model to be reused."""
    return config.model_dump(include=set(FROM_RUN) - {"model_type", "seed", "verify_base"})


def _stamps(source: Source) -> list[_StampedFile]:
    """Each file of weights."""
    return [*map(_StampedFile.of, (*source.transformer.files, *source.vae.files, *source.text_encoder.files))]


def _write_png(image: Image.Image, parameters: Mapping[str, Any], folder: Path) -> Path:
    """Write `image` as a new PNG file that contains its parameters; returns the path."""
    info = PngInfo()
    info.add_itxt("parameters", json.dumps(parameters, ensure_ascii=False))
    buffer = io.BytesIO()
    image.save(buffer, "PNG", pnginfo=info)
    stem = re.sub(r"\W+", "-", parameters["prompt"].lower())[:_NAME_LENGTH].strip("-") or "picture"
    path = _unused_path(folder / f"{stem}_{image.width}x{image.height}_{parameters['seed']}.png")
    write_atomic(path, buffer.getvalue(), sync=False)
    return path


def _unused_path(path: Path) -> Path:
    """`path`, or the first of path-2, path-3, … that does not exist."""
    candidate, number = path, 1
    while candidate.exists():
        number += 1
        candidate = path.with_stem(f"{path.stem}-{number}")
    return candidate
