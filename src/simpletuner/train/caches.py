"""Prepare the data before training: scan the datasets, then fill the caches with one encoder in memory at a time."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor

from simpletuner.base.errors import DataError
from simpletuner.base.files import sha256_json
from simpletuner.base.sizes import format_duration
from simpletuner.base.storage import Storage
from simpletuner.config.datasets import WHOLE_RUN, FolderDataset, ImageSet, TextStore, Windows
from simpletuner.config.load import LoadedConfig
from simpletuner.config.previews import validation_scales
from simpletuner.config.prompts import Prompt
from simpletuner.config.run import RunConfig
from simpletuner.data.batch import read_contexts, read_latents
from simpletuner.data.cache.contexts import ContextCodec, fill_contexts
from simpletuner.data.cache.latents import Encode, encode_crop, fill_latents, latent_key, read_latent, write_latent
from simpletuner.data.cache.masks import MaskSource, fill_masks
from simpletuner.data.cache.store import Store
from simpletuner.data.captions import LACKS_CAPTION
from simpletuner.data.manifest import Manifest, scan_of
from simpletuner.data.preserved import PreservedPrompts
from simpletuner.data.references import reference_crops
from simpletuner.data.sample import Crop, Sample
from simpletuner.data.storages import latent_storage, text_storage
from simpletuner.flow.condition import References, TextContext
from simpletuner.flux2.base_location import check_same_model
from simpletuner.flux2.components import open_autoencoder, open_text_encoder, text_codec
from simpletuner.flux2.load import autoencoder_id, earlier_autoencoder_id
from simpletuner.flux2.source import Source
from simpletuner.flux2.text import CODECS, TextEncoder, control_token_notice
from simpletuner.flux2.tokens import reference_tokens
from simpletuner.memory.free import release_memory
from simpletuner.memory.machines import differing_machine, shared_folders
from simpletuner.memory.precision import DTYPES
from simpletuner.memory.world import World
from simpletuner.train.claims import claim, key_of_latents
from simpletuner.train.masks import CachedMask, Masking, kept_positions
from simpletuner.train.report import Reporter

UNCONDITIONAL_CAPTION = ""
"""The caption for caption dropout and for the unconditional pass of real guidance: empty text in the full template."""


@dataclass(frozen=True)
class EncoderKeys:
    """Cache keys of the encoders: anything that changes a cached tensor changes the codec's key, or `latents`."""

    text: ContextCodec
    latents: str

    @classmethod
    def of(cls, config: RunConfig, source: Source, *, all_bytes: bool = False) -> "EncoderKeys":
        """The keys for the encoders' weights, precision and settings. `all_bytes` hashes all bytes of the text encoder,
        else only the first 4 KiB of each tensor.
        """
        return cls(text_codec(config, config, source, all_bytes=all_bytes), autoencoder_id(source, **_encoding(config)))

    @classmethod
    def claimed(cls, loaded: LoadedConfig, source: Source, world: World) -> "EncoderKeys":
        """The keys of this machine's caches: from the first 4 KiB of each tensor, unless other weights claimed these
        keys first. The first rank of each machine reads the weights and the claims.
        """
        codec = CODECS[source.flavour.text.padding_side]
        return world.run_on_each_machine(
            "the fingerprints of the encoders",
            lambda: cls._claimed(loaded, source),
            record=lambda encoders: [encoders.text.key, encoders.text.min_bytes, encoders.latents],
            restore=lambda record: cls(codec(record[0], record[1]), record[2]),
        )

    @classmethod
    def _claimed(cls, loaded: LoadedConfig, source: Source) -> "EncoderKeys":
        config, datasets = loaded.config, loaded.datasets
        prefix, full = (cls.of(config, source, all_bytes=all_bytes) for all_bytes in (False, True))
        earlier = (
            earlier_autoencoder_id(source, **_encoding(config), all_bytes=all_bytes) for all_bytes in (False, True)
        )
        texts = [text_storage(store) for store in datasets.text_stores]
        folder_datasets = (*datasets.train_sets, *datasets.eval_sets, *datasets.conditioning_sets)
        # Latents first: in a storage of latents and contexts, a claim of the contexts would hide that an earlier
        # release, which made no claims, wrote the latents.
        latents = key_of_latents([latent_storage(each) for each in folder_datasets], prefix.latents, *earlier)
        return cls(prefix.text if claim(texts, prefix.text.key, full.text.key) else full.text, latents)


