"""Identify weight files: an adapter, one or several components of a model, or something else.

Models are identified by their headers alone, so even large files are reported immediately. Adapters are fully read.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from simpletuner.base.errors import AccessError, CheckpointError, UserError
from simpletuner.base.files import file_errors_reported
from simpletuner.base.tensorfile import WEIGHT_FILES, TensorEntry, is_weight_file, read_header, read_metadata
from simpletuner.config.flavours import FLAVOURS, is_distilled_file
from simpletuner.flux2.adapter_kinds import FACTOR_SUFFIXES, UNREAD_SUFFIXES, UnreadKind
from simpletuner.flux2.configs import Component
from simpletuner.flux2.dialects import AdapterFile, read_adapter
from simpletuner.flux2.export import linear_shapes
from simpletuner.flux2.factors import Factors, Hadamard, Kronecker, LowRank
from simpletuner.flux2.gguf_file import is_gguf, read_gguf_header
from simpletuner.flux2.loaders import AdapterLoader, LoaderVerdict, loader_verdicts
from simpletuner.flux2.lora import CUSTOM, FUSED_IN, FUSED_OUT, PRESETS, TargetPreset
from simpletuner.flux2.names import renamed_shapes, transformer_renaming
from simpletuner.flux2.origin import base_model_of, training_of
from simpletuner.flux2.spec import transformer_from_tensors
from simpletuner.flux2.stored import StoredWeight, component_names, stored_weights

_KINDS: Mapping[type, str] = {LowRank: "LoRA", Kronecker: "LoKr", Hadamard: "LoHa"}
_ADAPTER_KEY = re.compile(
    r".+[._](lora_?(A|B|up|down|linear_layer)\b.*|lora\.(up|down)\.weight|"
    + "|".join(map(re.escape, sorted(FACTOR_SUFFIXES | UNREAD_SUFFIXES.keys() - {"magnitude", "rescale"})))
    + ")"
)
_NUMBERED = re.compile(r"\.\d+\.")
_BLOCK_NAME = re.compile(r"(single_)?transformer_blocks\.\d+")
_SHARD = re.compile(r"(.+)-\d{5}-of-\d{5}")
_HADAMARD_ROWS = 512
"""Rows of a LoHa's ΔW that are computed at a time."""


@dataclass(frozen=True)
class AdaptedGroup:
    """The adapted Linears that have the same name in their blocks."""

    name: str
    modules: int
    ranks: list[int]
    """Each rank that occurs, ascending; empty for a LoKr with full factors."""


@dataclass(frozen=True)
class AdapterReport:
    """Content of an adapter file."""

    kinds: dict[str, int]
    """Number of Linears by kind: LoRA, LoKr, LoHa."""
    dialect: str
    modules: int
    parameters: int
    ranks: dict[int, int]
    """How many Linears have each rank."""
    alphas: dict[float, int]
    """How many Linears have each alpha: scale times rank of the factors as stored in the file."""
    dtypes: list[str]
    target: str
    """A preset, or "custom"."""
    places: list[AdaptedGroup]
    fits: Sequence[str]
    """Flavours that have all these Linears with these shapes."""
    norms: dict[str, float]
    """Frobenius norm of ΔW for each block, and for each Linear outside the blocks."""
    unread: dict[str, list[str]]
    """Keys that were not read, by kind."""
    loaders: Mapping[AdapterLoader, LoaderVerdict]


@dataclass(frozen=True)
class ComponentReport:
    """Content of one component of a model."""

    component: Component
    layout: str
    """The project whose tensor names the component uses."""
    flavours: list[str]
    """Flavours with exactly these shapes."""
    sizes: dict[str, int | bool]
    tensors: int
    parameters: int
    bytes: int
    formats: dict[str, int]
    """Bytes by storage format of the tensors."""
    problem: str = ""
    """Why the component cannot be used as it is; empty if it can."""


@dataclass(frozen=True)
class FileReport:
    """Content of a file, or of the shards of one model."""

    path: str
    files: int
    bytes: int
    what: str
    """Short description; for an unreadable file in a folder, the reason."""
    base_model: str | None = None
    """Base model by the header; a flavour's name if it is known."""
    is_distilled: bool | None = None
    """Transformers only, by the file's name; None if the name does not say."""
    adapter: AdapterReport | None = None
    components: list[ComponentReport] = field(default_factory=list)
    training: dict[str, str] = field(default_factory=dict)
    """Training details from the header of any program."""
    header: dict[str, str] = field(default_factory=dict)
    """All text fields of the header."""


