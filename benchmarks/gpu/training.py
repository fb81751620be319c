"""Measure training steps at FLUX.2's shapes: seconds, rate, and memory against the plan; resident and streamed.

    python benchmarks/gpu/training.py dev|klein|int8|int4|streamed|variants|… [--device cpu --tiny]

Weights are random and generated on the device; a LoRA of rank 16 on every Linear of every block, AdamW, recomputed
blocks, 512 text tokens: the program's own `Stepper` over one batch, without reading batches or saving. Besides torch it
needs einops, jaxtyping, pydantic, safetensors, numpy and tqdm; quantized weights are random numbers in the formats of
int8-quanto and int4-quanto, and need no library. Streamed weights take 60 GiB of RAM in bf16, 30 in 8 bits.

A process measures one precision, and makes each model once for all cases that share it. A cap imitates a smaller card
by limiting torch's allocator (`torch.cuda.set_per_process_memory_fraction`). The CUDA context is not counted by it,
hence 22.5 GiB for a card of 24. If a case does not fit, the inputs of recomputed blocks go to host memory, and then the
ring gets one group less. The hidden share is 1 − (step − step without copies) / copies alone; a step without copies
computes with the group that happens to be loaded, which does not change its time.
"""

import contextlib
import gzip
import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from measuring import Clock, free, parser, wait
from models import FORMATS, TEXT, TINY_EDGE, TINY_TEXT, spec_of, transformer
from results import GIB, report

from simpletuner.config.run import RunConfig
from simpletuner.data.batch import Batch, GlobalBatch
from simpletuner.flow.condition import Condition, TextContext
from simpletuner.flux2.activations import TransformerPass
from simpletuner.flux2.arithmetic import training_flop
from simpletuner.flux2.denoiser import Denoiser
from simpletuner.flux2.footprint import Architecture, Footprint, Workload
from simpletuner.flux2.lora import Adapter, attach
from simpletuner.flux2.residency import resident_indices
from simpletuner.flux2.routes import Route
from simpletuner.flux2.tokens import PIXELS_PER_TOKEN
from simpletuner.flux2.transformer import Flux2Transformer
from simpletuner.flux2.tread import draw_choices
from simpletuner.memory import compile as compilation
from simpletuner.memory import offload, recompute
from simpletuner.memory.planner import MachineMemory
from simpletuner.train import optim
from simpletuner.train.placement import stream_blocks
from simpletuner.train.step import Objective, Stepper
from simpletuner.train.throughput import data_sheet_rate

WARM_UP = 2
"""Steps before the timed ones: they set up what is set up once, and let the ring record the order of groups."""
MOST_STEPS, FEWEST_STEPS = 10, 3
KERNELS_SHOWN = 15
PROFILE_BYTES = 16 * 2**20
ROUTE = (2, -2)
"""First and last block of the TREAD route."""


@dataclass(frozen=True)
class Case:
    """One row of the table."""

    model: str = "dev"
    precision: str = "bf16"
    edge: int = 1024
    """Edge of the image in pixels."""
    batch: int = 1
    cap_gib: float | None = None
    """GPU memory in GiB that the case may use; its blocks are then streamed. None for a resident model."""
    is_compiled: bool = False
    kept: float = 1.0
    """Share of the image tokens that TREAD keeps."""
    target: str = "every Linear"
    keeps_blocks: bool = False
    """Whether as many blocks stay resident as `group_offload_resident_blocks` `auto` would keep under the cap."""
    is_profiled: bool = False

    @property
    def is_resident(self) -> bool:
        return self.cap_gib is None

    @property
    def made_of(self) -> tuple[object, ...]:
        """Key of the model that the case needs; cases with equal keys share a model."""
        return self.model, self.precision, self.is_resident, self.is_compiled, self.target, self.keeps_blocks

    @property
    def variant(self) -> str:
        """Difference from an ordinary step, for the table."""
        parts = [f"TREAD keeps {self.kept:g}"] if self.kept < 1 else []
        return ", ".join([*parts, *([f"LoRA on {self.target}"] if self.target != "every Linear" else [])])


def capped(precision: str, caps: Sequence[float]) -> tuple[Case, ...]:
    return tuple(Case(precision=precision, cap_gib=cap) for cap in caps)


