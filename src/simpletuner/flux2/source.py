"""Locate all files of the model that the options name, and report everything that is wrong with them."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch

from simpletuner.base.errors import AccessError, ConfigError, Problem
from simpletuner.base.files import file_errors_reported, sha256_bytes, sha256_json, with_home
from simpletuner.base.tensorfile import TensorEntry, is_weight_file, read_header
from simpletuner.config.flavours import (
    FLAVOURS,
    AutoencoderSpec,
    Flavour,
    TextContextSpec,
    TextEncoderKind,
    TextSpec,
    TransformerSpec,
    is_distilled_file,
    sibling,
)
from simpletuner.config.options.model import ModelOptions
from simpletuner.config.rules import layer_findings
from simpletuner.flux2 import tiny
from simpletuner.flux2.configs import Component, Config, check_tokenizer, read_component_config, read_index, read_object
from simpletuner.flux2.content import LEDGER_NAME, ContentHashes
from simpletuner.flux2.model_locations import Hub, ModelFolder, ModelLocation, ReportLine, fetch
from simpletuner.flux2.names import text_encoder_name
from simpletuner.flux2.single import (
    COMPONENTS,
    check_holds,
    check_whole,
    component_shapes,
    config_in,
    open_component,
    shapes_in,
    single_files,
)
from simpletuner.flux2.spec import (
    autoencoder_from_config,
    decoder_channels,
    text_from_config,
    transformer_from_diffusers,
    transformer_from_tensors,
)
from simpletuner.flux2.stored import check_format, stored_weights
from simpletuner.memory.tensors import tensor_data

_STEMS: Mapping[Component, str] = {
    "transformer": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
}
# Names of the component types in configs: diffusers' `_class_name`; for text encoders, transformers' `model_type`.
_CLASSES: Mapping[Component, str] = {
    "transformer": "Flux2Transformer2DModel",
    "vae": "AutoencoderKLFlux2",
}
_TEXT_ENCODERS: Mapping[TextEncoderKind, tuple[str, ...]] = {
    "mistral3": ("mistral3", "mistral"),
    "qwen3": ("qwen3",),
}
_ALL_TEXT_ENCODERS = tuple(name for names in _TEXT_ENCODERS.values() for name in names)
_INDEX = "model_index.json"
_TOKENIZER = ("tokenizer.json", "tokenizer_config.json")
_TOKENIZER_EXTRA = ("chat_template.jinja", "special_tokens_map.json")
# Fields that identify the writer of a config do not change the model.
_WRITER_FIELDS = ("_diffusers_version", "_name_or_path", "transformers_version", "dtype", "torch_dtype")
_HEAD_BYTES = 4096
_ENCODING_TENSORS = ("encoder.", "quant_conv.", "bn.running_")
_ENCODING_FIELDS: Mapping[str, object] = {
    "in_channels": 3,
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
    "act_fn": "silu",
    "latent_channels": 32,
    "norm_num_groups": 32,
    "sample_size": 1024,
    "use_quant_conv": True,
    "mid_block_add_attention": True,
    "batch_norm_eps": 1e-4,
    "patch_size": [2, 2],
}
"""What determines a VAE's latents: prefixes of tensor names, and config fields with diffusers' defaults."""


@dataclass(frozen=True)
class Weights:
    """Files and config of one component. A transformer in a single file has no config: its shapes suffice."""

    files: tuple[Path, ...]
    config: Config | None


@dataclass(frozen=True)
class Source:
    """All files of a FLUX.2 model, on this machine's disk."""

    name: str
    """Name for users: the Hub id, or the name of the folder or file, without its path."""
    flavour: Flavour
    commit: str | None
    """The Hub commit of the base model; None if it is local."""
    transformer: Weights
    vae: Weights
    text_encoder: Weights
    tokenizer: Path
    text_layers: tuple[int, ...]
    """Layers of the text encoder whose hidden states are concatenated."""
    text_length: int
    """Tokens of a context, padding included."""
    pipeline: Path | None
    """Local folder of the base model, None if it is on the Hub. Overridden components may be elsewhere."""
    is_distilled: bool = False
    """Whether the transformer is distilled, by its model_index.json or file name, or else by the flavour."""
    hashes: ContentHashes = field(default_factory=ContentHashes, compare=False)
    """Hashes of the files' tensors."""
    _fingerprints: dict[tuple[str, bool], str] = field(default_factory=dict, init=False, repr=False, compare=False)
    """Cache of `fingerprint`: a run's start needs each several times, and every checkpoint the transformer's."""

    @property
    def spec(self) -> TransformerSpec:
        """The transformer's architecture, from its config or, for a single file, from its header.

        Raises:
            AccessError: it is not a FLUX.2 transformer.
        """
        return transformer_spec(self.transformer, self.name)

    @property
    def text(self) -> TextContextSpec:
        """How prompts become contexts: as in the flavour, with this source's layers and length."""
        return replace(self.flavour.text, layers=self.text_layers, length=self.text_length)

    @property
    def distillation_warning(self) -> str | None:
        """A warning if the weights are distilled and the flavour's are not, or vice versa; else None."""
        flavour, name = self.flavour, self.name
        sibling_flavour = sibling(flavour)
        if sibling_flavour is None or self.is_distilled == flavour.is_distilled:
            return None
        published = flavour.repo or flavour.title
        actual, expected = ("distilled", "base") if self.is_distilled else ("base", "distilled")
        expectation = f"model_flavour = {flavour.name} means {expected} weights"
        finding = f"{name} holds {actual} weights, according to its model_index.json or name; {expectation}."
        if self.is_distilled:
            return (
                f"{finding} Training distilled weights gives gray, smooth blobs: name the base weights ({published}) "
                f"instead. To generate images with these, give --model_flavour {sibling_flavour.name}."
            )
        return (
            f"{finding} Base weights generate only blurs in {flavour.steps} steps without guidance: name the distilled "
            f"weights ({published}), or give --model_flavour {sibling_flavour.name}."
        )

    def fingerprint(self, component: Component | Literal["tokenizer"], *, all_bytes: bool = False) -> str:
        """Hash of the content of `component`, independent of its location.

        Covers the config, and the name, dtype, shape and first 4 KiB of each tensor that is used, or all its bytes if
        `all_bytes`. Reads a few megabytes, even for dev; `all_bytes` reads each new file once.

        Raises:
            AccessError: a file cannot be read.
        """
        fingerprint = self._fingerprints.get((component, all_bytes))
        if fingerprint is None:
            fingerprint = self._fingerprints[component, all_bytes] = self._fingerprint(component, all_bytes)
        return fingerprint

    def _fingerprint(self, component: Component | Literal["tokenizer"], all_bytes: bool) -> str:
        if component == "tokenizer":
            present = (self.tokenizer / name for name in (*_TOKENIZER, *_TOKENIZER_EXTRA))
            with file_errors_reported(self.tokenizer, AccessError, doing="read"):
                return sha256_json({path.name: path.read_text(encoding="utf-8") for path in present if path.is_file()})
        weights = {"transformer": self.transformer, "vae": self.vae, "text_encoder": self.text_encoder}[component]
        used: dict[str, TensorEntry] = {}
        for name, weight in stored_weights(weights.files, component).items():
            # The name in the file, as in earlier releases, except for a text encoder.
            hashed_name: str | None = weight.name
            if component == "text_encoder":
                hashed_name = text_encoder_name(name, max(self.text_layers))
            if hashed_name is not None and weight.is_plain:
                used[hashed_name] = weight.data
            elif hashed_name is not None:
                used |= {f"{hashed_name} {weight.format} {part}": entry for part, entry in weight.parts.items()}
        digests = self.hashes.of(used) if all_bytes else {name: _head_digest(entry) for name, entry in used.items()}
        tensors = {name: [entry.dtype, list(entry.shape), digests[name]] for name, entry in used.items()}
        config = {key: value for key, value in (weights.config or {}).items() if key not in _WRITER_FIELDS}
        return sha256_json([config, tensors])

    def encoder_fingerprint(self, dtype: torch.dtype) -> str:
        """Hash of everything that determines the latents that the VAE computes in `dtype`.

        Covers the VAE's encoder, quant_conv and batch-norm statistics, and the config fields that determine latents.
        Tensors are cast to `dtype` first: the published files hold the same encoder in bf16 and in fp32. The first call
        reads all of them, 0.14 GB of dev's in fp32.

        Raises:
            AccessError: a file cannot be read.
        """
        key = (f"VAE encoder, {dtype}", True)
        if key not in self._fingerprints:
            config = {name: (self.vae.config or {}).get(name, default) for name, default in _ENCODING_FIELDS.items()}
            tensors: dict[str, tuple[list[int], str]] = {}
            with open_component(self.vae.files, "vae") as opened:
                for name, read in opened.items():
                    if name.startswith(_ENCODING_TENSORS):
                        tensor = read()
                        digest = sha256_bytes(bytes(tensor_data(tensor, dtype).data()))
                        tensors[name] = (list(tensor.shape), digest)
            self._fingerprints[key] = sha256_json([config, tensors])
        return self._fingerprints[key]


