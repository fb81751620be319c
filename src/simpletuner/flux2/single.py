"""Single weight files: find out which components a file holds, and infer the configs that such files lack.

"Our names" of tensors are those that `renaming_of` maps to: diffusers' for the transformer and the VAE, transformers'
for the text encoder.
"""

import contextlib
import functools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from torch import Tensor

from simpletuner.base.errors import AccessError
from simpletuner.base.files import with_home
from simpletuner.base.tensorfile import is_weight_file
from simpletuner.config.flavours import AutoencoderSpec, Flavour, TextSpec
from simpletuner.config.options.model import ModelOptions
from simpletuner.flux2.configs import Component, Config
from simpletuner.flux2.names import (
    RenamedTensor,
    TensorRenaming,
    renamed_shapes,
    text_encoder_renaming,
    transformer_renaming,
)
from simpletuner.flux2.spec import (
    TensorShape,
    autoencoder_from_tensors,
    autoencoder_to_config,
    decoder_shapes,
    encoder_shapes,
    text_from_tensors,
    text_layer_count,
    text_shapes,
    text_to_config,
    transformer_from_tensors,
)
from simpletuner.flux2.stored import open_stored, stored_weights
from simpletuner.flux2.transformer import empty_transformer
from simpletuner.flux2.vae_names import vae_renaming

COMPONENTS: Mapping[Component, str] = {
    "transformer": "transformer",
    "vae": "VAE",
    "text_encoder": "text encoder",
}
"""Display name of each component."""
_MARKERS: Mapping[Component, tuple[str, ...]] = {
    "transformer": ("double_stream_modulation_img.linear.weight",),
    "vae": ("encoder.conv_in.weight", "decoder.conv_in.weight"),
    "text_encoder": ("embed_tokens.weight",),
}
"""A file holds a component if it has one of these tensors, in our names."""


def renaming_of(component: Component, names: Sequence[str]) -> TensorRenaming:
    """The renaming for a file that holds `component`, given its tensor `names` without the component's prefix."""
    if component == "text_encoder":
        return text_encoder_renaming()
    return (transformer_renaming if component == "transformer" else vae_renaming)(names)


def single_files(options: ModelOptions) -> dict[Component, Path]:
    """Local single files that `options` name, by component. Components from a folder or the Hub are left out.

    The base model's file provides the transformer and every other component that it holds.

    Raises:
        AccessError: a file is damaged, or in an unsupported format.
    """
    base = options.pretrained_model_name_or_path
    overrides: Mapping[Component, str | None] = {
        "transformer": options.pretrained_transformer_model_name_or_path,
        "vae": options.pretrained_vae_model_name_or_path,
        "text_encoder": options.pretrained_text_encoder_model_name_or_path,
    }
    files: dict[Component, Path] = {}
    for component, override in overrides.items():
        name = override or base
        file = Path(with_home(name)) if name is not None and is_weight_file(name) else None
        if file is None or not file.is_file():
            continue
        if override is not None or component == "transformer" or shapes_in(file, component):
            files[component] = file
    return files


def shapes_in(file: Path, component: Component) -> dict[str, TensorShape]:
    """Tensor shapes of `component` in a single file, in our names; empty if the file does not hold it.

    Raises:
        AccessError: the file is damaged, or in an unsupported format.
    """
    shapes = component_shapes((file,), component)
    return shapes if any(name in shapes for name in _MARKERS[component]) else {}


def component_shapes(files: Sequence[Path], component: Component) -> dict[str, TensorShape]:
    """Tensor shapes of `component` in `files`, in our names.

    Raises:
        AccessError: a file is damaged, or in an unsupported format.
    """
    weights = stored_weights(files, component)
    renaming = renaming_of(component, list(weights))
    return renamed_shapes({name: weight.shape for name, weight in weights.items()}, renaming)


def check_holds(file: Path, component: Component) -> None:
    """Raise an AccessError unless a single file holds `component`. The error names the components that it holds."""
    if shapes_in(file, component):
        return
    titles = [title for each, title in COMPONENTS.items() if each != component and shapes_in(file, each)]
    raise AccessError.of(
        f"{file} holds {'a ' + ' and a '.join(titles) if titles else 'none of the components'} of FLUX.2",
        f"its {COMPONENTS[component]}",
    )


