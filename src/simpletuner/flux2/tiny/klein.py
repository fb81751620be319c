"""The embedded kleins: small versions of klein's components with random weights, none of which are shipped.

The distilled klein has the base's weights, slightly perturbed: the two are related as in the real klein.
"""

from pathlib import Path
from typing import Any

from torch import Tensor

from simpletuner.config.flavours import TINY_KLEIN, TINY_KLEIN_TEXT, FlavourName
from simpletuner.flux2.spec import text_shapes
from simpletuner.flux2.tiny import vocabulary
from simpletuner.flux2.tiny.parts import transformer_shapes, write_model
from simpletuner.flux2.tiny.weights import KLEIN_GAINS, TEXT_GAINS, Shapes, draw

KLEIN_VERSION = 1
"""Version of all weights drawn here. Each version has a line in CHANGELOG.md."""

KLEIN_SEED = 0
DISTILLED_SEED = 1
DISTILLED_SHARE = 0.1
"""Distance of the distilled weights from those of the base, relative to their size."""

# As in klein, there are more layers than are used: layer 27 must not be the last. Keys have the form of klein-4b's.
KLEIN_TEXT_CONFIG: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "dtype": "bfloat16",
    "vocab_size": TINY_KLEIN_TEXT.vocabulary,
    "hidden_size": TINY_KLEIN_TEXT.hidden,
    "intermediate_size": TINY_KLEIN_TEXT.inner,
    "num_hidden_layers": 30,
    "num_attention_heads": TINY_KLEIN_TEXT.heads,
    "num_key_value_heads": TINY_KLEIN_TEXT.key_heads,
    "head_dim": TINY_KLEIN_TEXT.head_dim,
    "hidden_act": "silu",
    "max_position_embeddings": 40960,
    "max_window_layers": 30,
    "rms_norm_eps": 1e-6,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "use_sliding_window": False,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "tie_word_embeddings": True,
    "use_cache": True,
}


def fill(folder: Path, flavour: FlavourName, vae: dict[str, Tensor]) -> None:
    """Write a complete model, except its stamp, into `folder`."""
    is_distilled = flavour == "tiny-klein-distilled"
    index = {
        "_class_name": "Flux2KleinPipeline",
        **({"is_distilled": True} if is_distilled else {}),
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "Qwen3ForCausalLM"],
        "tokenizer": ["transformers", "Qwen2TokenizerFast"],
        "transformer": ["diffusers", "Flux2Transformer2DModel"],
        "vae": ["diffusers", "AutoencoderKLFlux2"],
    }
    write_model(
        folder,
        index,
        vocabulary.klein_files(),
        TINY_KLEIN,
        KLEIN_TEXT_CONFIG,
        transformer=_transformer(is_distilled),
        text_encoder=_in_bf16(draw("qwen3", _text_encoder_shapes(), TEXT_GAINS, KLEIN_SEED)),
        vae=vae,
    )


def _transformer(is_distilled: bool) -> dict[str, Tensor]:
    shapes = transformer_shapes(TINY_KLEIN)
    base = draw("klein", shapes, KLEIN_GAINS, KLEIN_SEED)
    if not is_distilled:
        return _in_bf16(base)
    perturbation = draw("klein", shapes, KLEIN_GAINS, DISTILLED_SEED)
    return _in_bf16(
        {
            name: tensor + DISTILLED_SHARE * perturbation[name] if tensor.ndim > 1 else tensor
            for name, tensor in base.items()
        }
    )


def _in_bf16(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.bfloat16() for name, tensor in tensors.items()}


def _text_encoder_shapes() -> Shapes:
    """Shapes of the text encoder. Its head is tied to the embedding, as in klein-4b, so it has no tensor of its own."""
    shapes = text_shapes(TINY_KLEIN_TEXT, KLEIN_TEXT_CONFIG["num_hidden_layers"])
    model = {f"model.{name}": shape for name, shape in shapes.items()}
    return {**model, "model.norm.weight": (TINY_KLEIN_TEXT.hidden,)}