def _head_digest(entry: TensorEntry) -> str:
    """SHA-256 of the first 4 KiB of a tensor."""
    with file_errors_reported(entry.file, AccessError, doing="read"), entry.file.open("rb") as stream:
        stream.seek(entry.start)
        return sha256_bytes(stream.read(min(_HEAD_BYTES, entry.stop - entry.start)))


def transformer_spec(transformer: Weights, name: str) -> TransformerSpec:
    """A transformer's architecture, from its config or, for a single file, from its header. Errors mention `name`.

    Raises:
        AccessError: it is not a FLUX.2 transformer.
    """
    try:
        if transformer.config is not None:
            return transformer_from_diffusers(transformer.config)
        return transformer_from_tensors(component_shapes(transformer.files, "transformer"))
    except KeyError as error:
        raise AccessError.of(f"{name} has no tensor {error}", "a FLUX.2 transformer") from None
    except (ValueError, IndexError, ZeroDivisionError) as error:
        raise AccessError.of(f"{name}: {error}", "a FLUX.2 transformer") from None


def locate(options: ModelOptions, *, report: ReportLine, environ: Mapping[str, str] = os.environ) -> Source:
    """Locate all files of the model that `options` name. Downloads missing files, and creates the embedded model.

    `report` is called with sentences about each download or creation, its size, and the free disk space. Local paths
    and the embedded model need no network.

    Raises:
        AccessError: files are missing, forbidden, unreachable or not FLUX.2; the error lists all missing files.
        ConfigError: the text-encoder layers are not those that the model was trained with.
        DiskError: a download does not fit on the disk.
    """
    with file_errors_reported(Path(options.pretrained_model_name_or_path or "."), AccessError, doing="read"):
        return _Search(options, report, environ).run()


