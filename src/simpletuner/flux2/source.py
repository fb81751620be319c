"""Which files make up the model that was asked for, and everything that can be wrong with them."""

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
from simpletuner.flux2.names import text_encoder_name
from simpletuner.flux2.places import Hub, ModelFolder, ModelLocation, ReportLine, fetch
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
from simpletuner.memory.tensors import as_written

_STEMS: Mapping[Component, str] = {
    "transformer": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
}
# What a component's config says it is: diffusers' `_class_name`, or of a text encoder transformers' `model_type`.
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
# Who wrote a config, and with what, changes nothing about what it says.
_WRITTEN_BY = ("_diffusers_version", "_name_or_path", "transformers_version", "dtype", "torch_dtype")
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
"""What of a VAE decides latents: names of tensors begin with these; fields of its config, with diffusers' defaults."""


@dataclass(frozen=True)
class Weights:
    """The files of one component, and its config: None for a transformer in a single file, whose shapes tell."""

    files: tuple[Path, ...]
    config: Config | None


@dataclass(frozen=True)
class Source:
    """Every file of one FLUX.2, on this machine's disk."""

    name: str
    """What a person calls it: the Hub id, the folder's or file's name; no path."""
    flavour: Flavour
    commit: str | None
    """Of the Hub, when the base model came from there."""
    transformer: Weights
    vae: Weights
    text_encoder: Weights
    tokenizer: Path
    text_layers: tuple[int, ...]
    """Hidden states of the text encoder that are put side by side."""
    text_length: int
    """Tokens of a context, padding included."""
    pipeline: Path | None
    """The local folder that the model comes from, but for what was replaced; None where that is the Hub."""
    is_distilled: bool = False
    """Whether the transformer is distilled, as its model_index.json or its file's name says; else as the flavour is."""
    hashes: ContentHashes = field(default_factory=ContentHashes, compare=False)
    """Of the files' tensors."""
    _fingerprints: dict[tuple[str, bool], str] = field(default_factory=dict, init=False, repr=False, compare=False)
    """Those that were asked for: a start asks for each several times, and a checkpoint for the transformer's."""

    @property
    def spec(self) -> TransformerSpec:
        """What the transformer is made of, from its config or, of a single file, from its header.

        Raises:
            AccessError: it is no FLUX.2 transformer.
        """
        return transformer_spec(self.transformer, self.name)

    @property
    def distillation_warning(self) -> str | None:
        """Names weights that are distilled, or are not, while those of the flavour are not, or are."""
        flavour, name = self.flavour, self.name
        other = sibling(flavour)
        if other is None or self.is_distilled == flavour.is_distilled:
            return None
        usual = flavour.repo or flavour.title
        held, meant = ("distilled", "base") if self.is_distilled else ("base", "distilled")
        said = f"model_flavour = {flavour.name} means {meant} ones"
        found = f"{name} holds {held} weights, by model_index.json or its name; {said}."
        if self.is_distilled:
            return (
                f"{found} Training distilled weights gives gray, smooth blobs: name the base weights ({usual}) "
                f"instead. To draw with these, give --model_flavour {other.name}."
            )
        return (
            f"{found} Base weights draw only blurs in {flavour.steps} steps without guidance: name the distilled "
            f"weights ({usual}), or give --model_flavour {other.name}."
        )

    def fingerprint(self, component: Component | Literal["tokenizer"], *, whole: bool = False) -> str:
        """Names the content of `component`, wherever it lies: config; name, type, shape and first 4 KiB of each
        tensor that is used, or, if `whole`, all bytes of it. Reads a few megabytes, also of dev; for `whole`, a file
        that was not seen before is read once.

        Raises:
            AccessError: a file cannot be read.
        """
        found = self._fingerprints.get((component, whole))
        if found is None:
            found = self._fingerprints[component, whole] = self._fingerprint(component, whole)
        return found

    def _fingerprint(self, component: Component | Literal["tokenizer"], whole: bool) -> str:
        if component == "tokenizer":
            present = (self.tokenizer / name for name in (*_TOKENIZER, *_TOKENIZER_EXTRA))
            with file_errors_reported(self.tokenizer, AccessError, doing="read"):
                return sha256_json({path.name: path.read_text(encoding="utf-8") for path in present if path.is_file()})
        weights = {"transformer": self.transformer, "vae": self.vae, "text_encoder": self.text_encoder}[component]
        used: dict[str, TensorEntry] = {}
        for name, weight in stored_weights(weights.files, component).items():
            # Earlier releases named a transformer's tensors as the file does.
            known: str | None = weight.name
            if component == "text_encoder":
                known = text_encoder_name(name, max(self.text_layers))
            if known is not None and weight.is_plain:
                used[known] = weight.data
            elif known is not None:
                used |= {f"{known} {weight.format} {part}": entry for part, entry in weight.parts.items()}
        digests = self.hashes.of(used) if whole else {name: _head_digest(entry) for name, entry in used.items()}
        tensors = {name: [entry.dtype, list(entry.shape), digests[name]] for name, entry in used.items()}
        config = {key: value for key, value in (weights.config or {}).items() if key not in _WRITTEN_BY}
        return sha256_json([config, tensors])

    def encoder_fingerprint(self, dtype: torch.dtype) -> str:
        """Names what encodes images as `dtype`: encoder, quant_conv and batch-norm statistics of the VAE, and the
        fields of its config that decide latents. A tensor counts as it is when cast to `dtype`: the published files
        hold one encoder in bf16 and in fp32. Reads all of it at the first call, 0.14 GB of dev's in fp32.

        Raises:
            AccessError: a file cannot be read.
        """
        key = (f"VAE encoder, {dtype}", True)
        if key not in self._fingerprints:
            config = {name: (self.vae.config or {}).get(name, usual) for name, usual in _ENCODING_FIELDS.items()}
            tensors: dict[str, tuple[list[int], str]] = {}
            with open_component(self.vae.files, "vae") as opened:
                for name, read in opened.items():
                    if name.startswith(_ENCODING_TENSORS):
                        tensor = read()
                        digest = sha256_bytes(bytes(as_written(tensor, dtype).data()))
                        tensors[name] = (list(tensor.shape), digest)
            self._fingerprints[key] = sha256_json([config, tensors])
        return self._fingerprints[key]


