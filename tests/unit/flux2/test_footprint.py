"""Bytes of FLUX.2, against the modules themselves, and against the options that decide them."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.quantized_files import write_quantized
from tests.tiers import others_slow
from torch import nn

from simpletuner.base.errors import AccessError
from simpletuner.base.sizes import GIB
from simpletuner.config.flavours import (
    DEV,
    DEV_TEXT,
    FLAVOURS,
    KLEIN_4B,
    KLEIN_9B,
    TINY,
    AutoencoderSpec,
    FlavourName,
    TransformerSpec,
)
from simpletuner.config.optimizers import known_optimizer
from simpletuner.config.options.lora import LoraOptions
from simpletuner.config.run import RunConfig
from simpletuner.flux2.footprint import (
    Architecture,
    Footprint,
    Workload,
    autoencoder_bytes,
    decoding_bytes,
    encoding_bytes,
    stored_bytes,
    text_activation_bytes,
    text_bytes,
    transformer_bytes,
)
from simpletuner.flux2.lora import attach
from simpletuner.flux2.residency import resident_indices
from simpletuner.flux2.spec import autoencoder_from_config, decoder_shapes, encoder_shapes, text_from_config
from simpletuner.flux2.tiny.make import TEXT_CONFIG
from simpletuner.flux2.tiny.parts import VAE
from simpletuner.flux2.transformer import empty_transformer
from simpletuner.memory.planner import MachineMemory, MemoryPlan, MemoryTier, PhasePlan, plannable_bytes
from simpletuner.memory.trace import on_meta_device, trace_forward

KLEIN_PAGE = (Path(__file__).parents[3] / "docs" / "klein.md").read_text(encoding="utf-8")
CARD = MachineMemory(int(80.0 * GIB), int(64.0 * GIB), None)
CPU = MachineMemory(None, int(64.0 * GIB), None)
STREAMED: dict[str, object] = {
    "enable_group_offload": True,
    "group_offload_resident_blocks": 0,
    "group_offload_use_stream": False,
}


def plan(machine: MachineMemory = CARD, work: Workload | None = None, **options: object) -> MemoryPlan:
    config = RunConfig.model_validate({"model_flavour": "tiny", **options})
    work = work or Workload((512, 512), config.train_batch_size)
    return Footprint(config, Architecture.of(config), work, machine).plan()


def phase(name: str, machine: MachineMemory = CARD, work: Workload | None = None, **options: object) -> PhasePlan:
    found = plan(machine, work, **options).phase(name)  # type: ignore[arg-type]
    assert found is not None
    return found


def part(where: PhasePlan, name: str, place: MemoryTier = "accelerator") -> int:
    return sum(each.size for each in where.parts if each.name == name and each.place == place)


# Weights


@pytest.mark.parametrize(
    ("spec", "count"), [(DEV, 32_223_281_152), (KLEIN_9B, 9_078_581_248), (KLEIN_4B, 3_875_544_576)]
)
def test_published_models_have_as_many_parameters_as_they_have(spec: TransformerSpec, count: int) -> None:
    assert transformer_bytes(spec, "no_change", torch.bfloat16).total == 2 * count


def test_a_base_that_stays_in_its_files_fp8_takes_what_the_published_file_takes() -> None:
    """flux-2-klein-4b-fp8.safetensors, 4,070,624,520 bytes: all Linears of blocks in fp8, everything else in bf16. A
    row has a scale of its own here."""
    blocks = {
        name: each
        for name, each in empty_transformer(KLEIN_4B).named_modules()
        if "blocks." in name and isinstance(each, nn.Linear)
    }
    held = tuple((name, "fp8wo-torchao") for name in blocks)
    scales = 4 * sum(each.out_features for each in blocks.values())
    found = transformer_bytes(KLEIN_4B, "no_change", torch.bfloat16, 1, held)
    assert found.total - scales == pytest.approx(4_070_624_520, abs=40_000)
    assert found == transformer_bytes(KLEIN_4B, "fp8wo-torchao", torch.bfloat16)


@pytest.mark.parametrize("kind", ["fp8", "nvfp4"])
def test_a_quantized_base_is_planned_as_it_is_held(kind: str, tiny_folder: Path, tmp_path: Path) -> None:
    """What a precision of ours holds stays; the rest is decoded, and lies in no mapped file."""
    tensors = load_file(tiny_folder / "transformer/diffusion_pytorch_model.safetensors")
    file = tmp_path / "quantized.safetensors"
    write_quantized(file, tensors, kind)
    own = {"model_flavour": "tiny", "pretrained_transformer_model_name_or_path": str(file)}
    plain, fp8 = (transformer_bytes(TINY, name, torch.bfloat16).total for name in ("no_change", "fp8wo-torchao"))
    assert part(phase("train", **own), "weights") == (fp8 if kind == "fp8" else plain)
    assert part(phase("train", **own, base_model_precision="int8-torchao"), "weights") == fp8
    assert part(phase("train", **own, model_type="full"), "weights") == plain
    streamed = STREAMED | {"group_offload_to_disk_path": str(tmp_path), "gradient_checkpointing": True}
    assert part(phase("train", **own, **streamed), "streamed blocks", "ram") > 0
    assert part(phase("train", model_flavour="tiny", **streamed), "streamed blocks", "ram") == 0


@pytest.mark.parametrize("name", ["dev", "klein-9b", "klein-4b"])
def test_a_summary_counts_the_parameters_of_its_shapes(name: FlavourName) -> None:
    count = transformer_bytes(FLAVOURS[name].transformer, "no_change", torch.bfloat16).total / 2
    assert f"({count / 1e9:.3g} B parameters" in FLAVOURS[name].summary


@pytest.mark.parametrize("name", ["klein-9b", "klein-4b", "tiny-klein"])
def test_klein_md_counts_the_parameters_of_its_shapes(name: FlavourName) -> None:
    count = transformer_bytes(FLAVOURS[name].transformer, "no_change", torch.bfloat16).total / 2
    (row,) = re.findall(rf"^\| `{name}`.*", KLEIN_PAGE, re.MULTILINE)
    assert (f"{count / 1e9:.3g} B" if count >= 1e9 else f"{count / 1e6:.1f} M") in row


@pytest.mark.parametrize(("name", "megabytes"), [("klein-9b", 12.6), ("klein-4b", 7.9)])
def test_klein_md_says_how_large_a_caption_is(name: FlavourName, megabytes: float) -> None:
    text = FLAVOURS[name].text
    size = text.length * len(text.layers) * text.encoder.hidden * torch.bfloat16.itemsize
    assert round(size / 1e6, 1) == megabytes
    assert f"{megabytes} MB" in KLEIN_PAGE


def test_the_text_encoder_has_the_parameters_of_transformers_own() -> None:
    embedding, layer = text_bytes(DEV_TEXT, "no_change", torch.bfloat16)
    assert embedding + 30 * layer == 2 * 17_343_754_240
    from transformers import AutoModel, MistralConfig

    with torch.device("meta"):
        model = AutoModel.from_config(MistralConfig(**{**TEXT_CONFIG, "num_hidden_layers": 3}))
    embedding, layer = text_bytes(text_from_config(TEXT_CONFIG), "no_change", torch.float32)
    final_norm = TEXT_CONFIG["hidden_size"]
    assert embedding + 3 * layer == 4 * (sum(p.numel() for p in model.parameters()) - final_norm)


@pytest.mark.parametrize("config", [{}, VAE, {**VAE, "block_out_channels": [8, 16, 16], "layers_per_block": 3}])
def test_the_autoencoder_has_the_parameters_of_diffusers_own(config: dict[str, object]) -> None:
    from diffusers import AutoencoderKLFlux2

    if config:
        levels = len(config["block_out_channels"])  # type: ignore[arg-type]
        config = {**config, "down_block_types": ["DownEncoderBlock2D"] * levels}
        config["up_block_types"] = ["UpDecoderBlock2D"] * levels
    with torch.device("meta"):
        vae = AutoencoderKLFlux2.from_config(config)
    spec = autoencoder_from_config(config)
    halves = (
        (encoder_shapes(spec), (vae.encoder, vae.quant_conv)),
        (decoder_shapes(spec), (vae.decoder, vae.post_quant_conv)),
    )
    for shapes, parts in halves:
        counts = [parameter.numel() for part in parts for parameter in part.parameters()]
        assert autoencoder_bytes(shapes, torch.float32) == (4 * sum(counts), 4 * max(counts))


@pytest.mark.parametrize("target", others_slow(["all", "attention", "mlp", "tiny"], "all"))
def test_adapters_take_what_attached_ones_do(target: str) -> None:
    options = {"flux_lora_target": target, "lora_rank": 8}
    with torch.device("meta"):
        adapter = attach(type(empty_transformer(TINY))(TINY), LoraOptions(**options), seed=0)  # type: ignore[arg-type]
    audit = adapter.audit()
    assert part(phase("train", **options), "adapters") == audit["bytes"]
    per_number = known_optimizer("adamw").state_bytes
    assert part(phase("train", **options), "optimizer") == audit["parameters"] * per_number


@pytest.mark.parametrize("precision", ["int8-quanto", "int4-quanto", "int2-quanto", "nf4-bnb"])
def test_quantized_blocks_are_smaller_and_the_rest_is_not(precision: str) -> None:
    plain = transformer_bytes(DEV, "no_change", torch.bfloat16)
    packed = transformer_bytes(DEV, precision, torch.bfloat16)
    assert packed.outside_blocks == plain.outside_blocks
    bits = {"int8": 8, "int4": 4, "int2": 2, "nf4-": 4}[precision[:4]]
    payload = sum(plain.blocks) * bits / 16
    assert payload < sum(packed.blocks) < payload * 1.15


def test_an_unquantized_matrix_is_its_numbers() -> None:
    assert stored_bytes((6, 128), "no_change", 2) == 6 * 128 * 2
    assert 6 * 128 < stored_bytes((6, 128), "int8-quanto", 2) <= 6 * 128 + 6 * 4


# Activations beside the transformer's


@pytest.mark.parametrize(("side", "batch"), [(256, 1), (512, 2)])
def test_the_autoencoders_activations_are_those_of_its_code(side: int, batch: int) -> None:
    from diffusers import AutoencoderKLFlux2

    spec = AutoencoderSpec()
    with on_meta_device(torch.bfloat16):
        vae = AutoencoderKLFlux2().eval()
        weights = [*vae.parameters(), *vae.buffers()]
        encoding = trace_forward(
            lambda x: [vae.encode(x).latent_dist.mode()], lambda: [torch.empty(batch, 3, side, side)], weights
        )
        latents = [torch.empty(batch, 32, side // 8, side // 8)]
        decoding = trace_forward(lambda x: [vae.decode(x).sample], lambda: latents, weights)
    pixels = batch * side * side
    assert encoding_bytes(spec, pixels, torch.bfloat16) == pytest.approx(encoding, rel=0.03)
    # On the meta device the middle attends with a table of all pairs, smaller than what follows.
    assert decoding_bytes(spec, pixels, torch.bfloat16) == pytest.approx(decoding, rel=0.03)


def test_the_text_encoders_activations_are_those_of_its_code() -> None:
    from transformers import AutoModel, MistralConfig

    batch, tokens = 2, 300
    with on_meta_device(torch.float32):
        config = MistralConfig(**{**TEXT_CONFIG, "num_hidden_layers": 2, "intermediate_size": 512})
        model = AutoModel.from_config(config, attn_implementation="sdpa").eval()
        x = torch.empty(batch, tokens, 64)

        def run(stream: torch.Tensor) -> list[torch.Tensor]:
            layer = model.layers[0]
            return [layer.mlp(layer.post_attention_layernorm(stream)) + stream]

        measured = trace_forward(run, lambda: [x], [*model.parameters(), *model.buffers()])
    planned = text_activation_bytes(
        text_from_config({**TEXT_CONFIG, "intermediate_size": 512}), batch * tokens, 0, x.dtype
    )
    assert planned == pytest.approx(measured + x.nbytes, rel=0.1)


# Options

SMALLER = [
    ("train", {"gradient_checkpointing": False}, {"gradient_checkpointing": True}),
    ("train", {"gradient_checkpointing_interval": 2}, {"gradient_checkpointing_interval": 4}),
    ("train", {"gradient_checkpointing_interval": 2}, {}),
    ("train", {}, {"activation_offload": True}),
    ("train", {"train_batch_size": 2}, {"train_batch_size": 1}),
    ("train", {"lora_rank": 32}, {"lora_rank": 16}),
    ("train", {"flux_lora_target": "all"}, {"flux_lora_target": "tiny"}),
    ("train", {"optimizer": "prodigy"}, {"optimizer": "adamw"}),
    ("train", {"optimizer": "adamw"}, {"optimizer": "adamw_bf16"}),
    ("train", {"mixed_precision": "no"}, {"mixed_precision": "bf16"}),
    ("train", {"base_model_default_dtype": "fp32"}, {"base_model_default_dtype": "bf16"}),
    ("train", {"mixed_precision": "fp16"}, {"mixed_precision": "bf16"}),
    ("train", {"mixed_precision": "fp16", "base_model_default_dtype": "bf16"}, {"mixed_precision": "fp16"}),
    ("train", {}, STREAMED),
    ("train", STREAMED | {"group_offload_resident_blocks": 3}, STREAMED),
    ("train", STREAMED | {"group_offload_use_stream": True}, STREAMED),
    ("train", STREAMED | {"group_offload_use_stream": "auto"}, STREAMED),
    ("train", STREAMED | {"group_offload_blocks_per_group": 2}, STREAMED),
    ("train", STREAMED, STREAMED | {"group_offload_type": "leaf_level"}),
    ("train", {"use_ema": True}, {"use_ema": True, "ema_device": "cpu"}),
    (
        "train",
        {"model_type": "full", "use_ema": True, "ema_device": "accelerator"},
        {"model_type": "full", "use_ema": True},
    ),
    (
        "train",
        {},
        {"tread_config": {"routes": [{"selection_ratio": 0.5, "start_layer_idx": 0, "end_layer_idx": -1}]}},
    ),
    ("train", {"model_type": "full"}, {"model_type": "lora"}),
    ("train", {"model_type": "full"}, {"model_type": "full", "optimizer": "adamw_bf16"}),
    ("train", {"model_type": "full", "gradient_accumulation_steps": 2}, {"model_type": "full"}),
    ("train", {}, {"offload_during_startup": True}),
    ("validation", {"validation_resolution": "1024x1024"}, {"validation_resolution": "512x512"}),
    (
        "validation",
        {"validation_resolution": "2048x2048"},
        {"validation_resolution": "2048x2048", "vae_enable_tiling": True},
    ),
    (
        "validation",
        {"validation_resolution": "512x512"},
        {"validation_resolution": "512x512", "group_offload_vae": True},
    ),
    ("validation", {"validation_resolution": "512,1024"}, {"validation_resolution": "512,768"}),
    ("validation", {"use_ema": True}, {"use_ema": True, "ema_validation": "none"}),
    ("validation", {"optimizer": "adamw_schedulefree"}, {"optimizer": "adamw"}),
    ("latents", {"vae_batch_size": 4}, {"vae_batch_size": 1}),
    ("latents", {"vae_batch_size": 4}, {"vae_batch_size": 4, "vae_enable_slicing": True}),
    ("latents", {"vae_dtype": "fp32"}, {"vae_dtype": "bf16"}),
    ("latents", {}, {"vae_enable_tiling": True}),
    ("latents", {}, {"group_offload_vae": True}),
    ("text", {"text_encoder_mode": "resident"}, {"text_encoder_mode": "streamed"}),
    ("text", {"text_encoder_mode": "resident"}, {"group_offload_text_encoder": True}),
    ("text", {"text_encoder_batch_size": 8}, {"text_encoder_batch_size": 1}),
    ("text", {"tokenizer_max_length": 512}, {"tokenizer_max_length": 128}),
]


@pytest.mark.parametrize(
    ("name", "more", "less"),
    [  # a plan for training traces the blocks
        pytest.param(*case, marks=pytest.mark.slow) if case[0] == "train" and index % 2 else case
        for index, case in enumerate(SMALLER)
    ],
)
def test_options_take_memory_off_the_accelerator(name: str, more: dict[str, object], less: dict[str, object]) -> None:
    before, after = phase(name, **more), phase(name, **less)
    assert after.total("accelerator") < before.total("accelerator")


@pytest.mark.parametrize(
    ("name", "less", "more"),
    [
        ("train", {}, STREAMED),
        ("train", {}, {"activation_offload": True}),
        ("train", {"use_ema": True}, {"use_ema": True, "ema_device": "cpu"}),
        ("train", {"model_type": "full"}, {"model_type": "full", "use_ema": True}),
        ("text", {"text_encoder_mode": "resident"}, {"text_encoder_mode": "streamed"}),
        ("latents", {}, {"group_offload_vae": True}),
        ("train", STREAMED | {"group_offload_to_disk_path": "blocks"}, STREAMED),
    ],
)
def test_what_leaves_the_accelerator_is_in_memory(name: str, less: dict[str, object], more: dict[str, object]) -> None:
    assert phase(name, **more).total("ram") > phase(name, **less).total("ram")


@pytest.mark.parametrize("precision", ["int8-quanto", "int4-quanto"])
def test_precisions_of_dev(precision: str) -> None:
    dev = {"model_flavour": "dev"}
    plain, packed = phase("train", **dev), phase("train", **dev, base_model_precision=precision)
    assert packed.total("accelerator") < plain.total("accelerator")
    assert part(packed, "workspace") > part(plain, "workspace")
    key = {"text_encoder_mode": "resident"}
    text = phase("text", **dev, **key), phase("text", **dev, **key, text_encoder_1_precision=precision)
    assert text[1].total("accelerator") < text[0].total("accelerator")


def test_a_resolution_costs_its_tokens() -> None:
    small, large = (phase("train", work=Workload((side, side), 1)) for side in (512, 1024))
    assert part(large, "activations") > 2 * part(small, "activations")
    assert part(large, "weights") == part(small, "weights")


def test_routes_are_planned_with_the_tokens_that_masks_force() -> None:
    def activations(forced_share: float, **options: object) -> int:
        return part(phase("train", work=Workload((512, 512), 1, forced_share=forced_share), **options), "activations")

    route = {"selection_ratio": 0.25, "start_layer_idx": 1, "end_layer_idx": -2}
    options: dict[str, object] = {"gradient_checkpointing": False, "tread_config": {"routes": [route]}}
    none, few, many, all_ = (activations(share, **options) for share in (0.0, 0.2, 0.6, 1.0))
    assert none == few < many < all_ == activations(0.0, gradient_checkpointing=False)


def test_a_full_models_parts() -> None:
    count = sum(parameter.numel() for parameter in empty_transformer(TINY).parameters())
    found = phase("train", model_type="full")
    assert part(found, "weights") == 2 * count
    assert part(found, "masters") == part(found, "optimizer") / 2 == 4 * count
    assert part(found, "single file", "disk") == 4 * count
    halved = phase("train", model_type="full", model_save_dtype="bf16", use_ema=True)
    assert part(halved, "single file", "disk") == 2 * 2 * count
    assert part(phase("train"), "single file", "disk") == 0
    whole = phase("train", model_type="full", mixed_precision="no")
    assert part(whole, "weights") == 4 * count
    assert part(whole, "masters") == 0


RELEASED = {"model_type": "full", "optimizer": "adafactor", "max_grad_norm": 0, "optimizer_release_gradients": True}


def test_released_gradients_are_those_of_one_parameter_at_a_time() -> None:
    count = sum(parameter.numel() for parameter in empty_transformer(TINY).parameters())
    ordinary, released = (phase("train", **RELEASED | {"optimizer_release_gradients": on}) for on in (False, True))
    assert part(ordinary, "masters") == 4 * count
    assert (part(released, "masters"), part(released, "gradients")) == (0, 0)
    shapes = [weight.shape for weight in empty_transformer(TINY).parameters()]
    state = 4 * sum(sum(shape) if len(shape) == 2 else shape.numel() for shape in shapes)
    assert part(released, "optimizer") == part(ordinary, "optimizer") == state


def test_klein_9b_is_trained_whole_within_22_5_gib() -> None:
    """With a card's usual reserve; AdamW's state alone would be 68 GiB."""
    work = Workload((1024, 1024), 1, samples_images=True)
    found = plan(MachineMemory.of_size(22.5 * GIB, 64.0 * GIB), work, model_flavour="klein-9b", **RELEASED)
    assert [lack for lack in found.lacks if lack.place != "disk"] == []
    assert found.peak("accelerator") < 20 * GIB


def test_without_an_accelerator_everything_is_in_memory() -> None:
    there, here = plan(CARD), plan(CPU)
    assert here.peak("accelerator") == 0
    assert there.peak("accelerator") <= here.peak("ram")
    both = phase("train", CPU, enable_group_offload=True), phase("train", CPU)
    assert part(both[0], "streamed blocks", "ram") + part(both[0], "weights", "ram") == part(both[1], "weights", "ram")


@pytest.mark.parametrize("resident", [0, 3, 8, 99])
def test_resident_blocks_are_counted_as_weights_and_wait_nowhere(resident: int) -> None:
    whole, streamed = phase("train"), phase("train", **STREAMED | {"group_offload_resident_blocks": resident})
    weights = transformer_bytes(TINY, "no_change", torch.bfloat16)
    stay = [weights.blocks[index] for index in resident_indices(TINY, resident)]
    assert part(streamed, "resident blocks") == sum(stay)
    assert part(streamed, "streamed blocks", "ram") == sum(weights.blocks) - sum(stay)
    assert part(streamed, "weights") + part(streamed, "resident blocks") <= part(whole, "weights")
    assert streamed.what.endswith(f", {min(resident, 8)} of 8 blocks resident")
    assert (streamed.total("accelerator") == whole.total("accelerator")) == (resident >= 8)


def test_groups_are_as_large_as_the_streamed_blocks_in_them() -> None:
    blocks = transformer_bytes(TINY, "no_change", torch.bfloat16).blocks
    by_three = STREAMED | {"group_offload_blocks_per_group": 3}
    assert part(phase("train", **by_three), "slots for blocks") == sum(blocks[:3])
    # The double blocks stay, and what is left is one group of three single blocks, then one of one.
    left = by_three | {"group_offload_resident_blocks": 4, "group_offload_use_stream": True}
    assert len(blocks) == 8
    assert part(phase("train", **left), "slots for blocks") == 2 * 3 * blocks[-1]


def test_auto_keeps_as_many_blocks_as_there_is_room_for() -> None:
    auto = {"model_flavour": "dev", "base_model_precision": "int8-quanto", "enable_group_offload": True}
    work = Workload((1024, 1024), 1, samples_images=False)
    counts = []
    for card in (8.0, 12.0, 16.0, 24.0, 32.0, 80.0):
        machine = MachineMemory.of_size(card * GIB, 64.0 * GIB)
        assert machine.accelerator is not None
        train = phase("train", machine, work, **auto)
        foot = Footprint(
            config := RunConfig.model_validate(auto), architecture := Architecture.of(config), work, machine
        )
        count = foot.resolved_config.resident_blocks
        assert count is not None
        assert f"{count} of 56 blocks resident" in train.what
        counts.append(count)
        if count > 0:
            assert train.total("accelerator") <= plannable_bytes(machine.accelerator)
        if count < 56:
            one_more = foot.resolved_config.model_copy(update={"group_offload_resident_blocks": str(count + 1)})
            more = Footprint(one_more, architecture, work, machine).train()
            assert more.total("accelerator") > plannable_bytes(machine.accelerator)
    assert counts == sorted(counts)
    assert counts[0] == 0
    assert 0 < counts[3] < counts[4] < counts[5] == 56


def test_auto_has_pictures_in_mind_too() -> None:
    auto = {"model_flavour": "dev", "base_model_precision": "int8-quanto", "enable_group_offload": True}
    machine = MachineMemory.of_size(24.0 * GIB, 64.0 * GIB)
    drawn = plan(machine, Workload((512, 512), 1), **auto, validation_resolution="2048x2048")
    plain = plan(machine, Workload((512, 512), 1, samples_images=False), **auto)
    assert plannable_bytes(int(22.5 * GIB)) >= drawn.peak("accelerator")
    train, alone = drawn.phase("train"), plain.phase("train")
    assert train is not None
    assert alone is not None
    assert part(train, "resident blocks") < part(alone, "resident blocks")


def test_auto_takes_one_slot_where_two_do_not_fit() -> None:
    work = Workload((512, 512), 1, samples_images=False)
    auto = {"model_flavour": "dev", "base_model_precision": "int4-quanto", "enable_group_offload": True}
    one, two = (
        phase("train", CARD, work, **auto, group_offload_resident_blocks=0, group_offload_use_stream=stream)
        for stream in (False, True)
    )
    assert part(two, "slots for blocks") == 2 * part(one, "slots for blocks")
    between = MachineMemory((one.total("accelerator") + two.total("accelerator")) // 2, int(64.0 * GIB), None)
    assert phase("train", between, work, **auto).parts == one.parts
    enough = MachineMemory(two.total("accelerator"), int(64.0 * GIB), None)
    assert phase("train", enough, work, **auto).parts == two.parts


def test_auto_streams_all_blocks_through_one_slot_on_a_cpu() -> None:
    explicit, auto = phase("train", CPU, **STREAMED), phase("train", CPU, enable_group_offload=True)
    assert auto == explicit
    assert "resident" not in auto.what
    three = phase("train", CPU, **STREAMED | {"group_offload_resident_blocks": 3})
    assert three.what.endswith(", 3 of 8 blocks resident")


def test_auto_streams_the_text_encoder_where_it_does_not_fit() -> None:
    dev = {"model_flavour": "dev"}
    assert phase("text", **dev).what.startswith("resident")
    assert phase("text", MachineMemory.of_size(24.0 * GIB, 32.0 * GIB), **dev).what.startswith("streamed")
    few = Workload((512, 512), 1, captions=1000, caption_tokens=120)
    many = Workload((512, 512), 1, captions=10_000, caption_tokens=120)
    key = {"text_encoder_mode": "streamed", **dev}
    assert phase("text", work=many, **key).read > 5 * phase("text", work=few, **key).read
    assert part(phase("text", work=many, **key), "states", "disk") > 0


def test_caches_are_what_a_tensor_takes() -> None:
    work = Workload((1024, 512), 1, cached_images=10, captions=20, caption_tokens=50)
    assert part(phase("latents", work=work), "cache", "disk") == 10 * 128 * 64 * 32 * 4
    assert part(phase("text", work=work), "cache", "disk") == 20 * 51 * 192 * 2


def test_nothing_is_drawn_without_prompts() -> None:
    assert plan(work=Workload((512, 512), 1, samples_images=False)).phase("validation") is None


# Where the numbers come from


def test_local_configs_win_over_the_flavours_numbers(tiny_folder: Path) -> None:
    config = RunConfig.model_validate({"pretrained_model_name_or_path": str(tiny_folder)})
    found = Architecture.of(config)
    assert found.transformer == TINY
    assert found.text.hidden == TEXT_CONFIG["hidden_size"]
    assert found.autoencoder == autoencoder_from_config(VAE)
    weights = tiny_folder / "transformer" / "diffusion_pytorch_model.safetensors"
    single = RunConfig.model_validate({"pretrained_transformer_model_name_or_path": str(weights)})
    assert Architecture.of(single).transformer == TINY
    assert Architecture.of(single).text == DEV_TEXT


def test_dev_is_planned_without_its_files() -> None:
    found = Architecture.of(RunConfig.model_validate({}))
    assert (found.transformer, found.text, found.autoencoder) == (DEV, DEV_TEXT, AutoencoderSpec())


def test_a_folder_of_another_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text_encoder").mkdir()
    (tmp_path / "text_encoder" / "config.json").write_text(json.dumps({"hidden_size": 8}))
    config = RunConfig.model_validate({"pretrained_model_name_or_path": str(tmp_path)})
    with pytest.raises(AccessError, match=r"vocab_size"):
        Architecture.of(config)


def test_the_download_of_a_flavour_is_what_its_phases_read() -> None:
    for flavour in FLAVOURS.values():
        if flavour.repo is None:
            assert not flavour.downloads
            continue
        found = plan(model_flavour=flavour.name)
        read = {each.phase: each.read for each in found.phases}
        assert flavour.downloads["text_encoder"] == pytest.approx(read["text"], rel=0.01)
        assert flavour.downloads["transformer"] == pytest.approx(read["train"], rel=0.01)
        assert flavour.downloads["vae"] == pytest.approx(read["latents"] + read["validation"], rel=0.1)


# Guidance


def test_both_predictions_of_guidance_share_a_pass_where_training_takes_that_much_anyway() -> None:
    work = Workload((1024, 1024), 4)
    klein: dict[str, object] = {
        "model_flavour": "tiny-klein",
        "validation_resolution": "512",
        "validation_num_inference_steps": 3,
    }
    for machine, options, what in (
        (CARD, {}, "512x512, 3 passes of two"),
        (CARD, {"num_processes": 2, "fsdp_enable": True}, "512x512, 3 passes of two"),
        (CPU, {}, "512x512, 6 passes"),
        (CARD, {"validation_guidance": 1.0}, "512x512, 3 passes"),
        (CARD, {"model_flavour": "tiny-klein-distilled", "validation_guidance": 4.0}, "512x512, 3 passes"),
        (CARD, {"model_flavour": "tiny", "validation_guidance_real": 2.0}, "512x512, 3 passes of two"),
    ):
        assert phase("validation", machine, work, **klein | options).what == what

    both = phase("validation", CARD, work, **klein)
    one = phase("validation", CARD, work, **klein | {"validation_guidance": 1.0})
    assert part(both, "batch") == 2 * part(one, "batch") - (64 + 1024) * 32 * 4
    train = phase("train", CARD, work, **klein)
    assert one.total("accelerator") < both.total("accelerator") <= train.total("accelerator")
    assert phase("validation", CARD, Workload((64, 64), 1), **klein).what == "512x512, 6 passes"


def test_a_shared_pass_takes_no_resident_block() -> None:
    auto: dict[str, object] = {
        "model_flavour": "klein-9b",
        "enable_group_offload": True,
        "group_offload_use_stream": True,
        "validation_resolution": "1024",
    }
    small = MachineMemory(int(12 * GIB), CARD.ram, None)
    guided, plain = (plan(small, **auto, validation_guidance=guidance) for guidance in (4.0, 1.0))
    assert guided.phase("train") == plain.phase("train")


# Several processes

LORA = {"model_flavour": "dev", "mixed_precision": "bf16"}
FULL = {**LORA, "model_type": "full"}
DEV_BLOCKS = 62_813_929_472
"""Bytes of dev's 56 blocks in bf16."""
DEV_REST = 2 * 32_223_281_152 - DEV_BLOCKS