def locate_preview(
    options: ModelOptions,
    model: str,
    base: Source,
    *,
    flavour: Flavour | None,
    report: ReportLine,
    environ: Mapping[str, str] = os.environ,
) -> Source:
    """`base` with another transformer of the same shapes: that of `flavour`, or else of `model`, a folder, a Hub id or
    a single file. Locates and downloads only the transformer.

    Raises:
        AccessError: as in `locate`, or the shapes differ from those of `base`.
        DiskError: the download does not fit on the disk.
    """
    location = model if flavour is None else flavour.repo
    with file_errors_reported(Path(location or "."), AccessError, doing="read"):
        preview_options = options.model_copy(update={"model_flavour": flavour.name} if flavour is not None else {})
        try:
            return _Search(preview_options, report, environ).preview(location, base)
        except AccessError as error:
            AccessError.raise_if(
                replace(problem, found=f"validation_preview_model: {problem.found}") for problem in error.problems
            )
            raise


@dataclass
class _ComponentFiles:
    """Files and config of one component at a location. A transformer in a single file has no config."""

    location: ModelLocation
    names: list[str]
    config: Config | None
    is_single: bool = False

    @property
    def label(self) -> str:
        """Name of the location, or path of the single file, for messages."""
        return str(self.location.path(self.names[0])) if self.is_single else self.location.label


