"""Write a run's result files from its last checkpoint, without loading a model."""

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
    """The result files in a run directory."""

    products: Mapping[Path, Path | None]
    """Each result file, with the checkpoint file that it must equal; None for files of the base model or in another
    format than the checkpoint's."""
    lines: tuple[str, ...]
    """Lines for the user."""


def export_lora(
    config: RunConfig, run: RunDirectory, checkpoint: Path, _source: Callable[[], Source], _reporter: Reporter
) -> Export:
    """Write the LoRA of `checkpoint`, and that of its moving average, into the run directory, in `lora_format`."""
    products: dict[Path, Path | None] = {}
    for name in ("", EMA_FOLDER) if config.use_ema else ("",):
        target, saved = run.root / name / LORA_NAME, checkpoint / name / LORA_NAME
        if config.lora_format == "diffusers":
            with file_errors_reported(saved, doing="read"):
                content = saved.read_bytes()
            write_atomic(target, content)
            products[target] = saved
        else:
            file = read_adapter(saved)
            with file_errors_reported(target):
                target.parent.mkdir(exist_ok=True)
            write_adapter(target, lora_modules(file), config.lora_format, file.header)
            products[target] = None
    lines = [f"LoRA: {run.lora} ({format_size(run.lora.stat().st_size)}), in the {config.lora_format} format"]
    if config.use_ema:
        lines.append(f"Its moving average: {run.ema_lora}")
    return Export(products, (*lines, f"In diffusers: pipe.load_lora_weights({str(run.root)!r})"))


def export_full(
    config: RunConfig, run: RunDirectory, checkpoint: Path, find_source: Callable[[], Source], reporter: Reporter
) -> Export:
    """Write the transformer of `checkpoint` as a diffusers folder and as a single file in BFL's layout, which ComfyUI
    loads; and its moving average likewise.
    """
    source = find_source()
    products: dict[Path, Path | None] = {}
    lines = []
    missing_reason = None
    for name in ("", EMA_FOLDER) if config.use_ema else ("",):
        folder, transformer = run.root / name, checkpoint / name / TRANSFORMER_FOLDER
        with file_errors_reported(folder, doing="make"):
            folder.mkdir(exist_ok=True)
        single, model = folder / TRANSFORMER_NAME, folder / MODEL_FOLDER
        save_single(transformer, single)
        products[single] = None
        missing_reason = save_pipeline(model, transformer, source)
        for file in sorted(path for path in model.rglob("*") if path.is_file()):
            is_ours = file.parent.name == TRANSFORMER_FOLDER
            products[file] = transformer / file.name if is_ours else None
        title = "Its moving average" if name else "Model"
        size = format_size(single.stat().st_size)
        lines.append(f"{title}: {model}, and for ComfyUI {single} ({size}, in BFL's layout)")
    pipeline = "Flux2Pipeline" if source.flavour.text.kind == "mistral3" else "Flux2KleinPipeline"
    if missing_reason is None:
        outside_files = sorted({file.readlink() for file in run.model.rglob("*") if file.is_symlink()})
        if outside_files:
            reporter.notice(
                f"{run.model} links to {len(outside_files)} files on another disk, such as {outside_files[0]}: "
                "keep them."
            )
        return Export(products, (*lines, f"In diffusers: {pipeline}.from_pretrained({str(run.model)!r})"))
    reporter.notice(f"{run.model} contains only the transformer: {missing_reason}.")
    base = source.flavour.repo or source.name
    transformer_only = str(run.model / TRANSFORMER_FOLDER)
    usage = (
        f"In diffusers: {pipeline}.from_pretrained({base!r}, "
        f"transformer=Flux2Transformer2DModel.from_pretrained({transformer_only!r}))"
    )
    return Export(products, (*lines, usage))


EXPORTS: dict[str, Callable[[RunConfig, RunDirectory, Path, Callable[[], Source], Reporter], Export]] = {
    "lora": export_lora,
    "full": export_full,
}
"""By `model_type`: writes the result files from a checkpoint. The base model is located only if it is needed."""
