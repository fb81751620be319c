"""`simpletuner sample`: what it is asked, what it refuses, what it draws."""

import json
import os
from pathlib import Path

import pytest
from PIL import Image

from simpletuner.base.errors import ConfigError
from simpletuner.cli.main import main
from simpletuner.cli.sample import LoraWithStrength, read_request, requested_loras, sample_help
from simpletuner.runs.layout import LORA_NAME

SMALL = ["--width", "32", "--height", "48", "--steps", "2", "--mixed_precision", "no", "--vae_dtype", "fp32"]


def asked(*arguments: str) -> object:
    return read_request(arguments, {})


def write_config(path: Path, **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(options), encoding="utf-8")
    return path


def test_flags_and_defaults() -> None:
    config = read_request(
        ["--prompt", "a", "--prompt=b --c", "--lora=x.safetensors:0.5", "--model_flavour", "tiny", "--guidance=2"], {}
    )
    assert config.prompt == ("a", "b --c")
    assert config.lora == ("x.safetensors:0.5",)
    assert (config.width, config.height, config.num, config.seed) == (1024, 1024, 1, 42)
    assert (config.steps, config.guidance) == (None, 2.0)
    assert (config.model_flavour, config.base_dtype, config.out) == ("tiny", "bf16", "samples")


def test_options_of_training_alone_are_not_suggested() -> None:
    for name in ("rank", "validation_steps", "hub_model_id"):
        with pytest.raises(ConfigError, match=f"--{name}: no such option.$"):
            asked("--prompt", "a", f"--{name}", "1")


def test_all_mistakes_come_in_one_report() -> None:
    with pytest.raises(ConfigError) as caught:
        asked(
            "stray", "--promt", "a", "--lora", "--width=100", "--steps", "0", "--push_to_hub", "true", "--example", "x"
        )
    text = str(caught.value)
    assert text.startswith("8 problems")
    for part in (
        "'stray': expected a flag",
        "--promt: no such option. Did you mean --prompt?",
        "--lora",
        "--width = 100: expected a multiple of 16 pixels",
        "--steps = 0: expected a whole number of at least 1",
        "--push_to_hub = true: not built yet",
        "--example: not an option of sample",
        "prompt is missing",
    ):
        assert part in text


def test_a_run_gives_its_model_and_the_settings_of_its_pictures(tmp_path: Path) -> None:
    write_config(
        tmp_path / "run" / "config.json",
        model_flavour="tiny",
        base_model_default_dtype="fp32",
        validation_resolution="512x256,1024",
        validation_num_inference_steps=7,
        validation_guidance=3.5,
        validation_seed=9,
        seed=1,
        train_batch_size=4,
    )
    run = str(tmp_path / "run")
    config = read_request(["--run", run, "--prompt", "a"], {})
    assert (config.model_flavour, config.base_dtype, config.seed) == ("tiny", "fp32", 9)
    assert (config.width, config.height, config.steps, config.guidance) == (512, 256, 7, 3.5)
    config = read_request(["--run", run, "--prompt", "a", "--width", "64", "--seed", "5"], {})
    assert (config.width, config.height, config.seed) == (64, 256, 5)

    other = write_config(tmp_path / "other.json", **{"--validation_guidance": 1.0, "lora_rank": 8})
    config = read_request(["--run", run, "--config", str(other), "--prompt", "a"], {})
    assert (config.model_flavour, config.guidance) == ("tiny", 1.0)


def test_a_flavour_wins_over_a_configs_model_path(tmp_path: Path) -> None:
    config_file = write_config(tmp_path / "c.json", pretrained_model_name_or_path="{env:MODELS}/dev", cache_dir="~/x")
    environ = {"MODELS": "/models"}
    config = read_request(["--config", str(config_file), "--prompt", "a"], environ)
    assert config.pretrained_model_name_or_path == "/models/dev"
    assert config.cache_dir == str(Path("~/x").expanduser())
    config = read_request(["--config", str(config_file), "--prompt", "a", "--model_flavour", "tiny"], environ)
    assert config.pretrained_model_name_or_path is None
    with pytest.raises(ConfigError, match="variable MODELS is not set"):
        asked("--config", str(config_file), "--prompt", "a")