def footprint(machine: MachineMemory = CARD, **options: object) -> Footprint:
    config = RunConfig.model_validate(options)
    return Footprint(config, Architecture.of(config), Workload((1024, 1024), 1, samples_images=False), machine)


def test_one_process_has_the_plan_that_it_had() -> None:
    plain = footprint(**LORA).plan()
    assert (plain.processes, plain.engine, plain.wire) == (1, "single", None)
    for options in ({"num_processes": 1}, {"num_processes": 1, "fsdp_enable": True, "fsdp_cpu_offload": True}):
        assert footprint(**LORA, **options).plan() == plain
    assert "bucket" not in " ".join(each.name for phase in plain.phases for each in phase.parts)


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_copies_take_what_one_process_takes_and_the_bucket(ranks: int) -> None:
    alone, copies = footprint(**LORA).train(), footprint(**LORA, num_processes=ranks).train()
    assert copies.total("accelerator") == alone.total("accelerator") + 64 * 2**20
    assert copies.total("ram") == ranks * alone.total("ram")
    assert copies.total("disk") == alone.total("disk")


@pytest.mark.parametrize("ranks", [2, 3, 4, 8])
def test_the_base_falls_as_one_by_ranks(ranks: int) -> None:
    sharded = footprint(**LORA, num_processes=ranks, fsdp_enable=True).train()
    shards = part(sharded, "shards of weights")
    whole = DEV_BLOCKS + DEV_REST
    assert whole / ranks <= shards <= whole / ranks * 1.001  # rows are rounded up
    assert ranks == 3 or shards * ranks == whole
    largest = max(transformer_bytes(DEV, "no_change", torch.bfloat16).blocks)
    assert part(sharded, "gathered weights") == DEV_REST + 2 * largest
    alone = footprint(**LORA).train()
    for name in ("adapters", "optimizer", "activations", "workspace", "batch"):
        assert part(sharded, name) == part(alone, name)


