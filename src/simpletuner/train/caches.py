"""Before training: scan the sets, then fill the caches, one encoder in memory at a time."""

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
from simpletuner.config.datasets import WHOLE_RUN, ImageSet, PictureSet, TextStore, Windows
from simpletuner.config.load import Loaded
from simpletuner.config.previews import drawing_flavour
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
from simpletuner.flux2.components import open_autoencoder, open_text_encoder, text_codec
from simpletuner.flux2.load import autoencoder_id, earlier_autoencoder_id
from simpletuner.flux2.located import check_same_model
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
"""The caption that caption dropout and real guidance fall back to: empty text through the full template."""


@dataclass(frozen=True)
class Encoders:
    """What fills the caches: whatever changes a cached tensor changes the codec's key, or `latents`."""

    text: ContextCodec
    latents: str

    @classmethod
    def of(cls, config: RunConfig, source: Source, *, whole: bool = False) -> "Encoders":
        """Weights, `whole` or their heads, precision and every setting that the encoders see."""
        return cls(text_codec(config, config, source, whole=whole), autoencoder_id(source, **_encoding(config)))

    @classmethod
    def claimed(cls, loaded: Loaded, source: Source, world: World) -> "Encoders":
        """The keys of this machine's caches: those of the weights' heads, unless other weights had them there first.
        Its first rank reads the weights and the notes.
        """
        codec = CODECS[source.flavour.text.padding_side]
        return world.from_each_machine(
            "the fingerprints of the encoders",
            lambda: cls._claimed(loaded, source),
            record=lambda encoders: [encoders.text.key, encoders.text.least_bytes, encoders.latents],
            restore=lambda record: cls(codec(record[0], record[1]), record[2]),
        )

    @classmethod
    def _claimed(cls, loaded: Loaded, source: Source) -> "Encoders":
        config, datasets = loaded.config, loaded.datasets
        heads, whole = (cls.of(config, source, whole=all_bytes) for all_bytes in (False, True))
        earlier = (earlier_autoencoder_id(source, **_encoding(config), whole=all_bytes) for all_bytes in (False, True))
        texts = [text_storage(store) for store in datasets.text_stores]
        picture_sets = (*datasets.train_sets, *datasets.eval_sets, *datasets.conditioning_sets)
        # Before the texts: where both lie in one storage, what these note there would hide that it had no note.
        latents = key_of_latents([latent_storage(each) for each in picture_sets], heads.latents, *earlier)
        return cls(heads.text if claim(texts, heads.text.key, whole.text.key) else whole.text, latents)


def _encoding(config: RunConfig) -> dict[str, Any]:
    """Options that change a latent, as `autoencoder_id` takes them."""
    return {
        "dtype": DTYPES[config.vae_dtype],
        "tiling": config.vae_enable_tiling,
        "slicing": config.vae_enable_slicing,
    }


WHOLE = "whole:"
"""What fingerprints of all bytes of a base model begin with. Earlier releases recorded those of the heads."""


EARLIER_VAE = "VAE"
"""What earlier releases recorded of the VAE. Its decoder decides nothing that is trained."""


def base_fingerprints(
    config: RunConfig, source: Source, world: World, *, like: Mapping[str, str] | None = None
) -> dict[str, str]:
    """What a checkpoint remembers of the base model: the transformer, and what fills the caches. As the record `like`
    of an earlier release has it, or as this one does. The first rank of each machine reads the weights, and its `like`
    counts.

    Raises:
        AccessError: another machine has another base model.
    """
    found = world.from_each_machine(
        "the fingerprints of the base model", lambda: _base_fingerprints(config, source, like)
    )
    check_same_model(world, found)
    return found


def _base_fingerprints(config: RunConfig, source: Source, like: Mapping[str, str] | None) -> dict[str, str]:
    whole = like is None or knows_whole_base(like)
    found = {
        "transformer": source.fingerprint("transformer", whole=whole),
        "text encoder": text_codec(config, config, source, whole=whole).key,
    }
    if like is not None and EARLIER_VAE in like:
        found[EARLIER_VAE] = earlier_autoencoder_id(source, **_encoding(config), whole=whole)
    else:
        found["VAE encoder"] = autoencoder_id(source, **_encoding(config))
    return {name: f"{WHOLE if whole else ''}{value}" for name, value in found.items()}


def knows_whole_base(record: Mapping[str, str]) -> bool:
    """Whether the fingerprints that a checkpoint remembers are of all bytes of the base model."""
    return all(value.startswith(WHOLE) for value in record.values())


