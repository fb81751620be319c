"""Compare the memory plan with measurements, phase by phase, on a CPU.

    python benchmarks/plan.py [--heads 12] [--doubles 5] [--singles 24] [--text-hidden 1536] [--edge 384]

The model is like dev, with random weights, narrower and with fewer blocks, with dev's own autoencoder, in bf16 unless
an option says otherwise. By default transformer and text encoder have at least 2 GB each. Every phase runs through the
program's own code in a separate process. The measurement is the growth of its anonymous memory (RssAnon) plus the
resident part of mapped weight files, sampled, from before anything is loaded, with all libraries imported.

The plan counts tensors. By default glibc keeps freed small and medium allocations, fragmented. So the child processes
return freed memory to the system (MALLOC_MMAP_THRESHOLD_); --default-malloc measures glibc's default instead.
"""

import argparse
import datetime
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from simpletuner.base.sizes import format_size
from simpletuner.base.tensorfile import TensorData, write_tensors
from simpletuner.config.flavours import AutoencoderSpec, TransformerSpec
from simpletuner.flux2 import tiny
from simpletuner.flux2.spec import transformer_to_diffusers
from simpletuner.flux2.tiny.make import TEXT_CONFIG
from simpletuner.flux2.tiny.parts import VAE
from simpletuner.flux2.transformer import empty_transformer
from simpletuner.runs.events import read_events

EVERY_S = 0.002
CAPTION = " ".join(["a soft gradient from dark to light"] * 40)
"""As long as a context: shorter captions are counted in characters by the plan, which assumes the most tokens."""
GIVEN_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
LENGTH = 160
LIMIT = 0.10
PICTURES = 4