def test_faults_of_a_config_are_told_with_the_rest(tmp_path: Path) -> None:
    bad = write_config(tmp_path / "bad.json", validation_resolution="100", model_flavour="dev")
    with pytest.raises(ConfigError, match=r"(?s)3 problems.*no config\.json in it.*validation_resolution.*prompt is"):
        asked("--config", str(bad), "--run", str(tmp_path))


def test_drift_prompts_of_a_config_may_lie_in_a_file(tmp_path: Path) -> None:
    config = {"model_flavour": "tiny", "validation_drift_prompts": "drift.json"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    request = read_request(["--config", str(tmp_path / "config.json"), "--prompt", "a ball"], {})
    assert request.model_flavour == "tiny"


def test_a_reference_whose_path_is_too_long_is_no_file() -> None:
    with pytest.raises(ConfigError, match="no such file"):
        read_request(["--prompt=x", f"--references={'y' * 300}.png"], {})


def test_loras_and_strengths(tmp_path: Path) -> None:
    (tmp_path / "a:b.safetensors").touch()
    (tmp_path / "c.safetensors").touch()
    first, second = f"{tmp_path}/a:b.safetensors", f"{tmp_path}/c.safetensors:-0.5"
    config = read_request(["--prompt", "a", "--lora", first, "--lora", second], {})
    assert requested_loras(config) == [
        LoraWithStrength(Path(first), 1.0),
        LoraWithStrength(tmp_path / "c.safetensors", -0.5),
    ]
    with pytest.raises(ConfigError, match=r"--lora nothing\.safetensors: no such file"):
        requested_loras(read_request(["--prompt", "a", "--lora", "nothing.safetensors:1"], {}))


def test_a_lora_that_exists_is_the_path_whatever_follows_its_colon(tmp_path: Path) -> None:
    (tmp_path / "exp:2").mkdir()
    (tmp_path / "exp").mkdir()
    for text, wanted in {
        "exp:2": LoraWithStrength(Path("exp:2"), 1.0),
        "exp:2:0.5": LoraWithStrength(Path("exp:2"), 0.5),
        "exp:3": LoraWithStrength(Path("exp"), 3.0),
    }.items():
        assert requested_loras(read_request(["--prompt", "a", "--lora", text], {})) == [wanted]


@pytest.mark.parametrize("strength", ["nan", "inf", "-inf", "1e999"])
def test_a_strength_that_is_not_finite_is_refused(tmp_path: Path, strength: str) -> None:
    (tmp_path / "c.safetensors").touch()
    with pytest.raises(ConfigError, match=rf"--lora c\.safetensors:{strength}: a strength of .*a finite number"):
        requested_loras(read_request(["--prompt", "a", "--lora", f"c.safetensors:{strength}"], {}))


def test_a_lora_that_is_neither_file_nor_folder_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.safetensors")
    for text in ("pipe.safetensors", "x" * 5000):
        with pytest.raises(ConfigError, match="no such file"):
            requested_loras(read_request(["--prompt", "a", "--lora", text], {}))


def test_a_run_without_a_finished_lora_points_to_its_checkpoint(tmp_path: Path) -> None:
    write_config(tmp_path / "config.json")
    config = read_request(["--prompt", "a", "--run", str(tmp_path)], {})
    with pytest.raises(ConfigError, match="no checkpoint either"):
        requested_loras(config)
    for step in ("step-000100", "step-000200"):
        (tmp_path / "checkpoints" / step).mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"no finished LoRA\. Give --lora .*checkpoints/step-000200"):
        requested_loras(config)
    (tmp_path / "pytorch_lora_weights.safetensors").touch()
    assert requested_loras(config) == [LoraWithStrength(tmp_path / "pytorch_lora_weights.safetensors", 1.0)]