def _encoding(config: RunConfig) -> dict[str, Any]:
    """Options that change a latent, as `autoencoder_id` takes them."""
    return {
        "dtype": DTYPES[config.vae_dtype],
        "tiling": config.vae_enable_tiling,
        "slicing": config.vae_enable_slicing,
    }


WHOLE = "whole:"
"""Prefix of fingerprints over all bytes of a base model. Earlier releases hashed the first 4 KiB of each tensor."""


EARLIER_VAE = "VAE"
"""The name of the VAE's fingerprint in earlier releases. It also covered the decoder, which training never uses."""


def base_fingerprints(
    config: RunConfig, source: Source, world: World, *, like: Mapping[str, str] | None = None
) -> dict[str, str]:
    """The fingerprints of the base model for a checkpoint: of the transformer, the text encoder and the VAE encoder.

    They cover all bytes. If `like`, the record of a checkpoint, is given, they cover the same bytes under the same
    names, so that they compare even if an earlier release wrote it. The first rank of each machine reads the weights.

    Raises:
        AccessError: another machine has a different base model.
    """
    fingerprints = world.run_on_each_machine(
        "the fingerprints of the base model", lambda: _base_fingerprints(config, source, like)
    )
    check_same_model(world, fingerprints)
    return fingerprints


def _base_fingerprints(config: RunConfig, source: Source, like: Mapping[str, str] | None) -> dict[str, str]:
    all_bytes = like is None or has_full_fingerprints(like)
    fingerprints = {
        "transformer": source.fingerprint("transformer", all_bytes=all_bytes),
        "text encoder": text_codec(config, config, source, all_bytes=all_bytes).key,
    }
    if like is not None and EARLIER_VAE in like:
        fingerprints[EARLIER_VAE] = earlier_autoencoder_id(source, **_encoding(config), all_bytes=all_bytes)
    else:
        fingerprints["VAE encoder"] = autoencoder_id(source, **_encoding(config))
    return {name: f"{WHOLE if all_bytes else ''}{value}" for name, value in fingerprints.items()}


def has_full_fingerprints(record: Mapping[str, str]) -> bool:
    """Whether the fingerprints in a checkpoint cover all bytes of the base model."""
    return all(value.startswith(WHOLE) for value in record.values())