ONE_LINEAR = "one Linear of the first block"
PLANS: dict[str, tuple[Case, ...]] = {
    "dev": (Case(), Case(is_compiled=True, is_profiled=True)),
    "klein": (
        Case(model="klein-9b"),
        Case(model="klein-4b"),
        Case(model="klein-9b", is_compiled=True),
        Case(model="klein-4b", is_compiled=True),
    ),
    "int8": (Case(precision="int8"), Case(precision="int8", is_compiled=True)),
    "int4": (Case(precision="int4"), Case(precision="int4", is_compiled=True)),
    "streamed": capped("bf16", (22.5, 10.5)),
    "streamed-int8": capped("int8", (22.5, 14.5, 10.5, 7)),
    "streamed-more": capped("bf16", (14.5, 7)),
    "variants": (
        Case(kept=0.5),
        Case(target=ONE_LINEAR),
        Case(is_compiled=True, target=ONE_LINEAR),
        Case(is_compiled=True),
    ),
    "small": (Case(edge=512, batch=2),),
    "resident-blocks": (Case(precision="int8", cap_gib=22.5, keeps_blocks=True),),
}


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("plan", choices=PLANS)
    given = arguments.parse_args()
    clock = Clock(given.seconds)
    bench = Bench(given.device, given.tiny, clock, given.out)
    for _, cases in itertools.groupby(PLANS[given.plan], key=lambda case: case.made_of):
        bench.run(list(cases))


@dataclass(frozen=True)
class Bench:
    """The device, options and remaining time of the cases."""

    device: torch.device
    tiny: bool
    clock: Clock
    out: Path

    def run(self, cases: Sequence[Case]) -> None:
        """Measure and report the cases, which share a model."""
        left = list(cases)
        for ring in (0,) if cases[0].is_resident else (2, 1):
            if left and self.clock.left > 0:
                with contextlib.closing(Model(self, left[0], ring)) as model:
                    left = [case for case in left if not model.measure(case)]
        for case in left:
            self.report(case, "resident" if case.is_resident else "streamed", note="does not fit, or no time was left")

    def report(self, case: Case, residency: str, **fields: Any) -> None:
        """Report one row of the table."""
        edge = TINY_EDGE if self.tiny else case.edge
        report(
            "step",
            model=f"{case.model}, tiny" if self.tiny else case.model,
            precision=case.precision,
            residency=residency,
            cap_gib=case.cap_gib,
            image=f"{edge}²",
            batch=case.batch,
            blocks="compiled" if case.is_compiled else "eager",
            variant=case.variant,
            **fields,
        )


class UncheckedStepper(Stepper):
    """A stepper that waits for losses and gradient norm as its base class does, but accepts any values."""

    def read(self, values: torch.Tensor) -> list[float]:
        return [0.0] * len(super().read(values))