@dataclass(frozen=True)
class Scale:
    """Size of the random model."""

    heads: int = 12
    doubles: int = 5
    singles: int = 24
    text_hidden: int = 1536
    edge: int = 384
    dtype: str = "bf16"

    @property
    def spec(self) -> TransformerSpec:
        return TransformerSpec(self.heads, 128, self.doubles, self.singles, 3 * self.text_hidden, guidance_embeds=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in Scale().__dict__.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    parser.add_argument("--only", help="phases to measure, separated by commas")
    parser.add_argument("--default-malloc", action="store_true")
    given = vars(parser.parse_args())
    only = given.pop("only")
    if not given.pop("default_malloc"):
        os.environ |= GIVEN_BACK
    with tempfile.TemporaryDirectory(prefix="simpletuner-plan-") as folder:
        rows = compare(Path(folder), Scale(**given), None if only is None else only.split(","))
    print("| phase | planned | measured | plan / measured |")
    print("|---|---:|---:|---:|")
    for name, planned, measured in rows:
        print(f"| {name} | {format_size(planned)} | {format_size(measured)} | {planned / measured:.3f} |")
    worst = max(abs(planned / measured - 1) for _, planned, measured in rows)
    print(f"largest deviation {worst:.1%} (limit {LIMIT:.0%})")


def compare(work: Path, scale: Scale, only: list[str] | None = None) -> list[tuple[str, int, int]]:
    """(phase, planned, measured) of every phase, in bytes. Everything is made in `work`."""
    lay_out(work, scale)
    rows = []
    for name, flags in PHASES.items():
        if only is None or name in only:
            planned = plan(work, name, flags)
            rows.append((name, planned, measure(work, name, flags)))
    return rows


# In the order of a run, so that each finds its caches full. The second text phase has other keys, and fills its own.
PHASES: Mapping[str, tuple[str, ...]] = {
    "text streamed": ("--text_encoder_mode=streamed", "--output_dir=output/streamed"),
    "text resident": ("--text_encoder_mode=resident", "--tokenizer_fix_regex=true", "--output_dir=output/resident"),
    "latents": ("--text_encoder_mode=streamed", "--output_dir=output/latents"),
    "train": ("--validation_disable", "--output_dir=output/train"),
    "validation": ("--validation_epoch_interval=1", "--output_dir=output/validation"),
}


def lay_out(work: Path, scale: Scale) -> None:
    """Write a model's folder, images and a configuration."""
    model = work / "model"
    shutil.copytree(tiny.make(work / "tiny"), model)
    noise = torch.randn(2**20).mul_(0.02).to(torch.bfloat16)
    with torch.device("meta"):
        transformer = {name: tuple(p.shape) for name, p in empty_transformer(scale.spec).named_parameters()}
    write(model / "transformer", "diffusion_pytorch_model", transformer_to_diffusers(scale.spec), transformer, noise)
    hidden = scale.text_hidden
    tokens = json.loads((model / "text_encoder" / "config.json").read_text())["text_config"]["vocab_size"]
    text = {**TEXT_CONFIG, "vocab_size": tokens, "hidden_size": hidden, "intermediate_size": 4 * hidden}
    text |= {"num_hidden_layers": 31, "head_dim": 128, "num_attention_heads": hidden // 128}
    write(model / "text_encoder", "model", {**text, "model_type": "mistral"}, text_shapes(text), noise)
    vae = AutoencoderSpec()
    config = {**VAE, "block_out_channels": list(vae.channels), "layers_per_block": 2, "norm_num_groups": 32}
    write(model / "vae", "diffusion_pytorch_model", {**config, "sample_size": 1024}, vae_shapes(config), noise)

    pictures = work / "pictures"
    pictures.mkdir()
    for index in range(PICTURES):
        gradient = Image.linear_gradient("L").resize((scale.edge, scale.edge))
        Image.merge("RGB", (gradient, gradient.rotate(90), Image.new("L", gradient.size, 50 * index))).save(
            pictures / f"{index}.png"
        )
        (pictures / f"{index}.txt").write_text(f"number {index}: " + CAPTION, encoding="utf-8")
    settings = {
        "pretrained_model_name_or_path": str(model),
        "tokenizer_max_length": LENGTH,
        "max_train_steps": 1,
        "mixed_precision": "no" if scale.dtype == "fp32" else "bf16",
        "vae_dtype": scale.dtype,
        "validation_prompt": CAPTION,
        "validation_resolution": f"{scale.edge}x{scale.edge}",
        "validation_num_inference_steps": 1,
        "validation_step_interval": 0,
        "disable_benchmark": True,
        "checkpoint_step_interval": 0,
        "lora_rank": 16,
        "max_workers": 1,
    }
    datasets: list[dict[str, Any]] = [
        {
            "id": "pictures",
            "type": "local",
            "instance_data_dir": "pictures",
            "caption_strategy": "textfile",
            "resolution": scale.edge,
            "crop": True,
        },
        {"id": "text", "type": "local", "dataset_type": "text_embeds", "default": True, "cache_dir": "cache/text"},
    ]
    (work / "config").mkdir()
    for name, value in (("config.json", settings), ("multidatabackend.json", datasets)):
        (work / "config" / name).write_text(json.dumps(value), encoding="utf-8")


def write(
    folder: Path, stem: str, config: dict[str, Any], shapes: Mapping[str, tuple[int, ...]], noise: torch.Tensor
) -> None:
    """Write a component with random bf16 weights (one block of noise, repeated) and norms of one."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    for old in folder.glob("*.safetensors"):
        old.unlink()
    ones = torch.ones(2**20, dtype=torch.bfloat16)

    def data(shape: tuple[int, ...], name: str) -> bytes:
        count = math.prod(shape)
        source = ones if (len(shape) < 2 and "norm" in name) or name.endswith(("running_var", "tracked")) else noise
        repeated = torch.cat([*islice(cycle([source]), count // len(source)), source[: count % len(source)]])
        return repeated.view(torch.int16).numpy().tobytes()

    entries = {
        name: TensorData("BF16", shape, 2 * math.prod(shape), lambda shape=shape, name=name: data(shape, name))  # type: ignore[misc]
        for name, shape in shapes.items()
    }
    write_tensors(folder / f"{stem}.safetensors", entries, {"format": "pt"})


def text_shapes(text: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    # Takes seconds to import.
    from transformers import AutoModel, MistralConfig

    with torch.device("meta"):
        model = AutoModel.from_config(MistralConfig(**text))
    return {f"model.{name}": tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def vae_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    # Takes seconds to import.
    from diffusers import AutoencoderKLFlux2

    with torch.device("meta"):
        vae = AutoencoderKLFlux2.from_config(config)
    return {name: tuple(tensor.shape) for name, tensor in vae.state_dict().items()}


def plan(work: Path, name: str, flags: tuple[str, ...]) -> int:
    """The memory that the plan expects for the phase, on a machine without an accelerator."""
    command = [sys.executable, "-P", "-m", "simpletuner", "plan", "--json", "--vram=0", "--ram=1000", *flags]
    done = subprocess.run(command, cwd=work, capture_output=True, text=True, check=True)
    phases = json.loads(done.stdout)["plan"]["phases"]
    (own,) = (phase for phase in phases if phase["phase"] == name.partition(" ")[0])
    return int(own["ram"])


# The libraries are imported first and are not part of the measurement.
CHILD = """
import sys
import torch, torch._dynamo, diffusers, transformers
from diffusers import AutoencoderKLFlux2, AutoencoderKL
from transformers import AutoModel, Mistral3Config, MistralModel, PreTrainedTokenizerFast
from simpletuner.cli.main import main
import simpletuner.cli.train, simpletuner.train.job
sys.exit(main(["train", *sys.argv[1:]]))
"""


def measure(work: Path, name: str, flags: tuple[str, ...]) -> int:
    """The largest growth of a child process's memory during the phase."""
    phase = name.partition(" ")[0]
    run = work / next(flag for flag in flags if flag.startswith("--output_dir")).partition("=")[2]
    with (work / "child.log").open("w") as log:
        child = subprocess.Popen([sys.executable, "-P", "-c", CHILD, *flags], cwd=work, stdout=log, stderr=log)
        samples: list[tuple[float, int]] = []
        while child.poll() is None:
            found = resident(child.pid)
            if found is not None:
                samples.append((time.time(), found))
            time.sleep(EVERY_S)
            if any(
                event["type"] == "phase" and event["phase"] == phase and event["state"] == "end"
                for event in read_events(run / "events.jsonl")
            ):
                child.terminate()
                child.wait()
    begin, end = window(run / "events.jsonl", "load" if phase in ("train", "validation") else phase, phase)
    before = [size for at, size in samples if at <= begin][-1]
    began = window(run / "events.jsonl", phase, phase)[0] if phase == "validation" else begin
    during = [size for at, size in samples if began <= at <= end]
    return max(during) - before


def window(events: Path, first: str, last: str) -> tuple[float, float]:
    """When the phase `first` began and `last` ended, in seconds since 1970."""
    times = {
        (event["phase"], event["state"]): datetime.datetime.fromisoformat(event["time"]).timestamp()
        for event in read_events(events)
        if event["type"] == "phase"
    }
    if (last, "end") not in times:
        log = (events.parents[2] / "child.log").read_text()
        raise RuntimeError(f"{events}: the run did not come to the end of {last}:\n{log[-2000:]}")
    return times[first, "begin"], times[last, "end"]


def resident(pid: int) -> int | None:
    """Resident bytes of anonymous memory and of mapped weight files."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
        maps = Path(f"/proc/{pid}/smaps").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    anonymous = re.search(r"RssAnon:\s+(\d+) kB", status)
    if anonymous is None:
        return None
    mapped = re.findall(r"^\S+-\S+ .*\.safetensors\n(?:[A-Z]\w*:.*\n)*?Rss:\s+(\d+) kB", maps, re.MULTILINE)
    return (int(anonymous[1]) + sum(map(int, mapped))) * 1024


if __name__ == "__main__":
    main()