@dataclass(frozen=True)
class PreparedData:
    """The scanned datasets, and access to their caches."""

    loaded: LoadedConfig
    encoders: EncoderKeys
    train: tuple[Manifest, ...]
    held_out: tuple[Manifest, ...]

    @cached_property
    def prompt_references(self) -> dict[str, Crop]:
        """The reference images of the validation prompts, by path.

        Raises:
            ConfigError: lists every file that is not an image, or whose size is out of range for a reference.
        """
        return reference_crops(path for prompt in self.loaded.validation_prompts for path in prompt.references)

    @cached_property
    def fingerprints(self) -> dict[str, str]:
        """Fingerprint of each training dataset, by its id: `Manifest.fingerprint`."""
        return {manifest.image_set.id: manifest.fingerprint for manifest in self.train}

    @cached_property
    def mask_sources(self) -> dict[str, MaskSource]:
        """The mask reader of each dataset of masks, by its id."""
        return MaskSource.all_of(self.loaded.datasets)

    @property
    def windows(self) -> dict[str, Windows]:
        """First and last "step" and "epoch" of each training dataset that is not active throughout."""
        all_windows = {manifest.image_set.id: manifest.image_set.windows for manifest in self.train}
        return {name: windows for name, windows in all_windows.items() if windows != WHOLE_RUN}

    @property
    def image_count(self) -> int:
        """The number of training images."""
        return sum(len(manifest.samples) for manifest in self.train)

    def latent_store(self, folder_dataset: FolderDataset) -> Store:
        return Store(latent_storage(folder_dataset))

    def text_store(self, image_set: ImageSet | None) -> Store:
        """The store of a dataset's captions; for None, that of prompts outside the datasets."""
        datasets = self.loaded.datasets
        store = datasets.default_text_store if image_set is None else datasets.text_store_of(image_set)
        return Store(text_storage(store))

    def latents(self, image_set: ImageSet, samples: Sequence[Sample]) -> Float[Tensor, "b 128 h w"]:
        """The latents of samples of one dataset and one bucket, from the cache.

        Raises:
            DataError: a cache file is missing or damaged.
        """
        return read_latents(self.latent_store(image_set), samples, self.encoders.latents)

    def references(self, samples: Sequence[Sample]) -> list[list[Float[Tensor, "128 h w"]]]:
        """The latents of each sample's references, in their order, from the cache.

        Raises:
            DataError: a cache file is missing or damaged.
        """
        sets = {each.id: each for each in self.loaded.datasets.conditioning_sets}
        return [
            [
                read_latent(self.latent_store(sets[reference.dataset]), reference, self.encoders.latents)
                for reference in sample.references
            ]
            for sample in samples
        ]

    def masks(self, samples: Sequence[Sample]) -> list[CachedMask | None]:
        """The masks of `samples`, from the cache; None for a sample without a mask.

        Raises:
            DataError: a cache file is missing or damaged.
        """
        return [None if sample.mask is None else self.mask(sample.mask) for sample in samples]

    def mask(self, crop: Crop) -> CachedMask:
        """The cached mask whose file is `crop`."""
        return self.mask_sources[crop.dataset].read(crop)

    @cached_property
    def forced_shares(self) -> list[float]:
        """For each training image with a mask, the share of tokens that TREAD keeps because of it. Reads all masks.
        Empty if the options do not let masks force tokens.
        """
        masking = Masking(self.loaded.config, self.loaded.config.seed)
        masks = loss_masks(self.train) if masking.forces_tokens else []
        return [kept_positions(masking.inside(self.mask(mask))).float().mean().item() for mask in masks]

    @property
    def prompt_store(self) -> Store:
        """The store for reference images of prompts, which belong to no dataset: that of the first training dataset."""
        return self.latent_store(self.loaded.datasets.train_sets[0])

    def references_of(self, prompt: Prompt) -> References | None:
        """The references of a prompt, from the cache; None if it has none.

        Raises:
            DataError: a cache file is missing or damaged.
        """
        crops = [self.prompt_references[path] for path in prompt.references]
        latents = [read_latent(self.prompt_store, crop, self.encoders.latents) for crop in crops]
        return reference_tokens(latents) if latents else None

    def contexts(self, prompts: Sequence[str], image_set: ImageSet | None = None) -> TextContext:
        """The text encoder's contexts of `prompts`, from the cache.

        Raises:
            DataError: a cache file is missing or damaged.
        """
        return read_contexts(self.text_store(image_set), prompts, self.encoders.text)


def prepare(
    loaded: LoadedConfig, source: Source, world: World, reporter: Reporter, *, verify: bool = False
) -> PreparedData:
    """Scan all datasets and fill all caches; see `scan_sets` and `fill_caches`."""
    prepared = scan_sets(loaded, source, world, reporter)
    fill_caches(prepared, source, world, reporter, verify=verify)
    return prepared


def scan_sets(loaded: LoadedConfig, source: Source, world: World, reporter: Reporter) -> PreparedData:
    """Scan a run's datasets, without loading an encoder. The first rank of each machine scans; the other ranks use its
    result, even if a file has changed since.

    Raises:
        DataError: a dataset is missing, has no usable image, or differs between machines; or no caption contains
            `preservation_trigger`.
    """
    config, datasets = loaded.config, loaded.datasets
    image_sets = (*datasets.train_sets, *datasets.eval_sets)
    conditions = [datasets.conditions_of(each) for each in image_sets]
    with reporter.phase("scan") as progress:
        manifests = world.run_on_each_machine(
            "the scan of the image sets",
            lambda: [scan_of(loaded, each, report=progress) for each in image_sets],
            record=lambda manifests: [manifest.record() for manifest in manifests],
            restore=lambda records: [*map(Manifest.of_record, image_sets, records, conditions)],
        )
    check_same_images(manifests, world)
    for manifest in manifests:
        report_manifest(manifest, reporter)
    count = len(datasets.train_sets)
    notice = PreservedPrompts(config).notice(manifests[:count])
    if notice is not None:
        reporter.notice(notice)
    encoders = EncoderKeys.claimed(loaded, source, world)
    prepared = PreparedData(loaded, encoders, tuple(manifests[:count]), tuple(manifests[count:]))
    _ = prepared.prompt_references  # validate now: report a bad file before an encoder loads
    return prepared