class Model:
    """A transformer for some cases, with its adapter and optimizer."""

    def __init__(self, bench: Bench, case: Case, ring: int) -> None:
        self.bench = bench
        self.ring = ring
        """Groups of streamed blocks on the device at once; 0 if all blocks are resident."""
        device, spec = bench.device, spec_of(case.model, tiny=bench.tiny)
        self.config = planned(configured(case, ring, bench.tiny), case, tiny=bench.tiny).resolved_config
        if device.type == "cuda":
            torch.cuda.set_per_process_memory_fraction(1.0, device)
        resident = range(spec.blocks) if case.is_resident else resident_indices(spec, self.config.resident_blocks or 0)
        self.transformer: Flux2Transformer = transformer(spec, case.precision, device, resident)
        self.adapter: Adapter = attach(self.transformer, self.config, seed=0)
        if case.is_compiled:
            compilation.install(self.transformer.blocks, backend="inductor", sizes_vary=False)
        self.streaming = stream_blocks(self.transformer, self.config, device)
        self.plain = [block.forward for block in self.transformer.blocks]
        self.transformer.train()
        free()

    def close(self) -> None:
        """Free its memory."""
        del self.transformer, self.adapter, self.streaming, self.plain
        free()

    def measure(self, case: Case) -> bool:
        """Measure and report the case. Returns whether it fitted."""
        if self.bench.clock.left <= 0:
            return False
        device = self.bench.device
        if device.type == "cuda":
            whole = torch.cuda.get_device_properties(device).total_memory
            share = 1.0 if case.cap_gib is None else min(1.0, case.cap_gib * GIB / whole)
            torch.cuda.set_per_process_memory_fraction(share, device)
        # A resident model either fits or does not; under a cap that is too small, block inputs go to host memory.
        for goes_to_host in (False,) if case.is_resident else (False, True):
            for block, forward in zip(self.transformer.blocks, self.plain, strict=True):
                block.forward = forward
            inputs = recompute.HostInputs(device, ahead=self.ring == 2) if goes_to_host else None
            recompute.install(self.transformer.blocks, inputs=inputs)
            try:
                self._measure(case, goes_to_host)
            except torch.OutOfMemoryError:
                self.transformer.zero_grad(set_to_none=True)
                free()
            else:
                free()
                return True
        return False

    def _measure(self, case: Case, goes_to_host: bool) -> None:
        device, clock = self.bench.device, self.bench.clock
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        step = self.step(case)
        began = time.perf_counter()
        step()
        wait(device)
        first_s = time.perf_counter() - began
        for _ in range(WARM_UP - 1):
            step()
        copied = None if self.streaming is None else self.streaming.copied_bytes
        times = timed(step, device, clock)
        seconds = statistics.median(times)
        plan = planned(self.config, case, goes_to_host=goes_to_host, tiny=self.bench.tiny)
        flop, rate = training_flop(self.passing(plan, case), is_compiled=case.is_compiled), data_sheet_rate(device)
        fields: dict[str, Any] = {
            "seconds": seconds,
            "fastest_s": min(times),
            "slowest_s": max(times),
            "steps": len(times),
            "first_s": first_s,
            "images_per_s": case.batch / seconds,
            "flop": flop.model,
            "hardware_flop": flop.hardware,
            "flop_per_s": flop.model / seconds,
            "mfu": None if rate is None else flop.model / seconds / rate,
            "hfu": None if rate is None else flop.hardware / seconds / rate,
            "planned_bytes": plan.train().total("accelerator"),
            "ram_bytes": resident_bytes(),
        }
        if device.type == "cuda":
            fields["allocated_bytes"] = torch.cuda.max_memory_allocated(device)
            fields["reserved_bytes"] = torch.cuda.max_memory_reserved(device)
        residency = {0: "resident", 1: "streamed", 2: "streamed, ahead"}[self.ring]
        residency += ", inputs on the host" if goes_to_host else ""
        residency += f", {self.config.group_offload_resident_blocks} blocks resident" if case.keeps_blocks else ""
        if self.streaming is not None and copied is not None:
            fields["copied_bytes"] = (self.streaming.copied_bytes - copied) / len(times)
            if clock.left > 5 * seconds:
                unchecked = self.step(case, UncheckedStepper)
                # With the weights of wrong blocks the adapters train wrongly: their values are restored afterwards.
                with self.adapter.with_weights(self.adapter.state()):
                    fields |= overlap(self.streaming, unchecked, seconds, fields["copied_bytes"], device, clock)
        self.bench.report(case, residency, **fields)
        if case.is_profiled and clock.left > 10 * seconds:
            edge = TINY_EDGE if self.bench.tiny else case.edge
            profiled(step, device, self.bench.out, f"{case.model} {case.precision} {edge}²")

    def passing(self, plan: Footprint, case: Case) -> TransformerPass:
        """The passes of a step, for counting their operations."""
        passing = plan.transformer_pass(plan.workload.bucket, case.batch)
        routes = [route(self.transformer, case.kept)] if case.kept < 1 else []
        return replace(passing, routes=tuple(routes))

    def step(self, case: Case, kind: type[Stepper] = Stepper) -> Callable[[], None]:
        """A function that makes one optimizer step of the program, always over the same batch."""
        device, tiny = self.bench.device, self.bench.tiny
        denoiser = Denoiser(self.transformer)
        stepper = kind(
            denoise=denoiser,
            parameters=self.adapter.parameters(),
            optimizer=optim.build(self.adapter.parameters(), self.config),
            options=self.config,
            objective=Objective.of(self.config, self.config, 0),
            scaler=torch.amp.GradScaler(device.type, enabled=False),
            device=device,
            route=None if case.kept == 1 else denoiser.routed,
        )
        batch = random_batch(case, self.transformer, tiny)
        numbers = itertools.count(1)
        if device.type == "cuda":
            batch = batch.pin_memory()

        def step() -> None:
            stepper(GlobalBatch(next(numbers), 0, (batch,), case.batch), 1e-4)

        return step


def configured(case: Case, ring: int, tiny: bool) -> RunConfig:
    """The configuration of a case."""
    return RunConfig(
        base_model_precision=FORMATS.get(case.precision, "no_change"),
        lora_rank=16,
        flux_lora_target="all",
        peft_lora_target_modules=("transformer_blocks.0.attn.to_q",) if case.target == ONE_LINEAR else None,
        enable_group_offload=ring > 0,
        group_offload_use_stream="true" if ring == 2 else "false",
        group_offload_resident_blocks="0" if not case.keeps_blocks else "2" if tiny else "auto",
        tokenizer_max_length=TINY_TEXT if tiny else TEXT,
    )


def planned(config: RunConfig, case: Case, *, goes_to_host: bool = False, tiny: bool) -> Footprint:
    """The memory plan of the case, without a VAE beside it."""
    spec = spec_of(case.model, tiny=tiny)
    config = config.model_copy(update={"activation_offload": goes_to_host})
    architecture = replace(Architecture.of(config), transformer=spec, text_length=TINY_TEXT if tiny else TEXT)
    edge = TINY_EDGE if tiny else case.edge
    work = Workload(bucket=(edge, edge), batch=case.batch, samples_images=False)
    # The plan depends on the available memory only if blocks stay resident.
    room = int(case.cap_gib * GIB) if case.keeps_blocks and case.cap_gib is not None else 2**50
    return Footprint(config, architecture, work, MachineMemory(accelerator=room, ram=2**50, disk=None))