def test_strengths_are_numbers_in_one_flag_or_several() -> None:
    for arguments in (["--strength", "0, 0.5,1"], ["--strength=0", "--strength=0.5", "--strength", "1"]):
        assert read_request(["--prompt", "a", *arguments], {}).strength == (0, 0.5, 1)
    assert read_request([], {}, {"prompt": ["a"], "strength": [0, 0.5, 1]}).strength == (0, 0.5, 1)
    for wrong in ("strong", "", "nan", "1;2"):
        with pytest.raises(ConfigError, match=r"--strength .*expected numbers such as 0,0\.5,1"):
            read_request(["--prompt", "a", "--strength", wrong], {})


def lora_that_names(path: Path, base: str) -> Path:
    from simpletuner.base.tensorfile import write_tensors

    path.parent.mkdir(parents=True, exist_ok=True)
    write_tensors(path, {}, {"simpletuner.base_model": base})
    return path


@pytest.mark.parametrize(
    ("base", "flavour"),
    [("tiny-2", "tiny"), ("black-forest-labs/FLUX.2-dev", "dev"), ("my-folder", "dev"), ("", "dev")],
)
def test_a_lora_alone_names_its_base_model(tmp_path: Path, base: str, flavour: str) -> None:
    lora = lora_that_names(tmp_path / "a.safetensors", base)
    told: list[str] = []
    config = read_request(["--prompt", "a", "--lora", f"{lora}:0.5"], {}, report=told.append)
    assert config.model_flavour == flavour
    line = f"{lora} names {base} as its base model: sampling with --model_flavour {flavour}."
    assert told == ([line] if base not in ("my-folder", "") else [])


def test_the_header_of_another_program_names_the_base_model_too(tmp_path: Path) -> None:
    from simpletuner.base.tensorfile import write_tensors

    lora = tmp_path / "a.safetensors"
    write_tensors(lora, {}, {"ss_base_model_version": "flux2_klein_9b"})
    told: list[str] = []
    assert read_request(["--prompt", "a", "--lora", str(lora)], {}, report=told.append).model_flavour == "klein-9b"
    assert told == [f"{lora} names FLUX.2-klein-base-9B as its base model: sampling with --model_flavour klein-9b."]


def test_a_lora_of_a_run_takes_the_runs_model_and_settings(tmp_path: Path) -> None:
    run = tmp_path / "run"
    write_config(run / "config.json", model_flavour="tiny", base_model_default_dtype="fp32", validation_resolution="64")
    (run / "events.jsonl").touch()
    finished = lora_that_names(run / LORA_NAME, "black-forest-labs/FLUX.2-dev")
    checkpoint = lora_that_names(run / "checkpoints" / "step-000005" / "ema" / LORA_NAME, "")
    for lora in (run, finished, checkpoint, checkpoint.parent, checkpoint.parents[1]):
        told: list[str] = []
        config = read_request(["--prompt", "a", "--lora", str(lora)], {}, report=told.append)
        assert (config.model_flavour, config.base_dtype, config.width) == ("tiny", "fp32", 64)
        assert len(told) == 1
        assert f"belongs to the run {run}" in told[0]


def test_what_is_typed_wins_over_what_a_lora_names(tmp_path: Path) -> None:
    lora = lora_that_names(tmp_path / "a.safetensors", "tiny-2")
    other = write_config(tmp_path / "c.json", model_flavour="dev", validation_guidance=2.0)
    for typed in (
        ["--model_flavour=dev"], ["--pretrained_model_name_or_path=elsewhere"], [f"--config={other}"],
    ):  # fmt: skip
        config = read_request(["--prompt", "a", "--lora", str(lora), *typed], {}, report=pytest.fail)
        assert config.model_flavour == "dev", typed


def test_home_is_filled_in_where_a_path_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write_config(tmp_path / "c.json", model_flavour="tiny")
    (tmp_path / "a:1.safetensors").touch()
    config = read_request(
        ["--prompt", "a", "--config", "~/c.json", "--lora", "~/a:1.safetensors:0.5", "--out", "~/p"], {}
    )
    assert (config.model_flavour, config.out) == ("tiny", str(tmp_path / "p"))
    assert requested_loras(config) == [LoraWithStrength(tmp_path / "a:1.safetensors", 0.5)]


