"""Measure captions a second of the resident and the streamed text encoder, and of transformers' plain padded call.

    python benchmarks/text_encoder.py [--captions 64] [--tokens 60] [--rounds 3] [--hidden 512]

The model has random weights: thirty Mistral layers of width `hidden`, an MLP of four times that, in `--dtype`, on the
GPU or else the CPU. Captions have about `--tokens` tokens; the template adds its own. The plain call does what a
pipeline does: every caption is padded to 512 tokens, in the same batches, on a model without head that has one layer
more than is used (otherwise the last hidden state would be the normed one). The time of the streamed encoder includes
reading the weights; the two others have loaded theirs before. Rounds time all three in turn, so that a change in the
machine's speed affects them alike. The best round of each counts.
"""

import argparse
import dataclasses
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file

from simpletuner.config.options.model import ModelOptions
from simpletuner.flux2.load import load_text_encoder, stream_text_encoder
from simpletuner.flux2.source import Source, Weights, locate
from simpletuner.flux2.text import TextEncoder

LAYERS = (10, 20, 30)
LENGTH = 512
HEADS, KEY_HEADS, HEAD = 8, 2, 64
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TARGET = 3.0
WORDS = ("a", "small", "yellow", "house", "beside", "the", "river", "in", "soft", "morning", "light", "and", "trees")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--captions", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=60)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    given = parser.parse_args()
    device, dtype = torch.device("cuda" if torch.cuda.is_available() else "cpu"), DTYPES[given.dtype]
    with tempfile.TemporaryDirectory(prefix="simpletuner-text-") as name:
        folder = Path(name)
        source = drawn(folder, given.hidden, dtype)
        resident = load_text_encoder(source, dtype, device, fix_regex=False)
        streamed = stream_text_encoder(source, dtype, device, fix_regex=False, folder=folder)
        captions = written(resident, given.captions, given.tokens)
        batches = [captions[start : start + given.batch] for start in range(0, len(captions), given.batch)]
        lengths = resident.lengths(captions)
        print(f"{len(captions)} captions of {min(lengths)} to {max(lengths)} tokens with the template, {device}")
        plain = padded_call(source, dtype, device, resident)
        ways: dict[str, Callable[[], object]] = {
            "plain": lambda: [plain(batch) for batch in batches],
            "resident": lambda: list(resident.encode_batches(batches)),
            "streamed": lambda: list(streamed.encode_batches(batches)),
        }
        resident.encode(batches[0])
        check(plain(batches[0]), resident, batches[0])
        best = dict.fromkeys(ways, float("inf"))
        for _ in range(given.rounds):
            for way, encode in ways.items():
                began = time.perf_counter()
                encode()
                best[way] = min(best[way], time.perf_counter() - began)
        for way, seconds in best.items():
            rate = len(captions) / seconds
            print(f"{way:<9} {rate:8.2f} captions/s, {best['plain'] / seconds:5.2f} times the plain call")
        print(f"target: resident at least {TARGET} times")


def drawn(folder: Path, hidden: int, dtype: torch.dtype) -> Source:
    """A text encoder of random weights, with the embedded model's tokenizer."""
    tiny = locate(ModelOptions(model_flavour="tiny"), report=print)
    assert tiny.text_encoder.config is not None
    text = {**tiny.text_encoder.config["text_config"], "hidden_size": hidden, "intermediate_size": 4 * hidden}
    text |= {"num_hidden_layers": LAYERS[-1] + 1, "head_dim": HEAD}
    text |= {"num_attention_heads": HEADS, "num_key_value_heads": KEY_HEADS}
    matrices = {
        "self_attn.q_proj": (HEADS * HEAD, hidden),
        "self_attn.k_proj": (KEY_HEADS * HEAD, hidden),
        "self_attn.v_proj": (KEY_HEADS * HEAD, hidden),
        "self_attn.o_proj": (hidden, HEADS * HEAD),
        "mlp.gate_proj": (4 * hidden, hidden),
        "mlp.up_proj": (4 * hidden, hidden),
        "mlp.down_proj": (hidden, 4 * hidden),
    }
    draws = torch.Generator().manual_seed(0)
    tensors = {"model.embed_tokens.weight": torch.randn(text["vocab_size"], hidden, generator=draws)}
    for index in range(LAYERS[-1] + 1):
        layer = f"model.layers.{index}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{layer}.{norm}.weight"] = torch.ones(hidden)
        for name, shape in matrices.items():
            tensors[f"{layer}.{name}.weight"] = torch.randn(shape, generator=draws) * shape[1] ** -0.5
    file = folder / "model.safetensors"
    save_file({name: tensor.to(dtype) for name, tensor in tensors.items()}, file)
    return dataclasses.replace(tiny, text_encoder=Weights((file,), text), text_layers=LAYERS, text_length=LENGTH)


def written(encoder: TextEncoder, count: int, tokens: int) -> list[str]:
    """Captions of two thirds to four thirds of `tokens` tokens beside the template, the shortest first."""
    (template,) = encoder.lengths([""])
    captions = []
    for number in range(count):
        wanted = template + tokens * (2 / 3 + 2 / 3 * number / max(count - 1, 1))
        words = [WORDS[number % len(WORDS)]]
        while encoder.lengths([" ".join(words)])[0] < wanted:
            words.append(WORDS[(number + 7 * len(words)) % len(WORDS)])
        captions.append(" ".join(words))
    return captions


def padded_call(
    source: Source, dtype: torch.dtype, device: torch.device, encoder: TextEncoder
) -> Callable[[Sequence[str]], torch.Tensor]:
    """transformers' own model and call, as a pipeline makes it."""
    # Takes seconds to import: only what is measured here needs it.
    from transformers import AutoModel, MistralConfig

    with torch.device("meta"):
        model = AutoModel.from_config(MistralConfig(**(source.text_encoder.config or {})), attn_implementation="sdpa")
    model = model.to_empty(device=device).to(dtype)
    with torch.device(device):
        model.rotary_emb = type(model.rotary_emb)(config=model.config)
    one_more = dataclasses.replace(source, text_layers=(LAYERS[-1] + 1,))
    whole = load_text_encoder(one_more, dtype, device, fix_regex=False)
    model.load_state_dict(whole._model.state_dict(), strict=False)
    torch.nn.init.ones_(model.norm.weight)
    model.eval()

    @torch.no_grad()
    def encode(captions: Sequence[str]) -> torch.Tensor:
        batch = encoder._tokenize(captions)
        ids = torch.tensor([[model.config.pad_token_id] * (LENGTH - len(tokens)) + tokens for tokens in batch])
        seen = torch.tensor([[0] * (LENGTH - len(tokens)) + [1] * len(tokens) for tokens in batch])
        output = model(
            input_ids=ids.to(device), attention_mask=seen.to(device), output_hidden_states=True, use_cache=False
        )
        return torch.cat([output.hidden_states[layer] for layer in LAYERS], dim=-1).cpu()

    return encode


def check(plain: torch.Tensor, encoder: TextEncoder, captions: Sequence[str]) -> None:
    """Check that the compared encoders compute the same, to rounding."""
    ours = torch.cat([context.expanded() for context in encoder.encode(captions)])
    error = ((plain - ours).abs().max() / plain.abs().max()).item()
    print(f"largest difference between plain and resident: {error:.1e} of the largest number")
    assert error < (1e-4 if plain.dtype == torch.float32 else 5e-2)


if __name__ == "__main__":
    main()