@pytest.mark.parametrize("ranks", [2, 4, 8])
@pytest.mark.parametrize("precision", ["no_change", "int8-quanto"])
def test_what_a_sharded_base_sends(ranks: int, precision: str) -> None:
    options = {**LORA, "base_model_precision": precision, "num_processes": ranks}
    adapters = 4 * footprint(**options).trainable_parameters
    wire = footprint(**options).wire
    assert wire is not None
    assert (wire.gathered, wire.reduced) == (0, 2 * ((ranks - 1) * adapters // ranks))
    blocks = sum(transformer_bytes(DEV, precision, torch.bfloat16).blocks)
    for accumulation, resharded, gathers in ((1, True, 2), (3, True, 2), (3, False, 1)):
        sharded = footprint(
            **options,
            fsdp_enable=True,
            gradient_accumulation_steps=accumulation,
            fsdp_reshard_after_forward=resharded,
        ).wire
        assert sharded is not None
        assert sharded.gathered == accumulation * ((ranks - 1) * (gathers * blocks + DEV_REST) // ranks)
        assert sharded.reduced == wire.reduced
    assert wire.seconds()["NVLink"] == wire.total / 450e9


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_full_training_shards_all_that_belongs_to_a_weight(ranks: int) -> None:
    options = {**FULL, "use_ema": True, "ema_device": "accelerator"}
    alone, sharded = footprint(**options).train(), footprint(**options, num_processes=ranks, fsdp_enable=True)
    own = sharded.train()
    for name in ("masters", "optimizer", "average"):
        assert part(own, name) == pytest.approx(part(alone, name) / ranks, rel=1e-6), name
    every = 4 * 32_223_281_152 // ranks
    assert 0.9 * every < part(own, "gradients") <= every, "those that are there at the worst moment"
    assert part(own, "shards of weights") == 0, "masters are gathered as bf16"
    assert part(own, "reduction bucket") == 2 * max(transformer_bytes(DEV, "no_change", torch.bfloat16).blocks)
    bare = footprint(**{**options, "optimizer": "adamw_bf16"}, num_processes=ranks, fsdp_enable=True).train()
    assert part(bare, "masters") == 0
    assert part(bare, "shards of weights") == 2 * 32_223_281_152 // ranks
    away = footprint(**options, num_processes=ranks, fsdp_enable=True, fsdp_cpu_offload=True).train()
    for name in ("masters", "optimizer", "average", "gradients"):
        assert (part(away, name), part(away, name, "ram")) == (0, ranks * part(own, name)), name
    wire = sharded.wire
    assert wire is not None
    assert wire.reduced == (ranks - 1) * 4 * 32_223_281_152 // ranks
    assert wire.gathered == (ranks - 1) * (2 * DEV_BLOCKS + DEV_REST) // ranks


def test_shards_may_lie_in_ram_and_whole_blocks_may_stay() -> None:
    options = {**LORA, "num_processes": 4, "fsdp_enable": True}
    plain, away = footprint(**options).train(), footprint(**options, fsdp_cpu_offload=True).train()
    shards = part(plain, "shards of weights")
    assert part(away, "shards of weights") == 0
    assert part(away, "shards of weights", "ram") == 4 * shards
    assert plain.total("accelerator") - away.total("accelerator") == shards
    staying = footprint(**options, fsdp_reshard_after_forward=False).train()
    assert part(staying, "gathered weights") == DEV_BLOCKS + DEV_REST


def test_processes_share_out_captions_and_images_and_each_has_its_encoder() -> None:
    work = Workload((1024, 1024), 1, cached_images=3, captions=9, samples_images=False)
    options = {**LORA, "text_encoder_mode": "resident", "vae_batch_size": 4, "text_encoder_batch_size": 8}
    alone, three = plan(CARD, work, **options), plan(CARD, work, **options, num_processes=3)
    text = [found.phase("text") for found in (alone, three)]
    assert all(each is not None for each in text)
    assert [each.what for each in text if each] == ["resident, 8 × 512 tokens", "resident, 3 × 512 tokens"]
    assert [part(each, "weights") for each in text if each] == [part(text[0], "weights")] * 2  # type: ignore[arg-type]
    latents = [found.phase("latents") for found in (alone, three)]
    assert [each.what for each in latents if each] == ["1024x1024 × 3", "1024x1024 × 1"]
    assert [each.total("disk") for each in latents if each] == [alone.phases[1].total("disk")] * 2


def test_on_a_machine_without_an_accelerator_all_processes_share_its_ram() -> None:
    alone, two = footprint(CPU).train(), footprint(CPU, num_processes=2).train()
    bucket = part(two, "reduction bucket", "ram")
    assert two.total("ram") == 2 * alone.total("ram") + bucket > 0


def test_the_memory_of_a_machine_is_that_of_its_own_processes() -> None:
    options = {**LORA, "num_processes": 16}
    one, four = footprint(**options).plan(), footprint(**options, num_machines=4).plan()
    assert (one.machines, four.machines) == (1, 4)
    for here, there in zip(one.phases, four.phases, strict=True):
        assert here.total("accelerator") == there.total("accelerator")
        assert here.total("disk") == there.total("disk"), "each machine has its own caches"
    assert one.phases[2].total("ram") == 4 * four.phases[2].total("ram")
    assert one.wire is not None
    assert four.wire is not None
    assert one.wire.total == four.wire.total
    assert four.wire.seconds().keys() != one.wire.seconds().keys()


def zero(stage: int, ranks: int, settings: dict[str, object] | None = None, **options: object) -> Footprint:
    """With a stage of ZeRO and small buckets, and `settings` beside them."""
    zero_optimization = {"stage": stage, "reduce_bucket_size": 1000, **(settings or {})}
    return footprint(**options, num_processes=ranks, deepspeed_config={"zero_optimization": zero_optimization})


def test_one_process_has_no_stage() -> None:
    assert zero(3, 1, **LORA).plan() == footprint(**LORA).plan()


@pytest.mark.parametrize("ranks", [2, 8])
def test_each_stage_shares_more(ranks: int) -> None:
    alone = footprint(**FULL)
    parameters, trained = alone.trainable_parameters, part(alone.train(), "masters")
    stages = [zero(stage, ranks, **FULL) for stage in (1, 2, 3)]
    assert [each.engine for each in stages] == ["zero1", "zero2", "zero3"]
    for each in stages:
        train = each.train()
        assert part(train, "masters") == -(-trained // ranks)
        assert part(train, "optimizer") == -(-part(alone.train(), "optimizer") // ranks)
        assert part(train, "reduction bucket") == 2 * 1000
    first, second, third = (each.train() for each in stages)
    # In bf16 as they are computed, and in fp32 those of the share that the optimizer steps on.
    assert part(first, "gradients") == 2 * parameters + -(-4 * parameters // ranks)
    assert part(first, "weights") == part(second, "weights") == 2 * parameters
    assert first.total("accelerator") > second.total("accelerator") > third.total("accelerator")
    assert part(third, "shards of weights") <= 2 * parameters / ranks * 1.001
    largest = max(transformer_bytes(DEV, "no_change", torch.bfloat16).largest_layers)
    assert part(third, "gathered weights") == 1_050_000_000 * 2 + largest


def test_a_lora_shares_its_state_and_at_stage_3_the_base() -> None:
    alone = footprint(**LORA).train()
    second, third = zero(2, 4, use_ema=True, **LORA).train(), zero(3, 4, **LORA).train()
    adapters = part(alone, "adapters")
    assert (part(second, "adapters"), part(second, "masters")) == (adapters, adapters // 4)
    assert part(second, "average") == adapters // 4
    assert part(third, "adapters") == adapters // 4
    assert "masters" not in {each.name for each in third.parts}, "fp32 shares are stepped in place"
    settings: dict[str, object] = {"stage3_max_live_parameters": 0, "stage3_prefetch_bucket_size": 0}
    small = zero(3, 4, settings, **LORA).train()
    largest = max(transformer_bytes(DEV, "no_change", torch.bfloat16).largest_layers)
    assert part(small, "gathered weights") == largest


def test_what_is_offloaded_is_in_the_memory_of_the_machine() -> None:
    settings: dict[str, object] = {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}
    there, here = zero(3, 8, settings, **FULL, num_machines=2).train(), zero(3, 8, **FULL).train()
    for name in ("masters", "optimizer", "shards of weights"):
        (own,) = [each for each in there.parts if each.name == name]
        assert (own.place, own.size) == ("ram", 4 * part(here, name))


def test_a_quantized_base_is_loaded_whole_at_stage_3() -> None:
    train = zero(3, 4, **LORA, base_model_precision="int8-quanto").train()
    whole = transformer_bytes(DEV, "int8-quanto", torch.bfloat16).total
    assert part(train, "weights while loading", "ram") == 4 * whole


@pytest.mark.parametrize("kind", [LORA, FULL])
@pytest.mark.parametrize("ranks", [2, 8])
def test_what_the_stages_send(kind: dict[str, object], ranks: int) -> None:
    alone = footprint(**kind)
    gradients = alone.trainable_parameters * (2 if kind is FULL else 4)
    share = (ranks - 1) * gradients // ranks
    for accumulation in (1, 3):
        wires = [zero(stage, ranks, **kind, gradient_accumulation_steps=accumulation).wire for stage in (1, 2, 3)]
        assert [None if each is None else each.reduced for each in wires] == [
            2 * share,
            accumulation * 2 * share,
            accumulation * share,
        ]
        whole = 2 * (DEV_BLOCKS + DEV_REST) if kind is FULL else 2 * (DEV_BLOCKS + gradients) + DEV_REST
        gathered = (share, share, accumulation * ((ranks - 1) * whole // ranks))
        assert tuple(0 if each is None else each.gathered for each in wires) == gathered
