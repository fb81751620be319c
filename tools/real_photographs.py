"""Train a few steps of the embedded model on real photographs, at 1024 with aspect buckets.

    python tools/real_photographs.py PICTURES WORK [--steps 4] [--aspect preserve|closest]

PICTURES is a folder of photographs, and is not changed. WORK must be empty or new. It gets copies of the photographs,
a caption for each (the .txt beside it, else the words of its file name), a configuration, caches and the run. The exit
code is that of `simpletuner train`.
"""

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".avif", ".tif", ".tiff", ".bmp"}
SHAPES = [0.5625, 0.6667, 0.75, 1.0, 1.3333, 1.5, 1.6, 1.7778]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pictures", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--aspect", choices=("preserve", "closest"), default="preserve")
    arguments = parser.parse_args()

    count = collect(arguments.pictures, arguments.work / "datasets" / "photographs")
    if count == 0:
        parser.error(f"{arguments.pictures}: no pictures ({', '.join(sorted(SUFFIXES))})")
    print(f"{count} pictures", flush=True)
    write_configuration(arguments.work / "config", arguments.aspect)

    # -P: the folder `datasets` in WORK must not be taken for the library of that name.
    command = [sys.executable, "-P", "-m", "simpletuner"]
    subprocess.run([*command, "dataset", "scan"], cwd=arguments.work, check=True)
    steps = ["--max_train_steps", str(arguments.steps)]
    return subprocess.run([*command, "train", *steps], cwd=arguments.work, check=False).returncode


def collect(source: Path, folder: Path) -> int:
    """Copy the images under `source` into `folder`, each with a caption. Returns their number."""
    folder.mkdir(parents=True, exist_ok=True)
    found = sorted(path for path in source.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    for path in found:
        name = "--".join(path.relative_to(source).parts)
        shutil.copyfile(path, folder / name)
        caption = path.with_suffix(".txt")
        text = caption.read_bytes() if caption.exists() else words(path.stem).encode()
        (folder / name).with_suffix(".txt").write_bytes(text)
    return len(found)


def words(stem: str) -> str:
    """`a_red-barn` as a caption: "a red barn"."""
    return " ".join(stem.replace("_", " ").replace("-", " ").split())


def write_configuration(folder: Path, aspect: str) -> None:
    """Write the two configuration files of a run at 1024, with the images' own shapes instead of square crops."""
    photographs: dict[str, Any] = {
        "id": "photographs",
        "type": "local",
        "instance_data_dir": "datasets/photographs",
        "caption_strategy": "textfile",
        "resolution": 1024,
        "resolution_type": "pixel_area",
        "crop": True,
        "crop_aspect": aspect,
        "crop_style": "center",
    }
    if aspect == "closest":
        photographs["crop_aspect_buckets"] = SHAPES
    store = {"id": "text-embeds", "type": "local", "dataset_type": "text_embeds", "default": True}
    config = {
        "model_family": "flux2",
        "model_flavour": "tiny",
        "lora_rank": 8,
        "output_dir": "output/photographs",
        "validation_disable": True,
        "gradient_checkpointing": True,
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in (("config.json", config), ("multidatabackend.json", [photographs, store])):
        (folder / name).write_text(json.dumps(value, indent=2), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