def random_batch(case: Case, model: Flux2Transformer, tiny: bool) -> Batch:
    """Random latents, contexts and noise, in host memory."""
    generator = torch.Generator().manual_seed(0)
    side = (TINY_EDGE if tiny else case.edge) // PIXELS_PER_TOKEN
    text = TINY_TEXT if tiny else TEXT
    latents, noise = (torch.randn(case.batch, 128, side, side, generator=generator) for _ in range(2))
    rows = torch.randn(text, model.spec.context_dim, generator=generator).bfloat16()
    context = TextContext(rows, torch.arange(text).expand(case.batch, -1))
    routes = [route(model, case.kept)] if case.kept < 1 else []
    return Batch(
        latents=latents,
        condition=Condition.at(context, 1.0),
        sigma=torch.linspace(0.3, 0.7, case.batch),
        noise=noise,
        names=tuple(f"random/{index}" for index in range(case.batch)),
        weights=torch.ones(case.batch),
        slots=range(case.batch),
        choices=draw_choices(routes, 0, 0, range(case.batch), side**2),
    )


def route(model: Flux2Transformer, kept: float) -> Route:
    """The blocks that process a share of the image tokens."""
    start, end = (index % model.spec.blocks for index in ROUTE)
    return Route(start, end, kept)


def timed(step: Callable[[], None], device: torch.device, clock: Clock) -> list[float]:
    """Seconds of each step: `FEWEST_STEPS` to `MOST_STEPS` steps, and about half of the remaining time."""
    seconds: list[float] = []
    while len(seconds) < MOST_STEPS:
        began = time.perf_counter()
        step()
        wait(device)
        seconds.append(time.perf_counter() - began)
        if len(seconds) >= FEWEST_STEPS and sum(seconds) > clock.left / 2:
            break
    return seconds


def overlap(
    streaming: offload.Streaming,
    step: Callable[[], None],
    seconds: float,
    copied: float,
    device: torch.device,
    clock: Clock,
) -> dict[str, float]:
    """Seconds of a step without copies and of the copies alone, and, on a GPU, the share of the copies that compute
    hides.
    """
    with nothing_copied(streaming):
        without = statistics.median(timed(step, device, clock))
    before, began = streaming.copied_bytes, time.perf_counter()
    for group in streaming._groups:
        streaming._fill(group)
    wait(device)
    alone = copied / (streaming.copied_bytes - before) * (time.perf_counter() - began)
    hidden = {"hidden": 1 - (seconds - without) / alone} if device.type == "cuda" else {}
    return {"without_copies_s": without, "copies_alone_s": alone, **hidden}


@contextlib.contextmanager
def nothing_copied(streaming: offload.Streaming) -> Iterator[None]:
    """A context in which nothing is copied: slots keep their present weights."""

    def mark(group: Any) -> None:
        group.slot.group = group

    fill = streaming._fill
    streaming._fill = mark  # type: ignore[method-assign]
    try:
        yield
    finally:
        streaming._fill = fill  # type: ignore[method-assign]
        for slot in streaming._slots:
            slot.group = None


def profiled(step: Callable[[], None], device: torch.device, out: Path, case: str) -> None:
    """Report the kernels that take the most time, and write a trace of one step."""
    from torch.profiler import ProfilerActivity, profile

    is_cuda = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if is_cuda else [])]
    step()
    with profile(activities=activities) as recorded:
        step()
        wait(device)
    averages = recorded.key_averages()
    # Only what ran on the device itself: an operator's own row would count its kernels again.
    times = [
        (event.self_device_time_total if is_cuda else event.self_cpu_time_total, event.count, event.key)
        for event in averages
        if not is_cuda or event.device_type.name == "CUDA"
    ]
    total = sum(took for took, _, _ in times)
    for took, count, name in sorted(times, reverse=True)[:KERNELS_SHOWN]:
        report("kernel", case=case, name=name, calls=count, ms=took / 1e3, share=took / max(total, 1e-9))
    report(
        "kernel", case=case, name="all of them", calls=sum(count for _, count, _ in times), ms=total / 1e3, share=1.0
    )
    plain, packed = out / "profile.json", out / "profile.json.gz"
    out.mkdir(parents=True, exist_ok=True)
    recorded.export_chrome_trace(str(plain))
    packed.write_bytes(gzip.compress(plain.read_bytes(), compresslevel=6))
    plain.unlink()
    if packed.stat().st_size > PROFILE_BYTES:
        report("fact", name="trace", value=f"left out: {packed.stat().st_size / 2**20:.0f} MiB packed")
        packed.unlink()


def resident_bytes() -> int:
    """Memory of this process in bytes, pinned pages included."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines["VmRSS"].removesuffix("kB")) * 1024


if __name__ == "__main__":
    main()