class _Search:
    """The state of one call of `locate`: collects all problems, and raises them together."""

    def __init__(self, options: ModelOptions, report: ReportLine, environ: Mapping[str, str]) -> None:
        self.options = options
        self.report = report
        self.environ = environ
        self.flavour = FLAVOURS[options.model_flavour]
        self.layers = options.custom_text_encoder_intermediary_layers or self.flavour.text.layers
        self.repos: dict[str, Hub] = {}
        self.missing: dict[str, list[str]] = {}
        self.problems: list[Problem] = []
        self.fallbacks: list[Component] = []
        """Components without the requested variant."""
        self.foreign: dict[tuple[str, str], list[Component]] = {}
        """Components with the shapes of another flavour, by location and flavour."""

    def run(self) -> Source:
        """Locate the model; see `locate`."""
        base_name = self.options.pretrained_model_name_or_path
        overrides: dict[Component, str | None] = {
            "transformer": self.options.pretrained_transformer_model_name_or_path,
            "vae": self.options.pretrained_vae_model_name_or_path,
            "text_encoder": self.options.pretrained_text_encoder_model_name_or_path,
        }
        base_file = base_name if base_name is not None and is_weight_file(base_name) else None
        # Check the name even if the file provides only a VAE or a text encoder, or nothing.
        if base_file is not None and overrides["transformer"] is not None and not Path(with_home(base_file)).is_file():
            self.problems.append(Problem(f"{base_file}: no such file", "a .safetensors or .gguf file"))
        parts = self._single_parts(overrides | {"transformer": overrides["transformer"] or base_file})
        self._raise_problems()  # of headers, before any request to the Hub
        single = parts.get("transformer")
        base = self._base(None if base_file else base_name)

        for component, path in overrides.items():
            if component in parts:
                continue
            if path is not None:
                parts[component] = self._part(component, self._location(path), folders=(f"{component}/", ""))
            else:
                parts[component] = self._part(component, base, folders=(f"{component}/",))
        tokenizer = self._tokenizer(parts["text_encoder"].location, base)
        if parts["text_encoder"].is_single and tokenizer.location is base:
            parts["text_encoder"] = self._with_base_config(parts["text_encoder"], base)
        # If no other file comes from a Hub repository, do not query it: there may be no network.
        locations = [part.location for part in (*parts.values(), tokenizer)]
        if parts["vae"].is_single and (isinstance(base, ModelFolder) or base in locations):
            parts["vae"] = self._vae_with_base_config(parts["vae"], base)
        if single is None:
            self._compare_shapes(parts["transformer"])
        self._raise_problems()
        is_distilled = self._is_distilled(parts["transformer"])

        fetch([(part.location, name) for part in (*parts.values(), tokenizer) for name in part.names], self.report)
        weights = {
            component: Weights(tuple(part.location.path(name) for name in part.names), part.config)
            for component, part in parts.items()
        }
        for component, files in weights.items():
            check_format(files.files, self.flavour.repo, component)  # here rather than after an hour of encoding
        weights["vae"] = _with_decoder_channels(weights["vae"])
        folder = tokenizer.location.path(tokenizer.names[0]).parent
        check_tokenizer(folder, tuple(Path(name).name for name in tokenizer.names))
        source = Source(
            name=single.names[0] if single is not None else base.name,
            flavour=self.flavour,
            commit=base.commit if single is None else None,
            transformer=weights["transformer"],
            vae=weights["vae"],
            text_encoder=weights["text_encoder"],
            tokenizer=folder,
            text_layers=self.layers,
            text_length=self.options.tokenizer_max_length or self.flavour.text.length,
            is_distilled=is_distilled,
            pipeline=base.root if isinstance(base, ModelFolder) else None,
            hashes=ContentHashes(self._ledger(), self.report, self.options.verify_base),
        )
        ConfigError.raise_if(problem for _, problem in layer_findings(self.options, source.spec.context_dim))
        _check_width(source)
        return source

    def _single_parts(self, names: Mapping[Component, str | None]) -> dict[Component, _ComponentFiles]:
        """Components from single files. Their headers are checked against the flavour."""
        parts: dict[Component, _ComponentFiles] = {}
        for component, path in names.items():
            if path is not None and is_weight_file(path):
                try:
                    file = _single_file(path, component)
                    check_format((file,), self.flavour.repo, component)
                    check_holds(file, component)
                except AccessError as error:
                    self.problems += error.problems
        self._raise_problems()
        for component, file in single_files(self.options).items():
            config = config_in(file, component, self.flavour)
            part = parts[component] = _ComponentFiles(ModelFolder(file.parent), [file.name], config, is_single=True)
            counts = len(self.problems), len(self.foreign)
            if component == "transformer":
                self._compare_shapes(part)
            elif component == "text_encoder":
                self._check_text_encoder(part.label, config or {})
            if counts == (len(self.problems), len(self.foreign)):  # else this would report the same problem again
                try:
                    check_whole(file, component, self.flavour, max(self.layers))
                except AccessError as error:
                    self.problems += error.problems
        return parts

    def _check_text_encoder(self, label: str, config: Config) -> None:
        """Record problems of a text encoder in a single file with this inferred `config`."""
        if self._is_of_another_flavour("text_encoder", label, text_from_config(config)):
            return
        kinds, layers = _TEXT_ENCODERS[self.flavour.text.kind], config["num_hidden_layers"]
        if config["model_type"] not in kinds:
            self.problems.append(_wrong_kind(label, "text_encoder", config["model_type"], kinds, self.flavour))
        if layers < max(self.layers):
            self.problems.append(
                Problem(
                    f"{label} holds {layers} text-encoder layers",
                    f"the first {max(self.layers)}, whose output the transformer uses",
                    "Name a file that has them.",
                )
            )

    def _with_base_config(self, encoder: _ComponentFiles, base: ModelLocation) -> _ComponentFiles:
        """Give a text encoder's single file the config of the base model's text encoder if both have the same shapes.

        That config is the published one, and the ids of cached contexts include it.
        """
        if not base.contains("text_encoder/config.json"):
            return encoder
        config = read_component_config("text_encoder", base.path("text_encoder/config.json"))
        kinds = _TEXT_ENCODERS[self.flavour.text.kind]
        if config.get("model_type") in kinds and text_from_config(config) == text_from_config(encoder.config or {}):
            return replace(encoder, config=config)
        return encoder

    def _vae_with_base_config(self, vae: _ComponentFiles, base: ModelLocation) -> _ComponentFiles:
        """Give a VAE's single file the config of the base model's VAE if its names are diffusers' and its shapes fit.

        Earlier releases read only such files, always with that config. Their ids for latents and for a checkpoint's VAE
        include it (`earlier_autoencoder_id`).
        """
        file = vae.location.path(vae.names[0])
        if not shapes_in(file, "vae").keys() <= read_header(file).keys() or not base.contains("vae/config.json"):
            return vae
        _, config = self._config("vae", base, folders=("vae/",))
        if config is None:
            return vae
        inferred = autoencoder_from_config(vae.config or {})
        # Shapes do not determine tile and norm groups; the decoder's widths are read from the file later.
        expected = replace(
            autoencoder_from_config(config),
            tile=inferred.tile,
            norm_groups=inferred.norm_groups,
            decoder_channels=inferred.decoder_channels,
        )
        return replace(vae, config=config) if expected == inferred else vae

    def preview(self, model: str | None, base: Source) -> Source:
        """`base` with the transformer of `model`, by default the flavour's."""
        if model is not None and is_weight_file(model):
            single = _single_file(model, "transformer")
            check_holds(single, "transformer")
            part = _ComponentFiles(ModelFolder(single.parent), [single.name], None, is_single=True)
            name = single.name
        else:
            location = self._base(model)
            part = self._part("transformer", location, folders=("transformer/", ""))
            name = location.name
        self._raise_problems()
        local = (part.location.path(part.names[0]),) if part.config is None else ()
        spec = transformer_spec(Weights(local, part.config), name)
        expected = vars(base.spec)
        differing = [
            f"{key} {value} instead of {expected[key]}" for key, value in vars(spec).items() if value != expected[key]
        ]
        if differing:
            raise AccessError.of(
                f"the transformer of {name} differs from that of {base.name}: {', '.join(differing)}",
                "the same shapes, so that the LoRA fits",
                "Name the distilled model of the same size, or remove validation_preview_model.",
            )
        fetch([(part.location, name) for name in part.names], self.report)
        weights = Weights(tuple(part.location.path(name) for name in part.names), part.config)
        check_format(weights.files)
        commit = part.location.commit if part.config is not None else None
        return replace(base, name=name, commit=commit, transformer=weights)

    def _ledger(self) -> Path | None:
        """File that stores hashes, next to the embedded model; None for a user without a home folder."""
        cache_dir = self.options.cache_dir
        try:
            folder = tiny.default_folder(None if cache_dir is None else Path(cache_dir).expanduser(), self.environ)
        except RuntimeError:
            return None
        return folder.with_name(LEDGER_NAME)

    def _base(self, name: str | None) -> ModelLocation:
        """The location of the base model `name`, by default the flavour's."""
        name = name or self.flavour.repo
        if name is not None:
            return self._location(name)
        cache_dir = self.options.cache_dir
        cache_folder = None if cache_dir is None else Path(with_home(cache_dir))
        folder = tiny.default_folder(cache_folder, self.environ, self.flavour.name)
        if not folder.exists():
            self.report(f"Creating {self.flavour.title} in {folder}.")
        return ModelFolder(tiny.make(folder, self.flavour.name))

    def _location(self, text: str) -> ModelLocation:
        """The folder or Hub repository that an option names."""
        folder = Path(with_home(text))
        if folder.is_dir():
            return ModelFolder(folder)
        if folder.is_file():
            check_format((folder,), self.flavour.repo)  # its error names other containers
            raise AccessError.of(f"{text} is a file", "a folder, a Hub id, or a .safetensors or .gguf file")
        if Hub.is_id(text):
            if text not in self.repos:
                self.repos[text] = Hub(text, self.options, self.report, self.environ)
            return self.repos[text]
        raise AccessError.of(
            f"{text}: no such folder",
            "a folder, a Hub id such as black-forest-labs/FLUX.2-dev, or a .safetensors or .gguf file",
        )

    def _config(
        self, component: Component, location: ModelLocation, folders: tuple[str, ...]
    ) -> tuple[str, Config | None]:
        """The first of `folders` that has a config of `component`, and the config; None if a problem was recorded."""
        folder = next((folder for folder in folders if location.contains(f"{folder}config.json")), None)
        if folder is None:
            self._add_missing(location, f"{folders[0]}config.json")
            return folders[0], None
        try:
            config = read_component_config(component, location.path(f"{folder}config.json"))
        except AccessError as error:
            self.problems += error.problems
            return folder, None
        return folder, config

    def _part(self, component: Component, location: ModelLocation, folders: tuple[str, ...]) -> _ComponentFiles:
        """Config and weight files of `component`, from the first of `folders` that has a config."""
        folder, config = self._config(component, location, folders)
        if config is None:
            return _ComponentFiles(location, [], {})
        if component == "text_encoder":
            key, kinds = "model_type", _TEXT_ENCODERS[self.flavour.text.kind]
        else:
            key, kinds = "_class_name", (_CLASSES[component],)
        kind = config.get(key)
        if (
            component == "text_encoder"
            and kind in _ALL_TEXT_ENCODERS
            and self._is_of_another_flavour(component, location.label, text_from_config(config))
        ):
            return _ComponentFiles(location, [], config)
        if kind not in kinds:
            self.problems.append(_wrong_kind(location.label, component, kind, kinds, self.flavour))
            return _ComponentFiles(location, [], config)
        try:
            names = self._weights(component, location, folder)
        except AccessError as error:
            self.problems += error.problems
            return _ComponentFiles(location, [], config)
        for name in names:
            if not location.contains(name):
                self._add_missing(location, name)
        return _ComponentFiles(location, names, config)

    def _is_of_another_flavour(self, component: Component, label: str, spec: TransformerSpec | TextSpec) -> bool:
        """Whether `spec` equals that of another flavour that is published or has another kind of text encoder.

        Shapes of no flavour, and those of the embedded models, fit any flavour. Records the component if true.
        """
        matching = [each for each in FLAVOURS.values() if spec in (each.transformer, each.text.encoder)]
        if self.flavour in matching:
            return False
        foreign = [each for each in matching if each.repo is not None or each.text.kind != self.flavour.text.kind]
        if not foreign:
            return False
        likely = next((each for each in foreign if each.is_distilled == self.flavour.is_distilled), foreign[0])
        self.foreign.setdefault((label, likely.name), []).append(component)
        return True

    def _compare_shapes(self, transformer: _ComponentFiles) -> None:
        """Record a problem if the transformer is of another flavour. Its weights may not be downloaded yet."""
        if transformer.config == {} or not transformer.names:
            return
        try:
            files = (transformer.location.path(transformer.names[0]),) if transformer.config is None else ()
            spec = transformer_spec(Weights(files, transformer.config), transformer.label)
        except AccessError as error:
            self.problems += error.problems
            return
        self._is_of_another_flavour("transformer", transformer.label, spec)

    def _is_distilled(self, transformer: _ComponentFiles) -> bool:
        """Whether the transformer is distilled, by location, file name or model_index.json. Shapes do not reveal it."""
        sibling_flavour = sibling(self.flavour)
        if sibling_flavour is None or transformer.location.name in (self.flavour.repo, sibling_flavour.repo):
            return self.flavour.is_distilled
        if transformer.config is None:
            by_name = is_distilled_file(transformer.names[0])
            return self.flavour.is_distilled if by_name is None else by_name
        if not transformer.location.contains(_INDEX):
            return self.flavour.is_distilled
        index = read_object(transformer.location.path(_INDEX))
        return bool(index.get("is_distilled")) or index.get("_class_name") == "Flux2KleinKVPipeline"

    def _weights(self, component: Component, location: ModelLocation, folder: str) -> list[str]:
        """The weight files that are used. Leaves out a text encoder's shards that hold only unused layers."""
        stem = folder + _STEMS[component]
        variants = ["", f".{self.options.variant}"] if self.options.variant else [""]
        for variant in reversed(variants):
            single, index = f"{stem}{variant}.safetensors", f"{stem}.safetensors.index{variant}.json"
            if location.contains(single) or location.contains(index):
                if variant == "" and self.options.variant:
                    self.fallbacks.append(component)
                if location.contains(single):
                    return [single]
                shards = read_index(location.path(index))
                depth = max(self.layers)
                return sorted(
                    {
                        folder + shard
                        for tensor, shard in shards.items()
                        if component != "text_encoder" or text_encoder_name(tensor, depth) is not None
                    }
                )
        return [f"{stem}.safetensors"]

    def _tokenizer(self, text_encoder: ModelLocation, base: ModelLocation) -> _ComponentFiles:
        """The tokenizer's files, from the text encoder's location if it has them, or else from the base model."""
        candidates = [(text_encoder, "tokenizer/"), (text_encoder, ""), (base, "tokenizer/")]
        for location, folder in candidates if text_encoder is not base else candidates[-1:]:
            if all(location.contains(folder + name) for name in _TOKENIZER):
                extra = [folder + name for name in _TOKENIZER_EXTRA if location.contains(folder + name)]
                return _ComponentFiles(location, [*(folder + name for name in _TOKENIZER), *extra], None)
        for name in _TOKENIZER:
            if not base.contains(f"tokenizer/{name}"):
                self._add_missing(base, f"tokenizer/{name}")
        return _ComponentFiles(base, [], None)

    def _add_missing(self, location: ModelLocation, name: str) -> None:
        """Record that `location` lacks the file `name`."""
        self.missing.setdefault(location.label, []).append(name)

    def _raise_problems(self) -> None:
        """Raise all recorded problems as one AccessError, and report components without the requested variant."""
        for label, names in self.missing.items():
            listed = ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
            self.problems.append(
                Problem(
                    f"{label} lacks {listed}",
                    "a complete diffusers folder of FLUX.2",
                    "Download the missing files, or name another folder.",
                )
            )
        for (label, name), components in self.foreign.items():
            titles = " and ".join(component.replace("_", " ") for component in components)
            self.problems.append(
                Problem(
                    f"{label}: its {titles} {'has' if len(components) == 1 else 'have'} the shapes of {name}",
                    f"those of {self.flavour.name}, as set by model_flavour",
                    f"Give --model_flavour {name}.",
                )
            )
        if len(self.fallbacks) == len(_STEMS):
            self.problems.append(Problem(f"variant = {self.options.variant}: no component has files of this variant"))
        AccessError.raise_if(self.problems)
        if self.fallbacks:
            self.report(
                f"No {self.options.variant} variant of {', '.join(self.fallbacks)}: using files without a variant."
            )


