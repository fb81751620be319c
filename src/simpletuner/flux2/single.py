"""Single files of weights: which components one holds, and the configs that lie beside none of them."""

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
from simpletuner.flux2.names import Renamed, TensorRenaming, renamed_shapes, text_encoder_renaming, transformer_renaming
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
"""What people call each component."""
_TOLD_BY: Mapping[Component, tuple[str, ...]] = {
    "transformer": ("double_stream_modulation_img.linear.weight",),
    "vae": ("encoder.conv_in.weight", "decoder.conv_in.weight"),
    "text_encoder": ("embed_tokens.weight",),
}
"""Tensors of which one, in the names that we load, tells that a file holds a component."""


def renaming_of(component: Component, names: Sequence[str]) -> TensorRenaming:
    """How to read a file that holds `component` with tensors `names`, prefixes of the container taken off."""
    if component == "text_encoder":
        return text_encoder_renaming()
    return (transformer_renaming if component == "transformer" else vae_renaming)(names)


def single_files(options: ModelOptions) -> dict[Component, Path]:
    """The single file that each component comes from, as `options` name them, if it is on this disk; those that come
    from a folder or the Hub are left out. A base model's file has the transformer, and what else it holds.

    Raises:
        AccessError: a file is damaged, or in a format that cannot be read.
    """
    base = options.pretrained_model_name_or_path
    own: Mapping[Component, str | None] = {
        "transformer": options.pretrained_transformer_model_name_or_path,
        "vae": options.pretrained_vae_model_name_or_path,
        "text_encoder": options.pretrained_text_encoder_model_name_or_path,
    }
    found: dict[Component, Path] = {}
    for component, asked in own.items():
        name = asked or base
        file = Path(with_home(name)) if name is not None and is_weight_file(name) else None
        if file is None or not file.is_file():
            continue
        if asked is not None or component == "transformer" or shapes_in(file, component):
            found[component] = file
    return found


def shapes_in(file: Path, component: Component) -> dict[str, TensorShape]:
    """The shapes of the tensors of `component` in a single file, in the names that we load; empty where it holds none.

    Raises:
        AccessError: it is damaged, or in a format that cannot be read.
    """
    shapes = component_shapes((file,), component)
    return shapes if any(name in shapes for name in _TOLD_BY[component]) else {}


def component_shapes(files: Sequence[Path], component: Component) -> dict[str, TensorShape]:
    """The shapes of the tensors of `component` in `files`, in the names that we load.

    Raises:
        AccessError: as `shapes_in`.
    """
    weights = stored_weights(files, component)
    renaming = renaming_of(component, list(weights))
    return renamed_shapes({name: weight.shape for name, weight in weights.items()}, renaming)


def check_holds(file: Path, component: Component) -> None:
    """Raise an AccessError unless a single file holds `component`; says what it holds instead."""
    if shapes_in(file, component):
        return
    held = [title for other, title in COMPONENTS.items() if other != component and shapes_in(file, other)]
    raise AccessError.of(
        f"{file} holds {'a ' + ' and a '.join(held) if held else 'none of the components'} of FLUX.2",
        f"its {COMPONENTS[component]}",
    )


def check_whole(file: Path, component: Component, flavour: Flavour, text_layers: int) -> None:
    """Raise an AccessError unless a single file holds every tensor of `component` in its shape: of a text encoder those
    of the first `text_layers`.
    """
    found = shapes_in(file, component)
    if component == "vae":
        spec = autoencoder_spec_in(file, flavour.autoencoder)
        statistics = (4 * spec.latent_channels,)
        expected = Counter([*encoder_shapes(spec), *decoder_shapes(spec), statistics, statistics])
        lacking = [f"one of {list(shape)}" for shape in expected - Counter(found.values())]
    else:
        if component == "transformer":
            tensors = empty_transformer(transformer_from_tensors(found)).state_dict()
            shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        else:
            shapes = text_shapes(text_spec_in(file, flavour.text.encoder), text_layers)
        lacking = [name for name, shape in shapes.items() if found.get(name) != shape]
    if lacking:
        more = f" and {len(lacking) - 4} more" if len(lacking) > 4 else ""
        raise AccessError.of(
            f"{file}: missing or of another shape ({len(lacking)}): {', '.join(lacking[:4])}{more}",
            f"a whole {COMPONENTS[component]} of FLUX.2",
            "Is this the right file, and whole?",
        )


def text_spec_in(file: Path, default: TextSpec) -> TextSpec:
    """The spec of the text encoder in a single file; see `text_from_tensors` for `own`.

    Raises:
        AccessError: its tensors are no text encoder's that we know.
    """
    try:
        return text_from_tensors(shapes_in(file, "text_encoder"), default)
    except (KeyError, ValueError, ZeroDivisionError, IndexError) as error:
        raise _not_known(file, "text_encoder", error) from None


def autoencoder_spec_in(file: Path, default: AutoencoderSpec) -> AutoencoderSpec:
    """The spec of the VAE in a single file; see `autoencoder_from_tensors` for `own`.

    Raises:
        AccessError: its tensors are no VAE's of FLUX.2.
    """
    try:
        return autoencoder_from_tensors(shapes_in(file, "vae"), default)
    except (KeyError, ValueError, IndexError) as error:
        raise _not_known(file, "vae", error) from None


def config_in(file: Path, component: Component, flavour: Flavour) -> Config | None:
    """The config of `component` in a single file, inferred from its shapes and, where they do not tell, as `flavour`
    has it. None for a transformer, whose shapes tell all.

    Raises:
        AccessError: as `text_spec_in`.
    """
    if component == "transformer":
        return None
    if component == "text_encoder":
        layers = text_layer_count(shapes_in(file, component))
        return text_to_config(text_spec_in(file, flavour.text.encoder), layers)
    return autoencoder_to_config(autoencoder_spec_in(file, flavour.autoencoder))


def _not_known(file: Path, component: Component, error: Exception) -> AccessError:
    why = f"has no tensor {error}" if isinstance(error, KeyError) else f"has {error}"
    return AccessError.of(f"{file} {why}", f"a {COMPONENTS[component]} of FLUX.2", "Is this the right file, and whole?")


@contextlib.contextmanager
def open_component(files: Sequence[Path], component: Component) -> Iterator[Mapping[str, Callable[[], Tensor]]]:
    """Readers of the tensors of a component whose weights are not cut on the way, by the names that we load."""
    stored = stored_weights(files, component)
    renaming = renaming_of(component, list(stored))
    with open_stored(stored) as reader:

        def read(name: str, renamed: Renamed) -> Tensor:
            values = reader.values(name)
            return values.reshape(renamed.shapes(tuple(values.shape))[0])

        found = {name: new for name in stored if (new := renaming(name)) is not None}
        yield {new.names[0]: functools.partial(read, name, new) for name, new in found.items()}