@dataclass(frozen=True)
class Prepared:
    """The data, scanned and encoded."""

    loaded: Loaded
    encoders: Encoders
    train: tuple[Manifest, ...]
    held_out: tuple[Manifest, ...]

    @cached_property
    def prompt_references(self) -> dict[str, Crop]:
        """The reference images of the prompts that are drawn, by path.

        Raises:
            ConfigError: every file that is no image, or of a size that no reference has.
        """
        return reference_crops(path for prompt in self.loaded.drawn_prompts for path in prompt.references)

    @cached_property
    def fingerprints(self) -> dict[str, str]:
        """Fingerprint of each training set: its pictures, captions and crops."""
        return {manifest.image_set.id: manifest.fingerprint for manifest in self.train}

    @cached_property
    def mask_sources(self) -> dict[str, MaskSource]:
        """How masks are read, by the id of the set that their files lie in."""
        return MaskSource.all_of(self.loaded.datasets)

    @property
    def windows(self) -> dict[str, Windows]:
        """First and last "step" and "epoch" of each training set that is not active throughout."""
        own = {manifest.image_set.id: manifest.image_set.windows for manifest in self.train}
        return {name: windows for name, windows in own.items() if windows != WHOLE_RUN}

    @property
    def pictures(self) -> int:
        return sum(len(manifest.samples) for manifest in self.train)

    def latent_store(self, picture_set: PictureSet) -> Store:
        return Store(latent_storage(picture_set))

    def text_store(self, image_set: ImageSet | None) -> Store:
        """The store of a set's captions; None asks for that of the prompts that belong to no set."""
        datasets = self.loaded.datasets
        store = datasets.default_text_store if image_set is None else datasets.text_store_of(image_set)
        return Store(text_storage(store))

    def latents(self, image_set: ImageSet, samples: Sequence[Sample]) -> Float[Tensor, "b 128 h w"]:
        """The latents of samples of one set and one bucket, from the cache.

        Raises:
            DataError: a cache file is missing or damaged.
        """
        return read_latents(self.latent_store(image_set), samples, self.encoders.latents)

    def references(self, samples: Sequence[Sample]) -> list[list[Float[Tensor, "128 h w"]]]:
        """The latents of the references of each of `samples`, in the order of their positions, from the cache.

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
        """The masks of samples, from the cache; None for a sample that has none.

        Raises:
            DataError: a cache file is missing or damaged.
        """
        return [None if sample.mask is None else self.mask(sample.mask) for sample in samples]

    def mask(self, crop: Crop) -> CachedMask:
        """The cached mask of `crop`, which is a mask's file."""
        return self.mask_sources[crop.dataset].read(crop)

    @cached_property
    def forced_shares(self) -> list[float]:
        """Share of the tokens that TREAD keeps for its mask, of each training image that has one. Reads them all. Empty
        where the options let masks force no tokens.
        """
        masking = Masking(self.loaded.config, self.loaded.config.seed)
        masks = weighing_masks(self.train) if masking.forces_tokens else []
        return [kept_positions(masking.inside(self.mask(mask))).float().mean().item() for mask in masks]

    @property
    def prompt_store(self) -> Store:
        """The store of the references of prompts, which belong to no set: that of the first training set."""
        return self.latent_store(self.loaded.datasets.train_sets[0])

    def references_of(self, prompt: Prompt) -> References | None:
        """The references of a prompt, from the cache; None where it has none.

        Raises:
            DataError: a cache file is missing or damaged.
        """
        crops = [self.prompt_references[path] for path in prompt.references]
        latents = [read_latent(self.prompt_store, crop, self.encoders.latents) for crop in crops]
        return reference_tokens(latents) if latents else None

    def contexts(self, prompts: Sequence[str], image_set: ImageSet | None = None) -> TextContext:
        """The contexts of prompts, from the cache.

        Raises:
            DataError: a cache file is missing or damaged.
        """
        return read_contexts(self.text_store(image_set), prompts, self.encoders.text)


def prepare(loaded: Loaded, source: Source, world: World, reporter: Reporter, *, verify: bool = False) -> Prepared:
    """Scan every set and fill every cache, as `scan_sets` and `fill_caches` do."""
    prepared = scan_sets(loaded, source, world, reporter)
    fill_caches(prepared, source, world, reporter, verify=verify)
    return prepared


