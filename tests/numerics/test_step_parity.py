"""A whole step, from picture and caption files to gradients, against diffusers and PEFT alone, in fp32."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.recipes.conftest import CONFIG, Workplace

from simpletuner.config.load import load
from simpletuner.data.batch import GlobalBatch
from simpletuner.data.cache.latents import read_latent
from simpletuner.data.order import MicroBatch, Order, Visit
from simpletuner.data.pixels import render
from simpletuner.flux2.denoiser import Denoiser
from simpletuner.flux2.load import load_autoencoder, load_text_encoder, load_transformer
from simpletuner.flux2.lora import Adapter, attach
from simpletuner.flux2.source import Source, locate
from simpletuner.memory.world import World
from simpletuner.train import optim
from simpletuner.train.batches import BatchBuilder
from simpletuner.train.caches import PreparedData, prepare
from simpletuner.train.report import Reporter
from simpletuner.train.step import Objective, Stepper

CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=["tiny", "tiny-klein"])
def place(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, pictures: Path) -> Workplace:
    folder = tmp_path_factory.mktemp("step-parity")
    images = shutil.copytree(pictures, folder / "datasets" / "pictures")
    for index, caption in enumerate(sorted(images.glob("*.txt"))):  # the lengths of a batch differ
        caption.write_text("a soft gradient, " + "with more words " * (index % 3))
    model = request.getfixturevalue(f"{request.param.replace('-', '_')}_folder")
    config = CONFIG | {
        "model_flavour": request.param,
        "pretrained_model_name_or_path": str(model),
        "caption_dropout_probability": 0.0,
    }
    if request.param == "tiny":
        config |= {"tokenizer_max_length": 512, "flux_guidance_value": 3.5}
    place = Workplace(folder, config)
    place.write()
    return place


@pytest.fixture(scope="module")
def prepared(place: Workplace) -> tuple[PreparedData, Source]:
    loaded = load([], folder=place.folder, environ={})
    source = locate(loaded.config, report=print)
    return prepare(loaded, source, World(0, 1, CPU), Reporter()), source


@pytest.fixture(scope="module")
def pipeline(place: Workplace) -> Any:
    from diffusers import DiffusionPipeline

    return DiffusionPipeline.from_pretrained(place.config["pretrained_model_name_or_path"], dtype=torch.float32)


def assert_near(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


def pixels_of(sample: Any) -> torch.Tensor:
    return torch.from_numpy(render(sample.read(), sample.geometry)).permute(2, 0, 1)[None] / 127.5 - 1


def test_what_is_cached_is_what_the_encoders_give(prepared: tuple[PreparedData, Source]) -> None:
    """Bit for bit, with the batches of the fill: two captions, sorted by length, or two pictures of a bucket."""
    found, source = prepared
    (manifest,) = found.train
    encode = load_autoencoder(source, torch.float32, CPU).encode
    for indices in manifest.buckets.values():
        for start in range(0, len(indices), 2):
            batch = [manifest.samples[index] for index in indices[start : start + 2]]
            live = encode(torch.cat([pixels_of(sample) for sample in batch]))
            for sample, latent in zip(batch, live, strict=True):
                cached = read_latent(found.latent_store(manifest.image_set), sample, found.encoders.latents)
                assert torch.equal(cached, latent)
    encoder = load_text_encoder(source, torch.float32, CPU, fix_regex=False)
    prompts = sorted({"", *(caption for sample in manifest.samples for caption in sample.captions)})
    lengths = dict(zip(prompts, encoder.lengths(prompts), strict=True))
    prompts.sort(key=lambda prompt: (lengths[prompt], prompt))
    for start in range(0, len(prompts), 2):
        batch_of_prompts = prompts[start : start + 2]
        for prompt, live_context in zip(batch_of_prompts, encoder.encode(batch_of_prompts), strict=True):
            assert torch.equal(found.contexts([prompt]).expanded(), live_context.expanded())


def trainer_of(prepared: tuple[PreparedData, Source]) -> tuple[Adapter, Stepper, BatchBuilder]:
    """An adapter that acts, what computes its gradients, and what makes the batches."""
    found, source = prepared
    config = found.loaded.config
    ours = load_transformer(source, torch.float32, CPU)
    adapter = attach(ours, config, seed=0)
    for index, parameter in enumerate(adapter.parameters()):  # B starts at zero, and then A has no gradient
        parameter.data.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index)))
    stepper = Stepper(
        denoise=Denoiser(ours),
        parameters=adapter.parameters(),
        optimizer=optim.build(adapter.parameters(), config),
        options=config,
        objective=Objective.of(config, config, config.seed),
        scaler=torch.amp.GradScaler("cpu", enabled=False),
        device=CPU,
    )
    builder = BatchBuilder(
        config,
        found,
        Order(found.train, seed=config.seed, batch_size=2),
        stepper.objective,
        None,
        batches_per_step=1,
        world=World.single(),
    )
    return adapter, stepper, builder


def test_a_batch_of_two_is_two_batches_of_one(prepared: tuple[PreparedData, Source]) -> None:
    """Of prompts of different lengths; to 1e-5, since matrix products of another height may add in another order."""
    (manifest,) = prepared[0].train
    indices = max(manifest.buckets.values(), key=len)[:2]
    target = manifest.samples[indices[0]].geometry.target
    losses, gradients = [], []
    for sizes in ([2], [1, 1]):
        adapter, stepper, builder = trainer_of(prepared)
        starts = [sum(sizes[:place]) for place in range(len(sizes))]
        batches = [
            builder.batch(
                MicroBatch(tuple(Visit(0, index) for index in indices[start : start + size]), target), 5, start
            )
            for start, size in zip(starts, sizes, strict=True)
        ]
        losses.append(torch.tensor(stepper.backward(GlobalBatch(5, 0, tuple(batches), 2))))
        gradients.append([parameter.grad for parameter in adapter.parameters()])
    assert_near(*losses)
    for together, apart in zip(*gradients, strict=True):
        assert_near(apart, together)


def test_loss_and_gradients_are_those_of_diffusers_and_peft(
    prepared: tuple[PreparedData, Source], pipeline: Any
) -> None:
    from peft import LoraConfig

    found, source = prepared
    (manifest,) = found.train
    config = found.loaded.config
    indices = max(manifest.buckets.values(), key=len)[:2]
    samples = [manifest.samples[index] for index in indices]
    prompts = [sample.captions[0] for sample in samples]
    adapter, stepper, builder = trainer_of(prepared)
    micro_batch = MicroBatch(tuple(Visit(0, index) for index in indices), samples[0].geometry.target)
    losses = stepper.backward(GlobalBatch(5, 0, (builder.batch(micro_batch, 5, 0),), 2))

    theirs = pipeline.transformer.requires_grad_(False)
    theirs.add_adapter(LoraConfig(r=config.lora_rank, lora_alpha=config.alpha, target_modules=list(adapter.layers)))
    gradients = {}
    for name, layer in adapter.layers.items():
        peft = theirs.get_submodule(name)
        gradients[name] = (peft.lora_A["default"].weight, peft.lora_B["default"].weight)
        for mine, other in zip((layer.a, layer.b), gradients[name], strict=True):
            other.data.copy_(mine)
    with torch.no_grad():
        context, text_ids = pipeline.encode_prompt(prompts, max_sequence_length=source.text_length)
        latents = pipeline._encode_vae_image(torch.cat([pixels_of(sample) for sample in samples]), generator=None)
    draws = stepper.objective.draw(5, range(2), tuple(latents.shape[1:]))
    sigma = draws.sigma[:, None, None, None]
    velocity = theirs(
        hidden_states=pipeline._pack_latents((1 - sigma) * latents + sigma * draws.noise),
        encoder_hidden_states=context,
        timestep=draws.sigma,
        guidance=torch.full((2,), 3.5) if source.spec.guidance_embeds else None,
        img_ids=pipeline._prepare_latent_ids(latents),
        txt_ids=text_ids,
        return_dict=False,
    )[0]
    error = (velocity - pipeline._pack_latents(draws.noise - latents)).square().flatten(1).mean(1)
    error.mean().backward()

    assert_near(torch.tensor(losses), error.detach())
    for name, layer in adapter.layers.items():
        for mine, other in zip((layer.a, layer.b), gradients[name], strict=True):
            assert mine.grad is not None
            assert_near(mine.grad, other.grad)