def _head_digest(entry: TensorEntry) -> str:
    """The sha256 of the first 4 KiB of a tensor."""
    with file_errors_reported(entry.file, AccessError, doing="read"), entry.file.open("rb") as stream:
        stream.seek(entry.start)
        return sha256_bytes(stream.read(min(_HEAD_BYTES, entry.stop - entry.start)))


def transformer_spec(transformer: Weights, name: str) -> TransformerSpec:
    """What a transformer is made of, from its config or, of a single file, from its header. `name` is for people.

    Raises:
        AccessError: it is no FLUX.2 transformer.
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
    """Find every file of the model that `options` name, after downloading or making what is not here.

    `report` is called with sentences on what is about to be made or downloaded, its size, and how much disk is free.
    With local paths, and with the embedded model, the network is not touched.

    Raises:
        AccessError: something is missing, forbidden, unreachable or not FLUX.2; all that is missing, at once.
        ConfigError: other text-encoder layers than those that the model was trained with.
        DiskError: a download would not fit.
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
    """`base` with another transformer of the same shapes in place of its own: that of `flavour`, else of `model`, a
    folder, a Hub id or a single file. Nothing else of it is looked for or downloaded.

    Raises:
        AccessError: as in `locate`, or its shapes are not those of `base`.
        DiskError: the download would not fit.
    """
    place = model if flavour is None else flavour.repo
    with file_errors_reported(Path(place or "."), AccessError, doing="read"):
        own = options.model_copy(update={"model_flavour": flavour.name} if flavour is not None else {})
        try:
            return _Search(own, report, environ).preview(place, base)
        except AccessError as error:
            AccessError.raise_if(
                replace(problem, found=f"validation_preview_model: {problem.found}") for problem in error.problems
            )
            raise


@dataclass
class _Part:
    """What one component needs of a place. A single file of a transformer has no config."""

    place: ModelLocation
    names: list[str]
    config: Config | None
    is_single: bool = False

    @property
    def label(self) -> str:
        """The place, or the single file, as a person finds it."""
        return str(self.place.path(self.names[0])) if self.is_single else self.place.label