def check_same_images(manifests: Sequence[Manifest], world: World) -> None:
    """Raise a DataError, on all ranks, if machines have different images, captions, references or masks."""
    if world.machine_world is None:
        return
    for manifest in manifests:
        samples = {row[0][1]: sha256_json(row) for row in manifest.record()[0]}  # row[0][1] is the image's name
        difference = differing_machine(world, samples)
        if difference is not None:
            machine, (ours, theirs) = difference
            differing = sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))
            names = ", ".join(differing[:MAX_NAMED]) + (", …" if len(differing) > MAX_NAMED else "")
            raise DataError.of(
                f"{manifest.image_set.id}: {len(differing)} images, or their captions, references or masks, differ "
                f"between machine {machine} and machine 0: {names}",
                "the same files on every machine",
                f"Copy machine 0's {manifest.image_set.instance_data_dir} there, or use a folder that all machines "
                "share.",
            )


def ranks_of_cache(storages: Sequence[Storage], content: str, world: World, reporter: Reporter) -> World:
    """The ranks that together fill the caches of `content` in `storages`: all ranks if all machines share the storages,
    else the ranks of this machine. Reports which case applies.
    """
    if world.machine_world is None:
        return world
    folders = [folder for storage in storages if (folder := storage.local_path()) is not None]
    unshared = set(folders) - shared_folders(world, folders)
    if not unshared:
        reporter.say(f"The {world.machines} machines share the cache of {content}: it is filled once.")
        return world
    folder_names = ", ".join(map(str, sorted(unshared)))
    reporter.say(f"Each of {world.machines} machines fills its cache of {content}: they do not share {folder_names}.")
    return world.machine_world


def fill_caches(
    prepared: PreparedData, source: Source, world: World, reporter: Reporter, *, verify: bool = False
) -> None:
    """Fill every cache that the run will read. Masks come first, so that bad masks are reported before an encoder
    loads. All ranks call it, and each makes a share of the missing entries in caches that it can access. `verify` reads
    and hashes every cached file, even those checked earlier.

    Raises:
        DataError: a mask leaves no part of its image to train on.
        AccessError: an encoder cannot be loaded.
        DiskError: a cache's disk is full. Finished entries are kept.
    """
    datasets = prepared.loaded.datasets
    folder_datasets = (*datasets.train_sets, *datasets.eval_sets, *datasets.conditioning_sets)
    image_ranks = ranks_of_cache([*map(latent_storage, folder_datasets)], "images", world, reporter)
    text_ranks = ranks_of_cache([*map(text_storage, datasets.text_stores)], "captions", world, reporter)
    fill_mask_weights(prepared, image_ranks, reporter, verify=verify)
    fill_text(prepared, source, text_ranks, reporter, verify=verify)
    fill_images(prepared, source, image_ranks, reporter, verify=verify)
    world.barrier("the caches of other machines")


def report_manifest(manifest: Manifest, reporter: Reporter) -> None:
    """Report a dataset's images, repeats and buckets, and which images were left out and why."""
    image_set = manifest.image_set
    visits = len(manifest.samples) * (image_set.repeats + 1)
    sizes = ", ".join(f"{w}x{h} ({len(members)})" for (w, h), members in sorted(manifest.buckets.items())[:6])
    more_sizes = "" if len(manifest.buckets) <= 6 else f" and {len(manifest.buckets) - 6} more sizes"
    repeats = f", {image_set.repeats} repeats: {visits} visits per epoch" if image_set.repeats else ""
    reporter.say(f"{image_set.id}: {len(manifest.samples)} images{repeats}; {sizes}{more_sizes}")
    reasons: dict[str, list[str]] = {}
    for rejection in manifest.rejections:
        if rejection.reason in LACKS_CAPTION:  # a notice of the manifest reports these, with a remedy
            continue
        reasons.setdefault(rejection.reason, []).append(rejection.name)
    for reason, names in sorted(reasons.items()):
        examples = ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
        reporter.notice(f"{image_set.id}: left out {len(names)}, {reason}: {examples}")
    for text in manifest.notices:
        reporter.notice(text)


