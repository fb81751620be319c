"""`simpletuner plan`, of memory and of timesteps, as it is typed."""

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from simpletuner.base.errors import AccessError, ConfigError
from simpletuner.cli.plan import run
from simpletuner.config.options.schedule import ScheduleOptions
from simpletuner.flow.sigma import mu_linear
from simpletuner.memory.wire import NETWORKS
from simpletuner.train.timesteps import Timesteps


@pytest.fixture
def project(own_folder: Path) -> Path:
    """Pictures of two sizes: six small ones and two large ones."""
    datasets: list[dict[str, Any]] = [{"id": "t", "dataset_type": "text_embeds", "default": True, "cache_dir": "c"}]
    for name, size, count in (("small", 256, 6), ("large", 1024, 2)):
        folder = own_folder / "datasets" / name
        folder.mkdir(parents=True)
        for index in range(count):
            Image.new("RGB", (size, size), (index, 0, 0)).save(folder / f"{index}.png")
        keys = {"instance_data_dir": f"datasets/{name}", "caption_strategy": "filename", "cache_dir_vae": f"vae/{name}"}
        datasets.append({"id": name, "resolution": size, "resolution_type": "pixel_area"} | keys)
    (own_folder / "config").mkdir()
    config = {"model_flavour": "tiny", "max_train_steps": 5, "output_dir": "out"}
    (own_folder / "config" / "config.json").write_text(json.dumps(config))
    (own_folder / "config" / "multidatabackend.json").write_text(json.dumps(datasets))
    return own_folder


def answer(capsys: pytest.CaptureFixture[str], *flags: str) -> dict[str, Any]:
    assert run(["--show-timesteps", "--json", *flags]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)["timesteps"]
    return found


DENSITIES = [
    {},
    {"flow_schedule_shift": 1.0, "flow_sigmoid_scale": 2.0},
    {"flow_use_uniform_schedule": True},
    {"flow_use_beta_schedule": True, "flow_beta_schedule_alpha": 4.0},
]


@pytest.mark.usefixtures("project")
@pytest.mark.parametrize("options", DENSITIES)
def test_the_numbers_are_those_of_the_density_that_trains(
    capsys: pytest.CaptureFixture[str], options: dict[str, Any]
) -> None:
    found = answer(capsys, *(f"--{key}={str(value).lower()}" for key, value in options.items()))
    timesteps = Timesteps.of(ScheduleOptions(**options))
    levels = [timesteps.sigma((index + 0.5) / 100, 1) for index in range(100)]
    assert found["mean"] == pytest.approx(sum(levels) / 100, abs=3e-3)
    assert found["percentiles"]["50"] == pytest.approx(timesteps.sigma(0.5, 1), abs=3e-3)
    assert found["percentiles"]["95"] == pytest.approx(timesteps.sigma(0.95, 1), abs=3e-3)
    shares = found["histogram"]["shares"]
    assert sum(shares) == pytest.approx(1, abs=1e-3)
    upper = sum(level >= 0.5 for level in levels) / 100
    assert sum(shares[25:]) == pytest.approx(upper, abs=1e-2)
    assert found["strata"] is None


@pytest.mark.usefixtures("project")
def test_an_automatic_shift_is_each_sizes_own(capsys: pytest.CaptureFixture[str]) -> None:
    found = answer(capsys, "--flow_schedule_auto_shift", "--timestep_strata")
    assert [(own["name"], own["tokens"], own["share"]) for own in found["resolutions"]] == [
        ("256x256", 256, 0.75),
        ("1024x1024", 4096, 0.25),
    ]
    assert [own["shift"] for own in found["resolutions"]] == pytest.approx(
        [math.exp(mu_linear(tokens)) for tokens in (256, 4096)], abs=1e-4
    )
    small, large = (own["mean"] for own in found["resolutions"])
    assert found["mean"] == pytest.approx(0.75 * small + 0.25 * large, abs=1e-4)
    assert found["strata"] == 8