class _Search:
    """One call of `locate`: collects what is missing as it goes, and raises it together."""

    def __init__(self, options: ModelOptions, report: ReportLine, environ: Mapping[str, str]) -> None:
        self.options = options
        self.report = report
        self.environ = environ
        self.flavour = FLAVOURS[options.model_flavour]
        self.layers = options.custom_text_encoder_intermediary_layers or self.flavour.text.layers
        self.repos: dict[str, Hub] = {}
        self.missing: dict[str, list[str]] = {}
        self.problems: list[Problem] = []
        self.plain: list[Component] = []
        self.others: dict[tuple[str, str], list[Component]] = {}
        """Components with the shapes of another flavour, by place and flavour."""

    def run(self) -> Source:
        asked = self.options.pretrained_model_name_or_path
        overrides: dict[Component, str | None] = {
            "transformer": self.options.pretrained_transformer_model_name_or_path,
            "vae": self.options.pretrained_vae_model_name_or_path,
            "text_encoder": self.options.pretrained_text_encoder_model_name_or_path,
        }
        base_file = asked if asked is not None and is_weight_file(asked) else None
        # Only a VAE or a text encoder may be needed of it, or neither: a mistake in its name is one all the same.
        if base_file is not None and overrides["transformer"] is not None and not Path(with_home(base_file)).is_file():
            self.problems.append(Problem(f"{base_file}: no such file", "a .safetensors or .gguf file"))
        parts = self._single_parts(overrides | {"transformer": overrides["transformer"] or base_file})
        self._raise_problems()  # of headers, before anything is asked of the Hub
        single = parts.get("transformer")
        base = self._base(None if base_file else asked)

        for component, path in overrides.items():
            if component in parts:
                continue
            if path is not None:
                parts[component] = self._part(component, self._place(path), folders=(f"{component}/", ""))
            else:
                parts[component] = self._part(component, base, folders=(f"{component}/",))
        tokenizer = self._tokenizer(parts["text_encoder"].place, base)
        if parts["text_encoder"].is_single and tokenizer.place is base:
            parts["text_encoder"] = self._as_in_base(parts["text_encoder"], base)
        # A Hub repository of which nothing else is needed is not asked: all files may be here, for want of a network.
        places = [part.place for part in (*parts.values(), tokenizer)]
        if parts["vae"].is_single and (isinstance(base, ModelFolder) or base in places):
            parts["vae"] = self._vae_as_in_base(parts["vae"], base)
        if single is None:
            self._compare_shapes(parts["transformer"])
        self._raise_problems()
        is_distilled = self._is_distilled(parts["transformer"])

        fetch([(part.place, name) for part in (*parts.values(), tokenizer) for name in part.names], self.report)
        weights = {
            component: Weights(tuple(part.place.path(name) for name in part.names), part.config)
            for component, part in parts.items()
        }
        for component, found in weights.items():
            check_format(found.files, self.flavour.repo, component)  # found now, not after an hour of encoding
        weights["vae"] = _with_decoder_channels(weights["vae"])
        folder = tokenizer.place.path(tokenizer.names[0]).parent
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

    def _single_parts(self, asked: Mapping[Component, str | None]) -> dict[Component, _Part]:
        """The components that come from single files; their headers are compared with the flavour."""
        parts: dict[Component, _Part] = {}
        for component, path in asked.items():
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
            part = parts[component] = _Part(ModelFolder(file.parent), [file.name], config, is_single=True)
            before = len(self.problems), len(self.others)
            if component == "transformer":
                self._compare_shapes(part)
            elif component == "text_encoder":
                self._check_text_encoder(part.label, config or {})
            if before == (len(self.problems), len(self.others)):  # else more of the same would be said
                try:
                    check_whole(file, component, self.flavour, max(self.layers))
                except AccessError as error:
                    self.problems += error.problems
        return parts

    def _check_text_encoder(self, label: str, config: Config) -> None:
        """Note what is wrong with a text encoder in a single file, whose inferred config this is."""
        if self._is_of_another_flavour("text_encoder", label, text_from_config(config)):
            return
        kinds, layers = _TEXT_ENCODERS[self.flavour.text.kind], config["num_hidden_layers"]
        if config["model_type"] not in kinds:
            self.problems.append(_of_another_kind(label, "text_encoder", config["model_type"], kinds, self.flavour))
        if layers < max(self.layers):
            self.problems.append(
                Problem(
                    f"{label} holds {layers} layers of a text encoder",
                    f"the first {max(self.layers)}, whose output the transformer takes",
                    "Name a file that has them.",
                )
            )

    def _as_in_base(self, encoder: _Part, base: ModelLocation) -> _Part:
        """A text encoder's single file with the config of the base model's, where both have the same shapes: it is the
        one that its publisher wrote, and names cached contexts.
        """
        if not base.has("text_encoder/config.json"):
            return encoder
        config = read_component_config("text_encoder", base.path("text_encoder/config.json"))
        kinds = _TEXT_ENCODERS[self.flavour.text.kind]
        if config.get("model_type") in kinds and text_from_config(config) == text_from_config(encoder.config or {}):
            return replace(encoder, config=config)
        return encoder

    def _vae_as_in_base(self, vae: _Part, base: ModelLocation) -> _Part:
        """A VAE's single file with the config of the base model's VAE, where the file has diffusers' names and the
        shapes of that config. Earlier releases read only such files, always with that config, and it is part of the ids
        that they gave to latents and to a checkpoint's VAE (`earlier_autoencoder_id`).
        """
        file = vae.place.path(vae.names[0])
        if not shapes_in(file, "vae").keys() <= read_header(file).keys() or not base.has("vae/config.json"):
            return vae
        _, config = self._config("vae", base, folders=("vae/",))
        if config is None:
            return vae
        inferred = autoencoder_from_config(vae.config or {})
        # Shapes do not tell tile and norm groups; the decoder's widths are read off the file later.
        expected = replace(
            autoencoder_from_config(config),
            tile=inferred.tile,
            norm_groups=inferred.norm_groups,
            decoder_channels=inferred.decoder_channels,
        )
        return replace(vae, config=config) if expected == inferred else vae

    def preview(self, asked: str | None, base: Source) -> Source:
        """`base` with the transformer that lies at `asked`, or is that of the flavour."""
        if asked is not None and is_weight_file(asked):
            single = _single_file(asked, "transformer")
            check_holds(single, "transformer")
            part = _Part(ModelFolder(single.parent), [single.name], None, is_single=True)
            name = single.name
        else:
            place = self._base(asked)
            part = self._part("transformer", place, folders=("transformer/", ""))
            name = place.name
        self._raise_problems()
        local = (part.place.path(part.names[0]),) if part.config is None else ()
        spec = transformer_spec(Weights(local, part.config), name)
        own = vars(base.spec)
        differing = [f"{name} {value} for {own[name]}" for name, value in vars(spec).items() if value != own[name]]
        if differing:
            raise AccessError.of(
                f"the transformer of {name} differs from that of {base.name}: {', '.join(differing)}",
                "the same shapes, which the LoRA fits",
                "Name the distilled model of the same size, or take validation_preview_model out.",
            )
        fetch([(part.place, name) for name in part.names], self.report)
        weights = Weights(tuple(part.place.path(name) for name in part.names), part.config)
        check_format(weights.files)
        commit = part.place.commit if part.config is not None else None
        return replace(base, name=name, commit=commit, transformer=weights)

    def _ledger(self) -> Path | None:
        """Where hashes of files are kept: beside the embedded model. None for a user without a home folder."""
        cache_dir = self.options.cache_dir
        try:
            folder = tiny.default_folder(None if cache_dir is None else Path(cache_dir).expanduser(), self.environ)
        except RuntimeError:
            return None
        return folder.with_name(LEDGER_NAME)

    def _base(self, asked: str | None) -> ModelLocation:
        """The whole model: what was asked for, else the flavour's own."""
        name = asked or self.flavour.repo
        if name is not None:
            return self._place(name)
        cache_dir = self.options.cache_dir
        place = None if cache_dir is None else Path(with_home(cache_dir))
        folder = tiny.default_folder(place, self.environ, self.flavour.name)
        if not folder.exists():
            self.report(f"Making {self.flavour.title} in {folder}.")
        return ModelFolder(tiny.make(folder, self.flavour.name))

    def _place(self, text: str) -> ModelLocation:
        folder = Path(with_home(text))
        if folder.is_dir():
            return ModelFolder(folder)
        if folder.is_file():
            check_format((folder,), self.flavour.repo)  # names another container
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
        self, component: Component, place: ModelLocation, folders: tuple[str, ...]
    ) -> tuple[str, Config | None]:
        """The first of `folders` that has a config of `component`, and the config; None after a problem."""
        folder = next((folder for folder in folders if place.has(f"{folder}config.json")), None)
        if folder is None:
            self._lacks(place, f"{folders[0]}config.json")
            return folders[0], None
        try:
            config = read_component_config(component, place.path(f"{folder}config.json"))
        except AccessError as error:
            self.problems += error.problems
            return folder, None
        return folder, config

    def _part(self, component: Component, place: ModelLocation, folders: tuple[str, ...]) -> _Part:
        """Config and weights of `component`, in the first of `folders` that has a config."""
        folder, config = self._config(component, place, folders)
        if config is None:
            return _Part(place, [], {})
        if component == "text_encoder":
            key, kinds = "model_type", _TEXT_ENCODERS[self.flavour.text.kind]
        else:
            key, kinds = "_class_name", (_CLASSES[component],)
        kind = config.get(key)
        if (
            component == "text_encoder"
            and kind in _ALL_TEXT_ENCODERS
            and self._is_of_another_flavour(component, place.label, text_from_config(config))
        ):
            return _Part(place, [], config)
        if kind not in kinds:
            self.problems.append(_of_another_kind(place.label, component, kind, kinds, self.flavour))
            return _Part(place, [], config)
        try:
            names = self._weights(component, place, folder)
        except AccessError as error:
            self.problems += error.problems
            return _Part(place, [], config)
        for name in names:
            if not place.has(name):
                self._lacks(place, name)
        return _Part(place, names, config)

    def _is_of_another_flavour(self, component: Component, label: str, spec: TransformerSpec | TextSpec) -> bool:
        """Whether `spec` is exactly that of another flavour: a published one, or one with another kind of text encoder.
        Shapes of no flavour, and the embedded ones, fit any.
        """
        found = [each for each in FLAVOURS.values() if spec in (each.transformer, each.text.encoder)]
        if self.flavour in found:
            return False
        others = [each for each in found if each.repo is not None or each.text.kind != self.flavour.text.kind]
        if not others:
            return False
        other = next((each for each in others if each.is_distilled == self.flavour.is_distilled), others[0])
        self.others.setdefault((label, other.name), []).append(component)
        return True

    def _compare_shapes(self, transformer: _Part) -> None:
        """Note a transformer of another flavour; its weights are not here yet where they are still to be downloaded."""
        if transformer.config == {} or not transformer.names:
            return
        try:
            files = (transformer.place.path(transformer.names[0]),) if transformer.config is None else ()
            spec = transformer_spec(Weights(files, transformer.config), transformer.label)
        except AccessError as error:
            self.problems += error.problems
            return
        self._is_of_another_flavour("transformer", transformer.label, spec)

    def _is_distilled(self, transformer: _Part) -> bool:
        """Whether the transformer is distilled. Shapes do not tell."""
        other = sibling(self.flavour)
        if other is None or transformer.place.name in (self.flavour.repo, other.repo):
            return self.flavour.is_distilled
        if transformer.config is None:
            said = is_distilled_file(transformer.names[0])
            return self.flavour.is_distilled if said is None else said
        if not transformer.place.has(_INDEX):
            return self.flavour.is_distilled
        index = read_object(transformer.place.path(_INDEX))
        return bool(index.get("is_distilled")) or index.get("_class_name") == "Flux2KleinKVPipeline"

    def _weights(self, component: Component, place: ModelLocation, folder: str) -> list[str]:
        """The files with the tensors that are used: not a text encoder's shards of its last layers alone."""
        stem = folder + _STEMS[component]
        variants = ["", f".{self.options.variant}"] if self.options.variant else [""]
        for variant in reversed(variants):
            single, index = f"{stem}{variant}.safetensors", f"{stem}.safetensors.index{variant}.json"
            if place.has(single) or place.has(index):
                if variant == "" and self.options.variant:
                    self.plain.append(component)
                if place.has(single):
                    return [single]
                shards = read_index(place.path(index))
                depth = max(self.layers)
                return sorted(
                    {
                        folder + shard
                        for tensor, shard in shards.items()
                        if component != "text_encoder" or text_encoder_name(tensor, depth) is not None
                    }
                )
        return [f"{stem}.safetensors"]

    def _tokenizer(self, text_encoder: ModelLocation, base: ModelLocation) -> _Part:
        """A replaced text encoder brings its own tokenizer if it has one."""
        candidates = [(text_encoder, "tokenizer/"), (text_encoder, ""), (base, "tokenizer/")]
        for place, folder in candidates if text_encoder is not base else candidates[-1:]:
            if all(place.has(folder + name) for name in _TOKENIZER):
                extra = [folder + name for name in _TOKENIZER_EXTRA if place.has(folder + name)]
                return _Part(place, [*(folder + name for name in _TOKENIZER), *extra], None)
        for name in _TOKENIZER:
            if not base.has(f"tokenizer/{name}"):
                self._lacks(base, f"tokenizer/{name}")
        return _Part(base, [], None)

    def _lacks(self, place: ModelLocation, name: str) -> None:
        self.missing.setdefault(place.label, []).append(name)

    def _raise_problems(self) -> None:
        for label, names in self.missing.items():
            shown = ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
            self.problems.append(
                Problem(
                    f"{label} lacks {shown}",
                    "a whole diffusers folder of FLUX.2",
                    "Download what is missing, or point the option at another folder.",
                )
            )
        for (label, name), components in self.others.items():
            what = " and ".join(component.replace("_", " ") for component in components)
            self.problems.append(
                Problem(
                    f"{label}: its {what} {'has' if len(components) == 1 else 'have'} the shapes of {name}",
                    f"those of {self.flavour.name}, as model_flavour says",
                    f"Give --model_flavour {name}.",
                )
            )
        if len(self.plain) == len(_STEMS):
            self.problems.append(Problem(f"variant = {self.options.variant}: no component has files of that name"))
        AccessError.raise_if(self.problems)
        if self.plain:
            self.report(f"No {self.options.variant} variant of {', '.join(self.plain)}: the plain files are used.")


