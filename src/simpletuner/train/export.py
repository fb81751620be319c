"""What a run ends with, made from its last checkpoint alone: no model is loaded for it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from simpletuner.base.files import file_errors_reported, write_atomic
from simpletuner.base.sizes import format_size
from simpletuner.config.run import RunConfig
from simpletuner.flux2.convert_model import save_single
from simpletuner.flux2.dialects import read_adapter
from simpletuner.flux2.lora_formats import lora_modules, write_adapter
from simpletuner.flux2.modelfile import TRANSFORMER_FOLDER, save_pipeline
from simpletuner.flux2.source import Source
from simpletuner.runs.layout import EMA_FOLDER, LORA_NAME, MODEL_FOLDER, TRANSFORMER_NAME, RunDirectory
from simpletuner.train.report import Reporter


@dataclass(frozen=True)
class Export:
    """What was put into the run's directory."""

    products: Mapping[Path, Path | None]
    """Each file, with the checkpoint's file that it must equal; None for one of the base model, or in BFL's layout."""
    lines: tuple[str, ...]
    """What to tell people about it."""


def export_lora(
    config: RunConfig, run: RunDirectory, checkpoint: Path, _source: Callable[[], Source], _reporter: Reporter
) -> Export:
    """Put the LoRA of `checkpoint`, and that of its average, where people look for them, in the wanted format."""
    products: dict[Path, Path | None] = {}
    for name in ("", EMA_FOLDER) if config.use_ema else ("",):
        target, source = run.root / name / LORA_NAME, checkpoint / name / LORA_NAME
        if config.lora_format == "diffusers":
            with file_errors_reported(source, doing="read"):
                content = source.read_bytes()
            write_atomic(target, content)
            products[target] = source
        else:
            file = read_adapter(source)
            with file_errors_reported(target):
                target.parent.mkdir(exist_ok=True)
            write_adapter(target, lora_modules(file), config.lora_format, file.header)
            products[target] = None
    lines = [f"LoRA: {run.lora} ({format_size(run.lora.stat().st_size)}), in the {config.lora_format} format"]
    if config.use_ema:
        lines.append(f"Its moving average: {run.ema_lora}")
    return Export(products, (*lines, f"In diffusers: pipe.load_lora_weights({str(run.root)!r})"))


def export_full(
    config: RunConfig, run: RunDirectory, checkpoint: Path, find: Callable[[], Source], reporter: Reporter
) -> Export:
    """Make a diffusers folder of the transformer in `checkpoint`, and a single file in BFL's layout, with which ComfyUI
    starts; and the same of its average.
    """
    source = find()
    products: dict[Path, Path | None] = {}
    lines = []
    why = None
    for name in ("", EMA_FOLDER) if config.use_ema else ("",):
        folder, transformer = run.root / name, checkpoint / name / TRANSFORMER_FOLDER
        with file_errors_reported(folder, doing="make"):
            folder.mkdir(exist_ok=True)
        single, model = folder / TRANSFORMER_NAME, folder / MODEL_FOLDER
        save_single(transformer, single)
        products[single] = None
        why = save_pipeline(model, transformer, source)
        for file in sorted(path for path in model.rglob("*") if path.is_file()):
            is_ours = file.parent.name == TRANSFORMER_FOLDER
            products[file] = transformer / file.name if is_ours else None
        title = "Its moving average" if name else "Model"
        size = format_size(single.stat().st_size)
        lines.append(f"{title}: {model}, and for ComfyUI {single} ({size}, in BFL's layout)")
    pipeline = "Flux2Pipeline" if source.flavour.text.kind == "mistral3" else "Flux2KleinPipeline"
    if why is None:
        outside = sorted({file.readlink() for file in run.model.rglob("*") if file.is_symlink()})
        if outside:
            reporter.notice(
                f"{run.model} links to {len(outside)} files on another disk, such as {outside[0]}: keep them."
            )
        return Export(products, (*lines, f"In diffusers: {pipeline}.from_pretrained({str(run.model)!r})"))
    reporter.notice(f"{run.model} holds the transformer alone: {why}.")
    base = source.flavour.repo or source.name
    transformer_only = str(run.model / TRANSFORMER_FOLDER)
    how = (
        f"In diffusers: {pipeline}.from_pretrained({base!r}, "
        f"transformer=Flux2Transformer2DModel.from_pretrained({transformer_only!r}))"
    )
    return Export(products, (*lines, how))


EXPORTS: dict[str, Callable[[RunConfig, RunDirectory, Path, Callable[[], Source], Reporter], Export]] = {
    "lora": export_lora,
    "full": export_full,
}
"""By `model_type`: makes what a run ends with of a checkpoint. The base model is looked for only if it is needed."""