def test_a_set_counts_by_the_steps_that_train_it(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = project / "config" / "multidatabackend.json"
    text, small, large = json.loads(path.read_text())
    small |= {"end_step": 1, "timestep_sampling_offset": 2}
    large |= {"start_step": 2, "timestep_sampling_offset": -2}
    text["caption_filter_list"] = ["0"]
    path.write_text(json.dumps([text, small, large]))
    found = answer(capsys, "--timestep_strata")
    shares = {each["name"]: each["share"] for each in found["resolutions"]}
    assert shares == {"256x256 +2": pytest.approx(0.2), "1024x1024 -2": pytest.approx(0.8)}
    assert found["strata"] == 5  # of six small images, one has no caption left


@pytest.mark.usefixtures("project")
def test_listed_timesteps_are_points(capsys: pytest.CaptureFixture[str]) -> None:
    found = answer(capsys, "--flow_custom_timesteps=801,338,801,1000")
    shares = {index: share for index, share in enumerate(found["histogram"]["shares"]) if share}
    assert shares == {16: 0.25, 40: 0.5, 49: 0.25}
    assert found["percentiles"] == {"1": 0.338, "5": 0.338, "25": 0.338, "50": 0.801, "75": 0.801, "95": 1.0, "99": 1.0}


@pytest.mark.parametrize(
    "flags",
    [
        (),
        ("--flow_schedule_auto_shift", "--timestep_strata"),
        ("--flow_use_beta_schedule", "--flow_beta_schedule_alpha=0.2", "--flow_beta_schedule_beta=0.3"),
        ("--flow_custom_timesteps=0,500,1000",),
    ],
)
def test_the_drawing_fits_a_terminal_and_the_picture_is_there(
    project: Path, capsys: pytest.CaptureFixture[str], flags: tuple[str, ...]
) -> None:
    assert run(["--show-timesteps", *flags]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert sum("█" in line for line in lines) == 12
    assert lines[-1] == "Chart: out/timesteps.png"
    with Image.open(project / "out" / "timesteps.png") as image:
        colors = image.convert("RGB").getcolors(1 << 16)
    assert colors is not None
    assert len(colors) > 3


def test_the_picture_may_go_elsewhere(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert answer(capsys, "--out", "here")["path"] == "here/timesteps.png"
    assert (project / "here" / "timesteps.png").exists()
    assert not (project / "out").exists()


@pytest.mark.usefixtures("project")
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--out"], "--out: nothing follows it"),
        (["--flow_use_uniform_schedul"], "--flow_use_uniform_schedul: no such option"),
        (["--flow_custom_timesteps=1001"], "--flow_custom_timesteps = '1001': expected timesteps from 0"),
        (["--flow_custom_timesteps=0.3,0.7"], "expected timesteps from 0"),
        (["--flow_custom_timesteps=a"], "expected timesteps from 0"),
        (["--flow_custom_timesteps="], "expected timesteps from 0"),
    ],
)
def test_mistakes_are_those_of_train(flags: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        run(["--show-timesteps", *flags])
    assert message in str(caught.value)


@pytest.mark.usefixtures("project")
def test_it_starts_without_torch() -> None:
    code = (
        "import sys; from simpletuner.cli.plan import run; run(['--show-timesteps', '--flow_schedule_auto_shift']); "
        "sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# Memory


def planned(capsys: pytest.CaptureFixture[str], *flags: str) -> tuple[int, dict[str, Any]]:
    code = run(["--json", *flags])
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return code, found


def test_the_plan_knows_the_pictures_and_writes_nothing_but_the_index(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, found = planned(capsys, "--vram=24", "--ram=32")
    assert code == 0
    expected = {"width": 1024, "height": 1024, "batch": 1, "pictures": 8, "captions": 7}
    assert found["workload"].items() >= expected.items()
    assert [phase["phase"] for phase in found["plan"]["phases"]] == ["text", "latents", "train"]
    assert found["plan"]["machine"] == {"accelerator": int(22.5 * 2**30), "ram": 28 * 2**30, "disk": None}
    assert found["remedy"] is None
    assert not (project / "out").exists()
    for phase in found["plan"]["phases"]:
        for place in ("accelerator", "ram", "disk"):
            assert phase[place] == sum(part["bytes"] for part in phase["parts"] if part["place"] == place)


@pytest.mark.usefixtures("project")
def test_without_pictures_the_resolution_is_planned(capsys: pytest.CaptureFixture[str]) -> None:
    for file in Path("datasets/large").iterdir():
        file.unlink()
    _, found = planned(capsys, "--vram=24", "--ram=32")
    assert found["workload"] == {
        "width": 1024,
        "height": 1024,
        "batch": 1,
        **dict.fromkeys(("pictures", "captions", "caption_tokens", "tokenizer")),
    }


@pytest.mark.usefixtures("project")
def test_dev_on_a_small_card_gets_the_smallest_change(capsys: pytest.CaptureFixture[str]) -> None:
    dev = ("--model_flavour=dev", "--vram=12", "--ram=32")
    code, found = planned(capsys, *dev)
    assert code == 5
    assert not found["plan"]["fits"]
    (lack,) = found["plan"]["lacks"]
    assert (lack["phase"], lack["place"], lack["there"]) == ("train", "accelerator", int(10.5 * 2**30))
    changes = found["remedy"]["changes"]
    assert found["remedy"]["after"] <= lack["there"] < found["remedy"]["before"] == lack["needed"]
    code, found = planned(
        capsys, *dev, *(f"--{key}={json.dumps(value).strip(chr(34))}" for key, value in changes.items())
    )
    assert code == 0
    assert found["plan"]["fits"]
    assert run(list(dev)) == 5
    told = capsys.readouterr().out
    assert "It does not fit, for lack of GPU" in told
    assert "It would fit with --base_model_precision=" in told


@pytest.mark.usefixtures("project")
def test_a_machine_without_a_card_and_one_that_nothing_helps(capsys: pytest.CaptureFixture[str]) -> None:
    code, found = planned(capsys, "--vram=0", "--ram=8GB")
    assert code == 0
    assert found["plan"]["machine"]["accelerator"] is None
    assert run(["--model_flavour=dev", "--vram=2", "--ram=2"]) == 5
    assert "No option of this program would make it fit." in capsys.readouterr().out


@pytest.mark.usefixtures("project")
def test_gpus_are_planned_for_that_are_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    dev = ("--model_flavour=dev", "--mixed_precision=bf16", "--vram=48", "--ram=128", "--gpus=2")
    code, found = planned(capsys, *dev, "--num_processes=3")
    assert code == 5
    assert (found["plan"]["processes"], found["plan"]["engine"]) == (2, "ddp")
    assert (found["engine"]["advised"], found["remedy"]["changes"]) == ("fsdp2", {"fsdp_enable": True})
    code, found = planned(capsys, *dev, "--fsdp_enable")
    assert code == 0
    assert found["plan"]["wire"]["total"] == found["plan"]["wire"]["gathered"] + found["plan"]["wire"]["reduced"]
    assert found["engine"]["peaks"]["fsdp2"] == found["plan"]["peak"]["accelerator"]
    assert run([*dev, "--fsdp_enable"]) == 0
    told = capsys.readouterr().out.splitlines()
    assert told[-1].startswith("Use FSDP2 (--fsdp_enable): whole copies take ")
    assert told[-2].startswith("Each process sends ")


@pytest.mark.usefixtures("project")
def test_hosts_are_planned_with_gpus_on_each(capsys: pytest.CaptureFixture[str]) -> None:
    dev = ("--model_flavour=dev", "--mixed_precision=bf16", "--vram=48", "--ram=128", "--gpus=4", "--machine_rank=3")
    code, found = planned(capsys, *dev, "--hosts=2", "--fsdp_enable")
    assert code == 0
    assert (found["plan"]["processes"], found["plan"]["machines"]) == (8, 2)
    assert list(found["plan"]["wire"]["seconds"]) == list(NETWORKS)
    assert found["engine"]["sent"]["fsdp2"] == found["plan"]["wire"]["total"]
    assert None not in found["engine"]["peaks"].values()
    assert run([*dev, "--hosts=2", "--fsdp_enable"]) == 0
    told = capsys.readouterr().out.splitlines()
    assert [
        line.split()[0] for line in told[told.index("") :] if line.startswith(("engine", "DDP", "FSDP2", "ZeRO"))
    ] == [
        "engine",
        "DDP",
        "FSDP2",
        "ZeRO-1",
        "ZeRO-2",
        "ZeRO-3",
    ]
    _, one = planned(capsys, *dev, "--num_machines=2")
    assert (one["plan"]["processes"], one["plan"]["machines"]) == (4, 1)


def test_hosts_need_gpus() -> None:
    with pytest.raises(ConfigError, match=r"--hosts without --gpus.*such as --gpus 8"):
        run(["--hosts=2"])


@pytest.mark.usefixtures("project")
def test_without_gpus_several_processes_share_the_ram(capsys: pytest.CaptureFixture[str]) -> None:
    _, alone = planned(capsys)
    _, two = planned(capsys, "--gpus=2", "--fsdp_enable=false")
    assert (alone["engine"], alone["plan"]["wire"]) == (None, None)
    assert two["plan"]["machine"]["accelerator"] is None
    assert two["plan"]["peak"]["ram"] > 1.9 * alone["plan"]["peak"]["ram"]
    assert two["engine"]["advised"] == "ddp"
    _, one = planned(capsys, "--gpus=1")
    assert one["engine"]["text"].startswith("One process holds the run: ")
    assert {**one, "engine": None, "time": None, "plan": None, "summary": None} == {
        **alone,
        "time": None,
        "plan": None,
        "summary": None,
    }


@pytest.mark.usefixtures("project")
def test_this_machine_is_planned_for_by_default(capsys: pytest.CaptureFixture[str]) -> None:
    assert run([]) == 0
    told = capsys.readouterr().out.splitlines()
    assert told[2] == "Memory plan, worst moment of each phase (8 images):"
    assert told[-1].startswith("It fits: ")
    # The path of the tokenizer, where an earlier test made the embedded model, is as long as the temporary folder's.
    assert max(len(line) for line in told if "tokenizer.json" not in line) <= 160


@pytest.mark.usefixtures("project")
def test_a_sentence_says_what_the_run_does_and_what_it_takes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    _, found = planned(capsys, "--vram=24", "--ram=32", "--max_train_steps=2000")
    start = "Trains a rank-16 LoRA of the embedded model on 8 images, 2,000 steps (each image seen 250 times); needs "
    assert found["summary"].startswith(start)
    assert found["summary"].endswith(" of 28.00 GiB usable RAM.")
    assert run(["--vram=24", "--ram=32", "--max_train_steps=2000"]) == 0
    assert capsys.readouterr().out.splitlines()[0] == found["summary"]

    dev = ("--model_flavour=dev", "--vram=8", "--ram=64", "--lora_rank=4", "--max_train_steps=1")
    _, found = planned(capsys, *dev)
    assert "a rank-4 LoRA of FLUX.2-dev on 8 images, 1 step (each image seen 0.12 times); needs " in found["summary"]
    assert " of 7.00 GiB usable VRAM and " in found["summary"]
    assert found["summary"].endswith(" usable RAM, which is not enough, downloads 99 GB.")
    _, found = planned(capsys, "--vram=24", "--ram=32", "--model_type=full")
    assert found["summary"].startswith(
        "Trains all weights of the embedded model on 8 images, 5 steps (each image seen 0.6"
    )


@pytest.mark.usefixtures("project")
def test_weights_in_the_hubs_cache_are_not_downloaded_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = tmp_path / "models--black-forest-labs--FLUX.2-dev"
    folder = kept / "snapshots" / "abc" / "transformer"
    folder.mkdir(parents=True)
    (kept / "refs").mkdir()
    (kept / "refs" / "main").write_text("abc")
    with (folder / "diffusion_pytorch_model-00001-of-00001.safetensors").open("wb") as file:
        file.truncate(64_450_000_000)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    _, found = planned(capsys, "--model_flavour=dev", "--vram=80", "--ram=64")
    assert found["summary"].endswith(", downloads 35 GB.")


@pytest.mark.usefixtures("project")
def test_images_that_nobody_has_looked_at_are_not_counted(capsys: pytest.CaptureFixture[str]) -> None:
    for file in Path("datasets/large").iterdir():
        file.unlink()
    _, found = planned(capsys, "--vram=24", "--ram=32")
    assert "LoRA of the embedded model on images that are not scanned yet, 5 steps; needs " in found["summary"]


MISTAKES = [
    (["--vram"], "--vram: nothing follows it: expected a size in GiB"),
    (["--vram", "--ram=3"], "--vram: nothing follows it"),
    (["--vram=big"], "--vram = 'big': expected a size in GiB such as 24"),
    (["--ram=-3"], "--ram = '-3': expected a size in GiB such as 24"),
    (["--ram=0"], "--ram = 0: expected a size in GiB above 0"),
    (["--gpus"], "--gpus: nothing follows it: expected a number of GPUs"),
    (["--gpus=0"], "--gpus = '0': expected a whole number from 1 to 1024"),
    (["--gpus=-1"], "--gpus = '-1': expected a whole number from 1 to 1024"),
    (["--gpus=1000000"], "--gpus = '1000000': expected a whole number from 1 to 1024"),
    (["--gpus=two"], "--gpus = 'two': expected a whole number from 1 to 1024"),
    (["--gpus=2", "--show-timesteps"], "--gpus with --show-timesteps: expected one of them"),
    (["--vram=24", "--lora_rnak=3"], "--lora_rnak: no such option"),
]
"""Flags, and what the answer says."""


@pytest.mark.usefixtures("project")
def test_mistakes_are_answered_without_torch() -> None:
    """All in one process, which starts once."""
    code = f"""
import contextlib, io, json, sys
from simpletuner.cli.main import main

answers = []
for flags in {[flags for flags, _ in MISTAKES]!r}:
    with contextlib.redirect_stderr(io.StringIO()) as told:
        answers.append((main(["plan", *flags]), told.getvalue()))
print(json.dumps([answers, "torch" in sys.modules]))
"""
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    answers, has_torch = json.loads(done.stdout)
    assert not has_torch
    for (flags, message), (exit_code, told) in zip(MISTAKES, answers, strict=True):
        assert exit_code == 2, flags
        assert message in told, flags


@pytest.mark.usefixtures("project")
def test_captions_are_counted_by_the_tokenizer_of_a_local_folder(
    tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--vram=24", f"--pretrained_model_name_or_path={tiny_folder}"]
    _, found = planned(capsys, *flags)
    # 32 of the template, and a digit, the name of a file.
    assert found["workload"]["caption_tokens"] == 33
    assert found["workload"]["tokenizer"] == str(tiny_folder / "tokenizer")
    run(flags)
    told = capsys.readouterr().out
    assert (
        "The longest caption has 33 tokens with its template, counted with "
        f"{tiny_folder / 'tokenizer' / 'tokenizer.json'}.\n"
    ) in told


@pytest.mark.usefixtures("project")
def test_captions_are_counted_by_the_tokenizer_in_the_hubs_cache(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = tmp_path / "models--black-forest-labs--FLUX.2-dev"
    tokenizer = kept / "snapshots" / "abc" / "tokenizer"
    shutil.copytree(tiny_folder / "tokenizer", tokenizer)
    (kept / "refs").mkdir()
    (kept / "refs" / "main").write_text("abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    _, found = planned(capsys, "--model_flavour=dev", "--vram=80", "--ram=64")
    assert (found["workload"]["caption_tokens"], found["workload"]["tokenizer"]) == (33, str(tokenizer))


@pytest.mark.usefixtures("project")
def test_without_a_tokenizer_captions_are_estimated_by_their_characters(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--model_flavour=dev", "--vram=80", "--ram=64", "--cache_dir=nowhere"]
    _, found = planned(capsys, *flags)
    assert (found["workload"]["caption_tokens"], found["workload"]["tokenizer"]) == (65, None)
    run(flags)
    assert (
        "The longest caption has at most about 65 tokens by its characters: this model's tokenizer is "
        "not on this disk.\n"
    ) in capsys.readouterr().out


@pytest.mark.usefixtures("project")
def test_a_damaged_tokenizer_is_named(tmp_path: Path) -> None:
    (tmp_path / "model" / "tokenizer").mkdir(parents=True)
    (tmp_path / "model" / "tokenizer" / "tokenizer.json").write_text('{"model": {}}')
    with pytest.raises(AccessError, match=r"tokenizer\.json has no vocabulary"):
        run(["--vram=24", f"--pretrained_model_name_or_path={tmp_path / 'model'}"])