def _of_another_kind(label: str, component: str, kind: object, kinds: tuple[str, ...], flavour: Flavour) -> Problem:
    return Problem(
        f"{label}: its {component} is a {kind}",
        f"a {' or '.join(kinds)}",
        f"model_flavour = {flavour.name} is {flavour.title}: name the flavour that this is.",
    )


def _check_width(source: Source) -> None:
    """Raise unless the states of `text_layers`, side by side, are as wide as the transformer's context."""
    config = source.text_encoder.config or {}
    width = config.get("text_config", config).get("hidden_size")
    context = source.spec.context_dim
    if width is not None and width * len(source.text_layers) != context:
        raise AccessError.of(
            f"{len(source.text_layers)} layers of a text encoder that is {width} wide",
            f"{context} in all, the context of the transformer",
            "Check custom_text_encoder_intermediary_layers, and that encoder and transformer belong together.",
        )


def _with_decoder_channels(vae: Weights) -> Weights:
    """`vae` with a config that has its decoder's widths, which a small decoder may lie beside without saying so."""
    config = vae.config or {}
    found = list(decoder_channels(component_shapes(vae.files, "vae")))
    said = config.get("decoder_block_out_channels") or config.get("block_out_channels", list(AutoencoderSpec.channels))
    if not found or found == said:
        return vae
    return Weights(vae.files, config | {"decoder_block_out_channels": found})


def _single_file(text: str, component: Component) -> Path:
    file = Path(with_home(text))
    if not file.is_file():
        raise AccessError.of(f"{text}: no such file", f"a .safetensors or .gguf file of the {COMPONENTS[component]}")
    return file
