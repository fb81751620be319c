"""Before training: look at the pictures, then fill the caches, one encoder in memory at a time."""

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from simpletuner.base.sizes import format_duration, format_size
from simpletuner.config.datasets import ImageSet, TextStore
from simpletuner.config.load import Loaded
from simpletuner.config.options.model import ModelOptions
from simpletuner.config.options.offload import OffloadOptions
from simpletuner.config.options.precision import PrecisionOptions
from simpletuner.config.run import RunConfig
from simpletuner.data.cache.contexts import Context, fill_contexts, read_context
from simpletuner.data.cache.latents import Encode, fill_latents
from simpletuner.data.cache.store import Store
from simpletuner.data.collate import Batch, load_batch
from simpletuner.data.manifest import Manifest, scan
from simpletuner.data.sample import Sample
from simpletuner.flux2.autoencoder import Autoencoder
from simpletuner.flux2.footprint import resident_text_bytes
from simpletuner.flux2.load import (
    Half,
    autoencoder_id,
    load_autoencoder,
    load_text_encoder,
    load_transformer,
    stream_text_encoder,
    text_encoder_id,
)
from simpletuner.flux2.source import Source
from simpletuner.flux2.spec import text_from_config
from simpletuner.flux2.text import TextEncoder
from simpletuner.flux2.transformer import Flux2Transformer
from simpletuner.memory.free import free_memory_bytes
from simpletuner.memory.precision import DTYPES, check_precision
from simpletuner.train.report import Reporter

EMPTY = ""
"""The caption that caption dropout and real guidance fall back to: empty text through the full template."""


@dataclass(frozen=True)
class Encoders:
    """The identity of what fills the caches: whatever changes a cached tensor changes one of these strings."""

    text: str
    latents: str

    @classmethod
    def of(cls, config: RunConfig, source: Source) -> "Encoders":
        """Weights, precision and every setting that the encoders see."""
        text = text_encoder_id(
            source,
            DTYPES[config.base_dtype],
            layers=source.text_layers,
            max_length=source.text_length,
            fix_regex=config.tokenizer_fix_regex,
            precision=config.text_encoder_1_precision,
        )
        latents = autoencoder_id(
            source,
            DTYPES[config.vae_dtype],
            tiling=config.vae_enable_tiling,
            slicing=config.vae_enable_slicing,
        )
        return cls(text, latents)


@dataclass(frozen=True)
class Prepared:
    """The data, looked at and encoded."""

    loaded: Loaded
    encoders: Encoders
    train: tuple[Manifest, ...]
    held_out: tuple[Manifest, ...]

    @cached_property
    def fingerprints(self) -> dict[str, str]:
        """Of each training set's pictures, captions and crops."""
        return {manifest.image_set.id: manifest.fingerprint for manifest in self.train}

    @property
    def pictures(self) -> int:
        return sum(len(manifest.samples) for manifest in self.train)

    def latent_store(self, image_set: ImageSet) -> Store:
        return Store(Path(image_set.cache_dir_vae))

    def text_store(self, image_set: ImageSet | None) -> Store:
        """The store of a set's captions; None asks for that of the prompts that belong to no set."""
        datasets = self.loaded.datasets
        store = datasets.default_text_store if image_set is None else datasets.text_store_of(image_set)
        return Store(Path(store.cache_dir))

    def context(self, prompt: str, image_set: ImageSet | None = None) -> Context:
        """A prompt's context, from the cache."""
        return read_context(self.text_store(image_set), prompt, self.encoders.text)

    def batch(self, image_set: ImageSet, samples: Sequence[Sample], prompts: Sequence[str]) -> Batch:
        """Samples of one set and one bucket with their prompts, from the caches."""
        return load_batch(
            samples,
            prompts,
            latent_store=self.latent_store(image_set),
            latent_encoder=self.encoders.latents,
            context_store=self.text_store(image_set),
            context_encoder=self.encoders.text,
        )