def inspect_files(path: Path) -> list[FileReport]:
    """Report on the file `path`, or on each weight file in the folder `path` and its direct subfolders.

    Shards of one model get one report. For an unreadable file in a folder, the report states the reason.

    Raises:
        AccessError: the path does not exist, is a damaged file, or is a folder without weight files.
        CheckpointError: the file holds a damaged adapter.
    """
    with file_errors_reported(path, AccessError, doing="read"):
        if not path.is_dir():
            path.stat()
            return [_inspect((path,), path)]
        weight_files = sorted(
            file
            for file in (*path.iterdir(), *path.glob("*/*"))
            if is_weight_file(file.name) and file.is_file() and not file.name.startswith(".")
        )
    groups: dict[Path, list[Path]] = {}
    for file in weight_files:
        shard = _SHARD.fullmatch(file.stem)
        groups.setdefault(file if shard is None else file.with_name(f"{shard[1]}{file.suffix}"), []).append(file)
    if not groups:
        raise AccessError.of(f"{path} holds no weights", f"files that end in {' or '.join(WEIGHT_FILES)}")
    return [_inspect_in_folder(tuple(files), name) for name, files in groups.items()]


def _inspect_in_folder(files: tuple[Path, ...], path: Path) -> FileReport:
    """The report of one file among several; if the file cannot be read, the report states the reason."""
    try:
        return _inspect(files, path)
    except UserError as error:
        reasons = "; ".join(map(str, error.problems))
        return FileReport(str(path), len(files), sum(file.stat().st_size for file in files), reasons)


def _inspect(files: tuple[Path, ...], path: Path) -> FileReport:
    entries = _entries(files)
    header = {key: value for file in files if not is_gguf(file) for key, value in read_metadata(file).items()}
    adapter = None
    components: list[ComponentReport] = []
    if any(_ADAPTER_KEY.fullmatch(name) for name in entries):
        adapter = _adapter(path, entries)
        title = _adapter_title(adapter)
    else:
        components = [_component(files, entries, each) for each in _components(entries)]
        title = _model_title(components) or _foreign_title(entries)
    base = base_model_of(header)
    return FileReport(
        str(path),
        len(files),
        sum(file.stat().st_size for file in files),
        title,
        base_model=base,
        is_distilled=is_distilled_file(path.name)
        if any(one.component == "transformer" for one in components)
        else None,
        adapter=adapter,
        components=components,
        training=training_of(header),
        header=header,
    )


def _entries(files: Sequence[Path]) -> dict[str, TensorEntry]:
    entries: dict[str, TensorEntry] = {}
    for file in files:
        entries |= read_gguf_header(file).tensors if is_gguf(file) else read_header(file)
    return entries


def _adapter(path: Path, entries: Mapping[str, TensorEntry]) -> AdapterReport:
    """The report of an adapter file.

    Raises:
        CheckpointError: the file is damaged, or has no layer of FLUX.2.
    """
    try:
        file = read_adapter(path)
    except CheckpointError:
        unread = {name: kind.name for name in entries if (kind := _unread_kind(name)) is not None}
        if not unread:
            raise
        file = AdapterFile(path, "unread", {}, unread)
    modules = file.modules
    shapes = {name: factors.shape for name, factors in modules.items()}
    fits = [
        flavour.name for flavour in FLAVOURS.values() if shapes.items() <= linear_shapes(flavour.transformer).items()
    ]
    norms: dict[str, list[float]] = {}
    for name, factors in modules.items():
        block = _BLOCK_NAME.match(name)
        norms.setdefault(name if block is None else block[0], []).append(delta_norm(factors))
    alphas = Counter(_rounded(factors.scale * rank) for factors in modules.values() if (rank := factors.rank))
    read_keys = [name for name in entries if name not in file.unread]
    unread_keys: dict[str, list[str]] = {}
    for key, kind_name in file.unread.items():
        unread_keys.setdefault(kind_name, []).append(key)
    return AdapterReport(
        kinds=dict(Counter(_KINDS[type(factors)] for factors in modules.values())),
        dialect=f"mixed: {', '.join(file.dialects)}" if file.dialects else file.dialect,
        modules=len(modules),
        parameters=sum(math.prod(entries[name].shape) for name in read_keys if not name.endswith(".alpha")),
        ranks=dict(sorted(Counter(rank for factors in modules.values() if (rank := factors.rank)).items())),
        alphas=dict(sorted(alphas.items())),
        dtypes=sorted({entry.dtype for entry in entries.values()}),
        target=target_of(modules, fits),
        places=_adapted_groups(modules),
        fits=fits,
        norms={name: math.hypot(*norms[name]) for name in sorted(norms, key=_by_number)},
        unread=unread_keys,
        loaders=loader_verdicts(read_keys, modules, unread=file.unread, header_scaled=file.header_scaled)
        if modules
        else {},
    )


