"""Which flavour's steps and guidance draw the validation images: the trained one's, or those of another model."""

from pathlib import Path

from simpletuner.base.files import read_json
from simpletuner.base.tensorfile import is_weight_file
from simpletuner.config.flavours import FLAVOURS, Flavour, is_distilled_file
from simpletuner.config.options.validation import AUTO_PREVIEW
from simpletuner.config.run import RunConfig


def preview_flavour(config: RunConfig) -> Flavour | None:
    """The flavour that `validation_preview_model` names: by itself, as `auto`, or by its Hub id. None where it names a
    path or another Hub id, or nothing.
    """
    own, asked = FLAVOURS[config.model_flavour], config.validation_preview_model
    if asked == AUTO_PREVIEW:
        return None if own.preview is None else FLAVOURS[own.preview]
    named = (each for each in FLAVOURS.values() if asked is not None and asked in (each.name, each.repo))
    return next(named, None)


def preview_download(config: RunConfig) -> str | None:
    """The Hub id, or another place, that `validation_preview_model` stands for; None where nothing is fetched."""
    named = preview_flavour(config)
    if config.validation_disable:
        return None
    return config.validation_preview_model if named is None else named.repo


def drawing_flavour(config: RunConfig) -> Flavour:
    """The flavour whose guidance and default steps validation images are drawn with. For a path that is the distilled
    sibling where its model_index.json, or a single file's name, says that it is distilled; else the trained flavour.
    """
    own, named = FLAVOURS[config.model_flavour], preview_flavour(config)
    if named is not None:
        return named
    is_other = config.validation_preview_model is not None and own.preview is not None
    if is_other and _is_distilled(Path(config.validation_preview_model or "")):
        return FLAVOURS[own.preview or own.name]
    return own


def _is_distilled(place: Path) -> bool:
    if is_weight_file(place.name):
        return is_distilled_file(place.name) is True
    try:
        index = read_json(place / "model_index.json")
    except (OSError, ValueError):
        return False
    return isinstance(index, dict) and index.get("is_distilled") is True


def with_preview_defaults(config: RunConfig, given: set[str]) -> RunConfig:
    """`config` with the steps and guidance of `drawing_flavour`, where they are not `given`."""
    usual = drawing_flavour(config).option_defaults
    names = {"validation_guidance", "validation_num_inference_steps"} - given
    return config.model_copy(update={name: usual[name] for name in names})