def scan_sets(loaded: Loaded, source: Source, world: World, reporter: Reporter) -> Prepared:
    """The data of a run, scanned but not encoded: what is known before an encoder loads. The first rank of each machine
    scans; the others train what it found, also where a file has changed since.

    Raises:
        DataError: a set is missing or ends up empty, or is another one on another machine; or no caption contains
            `preservation_trigger`.
    """
    config, datasets = loaded.config, loaded.datasets
    image_sets = (*datasets.train_sets, *datasets.eval_sets)
    conditions = [datasets.conditions_of(each) for each in image_sets]
    with reporter.phase("scan") as progress:
        manifests = world.from_each_machine(
            "the scan of the image sets",
            lambda: [scan_of(loaded, each, report=progress) for each in image_sets],
            record=lambda manifests: [manifest.record() for manifest in manifests],
            restore=lambda records: [*map(Manifest.of_record, image_sets, records, conditions)],
        )
    check_same_images(manifests, world)
    for manifest in manifests:
        tell_manifest(manifest, reporter)
    count = len(datasets.train_sets)
    notice = PreservedPrompts(config).notice(manifests[:count])
    if notice is not None:
        reporter.notice(notice)
    encoders = Encoders.claimed(loaded, source, world)
    prepared = Prepared(loaded, encoders, tuple(manifests[:count]), tuple(manifests[count:]))
    _ = prepared.prompt_references  # validated now: a bad file is reported before an encoder loads
    return prepared


def check_same_images(manifests: Sequence[Manifest], world: World) -> None:
    """Raise a DataError, on all ranks, if another machine has other images, captions, references or masks."""
    if world.of_machine is None:
        return
    for manifest in manifests:
        samples = {row[0][1]: sha256_json(row) for row in manifest.record()[0]}
        other = differing_machine(world, samples)
        if other is not None:
            machine, (ours, theirs) = other
            differing = sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))
            shown = ", ".join(differing[:MOST_NAMED]) + (", …" if len(differing) > MOST_NAMED else "")
            raise DataError.of(
                f"{manifest.image_set.id}: {len(differing)} images, or their captions, references or masks, are not "
                f"the same on machine {machine} as on machine 0: {shown}",
                "the same files on every machine",
                f"Copy machine 0's {manifest.image_set.instance_data_dir} there, or name a folder that all machines "
                "share.",
            )


def ranks_of_cache(storages: Sequence[Storage], what: str, world: World, reporter: Reporter) -> World:
    """The ranks that together fill the caches `what` in `storages`: all of them where every machine sees each of these,
    else those of a machine, each of which fills its own. Says which.
    """
    if world.of_machine is None:
        return world
    folders = [folder for storage in storages if (folder := storage.local_path()) is not None]
    own = set(folders) - shared_folders(world, folders)
    if not own:
        reporter.say(f"The cache of {what} is shared by {world.machines} machines and filled once.")
        return world
    named = ", ".join(map(str, sorted(own)))
    reporter.say(f"The cache of {what} is filled on each of {world.machines} machines, which do not share {named}.")
    return world.of_machine


def fill_caches(prepared: Prepared, source: Source, world: World, reporter: Reporter, *, verify: bool = False) -> None:
    """Fill every cache that the run will read, masks first: what is wrong with them is known before an encoder loads.
    All ranks call it, and each makes a share of what is missing in caches that it sees. With `verify` every cached file
    is read and hashed, also those that an earlier check left as they are.

    Raises:
        DataError: a mask would leave nothing of its image to train on.
        AccessError: an encoder cannot be loaded.
        DiskError: a cache's disk is full. What is finished is kept.
    """
    datasets = prepared.loaded.datasets
    picture_sets = (*datasets.train_sets, *datasets.eval_sets, *datasets.conditioning_sets)
    of_pictures = ranks_of_cache([*map(latent_storage, picture_sets)], "images", world, reporter)
    of_texts = ranks_of_cache([*map(text_storage, datasets.text_stores)], "captions", world, reporter)
    fill_mask_weights(prepared, of_pictures, reporter, verify=verify)
    fill_text(prepared, source, of_texts, reporter, verify=verify)
    fill_pictures(prepared, source, of_pictures, reporter, verify=verify)
    world.barrier("the caches of other machines")


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
        if rejection.reason in LACKS_CAPTION:  # told by a notice of the manifest, with what to do
            continue
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
        prompts.append(UNCONDITIONAL_CAPTION)
    for manifest in prepared.train:
        found[datasets.text_store_of(manifest.image_set)] += PreservedPrompts(config).all_of(manifest)
    general = found[datasets.default_text_store]
    general += [UNCONDITIONAL_CAPTION, *(prompt.text for prompt in prepared.loaded.prompts.values())]
    if not config.validation_disable:
        general += config.validation_drift_prompts or ()
    scales = drawing_flavour(config).scales(config.validation_guidance, config.validation_guidance_real)
    if scales.real != 1.0:
        general.append(config.validation_negative_prompt)
    return found


MOST_NAMED = 50
"""Masks that an error names."""


def fill_mask_weights(prepared: Prepared, world: World, reporter: Reporter, *, verify: bool) -> None:
    """Make the masks that no cache has, and say how much of the images counts.

    Raises:
        DataError: masks under which nothing counts.
    """
    masks = weighing_masks((*prepared.train, *prepared.held_out))
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
        empty, share = world.from_main("the areas of the masks", lambda: _mask_areas(prepared, masks))
    if empty:
        raise _nothing_counts(empty, prepared.loaded.config)
    reporter.say(
        f"Masks: {report.encoded} made in {format_duration(report.seconds)}, {report.found} in the cache already. "
        f"{len(masks)} images have one; on average {share:.0%} of such an image counts."
    )