def _unread_kind(key: str) -> UnreadKind | None:
    """The unsupported adapter kind that the suffix of `key` identifies; None if it identifies none."""
    return next((kind for suffix, kind in UNREAD_SUFFIXES.items() if key.endswith(f".{suffix}")), None)


def _by_number(name: str) -> tuple[str, int]:
    """Sort key: blocks of one kind by number."""
    group, _, number = name.rpartition(".")
    return (group, int(number)) if number.isdecimal() else (name, 0)


def _rounded(alpha: float) -> float:
    """`alpha` with six significant digits, without the rounding error of scale times rank."""
    return float(f"{alpha:.6g}")


@torch.no_grad()
def delta_norm(factors: Factors) -> float:
    """The Frobenius norm of ΔW in fp64, computed without forming ΔW."""
    if isinstance(factors, LowRank):
        a, b = factors.a.double(), factors.b.double()
        # ‖b a‖² = Σ (bᵀb) ∘ (a aᵀ); rounding may make a zero norm negative.
        squared = (b.T @ b * (a @ a.T)).sum().clamp(min=0)
    elif isinstance(factors, Kronecker):
        # The norm of a row of kron(w1, w2) is the product of the norms of the two rows it comes from.
        rows = torch.outer(*(factor.double().square().sum(1) for factor in (factors.w1, factors.w2))).flatten()
        ranges = factors.ranges or ((0, len(rows)),)
        squared = torch.stack([rows[start:stop].sum() for start, stop in ranges]).sum()
    else:
        squared = torch.zeros((), dtype=torch.float64)
        for start in range(0, factors.shape[0], _HADAMARD_ROWS):
            part = factors.selected_rows([(start, start + _HADAMARD_ROWS)])
            first = part.w1_b.double() @ part.w1_a.double()
            squared += (first * (part.w2_b.double() @ part.w2_a.double())).square().sum()
    return math.sqrt(squared) * abs(factors.scale)


def target_of(modules: Mapping[str, Factors], fits: Sequence[str]) -> str:
    """The preset that has exactly these Linears, rows and columns, in the first flavour of `fits`; "custom" if none
    has.
    """
    if not fits:
        return CUSTOM
    names = linear_shapes(FLAVOURS[fits[0]].transformer)
    for title, preset in PRESETS.items():
        if modules.keys() == _preset_modules(preset, names) and all(
            _is_within(preset, name, factors) for name, factors in modules.items()
        ):
            return title
    return CUSTOM


def _preset_modules(preset: TargetPreset, names: Iterable[str]) -> set[str]:
    single = {linear_name for linear_name, part in ((FUSED_IN, preset.fused_in), (FUSED_OUT, preset.fused_out)) if part}
    by_group = {"transformer_blocks": set(preset.double), "single_transformer_blocks": single}
    name_parts = {name: name.split(".", 2) for name in names}
    return {name for name, parts in name_parts.items() if len(parts) == 3 and parts[2] in by_group.get(parts[0], ())}


def _is_within(preset: TargetPreset, name: str, factors: Factors) -> bool:
    """Whether the factors change only those rows or columns of a fused Linear that the preset adapts."""
    part = preset.fused_in if name.endswith(FUSED_IN) else preset.fused_out
    if not name.startswith("single_") or part in (None, "whole"):
        return True
    if not isinstance(factors, LowRank):
        return False
    rows, columns = factors.shape
    # Attention has the first 3 · columns rows of the input Linear, and the first `rows` columns of the output Linear.
    matrix, cut = (factors.b, 3 * columns) if name.endswith(FUSED_IN) else (factors.a.T, rows)
    outside = matrix[cut:] if part == "attention" else matrix[:cut]
    return not outside.count_nonzero()


