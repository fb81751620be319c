"""Make `tests/fixtures/before-breadth`: caches, and a run that was killed after its checkpoint at step 2 of 4.

    PYTHONPATH=SOURCE python -P tools/interrupted_run.py FOLDER

SOURCE is the `src` folder of the commit that is to write the files. FOLDER must be empty or new. It becomes a working
folder with two images of 64x64 and 160x96 pixels, their configuration, the caches of a first start, and the run.
"""

import argparse
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from PIL import Image

KILLED = Path(__file__).parents[1] / "tests" / "recipes" / "killed.py"
SETTLED_S = 3
"""Files younger than 2 s are not entered in `verified.json`."""

CONFIG: dict[str, Any] = {
    "model_flavour": "tiny",
    "output_dir": "output/run",
    "max_train_steps": 4,
    "train_batch_size": 1,
    "mixed_precision": "no",
    "vae_dtype": "fp32",
    "learning_rate": 1e-3,
    "lr_scheduler": "cosine",
    "lora_rank": 1,
    "peft_lora_target_modules": ["transformer_blocks.1.attn.to_q", "single_transformer_blocks.1.attn.to_qkv_mlp_proj"],
    "caption_dropout_probability": 0.25,
    "checkpoint_step_interval": 2,
    "validation_disable": True,
    "max_workers": 1,
}
DATASETS: list[dict[str, Any]] = [
    {
        "id": "images",
        "type": "local",
        "instance_data_dir": "datasets/images",
        "caption_strategy": "textfile",
        "resolution": 64,
        "resolution_type": "pixel_area",
        "crop": True,
        "crop_aspect": "preserve",
        "crop_style": "center",
        "cache_dir_vae": "cache/vae",
    },
    {"id": "text", "type": "local", "dataset_type": "text_embeds", "default": True, "cache_dir": "cache/text"},
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    work: Path = parser.parse_args().folder
    images = work / "datasets" / "images"
    images.mkdir(parents=True)
    for index, size in enumerate(((64, 64), (160, 96))):
        gradient = Image.linear_gradient("L")
        bands = (gradient.rotate(90).resize(size), gradient.resize(size), Image.new("L", size, 90 * index))
        Image.merge("RGB", bands).save(images / f"image-{index}.png")
        (images / f"image-{index}.txt").write_text(f"a soft gradient, number {index}\n", encoding="utf-8")
    (work / "config").mkdir()
    for name, content in (("config", CONFIG), ("multidatabackend", DATASETS)):
        (work / "config" / f"{name}.json").write_text(json.dumps(content, indent=4) + "\n", encoding="utf-8")

    cache = [sys.executable, "-P", "-m", "simpletuner", "dataset", "cache"]
    subprocess.run(cache, cwd=work, check=True)
    time.sleep(SETTLED_S)
    subprocess.run(cache, cwd=work, check=True)
    # After step 3, because step 2 is reported before its checkpoint is written.
    killed = subprocess.run([sys.executable, "-P", str(KILLED), "step:3"], cwd=work, check=False)
    if killed.returncode != -signal.SIGKILL:
        sys.exit(f"the run ended by itself, with {killed.returncode}")


if __name__ == "__main__":
    main()