def _wrong_kind(label: str, component: str, kind: object, kinds: tuple[str, ...], flavour: Flavour) -> Problem:
    return Problem(
        f"{label}: its {component} is a {kind}",
        f"a {' or '.join(kinds)}",
        f"model_flavour = {flavour.name} is {flavour.title}: set model_flavour to the flavour of this model.",
    )


def _check_width(source: Source) -> None:
    """Raise an AccessError unless the concatenated states of `text_layers` are as wide as the transformer's context."""
    config = source.text_encoder.config or {}
    width = config.get("text_config", config).get("hidden_size")
    context = source.spec.context_dim
    if width is not None and width * len(source.text_layers) != context:
        raise AccessError.of(
            f"{len(source.text_layers)} text-encoder layers of width {width}",
            f"{context} in total, the width of the transformer's context",
            "Check custom_text_encoder_intermediary_layers, and that text encoder and transformer match.",
        )


def _with_decoder_channels(vae: Weights) -> Weights:
    """`vae` with its decoder's actual widths in the config, which the config of a small decoder may lack."""
    config = vae.config or {}
    channels = list(decoder_channels(component_shapes(vae.files, "vae")))
    in_config = config.get("decoder_block_out_channels") or config.get(
        "block_out_channels", list(AutoencoderSpec.channels)
    )
    if not channels or channels == in_config:
        return vae
    return Weights(vae.files, config | {"decoder_block_out_channels": channels})


def _single_file(text: str, component: Component) -> Path:
    """The path of the single weight file that an option names."""
    file = Path(with_home(text))
    if not file.is_file():
        raise AccessError.of(f"{text}: no such file", f"a .safetensors or .gguf file of the {COMPONENTS[component]}")
    return file
