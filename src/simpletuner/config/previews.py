"""Select the flavour whose steps and guidance apply to validation images: the trained one, or the preview model's."""

from pathlib import Path

from simpletuner.base.files import read_json
from simpletuner.base.tensorfile import is_weight_file
from simpletuner.config.flavours import FLAVOURS, Flavour, GuidanceScales, is_distilled_file
from simpletuner.config.options.validation import AUTO_PREVIEW
from simpletuner.config.run import RunConfig


def preview_flavour(config: RunConfig) -> Flavour | None:
    """The flavour that `validation_preview_model` names: by the flavour's name, by `auto` or by its Hub id. None if the
    option is a path or another Hub id, or is not set.
    """
    trained, model = FLAVOURS[config.model_flavour], config.validation_preview_model
    if model == AUTO_PREVIEW:
        return None if trained.preview is None else FLAVOURS[trained.preview]
    named = (each for each in FLAVOURS.values() if model is not None and model in (each.name, each.repo))
    return next(named, None)


def preview_source(config: RunConfig) -> str | None:
    """The Hub id or path to load the preview model from; None if there is none, or it is an embedded model."""
    named = preview_flavour(config)
    if config.validation_disable:
        return None
    return config.validation_preview_model if named is None else named.repo


def sampling_flavour(config: RunConfig) -> Flavour:
    """The flavour whose guidance and default steps apply to validation images. For a preview model at a path, this is
    the distilled sibling if model_index.json or the single file's name marks it as distilled; else the trained flavour.
    """
    trained, named = FLAVOURS[config.model_flavour], preview_flavour(config)
    if named is not None:
        return named
    may_be_sibling = config.validation_preview_model is not None and trained.preview is not None
    if may_be_sibling and _is_distilled(Path(config.validation_preview_model or "")):
        return FLAVOURS[trained.preview or trained.name]
    return trained


def validation_scales(config: RunConfig) -> GuidanceScales:
    """The guidance scales of the validation images, for the model that generates them."""
    return sampling_flavour(config).guidance_scales(config.validation_guidance, config.validation_guidance_real)


def _is_distilled(path: Path) -> bool:
    if is_weight_file(path.name):
        return is_distilled_file(path.name) is True
    try:
        index = read_json(path / "model_index.json")
    except (OSError, ValueError):
        return False
    return isinstance(index, dict) and index.get("is_distilled") is True


def with_preview_defaults(config: RunConfig, given_options: set[str]) -> RunConfig:
    """`config` with the steps and guidance of `sampling_flavour`, except those in `given_options`."""
    defaults = sampling_flavour(config).option_defaults
    names = {"validation_guidance", "validation_num_inference_steps"} - given_options
    return config.model_copy(update={name: defaults[name] for name in names})
