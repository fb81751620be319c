"""Measure processor time and peak memory of a scan: cold (decodes every image) and warm (finds all unchanged).

    python benchmarks/scan.py [--pictures 100000]

Images of 16x16 pixels with captions in .txt files, 1,000 to a folder, so that the work on files outweighs decoding.
Each scan is a separate process.
"""

import argparse
import multiprocessing
import resource
import tempfile
import time
from pathlib import Path

from PIL import Image

from simpletuner.config.datasets import ImageSet
from simpletuner.data.manifest import scan


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=100_000)
    pictures = parser.parse_args().pictures
    with tempfile.TemporaryDirectory(prefix="simpletuner-scan-") as folder:
        draw(Path(folder) / "images", pictures)
        for name in ("cold", "warm", "warm"):
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                fingerprint, seconds, peak_mib = pool.apply(measured, (Path(folder),))
            print(f"{name}: {seconds:.1f} s of processor time, peak {peak_mib:.0f} MiB, fingerprint {fingerprint[:12]}")


def draw(folder: Path, count: int) -> None:
    """Write `count` images, each of its own color."""
    for number in range(count):
        path = folder / f"{number // 1000:03}" / f"{number:06}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        color = (number >> 16, number >> 8 & 255, number & 255)
        Image.new("RGB", (16, 16), color).save(path, compress_level=1)
        path.with_suffix(".txt").write_text(f"color {number}", encoding="utf-8")


def measured(folder: Path) -> tuple[str, float, float]:
    """Fingerprint, processor time in seconds and peak memory in MiB of a scan, in the process it runs in."""
    keys = {"id": "images", "instance_data_dir": str(folder / "images"), "cache_dir_vae": str(folder / "cache")}
    image_set = ImageSet.model_validate(keys | {"caption_strategy": "textfile", "resolution": 16})
    began = time.process_time()
    manifest = scan(image_set, seed=0, workers=2)
    seconds = time.process_time() - began
    peak_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    return manifest.fingerprint, seconds, peak_mib


if __name__ == "__main__":
    main()