def prompts_to_encode(prepared: PreparedData) -> dict[TextStore, list[str]]:
    """Every prompt that the run may use, by the store that caches it."""
    config, datasets = prepared.loaded.config, prepared.loaded.datasets
    prompts_of: dict[TextStore, list[str]] = {store: [] for store in datasets.text_stores}
    for manifest in (*prepared.train, *prepared.held_out):
        prompts = prompts_of[datasets.text_store_of(manifest.image_set)]
        prompts += [caption for sample in manifest.samples for caption in sample.captions]
        prompts.append(UNCONDITIONAL_CAPTION)
    for manifest in prepared.train:
        prompts_of[datasets.text_store_of(manifest.image_set)] += PreservedPrompts(config).all_of(manifest)
    general = prompts_of[datasets.default_text_store]
    general += [UNCONDITIONAL_CAPTION, *(prompt.text for prompt in prepared.loaded.prompts.values())]
    if not config.validation_disable:
        general += config.validation_drift_prompts or ()
    if validation_scales(config).real != 1.0:
        general.append(config.validation_negative_prompt)
    return prompts_of


MAX_NAMED = 50
"""Maximum number of images or masks that an error lists."""


def fill_mask_weights(prepared: PreparedData, world: World, reporter: Reporter, *, verify: bool) -> None:
    """Cache the missing masks, and report the share of the images that they train.

    Raises:
        DataError: some masks leave no part of their images to train on.
    """
    masks = loss_masks((*prepared.train, *prepared.held_out))
    if not masks:
        return
    with reporter.phase("scan", "reading masks") as progress:
        report = fill_masks(
            masks,
            prepared.mask_sources,
            workers=math.ceil(prepared.loaded.config.workers / world.on_machine.size),
            verify=verify,
            report=progress,
            world=world,
        )
        empty, share = world.run_on_main("the areas of the masks", lambda: _mask_areas(prepared, masks))
    if empty:
        raise _empty_masks_error(empty, prepared.loaded.config)
    reporter.say(
        f"Masks: {report.encoded} made in {format_duration(report.seconds)}, {report.existing} already cached. "
        f"{len(masks)} images have one; on average it trains {share:.0%} of the image."
    )


def loss_masks(manifests: Sequence[Manifest]) -> list[Crop]:
    """The masks that weight a loss: those of held-out datasets, and of training datasets except those for
    regularization.
    """
    manifests_with_weights = (
        manifest
        for manifest in manifests
        if manifest.image_set.dataset_type == "eval" or not manifest.image_set.is_regularisation_data
    )
    return [
        sample.mask for manifest in manifests_with_weights for sample in manifest.samples if sample.mask is not None
    ]


def _mask_areas(prepared: PreparedData, masks: Sequence[Crop]) -> tuple[list[str], float]:
    """The names of masks whose weights are all zero, and the mean weight of a position over all masks."""
    masking = Masking(prepared.loaded.config, prepared.loaded.config.seed)
    empty, total = [], 0.0
    for mask in masks:
        weights = masking.weights(masking.inside(prepared.mask(mask)))
        total += weights.mean().item()
        if not weights.any():
            empty.append(mask.location)
    return empty, total / len(masks)


def _empty_masks_error(empty: Sequence[str], config: RunConfig) -> DataError:
    level, trained_level = ("white", "black") if config.masked_loss_invert else ("black", "white")
    names = ", ".join(empty[:MAX_NAMED]) + (f" and {len(empty) - MAX_NAMED} more" if len(empty) > MAX_NAMED else "")
    masks = "1 mask is" if len(empty) == 1 else f"{len(empty)} masks are"
    return DataError.of(
        f"{masks} all {level} in the trained crop, so no part of the image would be trained: {names}",
        f"some {trained_level} in each",
        f"Paint what to train {trained_level}, or take the image out of the dataset. With --masked_loss_floor=0.1 all "
        "of it is trained a little.",
    )