def prepare(
    loaded: Loaded, source: Source, device: torch.device, reporter: Reporter, *, verify: bool = False
) -> Prepared:
    """Scan every set and fill every cache that the run will read. With `verify` every cached file is read and hashed,
    also those that an earlier check left as they are.

    Raises:
        DataError: a set is missing or ends up empty.
        AccessError: an encoder cannot be loaded.
        DiskError: a cache's disk is full. What is finished is kept.
    """
    config, datasets = loaded.config, loaded.datasets
    with reporter.phase("scan") as progress:
        manifests = [
            scan(image_set, seed=config.seed, workers=config.workers, report=progress)
            for image_set in (*datasets.train_sets, *datasets.eval_sets)
        ]
    for manifest in manifests:
        tell_manifest(manifest, reporter)
    count = len(datasets.train_sets)
    prepared = Prepared(loaded, Encoders.of(config, source), tuple(manifests[:count]), tuple(manifests[count:]))
    fill_text(prepared, source, device, reporter, verify=verify)
    fill_pictures(prepared, source, device, reporter, verify=verify)
    return prepared


def check_precisions(options: PrecisionOptions, device: torch.device) -> None:
    """Raise a ConfigError where `device` cannot run a precision that `options` asks for."""
    check_precision(options.base_model_precision, device, "base_model_precision")
    check_precision(options.text_encoder_1_precision, device, "text_encoder_1_precision")


def quantised_on(options: PrecisionOptions, device: torch.device) -> torch.device:
    """Where weights are quantised for `device`."""
    return device if options.quantize_via == "accelerator" else torch.device("cpu")


def tell_manifest(manifest: Manifest, reporter: Reporter) -> None:
    """How many pictures a set has, how often each is seen, in which buckets, and what was left out and why."""
    image_set = manifest.image_set
    visits = len(manifest.samples) * (image_set.repeats + 1)
    sizes = ", ".join(f"{w}x{h} ({len(members)})" for (w, h), members in sorted(manifest.buckets.items())[:6])
    more = "" if len(manifest.buckets) <= 6 else f" and {len(manifest.buckets) - 6} more sizes"
    seen = f", {image_set.repeats} repeats: {visits} visits an epoch" if image_set.repeats else ""
    reporter.say(f"{image_set.id}: {len(manifest.samples)} pictures{seen}; {sizes}{more}")
    reasons: dict[str, list[str]] = {}
    for rejection in manifest.rejections:
        reasons.setdefault(rejection.reason, []).append(rejection.name)
    for reason, names in sorted(reasons.items()):
        shown = ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
        reporter.notice(f"{image_set.id}: left out {len(names)}, {reason}: {shown}")
    for text in manifest.notices:
        reporter.notice(text)


def wanted_prompts(prepared: Prepared) -> dict[TextStore, list[str]]:
    """Every prompt that the run may ask for, by the store that keeps it."""
    config, datasets = prepared.loaded.config, prepared.loaded.datasets
    found: dict[TextStore, list[str]] = {store: [] for store in datasets.text_stores}
    for manifest in (*prepared.train, *prepared.held_out):
        prompts = found[datasets.text_store_of(manifest.image_set)]
        prompts += [caption for sample in manifest.samples for caption in sample.captions]
        prompts.append(EMPTY)
    general = found[datasets.default_text_store]
    general += [EMPTY, *prepared.loaded.prompts.values()]
    if config.validation_guidance_real != 1.0:
        general.append(config.validation_negative_prompt)
    return found


def landing(options: OffloadOptions, device: torch.device) -> torch.device:
    """Where a transformer is loaded that is to be streamed: all of it need not fit on the accelerator."""
    return torch.device("cpu") if options.enable_group_offload else device


def open_autoencoder(
    model: ModelOptions, offload: OffloadOptions, source: Source, device: torch.device, half: Half
) -> Autoencoder:
    """The `half` of the autoencoder that is wanted, on `device` or streamed to it.

    Raises:
        AccessError: it cannot be loaded.
    """
    return load_autoencoder(
        source,
        DTYPES[model.vae_dtype],
        device,
        tiling=model.vae_enable_tiling,
        slicing=model.vae_enable_slicing,
        is_streamed=offload.group_offload_vae,
        ahead=offload.group_offload_use_stream and device.type != "cpu",
        half=half,
    )