def check_whole(file: Path, component: Component, flavour: Flavour, text_layers: int) -> None:
    """Raise an AccessError unless a single file holds all tensors of `component`, with the right shapes.

    Of a text encoder, only the embedding and the first `text_layers` layers are required.
    """
    actual = shapes_in(file, component)
    if component == "vae":
        spec = autoencoder_spec_in(file, flavour.autoencoder)
        statistics = (4 * spec.latent_channels,)
        expected = Counter([*encoder_shapes(spec), *decoder_shapes(spec), statistics, statistics])
        lacking = [f"a tensor of shape {list(shape)}" for shape in expected - Counter(actual.values())]
    else:
        if component == "transformer":
            tensors = empty_transformer(transformer_from_tensors(actual)).state_dict()
            shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        else:
            shapes = text_shapes(text_spec_in(file, flavour.text.encoder), text_layers)
        lacking = [name for name, shape in shapes.items() if actual.get(name) != shape]
    if lacking:
        more = f" and {len(lacking) - 4} more" if len(lacking) > 4 else ""
        raise AccessError.of(
            f"{file}: tensors are missing or have another shape ({len(lacking)}): {', '.join(lacking[:4])}{more}",
            f"a complete {COMPONENTS[component]} of FLUX.2",
            "Check that this is the right file and that it is complete.",
        )


def text_spec_in(file: Path, default: TextSpec) -> TextSpec:
    """The spec of the text encoder in a single file; see `text_from_tensors` for `default`.

    Raises:
        AccessError: its tensors are not those of a supported text encoder.
    """
    try:
        return text_from_tensors(shapes_in(file, "text_encoder"), default)
    except (KeyError, ValueError, ZeroDivisionError, IndexError) as error:
        raise _unsupported(file, "text_encoder", error) from None


def autoencoder_spec_in(file: Path, default: AutoencoderSpec) -> AutoencoderSpec:
    """The spec of the VAE in a single file; see `autoencoder_from_tensors` for `default`.

    Raises:
        AccessError: its tensors are not those of a FLUX.2 VAE.
    """
    try:
        return autoencoder_from_tensors(shapes_in(file, "vae"), default)
    except (KeyError, ValueError, IndexError) as error:
        raise _unsupported(file, "vae", error) from None


def config_in(file: Path, component: Component, flavour: Flavour) -> Config | None:
    """Infer the config of `component` from the shapes in a single file.

    Values that shapes do not determine are those of `flavour`. None for a transformer, which needs no config.

    Raises:
        AccessError: its tensors are not those of a supported text encoder or VAE.
    """
    if component == "transformer":
        return None
    if component == "text_encoder":
        layers = text_layer_count(shapes_in(file, component))
        return text_to_config(text_spec_in(file, flavour.text.encoder), layers)
    return autoencoder_to_config(autoencoder_spec_in(file, flavour.autoencoder))


def _unsupported(file: Path, component: Component, error: Exception) -> AccessError:
    finding = f"has no tensor {error}" if isinstance(error, KeyError) else f"has {error}"
    return AccessError.of(
        f"{file} {finding}",
        f"a {COMPONENTS[component]} of FLUX.2",
        "Check that this is the right file and that it is complete.",
    )


@contextlib.contextmanager
def open_component(files: Sequence[Path], component: Component) -> Iterator[Mapping[str, Callable[[], Tensor]]]:
    """Open a component and yield a reader for each tensor, by our names. Cannot read fused weights."""
    stored = stored_weights(files, component)
    renaming = renaming_of(component, list(stored))
    with open_stored(stored) as reader:

        def read(name: str, renamed: RenamedTensor) -> Tensor:
            values = reader.values(name)
            return values.reshape(renamed.shapes(tuple(values.shape))[0])

        renamed_tensors = {name: new for name in stored if (new := renaming(name)) is not None}
        yield {new.names[0]: functools.partial(read, name, new) for name, new in renamed_tensors.items()}