def fill_text(prepared: PreparedData, source: Source, world: World, reporter: Reporter, *, verify: bool) -> None:
    """Encode the prompts that are not cached. Only ranks with prompts to encode load the encoder, and free it
    afterwards.
    """
    config = prepared.loaded.config
    encoders: list[TextEncoder] = []
    # Each rank has its own GPU. On CPUs all ranks load into the same RAM: rank 0 first, then the others together, which
    # see the RAM that rank 0 left free.
    local_world = world.on_machine
    sharing_processes = local_world.size - (not local_world.is_main) if world.device.type == "cpu" else 1

    def load() -> TextEncoder:
        if not encoders:
            folder = prepared.text_store(None).storage.local_path() or Path(config.output_dir)
            encoder = open_text_encoder(
                config,
                config,
                config,
                source,
                world.device,
                folder=folder,
                report=reporter.say,
                processes=sharing_processes,
            )
            encoders.append(encoder)
        return encoders[0]

    with reporter.phase("text") as progress:
        reports = [
            fill_contexts(
                prompts,
                Store(text_storage(store)),
                prepared.encoders.text,
                load,
                batch_size=config.text_encoder_batch_size,
                write_batch_size=store.write_batch_size or config.write_batch_size,
                verify=verify,
                report=progress,
                world=world,
            )
            for store, prompts in prompts_to_encode(prepared).items()
            if prompts
        ]
    # No variable may reference the encoder when memory is freed: the encoder is in a reference cycle, and would still
    # be in memory in the next phase. Rank 0 has counted the tokens of all prompts, even those that other ranks encode.
    truncated = [text for encoder in encoders for text in encoder.truncated]
    if truncated:
        examples = "; ".join(text[:60] + "…" for text in truncated[:3])
        reporter.notice(
            f"{len(truncated)} captions are longer than tokenizer_max_length "
            f"({source.text_length} tokens with the template) and were truncated: {examples}"
        )
    control_tokens = {prompt: names for encoder in encoders for prompt, names in encoder.control_tokens.items()}
    if control_tokens:
        reporter.notice(control_token_notice(control_tokens))
    encoded, cached = sum(r.encoded for r in reports), sum(r.existing for r in reports)
    seconds = sum(r.seconds for r in reports)
    reporter.say(f"Captions: {encoded} encoded in {format_duration(seconds)}, {cached} already cached.")
    encoders.clear()
    release_memory(world.device)


def fill_images(prepared: PreparedData, source: Source, world: World, reporter: Reporter, *, verify: bool) -> None:
    """Encode the images that are not cached. Only ranks with images to encode load the VAE, and free it afterwards."""
    config = prepared.loaded.config

    def load() -> Encode:
        return open_autoencoder(config, config, source, world.device, "encode").encode

    with reporter.phase("latents") as progress:
        report = fill_latents(
            (*prepared.train, *prepared.held_out),
            prepared.latent_store,
            prepared.encoders.latents,
            load,
            batch_size=config.vae_batch_size,
            workers=math.ceil(config.workers / world.on_machine.size),
            verify=verify,
            report=progress,
            world=world,
        )
        world.run_on_main("the references of prompts", lambda: _fill_prompt_references(prepared, load))
    reporter.say(
        f"Images: {report.encoded} encoded in {format_duration(report.seconds)}, {report.existing} already cached."
    )
    release_memory(world.device)


def _fill_prompt_references(prepared: PreparedData, load: Callable[[], Encode]) -> None:
    """Encode the reference images of prompts that are not cached."""
    store, encoder = prepared.prompt_store, prepared.encoders.latents
    missing = [
        crop for crop in prepared.prompt_references.values() if store.check(latent_key(crop, encoder)) != "sound"
    ]
    encode = load() if missing else None
    for crop in missing:
        assert encode is not None
        write_latent(store, crop, encoder, encode_crop(crop, encode))