def open_text_encoder(
    model: ModelOptions,
    precision: PrecisionOptions,
    offload: OffloadOptions,
    source: Source,
    device: torch.device,
    *,
    folder: Path,
    say: Callable[[str], None],
) -> TextEncoder:
    """The text encoder in the mode that is asked for; what `auto` takes, and why, is said in a line.

    `folder` is where a streamed encoder puts states that do not stay in memory.

    Raises:
        AccessError: it cannot be loaded.
        ConfigError: it has fewer layers than are asked for, or the context has no room for the template.
    """
    dtype, layers = DTYPES[precision.base_dtype], source.text_layers
    length, fix_regex = source.text_length, model.tokenizer_fix_regex
    name = precision.text_encoder_1_precision
    mode = "streamed" if offload.group_offload_text_encoder else precision.text_encoder_mode
    if mode == "auto":
        tokens = precision.text_encoder_batch_size * length
        text = text_from_config(source.text_encoder.config or {})
        needed = sum(resident_text_bytes(text, layers, tokens=tokens, precision=name, dtype=dtype))
        free = free_memory_bytes(device)
        mode = "resident" if needed <= free else "streamed"
        memory = f"{format_size(free)} of memory {'on the GPU ' if device.type == 'cuda' else ''}are free"
        how = "resident: it" if mode == "resident" else "streamed, one layer at a time: resident it"
        say(f"Text encoder {how} takes up to {format_size(needed)}, {memory}.")
    via = quantised_on(precision, device)
    if mode == "streamed":
        return stream_text_encoder(
            source,
            dtype,
            device,
            layers=layers,
            max_length=length,
            fix_regex=fix_regex,
            folder=folder,
            precision=name,
            via=via,
        )
    return load_text_encoder(
        source, dtype, device, layers=layers, max_length=length, fix_regex=fix_regex, precision=name, via=via
    )


def load_base(
    options: PrecisionOptions,
    offload: OffloadOptions,
    source: Source,
    device: torch.device,
    *,
    report: Callable[[str], None],
) -> Flux2Transformer:
    """The frozen transformer as `options` have it, where `offload` wants it first; `report` is told if a quantised one
    that was kept is of no use.

    Raises:
        AccessError: it cannot be loaded.
        ConfigError: its shapes do not suit the precision.
        DiskError: no space to keep it.
    """
    folder = options.base_model_cache_dir
    return load_transformer(
        source,
        DTYPES[options.base_dtype],
        landing(offload, device),
        options.base_model_precision,
        via=quantised_on(options, device),
        cache_dir=None if folder is None else Path(folder),
        report=report,
    )


def fill_text(prepared: Prepared, source: Source, device: torch.device, reporter: Reporter, *, verify: bool) -> None:
    """Encode the prompts that no cache has; the encoder is loaded only if there are any, and let go after."""
    config = prepared.loaded.config
    held: list[TextEncoder] = []

    def load() -> TextEncoder:
        if not held:
            folder = prepared.text_store(None).folder
            held.append(open_text_encoder(config, config, config, source, device, folder=folder, say=reporter.say))
        return held[0]

    with reporter.phase("text") as progress:
        reports = [
            fill_contexts(
                prompts,
                Store(Path(store.cache_dir)),
                prepared.encoders.text,
                load,
                batch_size=config.text_encoder_batch_size,
                write_batch_size=store.write_batch_size or config.write_batch_size,
                verify=verify,
                report=progress,
            )
            for store, prompts in wanted_prompts(prepared).items()
            if prompts
        ]
    # No name may hold the encoder when memory is freed: it holds itself, and would be found by the next phase.
    truncated = [text for encoder in held for text in encoder.truncated]
    if truncated:
        shown = "; ".join(text[:60] + "…" for text in truncated[:3])
        reporter.notice(
            f"{len(truncated)} captions are longer than tokenizer_max_length "
            f"({source.text_length} tokens with the template) and were shortened: {shown}"
        )
    encoded, found = sum(r.encoded for r in reports), sum(r.found for r in reports)
    seconds = sum(r.seconds for r in reports)
    reporter.say(f"Captions: {encoded} encoded in {format_duration(seconds)}, {found} in the cache already.")
    held.clear()
    free_memory(device)


def fill_pictures(
    prepared: Prepared, source: Source, device: torch.device, reporter: Reporter, *, verify: bool
) -> None:
    """Encode the pictures that no cache has; the VAE is loaded only if there are any, and let go after."""
    config = prepared.loaded.config

    def load() -> Encode:
        return open_autoencoder(config, config, source, device, "encode").encode

    with reporter.phase("latents") as progress:
        report = fill_latents(
            (*prepared.train, *prepared.held_out),
            prepared.latent_store,
            prepared.encoders.latents,
            load,
            batch_size=config.vae_batch_size,
            workers=config.workers,
            verify=verify,
            report=progress,
        )
    reporter.say(
        f"Pictures: {report.encoded} encoded in {format_duration(report.seconds)}, {report.found} in the cache already."
    )
    free_memory(device)


def free_memory(device: torch.device) -> None:
    """Give back what is not referenced any more, so that the next phase finds it free."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