def test_a_served_request_goes_over_the_options_of_the_command_line(tmp_path: Path) -> None:
    write_config(tmp_path / "run" / "config.json", model_flavour="tiny", validation_guidance=3.0)
    (tmp_path / "run" / LORA_NAME).touch()
    options = ["--width=64", "--seed=3"]
    request = {"run": str(tmp_path / "run"), "prompt": ["a"], "seed": 4}
    config = read_request(options, {}, request)
    assert (config.model_flavour, config.guidance, config.width, config.seed) == ("tiny", 3.0, 64, 4)
    assert requested_loras(config) == [LoraWithStrength(tmp_path / "run" / LORA_NAME, 1.0)]
    assert requested_loras(read_request(options, {}, request | {"lora": []})) == [], "an empty list is the base"
    with pytest.raises(
        ConfigError, match=r"(?s)2 problems.*widht: no such option. Did you mean width.*prompt is missing"
    ):
        read_request(options, {}, {"widht": 3})


def test_help_names_every_option_of_its_own() -> None:
    text = sample_help()
    assert "--lora" in text
    assert "--guidance_real" in text
    assert "(default 1024)" in text
    assert "--config PATH" in text


@pytest.fixture
def lora(acting_lora: Path) -> Path:
    return acting_lora


def drawn(capsys: pytest.CaptureFixture[str]) -> list[Path]:
    return [Path(line) for line in capsys.readouterr().out.splitlines()]