def weighing_masks(manifests: Sequence[Manifest]) -> list[Crop]:
    """The masks that weigh the losses of samples: all but those of regularization sets, which are trained."""
    weighed = (
        manifest
        for manifest in manifests
        if manifest.image_set.dataset_type == "eval" or not manifest.image_set.is_regularisation_data
    )
    return [sample.mask for manifest in weighed for sample in manifest.samples if sample.mask is not None]


def _mask_areas(prepared: Prepared, masks: Sequence[Crop]) -> tuple[list[str], float]:
    """The masks under which nothing counts, and the mean weight of a place."""
    masking = Masking(prepared.loaded.config, prepared.loaded.config.seed)
    empty, total = [], 0.0
    for mask in masks:
        weights = masking.weights(masking.inside(prepared.mask(mask)))
        total += weights.mean().item()
        if not weights.any():
            empty.append(mask.shown)
    return empty, total / len(masks)


def _nothing_counts(empty: Sequence[str], config: RunConfig) -> DataError:
    level, other = ("white", "black") if config.masked_loss_invert else ("black", "white")
    named = ", ".join(empty[:MOST_NAMED]) + (f" and {len(empty) - MOST_NAMED} more" if len(empty) > MOST_NAMED else "")
    masks = "1 mask is" if len(empty) == 1 else f"{len(empty)} masks are"
    return DataError.of(
        f"{masks} {level} in all of the crop that is trained, so nothing of the image would count: {named}",
        f"some {other} in each",
        "Paint what counts, or take the image out of the set. With --masked_loss_floor=0.1 all of it counts a little.",
    )


def fill_text(prepared: Prepared, source: Source, world: World, reporter: Reporter, *, verify: bool) -> None:
    """Encode the prompts that no cache has; the encoder is loaded only on ranks that have any to encode, and let go
    after.
    """
    config = prepared.loaded.config
    held: list[TextEncoder] = []
    # A GPU is a rank's own. On CPUs all load into one memory: rank 0 first, then the others, who see what it left.
    here = world.on_machine
    sharing = here.size - (not here.is_main) if world.device.type == "cpu" else 1

    def load() -> TextEncoder:
        if not held:
            folder = prepared.text_store(None).storage.local_path() or Path(config.output_dir)
            encoder = open_text_encoder(
                config, config, config, source, world.device, folder=folder, say=reporter.say, sharing=sharing
            )
            held.append(encoder)
        return held[0]

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
            for store, prompts in wanted_prompts(prepared).items()
            if prompts
        ]
    # No name may hold the encoder when memory is freed: it holds itself, and would be found by the next phase. Rank 0
    # has counted the tokens of all prompts, so it knows those of the other ranks too.
    truncated = [text for encoder in held for text in encoder.truncated]
    if truncated:
        shown = "; ".join(text[:60] + "…" for text in truncated[:3])
        reporter.notice(
            f"{len(truncated)} captions are longer than tokenizer_max_length "
            f"({source.text_length} tokens with the template) and were shortened: {shown}"
        )
    control_tokens = {prompt: names for encoder in held for prompt, names in encoder.control_tokens.items()}
    if control_tokens:
        reporter.notice(control_token_notice(control_tokens))
    encoded, found = sum(r.encoded for r in reports), sum(r.found for r in reports)
    seconds = sum(r.seconds for r in reports)
    reporter.say(f"Captions: {encoded} encoded in {format_duration(seconds)}, {found} in the cache already.")
    held.clear()
    release_memory(world.device)


def fill_pictures(prepared: Prepared, source: Source, world: World, reporter: Reporter, *, verify: bool) -> None:
    """Encode the pictures that no cache has; the VAE is loaded only on ranks that encode any, and let go after."""
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
        world.from_main("the references of prompts", lambda: _fill_prompt_references(prepared, load))
    reporter.say(
        f"Pictures: {report.encoded} encoded in {format_duration(report.seconds)}, {report.found} in the cache already."
    )
    release_memory(world.device)


def _fill_prompt_references(prepared: Prepared, load: Callable[[], Encode]) -> None:
    """Encode the reference images of prompts that the cache lacks."""
    store, encoder = prepared.prompt_store, prepared.encoders.latents
    lacking = [
        crop for crop in prepared.prompt_references.values() if store.check(latent_key(crop, encoder)) != "sound"
    ]
    encode = load() if lacking else None
    for crop in lacking:
        assert encode is not None
        write_latent(store, crop, encoder, encode_crop(crop, encode))
