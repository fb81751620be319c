"""Measure drawing the order of an epoch: processor time and memory, against the same order in pure Python.

    python benchmarks/order.py [--visits 1000000]

One dataset whose samples lie in seven buckets, each sample once, in batches of 1. Both orders must be equal. Memory is
peak growth: as tracemalloc counts it and, in another pass, of the process (VmHWM).
"""

import argparse
import random
import time
import tracemalloc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from simpletuner.base.draws import draw_seed
from simpletuner.base.storage import LocalStorage
from simpletuner.config.datasets import ImageSet
from simpletuner.data.geometry import Geometry
from simpletuner.data.manifest import Manifest
from simpletuner.data.order import MicroBatch, Order, Visit
from simpletuner.data.sample import Sample

T = TypeVar("T")

EPOCHS = 3
"""Epochs drawn in turn: the order keeps two while it draws another."""
BUDGET_S = 1.0
BUDGET_MIB = 50.0
MIB = 2**20
SEED = 42
TARGETS = ((1024, 1024), (1152, 864), (864, 1152), (1248, 832), (832, 1248), (1344, 768), (768, 1344))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--visits", type=int, default=1_000_000)
    manifest = manifest_of(parser.parse_args().visits)

    order, seconds, resident_mib = measured(lambda: draw_epochs(manifest))
    seconds /= EPOCHS
    expected, reference_s, reference_mib = measured(lambda: reference_epoch(manifest, EPOCHS - 1))
    assert [order.epoch(EPOCHS - 1)[place] for place in range(len(order.epoch(0)))] == expected
    del order, expected
    tracemalloc.start()
    draw_epochs(manifest)
    traced_mib = tracemalloc.get_traced_memory()[1] / MIB
    tracemalloc.stop()

    print(
        f"an epoch of {manifest.visits_per_epoch} visits: {seconds:.2f} s of processor time (budget {BUDGET_S:.0f} s);"
    )
    print(f"  in pure Python {reference_s:.1f} s, {reference_s / seconds:.0f} times as long")
    print(f"peak growth: {resident_mib:.0f} MiB resident, {traced_mib:.0f} MiB traced (budget {BUDGET_MIB:.0f} MiB);")
    print(f"  in pure Python {reference_mib:.0f} MiB resident, for one epoch")


def measured(work: Callable[[], T]) -> tuple[T, float, float]:
    """The result of `work`, its processor seconds, and the growth of the process's peak memory in MiB."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak is now what is resident
    before_mib = peak_mib()
    began = time.process_time()
    result = work()
    return result, time.process_time() - began, peak_mib() - before_mib


def manifest_of(visits: int) -> Manifest:
    geometries = [Geometry(target, target, (0, 0)) for target in TARGETS]
    samples = tuple(
        Sample("set", LocalStorage(Path()), "", "", 0, 0, geometries[index**3 % 11 % len(TARGETS)], ("",))
        for index in range(visits)
    )
    manifest = Manifest(ImageSet.model_validate({"id": "set", "instance_data_dir": "."}), samples, (), ())
    assert len(manifest.buckets) == len(TARGETS)  # computed here and cached by the manifest
    return manifest


def draw_epochs(manifest: Manifest) -> Order:
    order = Order([manifest], seed=SEED, batch_size=1)
    for epoch in range(EPOCHS):
        order.epoch(epoch)
    return order


def peak_mib() -> float:
    """Peak resident memory of this process."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


def reference_epoch(manifest: Manifest, epoch: int) -> list[MicroBatch]:
    batches = []
    for bucket, members in manifest.buckets.items():
        key = draw_seed(SEED, "order", epoch, manifest.image_set.id, f"{bucket[0]}x{bucket[1]}")
        batches += [MicroBatch((Visit(0, index),), bucket) for index in reference_shuffled(members, key)]
    return reference_shuffled(batches, draw_seed(SEED, "order", epoch))


def reference_shuffled(items: Sequence[T], seed: int) -> list[T]:
    generator = random.Random(seed)
    keys = [generator.random() for _ in items]
    return [items[index] for index in sorted(range(len(items)), key=keys.__getitem__)]


if __name__ == "__main__":
    main()