def test_pictures_with_their_parameters(tiny_folder: Path, lora: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = ["--pretrained_model_name_or_path", str(tiny_folder)]
    prompts = ["--prompt", "A Red – “fish”?", "--prompt", "two"]
    assert (
        main(["sample", *model, *SMALL, *prompts, "--lora", f"{lora}:0.5", "--num", "2", "--seed", "8", "--progress"])
        == 0
    )
    captured = capsys.readouterr()
    told = [json.loads(line) for line in captured.err.splitlines() if line.startswith("{")]
    assert told == [{"what": "generating", "done": done, "total": 8} for done in range(1, 9)]
    paths = [Path(line) for line in captured.out.splitlines()]
    assert [path.name for path in paths] == [
        "a-red-fish_32x48_8.png",
        "a-red-fish_32x48_9.png",
        "two_32x48_8.png",
        "two_32x48_9.png",
    ]
    assert "was trained on another-model" in captured.err
    images = [Image.open(path) for path in paths]
    assert {image.size for image in images} == {(32, 48)}
    assert len({image.tobytes() for image in images}) == 4
    parameters = json.loads(images[1].info["parameters"])
    (used,) = parameters.pop("loras")
    assert (used["name"], used["strength"]) == (lora.name, 0.5)
    assert parameters == {
        "prompt": "A Red – “fish”?",
        "width": 32,
        "height": 48,
        "seed": 9,
        "steps": 2,
        "guidance": 4.0,
        "guidance_real": 1.0,
        "negative_prompt": "",
        "model": tiny_folder.name,
    }
    assert not any(str(folder) in images[0].info["parameters"] for folder in (tiny_folder.parent, lora.parent))


def test_references_change_the_picture_in_their_order_and_not_its_size(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, color in (("a.png", "red"), ("b.png", "blue")):
        Image.new("RGB", (64, 80), color).save(tmp_path / name)
    a, b = (f"--references={tmp_path / name}" for name in ("a.png", "b.png"))
    model = [f"--pretrained_model_name_or_path={tiny_folder}", "--mixed_precision=no"]
    images = {}
    for way, flags in {"none": [], "a": [a], "ab": [a, b], "ba": [b, a]}.items():
        assert main(["sample", *model, *SMALL, "--prompt=two", *flags]) == 0
        images[way] = Image.open(drawn(capsys)[0])
    assert len({image.tobytes() for image in images.values()}) == 4
    assert {image.size for image in images.values()} == {(32, 48)}
    told = {way: json.loads(image.info["parameters"]).get("references") for way, image in images.items()}
    assert told["none"] is None
    assert [each["name"] for each in told["ba"]] == ["b.png", "a.png"]
    assert told["ba"] == told["ab"][::-1]


def test_references_that_cannot_be_are_refused_before_anything_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, size in (("small.png", (63, 64)), ("narrow.png", (64, 513))):
        Image.new("RGB", size).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("x")
    names = ("gone.png", "notes.txt")
    assert main(["sample", "--prompt=x", *(f"--references={tmp_path / name}" for name in names)]) == 2
    told = capsys.readouterr().err
    assert "gone.png: no such file: expected the path of an image." in told
    assert "notes.txt: expected an image, such as .png, .jpg or .webp." in told
    names = ("small.png", "narrow.png")
    assert main(["sample", "--prompt=x", *(f"--references={tmp_path / name}" for name in names)]) == 2
    told = capsys.readouterr().err
    assert "small.png: reference is too small: 63x64" in told
    assert "narrow.png: reference is too narrow: 64x513" in told


def test_a_lora_acts_by_its_strength_and_nothing_is_overwritten(
    tiny_folder: Path, lora: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["sample", "--pretrained_model_name_or_path", str(tiny_folder), *SMALL, "--prompt", "a fish"]
    ways = {
        "base": [],
        "off": ["--lora", f"{lora}:0"],
        "once": ["--lora", str(lora)],
        "folder": ["--lora", str(lora.parent)],
        "halves": ["--lora", f"{lora}:0.5", "--lora", f"{lora}:0.5"],
        "steered": ["--guidance_real", "3", "--negative", "a bird"],
    }
    pictures = {}
    for number, (way, flags) in enumerate(ways.items(), start=1):
        assert main([*common, *flags]) == 0
        (path,) = drawn(capsys)
        assert path.name == ("a-fish_32x48_42.png" if number == 1 else f"a-fish_32x48_42-{number}.png")
        pictures[way] = Image.open(path).tobytes()
    assert pictures["off"] == pictures["base"]
    assert pictures["once"] == pictures["folder"]
    # Halves are added in another order than the whole: a value on the edge may round to the next level.
    differences = [abs(a - b) for a, b in zip(pictures["once"], pictures["halves"], strict=True)]
    assert max(differences) <= 1
    assert len({pictures["base"], pictures["once"], pictures["steered"]}) == 3


@pytest.mark.slow
def test_lokr_and_loha_files_draw_what_their_deltas_do(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch
    from safetensors.torch import save_file
    from tests.lora_dialects import draw_loha, draw_lokr, write_dialect

    from simpletuner.cli.sampler import Sampler
    from simpletuner.config.flavours import TINY

    text = {"lora_te1_layers_0_mlp_fc1.lora_down.weight": torch.ones(1, 1)}
    files = {}
    for kind, draw_factors in (("lokr", draw_lokr), ("loha", draw_loha)):
        files[kind] = tmp_path / f"{kind}.safetensors"
        deltas = write_dialect(files[kind], TINY, "2b OneTrainer for ComfyUI", draw=draw_factors, also=text)
        tensors = {f"transformer.{name}.lora_A.weight": torch.eye(delta.shape[1]) for name, delta in deltas.items()}
        tensors |= {f"transformer.{name}.lora_B.weight": delta.float() for name, delta in deltas.items()}
        files[f"{kind} as lora"] = tmp_path / f"{kind}-as-lora.safetensors"
        save_file(tensors, files[f"{kind} as lora"])

    model = [f"--pretrained_model_name_or_path={tiny_folder}", *SMALL, f"--out={tmp_path}", "--prompt=a fish"]
    sampler = Sampler()

    def draw(strengths: str, **loras: float) -> list[bytes]:
        flags = [f"--lora={files[name.replace('_', ' ')]}:{strength}" for name, strength in loras.items()]
        config = read_request([*model, f"--strength={strengths}", *flags], {})
        drawings = sampler.sample(config, requested_loras(config), lambda *_: None)
        return [Image.open(drawing.path).tobytes() for drawing in drawings]

    def are_near(one: bytes, two: bytes) -> bool:
        """A value on the edge may round to the next level."""
        return max(abs(a - b) for a, b in zip(one, two, strict=True)) <= 1

    (base,) = draw("1")
    off, little, much = draw("0,0.5,1", lokr=0.1)
    assert "lokr.safetensors has 1 tensors for a text encoder" in capsys.readouterr().err
    assert off == base
    wanted = draw("0.5,1", lokr_as_lora=0.1)
    assert are_near(little, wanted[0])
    assert are_near(much, wanted[1])
    assert not are_near(little, much)
    (both,) = draw("1", lokr_as_lora=0.1, loha=-0.1)
    assert are_near(both, *draw("1", lokr=0.1, loha_as_lora=-0.1))
    assert not are_near(both, much)
    assert draw("1") == [base]


def test_a_lora_of_another_model_is_refused_before_anything_is_loaded(
    tiny_folder: Path, lora: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from safetensors.torch import load_file, save_file

    tensors = {name: tensor[:, :8] if "lora_A" in name else tensor for name, tensor in load_file(lora).items()}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "narrow.safetensors")
    arguments = ["--pretrained_model_name_or_path", str(tiny_folder), "--prompt", "a"]
    assert main(["sample", *arguments, "--lora", str(tmp_path / "narrow.safetensors")]) == 6
    error = capsys.readouterr().err
    assert "does not fit this model" in error
    assert "Traceback" not in error


def test_a_full_run_gives_the_model_it_finished_or_points_to_its_checkpoint(tmp_path: Path) -> None:
    write_config(tmp_path / "config.json", model_flavour="tiny", model_type="full")
    run = ["--prompt", "a", "--run", str(tmp_path)]
    with pytest.raises(ConfigError, match=r"no finished model\. It has no checkpoint either"):
        requested_loras(read_request(run, {}))
    (tmp_path / "checkpoints" / "step-000100").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"Give --pretrained_transformer.* .*checkpoints/step-000100/transformer\."):
        requested_loras(read_request(run, {}))
    given = read_request([*run, "--pretrained_transformer_model_name_or_path", "elsewhere"], {})
    assert given.pretrained_transformer_model_name_or_path == "elsewhere"
    assert requested_loras(given) == []
    transformer = tmp_path / "model" / "transformer"
    transformer.mkdir(parents=True)
    config = read_request(run, {})
    assert requested_loras(config) == []
    assert config.pretrained_transformer_model_name_or_path == str(transformer)
    (tmp_path / "model" / "model_index.json").touch()
    config = read_request(run, {})
    assert config.pretrained_model_name_or_path == str(tmp_path / "model")
    assert config.pretrained_transformer_model_name_or_path is None


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["block_level", "leaf_level"])
def test_loras_that_come_and_go_on_a_streamed_model_change_no_bit(
    tiny_folder: Path, acting_lora: Path, tmp_path: Path, kind: str
) -> None:
    from simpletuner.cli.sampler import Sampler

    model = [f"--pretrained_model_name_or_path={tiny_folder}", *SMALL, f"--out={tmp_path}", "--prompt=a fish"]
    streamed = [*model, "--enable_group_offload", f"--group_offload_type={kind}"]

    def draw(sampler: Sampler, options: list[str], *loras: str) -> list[bytes]:
        config = read_request([*options, *(f"--lora={lora}" for lora in loras)], {})
        drawings = sampler.sample(config, requested_loras(config), lambda *_: None)
        return [Image.open(drawing.path).tobytes() for drawing in drawings]

    warm, resident = Sampler(), Sampler()
    wanted: list[tuple[str, ...]] = [(), (f"{acting_lora}",), (f"{acting_lora}:0.5", f"{acting_lora}:-2"), ()]
    for loras in wanted:
        assert draw(warm, streamed, *loras) == draw(resident, model, *loras) == draw(Sampler(), streamed, *loras), loras


KLEIN_SIZE = ["--width", "32", "--height", "48", "--mixed_precision", "no", "--vae_dtype", "fp32", "--num", "1"]


def test_klein_is_guided_against_the_negative_prompt_and_its_distilled_sibling_by_nothing(
    tiny_klein_folder: Path, tiny_klein_distilled_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = ["--model_flavour=tiny-klein", "--pretrained_model_name_or_path", str(tiny_klein_folder), "--steps=2"]
    distilled = ["--model_flavour=tiny-klein-distilled"]
    distilled += ["--pretrained_model_name_or_path", str(tiny_klein_distilled_folder)]
    ways = {
        "by default": base,
        "off": [*base, "--guidance=1"],
        "off, with a negative": [*base, "--guidance=1", "--negative=a bird"],
        "with a negative": [*base, "--negative=a bird"],
        "distilled": distilled,
    }
    images, steps = {}, {}
    for way, flags in ways.items():
        assert main(["sample", *flags, *KLEIN_SIZE, "--prompt", "a fish"]) == 0
        (path,) = drawn(capsys)
        image = Image.open(path)
        images[way], steps[way] = image.tobytes(), json.loads(image.info["parameters"])["steps"]
    assert images["off"] == images["off, with a negative"]
    assert len(set(images.values())) == 4
    assert (steps["by default"], steps["distilled"]) == (2, 4)


def test_guidance_that_klein_does_not_have_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sample", "--model_flavour=klein-4b", "--prompt", "a", "--guidance_real=3"]) == 2
    assert capsys.readouterr().err == (
        "guidance_real = 3: only for models that take guidance as an input, such as dev: expected 1. Give "
        "--guidance=3 instead, which is true guidance on klein-4b.\n"
    )


def test_a_config_of_klein_draws_with_kleins_steps(tmp_path: Path) -> None:
    path = write_config(tmp_path / "config.json", model_flavour="klein-4b")
    config = read_request(["--config", str(path), "--prompt", "a"], {})
    assert (config.steps, config.guidance, config.guidance_real) == (50, 4.0, 1.0)


def test_another_flavour_takes_no_steps_and_guidance_from_a_config(tmp_path: Path) -> None:
    path = write_config(
        tmp_path / "config.json",
        model_flavour="klein-4b",
        validation_resolution="512",
        validation_negative_prompt="a bird",
        validation_guidance=3.0,
    )
    words = ["--config", str(path), "--prompt", "a"]
    same = read_request([*words, "--model_flavour=klein-4b"], {})
    assert (same.steps, same.guidance, same.width) == (50, 3.0, 512)
    sibling = read_request([*words, "--model_flavour=klein-4b-distilled"], {})
    assert (sibling.steps, sibling.guidance, sibling.width) == (None, None, 512)


@pytest.mark.parametrize(
    ("flags", "notices"),
    [
        (
            ["--model_flavour=klein-4b-distilled", "--guidance=4", "--negative=a bird"],
            [
                "guidance and negative have no effect: klein-4b-distilled is distilled: guidance is built into its "
                "weights."
            ],
        ),
        (
            ["--model_flavour=klein-4b", "--guidance=1", "--negative=a bird"],
            ["negative has no effect: guidance is 1."],
        ),
        (["--model_flavour=dev", "--negative=a bird"], ["negative has no effect: guidance_real is 1."]),
        (["--model_flavour=klein-4b", "--negative=a bird"], []),
        (["--model_flavour=klein-4b-distilled"], []),
    ],
)
def test_guidance_without_effect_is_said(flags: list[str], notices: list[str]) -> None:
    said: list[str] = []
    read_request([*flags, "--prompt", "a"], {}, report=said.append)
    assert said == notices


def test_layers_that_a_flavour_was_not_trained_with_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"expected 9,18,27\. Remove it\."):
        asked("--prompt", "a", "--model_flavour=klein-4b", "--custom_text_encoder_intermediary_layers=10,20,30")