def _adapted_groups(modules: Mapping[str, Factors]) -> list[AdaptedGroup]:
    groups: dict[str, list[Factors]] = {}
    for name, factors in modules.items():
        groups.setdefault(_NUMBERED.sub(".*.", name, count=1), []).append(factors)
    return [
        AdaptedGroup(name, len(each), sorted({rank for factors in each if (rank := factors.rank)}))
        for name, each in groups.items()
    ]


_COMPONENT_PATTERNS: Mapping[Component, re.Pattern[str]] = {
    "transformer": re.compile(r"(.*\.)?double_stream_modulation_img\.lin(ear)?\.weight"),
    "vae": re.compile(r"(.*\.)?bn\.running_mean"),
    "text_encoder": re.compile(r"(.*\.)?(embed_tokens|token_embd)\.weight"),
}
"""For each component, the pattern of a tensor name that it has in every layout."""


def _components(names: Iterable[str]) -> list[Component]:
    names = list(names)
    return [component for component, pattern in _COMPONENT_PATTERNS.items() if any(map(pattern.fullmatch, names))]


def _component(files: Sequence[Path], entries: Mapping[str, TensorEntry], component: Component) -> ComponentReport:
    """The report of one component in `files`, which may hold several."""
    problem = ""
    try:
        weights = stored_weights(files, component)
    except AccessError as error:
        problem = str(error)
        weights = {
            tensor_name: StoredWeight(name, entries[name].dtype, entries[name].shape, {"data": entries[name]})
            for name, tensor_name in component_names(entries, component).items()
        }
    shapes = {name: weight.shape for name, weight in weights.items()}
    formats: Counter[str] = Counter()
    for weight in weights.values():
        title = weight.data.dtype if weight.format == "plain" else weight.format
        formats[title] += sum(entry.stop - entry.start for entry in weight.parts.values())
    try:
        layout, sizes, flavours = _COMPONENT_READERS[component](shapes)
    except (KeyError, IndexError, ValueError, ZeroDivisionError):
        layout, sizes, flavours = "unknown", {}, []
        problem = problem or "required tensors are missing"
    return ComponentReport(
        component,
        layout,
        flavours,
        sizes,
        len(weights),
        sum(map(math.prod, shapes.values())),
        formats.total(),
        dict(formats.most_common()),
        problem,
    )


TensorShapes = Mapping[str, tuple[int, ...]]
ReadComponent = Callable[[TensorShapes], tuple[str, dict[str, int | bool], list[str]]]
"""Takes the shapes of a component's tensors; returns its layout, sizes and flavours."""


def _transformer(shapes: TensorShapes) -> tuple[str, dict[str, int | bool], list[str]]:
    spec = transformer_from_tensors(renamed_shapes(shapes, transformer_renaming(shapes)))
    sizes: dict[str, int | bool] = {
        "width": spec.hidden,
        "double blocks": spec.double_blocks,
        "single blocks": spec.single_blocks,
        "context": spec.context_dim,
        "guidance": spec.guidance_embeds,
    }
    layout = "BFL" if any(name.startswith("double_blocks.") for name in shapes) else "diffusers"
    return layout, sizes, [name for name, flavour in FLAVOURS.items() if flavour.transformer == spec]


def _vae(shapes: TensorShapes) -> tuple[str, dict[str, int | bool], list[str]]:
    ends = {half: shapes.get(f"{half}.conv_{end}.weight") for half, end in (("encoder", "in"), ("decoder", "out"))}
    widths = {half: shape[half == "decoder"] for half, shape in ends.items() if shape is not None}
    sizes: dict[str, int | bool] = {
        "latent channels": shapes["bn.running_mean"][0] // 4,
        **{f"{half} width": width for half, width in widths.items()},
    }
    layout = "BFL" if any(".mid.block_1." in name for name in shapes) else "diffusers"
    width = widths["encoder"]
    return layout, sizes, [name for name, flavour in FLAVOURS.items() if flavour.autoencoder.channels[0] == width]


_LAYER = re.compile(r"(?:.*\.)?(?:layers|blk)\.(\d+)\.(.+)\.weight")
_LLAMA_CPP = {"attn_q": "q_proj", "attn_k": "k_proj", "ffn_gate": "gate_proj", "attn_q_norm": "q_norm"}


def _text_encoder(shapes: TensorShapes) -> tuple[str, dict[str, int | bool], list[str]]:
    layers = {int(match[1]) for name in shapes if "vision" not in name and (match := _LAYER.fullmatch(name))}
    layer0_shapes = {
        _LLAMA_CPP.get(leaf, leaf): shape
        for name, shape in shapes.items()
        if "vision" not in name and (match := _LAYER.fullmatch(name)) and match[1] == "0"
        for leaf in (match[2].rpartition(".")[2],)
    }
    is_llama_cpp = "token_embd.weight" in shapes
    embedding = next(name for name in shapes if _COMPONENT_PATTERNS["text_encoder"].fullmatch(name))
    vocabulary, hidden = shapes[embedding]
    dimensions = (
        vocabulary,
        hidden,
        layer0_shapes["gate_proj"][0],
        layer0_shapes["q_proj"][0],
        layer0_shapes["k_proj"][0],
        "q_norm" in layer0_shapes,
    )
    flavours = []
    for name, flavour in FLAVOURS.items():
        spec = flavour.text.encoder
        width, keys = spec.heads * spec.head_dim, spec.key_heads * spec.head_dim
        if dimensions == (spec.vocabulary, spec.hidden, spec.inner, width, keys, spec.has_head_norms):
            flavours.append(name)
    sizes: dict[str, int | bool] = {"width": hidden, "layers": len(layers), "vocabulary": vocabulary}
    has_tokenizer = "tekken_model" in shapes
    layout = "llama.cpp" if is_llama_cpp else "ComfyUI" if has_tokenizer else "transformers"
    return layout, sizes, flavours


_COMPONENT_READERS: Mapping[Component, ReadComponent] = {
    "transformer": _transformer,
    "vae": _vae,
    "text_encoder": _text_encoder,
}


def _adapter_title(adapter: AdapterReport) -> str:
    kinds = " and ".join(adapter.kinds)
    if not adapter.modules:
        titles = sorted({kind.title for keys in adapter.unread.values() for key in keys if (kind := _unread_kind(key))})
        return f"{', '.join(titles)}: this program cannot read it"
    families = list(dict.fromkeys(FLAVOURS[name].family for name in adapter.fits))
    if not families:
        return f"{kinds}, not for FLUX.2: no flavour has layers of these shapes"
    return f"{kinds} for FLUX.2 {' or '.join(families)}"


def _model_title(components: Sequence[ComponentReport]) -> str:
    titles = {"transformer": "transformer", "vae": "VAE", "text_encoder": "text encoder"}
    parts = " and ".join(titles[one.component] for one in components)
    families = dict.fromkeys(FLAVOURS[name].family for one in components[:1] for name in one.flavours)
    if not parts:
        return ""
    model = f"FLUX.2 {' or '.join(families)}" if families else "FLUX.2, but no flavour has these shapes"
    return f"{'all-in-one checkpoint: ' if len(components) > 1 else ''}{parts} of {model}"


_FOREIGN: Mapping[str, str] = {
    r"(.*\.)?double_blocks\.0\.img_mod\.lin\.weight": "transformer of FLUX.1",
    r"(.*\.)?transformer_blocks\.0\.norm1\.linear\.weight": "transformer of FLUX.1 or SD3 in diffusers' names",
    r"(.*\.)?joint_blocks\.0\..+": "transformer of SD3",
    r"(.*\.)?input_blocks\.0\.0\.weight|(.*\.)?down_blocks\.0\.attentions\..+": "UNet of SD or SDXL",
    r"(.*\.)?decoder\.conv_in\.weight": "VAE of another model",
    r"(.*\.)?encoder\.block\.0\.layer\.0\.SelfAttention\.q\.weight": "T5 text encoder",
    r"(.*\.)?text_model\.embeddings\.token_embedding\.weight": "CLIP text encoder",
}
"""Titles of other models' files, by the pattern of a tensor name that each has."""


def _foreign_title(entries: Mapping[str, TensorEntry]) -> str:
    for pattern, title in _FOREIGN.items():
        if any(re.fullmatch(pattern, name) for name in entries):
            return f"{title}: not a FLUX.2 file"
    examples = ", ".join(list(entries)[:3])
    return f"not a FLUX.2 file: {len(entries)} tensors{f', such as {examples}' if examples else ''}"
