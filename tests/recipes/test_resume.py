"""Killed, stopped, damaged, repeated: a run ends with the bits of one that was left alone."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from tests.ranks import train_together
from tests.recipes.conftest import Workplace, commands_in, tensors_below

from simpletuner.base.files import sha256_file
from simpletuner.cli.main import main
from simpletuner.config.record import REMOVED
from simpletuner.flux2.tiny import make
from simpletuner.runs.checkpoints import MANIFEST
from simpletuner.train.checkpoint import STATE_NAME


@pytest.mark.slow
@pytest.mark.parametrize(
    "moment", ["scan:3", "text:2", "text:4", "latents:2", "step:1", "step:2", "checkpoint:2", "checkpoint:1"]
)
def test_killed_at_any_moment_and_started_again_it_ends_the_same(
    workplace: Workplace, same_bytes: Callable[[Workplace], None], moment: str
) -> None:
    killed = workplace.train_apart(kill_at=moment)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert workplace.train() == 0
    same_bytes(workplace)
    assert not list(workplace.run().checkpoints.glob(".tmp-*"))


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["text:3", "text:6"])
def test_a_streamed_text_encoder_ends_the_same_killed_or_not(
    workplace: Workplace, same_bytes: Callable[[Workplace], None], moment: str
) -> None:
    """Also where the next start holds it otherwise: how it is held is no part of a run."""
    killed = workplace.train_apart("--text_encoder_mode=streamed", kill_at=moment)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not list((workplace.folder / "cache" / "text").rglob("*.safetensors")), "one portion, not yet finished"
    assert workplace.train("--text_encoder_mode=streamed", "--max_train_steps=1") == 0
    assert workplace.train("--text_encoder_mode=resident") == 0
    same_bytes(workplace)


def test_more_steps_go_on_from_the_end(workplace: Workplace, same_bytes: Callable[[Workplace], None]) -> None:
    assert workplace.train("--max_train_steps=1") == 0
    assert workplace.train("--max_train_steps=3") == 0
    assert [event["resumed_from"] for event in workplace.events("run")] == [None, 1]
    same_bytes(workplace)


def test_a_damaged_checkpoint_is_passed_over_with_a_notice(
    workplace: Workplace, same_bytes: Callable[[Workplace], None], capsys: pytest.CaptureFixture[str]
) -> None:
    assert workplace.train("--max_train_steps=2") == 0
    victim = workplace.run().checkpoint(2) / "optimizer.safetensors"
    victim.write_bytes(victim.read_bytes()[:-1] + b"\0")
    workplace.run().lora.unlink()
    assert workplace.train() == 0
    assert "step-000002 is damaged and skipped: optimizer.safetensors does not have" in capsys.readouterr().out
    assert [event["state"] for event in workplace.events("checkpoint")].count("damaged") == 1
    same_bytes(workplace)


def test_all_damaged_is_an_error_and_not_a_fresh_start(
    workplace: Workplace, capsys: pytest.CaptureFixture[str]
) -> None:
    assert workplace.train("--max_train_steps=1") == 0
    (workplace.run().checkpoint(1) / "state.json").write_text("{}")
    assert workplace.train() == 6
    assert "all 1 checkpoints" in capsys.readouterr().err


def test_a_refused_change_shows_both_values_and_the_command_that_puts_it_back(
    workplace: Workplace, same_bytes: Callable[[Workplace], None], capsys: pytest.CaptureFixture[str]
) -> None:
    workplace.config["output_dir"] = "output/a run"
    workplace.write()
    assert main(["train", "--max_train_steps=1"]) == 0
    typed = ["--lora_rank=8", "--checkpoint_step_interval=7", "--seed", "3"]
    assert workplace.train(*typed) == 6
    error = capsys.readouterr().err
    assert "lora_rank = 8 (was 4), seed = 3 (was 42)" in error
    back, anew = commands_in(error)
    assert back == ["train", "--checkpoint_step_interval=7", "--lora_rank=4", "--seed=42"]
    assert anew == ["train", *typed, "--output_dir=output/a run-2"]
    assert main(back) == 0
    # "output/a run" is moved to where the fixture looks for it.
    (workplace.folder / "output" / "a run").rename(workplace.run().root)
    same_bytes(workplace)


@pytest.mark.slow
def test_another_batch_size_cuts_the_rest_of_the_epoch_anew_and_stays_so(
    cached_workplace: Workplace, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two of six images are trained; four are left, two a step, then whole epochs."""
    place = cached_workplace
    assert place.train("--max_train_steps=1") == 0
    other = ("--train_batch_size=2", "--gradient_accumulation_steps=1", "--max_train_steps=4")
    assert place.train(*other[:2], "--max_train_steps=2") == 0
    said = (
        "Note: From step 2 on, this run is trained with train_batch_size = 2 (was 1), gradient_accumulation_steps = 1"
    )
    assert said in (out := capsys.readouterr().out)
    assert "A step still has 2 images, in another order; this epoch continues with its remaining images." in out
    assert place.train(*other) == 0
    assert "Changed since step 2: max_train_steps = 4 (was 2).\n" in (out := capsys.readouterr().out)
    assert "Resuming from step 2 of 4" in out
    state = json.loads((place.run().checkpoint(4) / STATE_NAME).read_text())
    assert state["cuts"] == [{"steps": 1, "batch_size": 1, "batches_per_step": 2}]
    # Stopped in between or not: the same bits.
    first = f"--resume_from_checkpoint={place.run().checkpoint(1)}"
    assert place.train(*other, first, "--output_dir=output/at-once") == 0
    assert place.run("at-once").lora.read_bytes() == place.run().lora.read_bytes()


@pytest.mark.slow
def test_it_goes_on_with_other_processes_to_the_same_bytes(
    cached_workplace: Workplace, same_bytes: Callable[[Workplace], None], capsys: pytest.CaptureFixture[str]
) -> None:
    place = cached_workplace
    assert place.train("--max_train_steps=1") == 0
    train_together(2, "--gradient_accumulation_steps=1", "--max_train_steps=2")
    capsys.readouterr()
    assert place.train() == 0
    said = "max_train_steps = 3 (was 2), gradient_accumulation_steps = 2 (was 1), num_processes = 1 (was 2)."
    assert f"Changed since step 2: {said}" in capsys.readouterr().out
    same_bytes(place)


@pytest.mark.slow
def test_another_default_does_not_change_a_run(
    workplace: Workplace, same_bytes: Callable[[Workplace], None], capsys: pytest.CaptureFixture[str]
) -> None:
    """What is not given stays as the checkpoint has it, also at the start after the next."""
    assert workplace.train("--max_train_steps=1") == 0
    for key in ("learning_rate", "lora_rank", "mixed_precision", "gradient_accumulation_steps"):
        del workplace.config[key]
    for steps in (2, 3):
        assert workplace.train(f"--max_train_steps={steps}") == 0
        kept = "gradient_accumulation_steps = 2, learning_rate = 0.001, lora_rank = 4, mixed_precision = 'no'."
        assert f"Not set, so kept at the values of output/run/checkpoints/step-{steps - 1:06}" in (
            out := capsys.readouterr().out
        )
        assert kept in out
        assert json.loads(workplace.run().config.read_text())["lora_rank"] == 4
    same_bytes(workplace)


@pytest.mark.slow
def test_another_default_is_checked_against_what_is_given(
    workplace: Workplace, capsys: pytest.CaptureFixture[str]
) -> None:
    assert workplace.train("--max_train_steps=1") == 0
    rewrite_record(workplace, 1, dynamo_backend="inductor")
    assert workplace.train("--enable_group_offload", "--group_offload_type=leaf_level") == 2
    assert "enable_group_offload with dynamo_backend = inductor" in capsys.readouterr().err


@pytest.mark.slow
def test_an_option_that_the_checkpoint_does_not_know_is_no_difference(
    workplace: Workplace, same_bytes: Callable[[Workplace], None]
) -> None:
    assert workplace.train("--max_train_steps=1") == 0
    rewrite_record(workplace, 1, lora_dropout=None, tread_config=None, flow_sigmoid_scale=None)
    assert workplace.train() == 0
    same_bytes(workplace)


@pytest.mark.slow
def test_an_option_that_is_gone_is_refused_unless_it_changed_nothing(
    workplace: Workplace,
    same_bytes: Callable[[Workplace], None],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert workplace.train("--max_train_steps=1") == 0
    rewrite_record(workplace, 1, a_lost_option=0)
    assert workplace.train() == 6
    error = capsys.readouterr().err
    assert "was trained with a_lost_option = 0, which this release does not have" in error
    assert "Resume with the release that wrote it." in error
    monkeypatch.setitem(REMOVED, "a_lost_option", (0,))
    assert workplace.train() == 0
    same_bytes(workplace)


def rewrite_record(workplace: Workplace, step: int, **options: object) -> None:
    """Make a checkpoint's recorded configuration that of another release; None leaves the option out."""
    folder = workplace.run().checkpoint(step)
    state = json.loads((folder / STATE_NAME).read_text())
    config = state["config"] | options
    state["config"] = {name: value for name, value in config.items() if options.get(name, value) is not None}
    (folder / STATE_NAME).write_text(json.dumps(state))
    manifest = json.loads((folder / MANIFEST).read_text())
    size, digest = (folder / STATE_NAME).stat().st_size, sha256_file(folder / STATE_NAME)
    manifest["files"][STATE_NAME] = {"sha256": digest, "bytes": size}
    (folder / MANIFEST).write_text(json.dumps(manifest))


def test_another_caption_is_refused(workplace: Workplace, capsys: pytest.CaptureFixture[str]) -> None:
    assert workplace.train("--max_train_steps=1") == 0
    (workplace.folder / "datasets" / "pictures" / "picture-0.txt").write_text("something else")
    assert workplace.train() == 6
    assert "pictures: images, captions, crops, references or masks have changed" in capsys.readouterr().err


@pytest.mark.slow
def test_starting_over_needs_another_folder(workplace: Workplace, capsys: pytest.CaptureFixture[str]) -> None:
    assert workplace.train("--max_train_steps=1") == 0
    assert workplace.train("--resume_from_checkpoint=") == 6
    assert "already holds a run" in capsys.readouterr().err
    assert workplace.train("--max_train_steps=1", "--resume_from_checkpoint=", "--output_dir=output/other") == 0


@pytest.mark.slow
def test_a_run_goes_on_from_a_named_checkpoint(workplace: Workplace, same_bytes: Callable[[Workplace], None]) -> None:
    assert workplace.train("--max_train_steps=2") == 0
    workplace.run().lora.unlink()
    assert workplace.train("--resume_from_checkpoint=output/run/checkpoints/step-000001") == 0
    same_bytes(workplace)


def test_the_second_of_two_runs_in_one_folder_is_refused(
    workplace: Workplace, capsys: pytest.CaptureFixture[str]
) -> None:
    workplace.run().create()
    with workplace.run().lock():
        assert workplace.train() == 6
    assert f"in use by process {os.getpid()}" in capsys.readouterr().err


@pytest.mark.slow
def test_old_checkpoints_go_and_the_limit_stays(workplace: Workplace) -> None:
    assert workplace.train("--checkpoints_total_limit=1") == 0
    assert [path.name for path in workplace.run().checkpoints.iterdir()] == ["step-000003"]
    assert [(e["step"], e["state"]) for e in workplace.events("checkpoint")] == [
        (1, "saved"), (2, "saved"), (1, "pruned"), (3, "saved"), (2, "pruned"),
    ]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("how", ["signal", "file"])
def test_a_stop_saves_and_says_how_to_go_on(
    workplace: Workplace, same_bytes: Callable[[Workplace], None], how: str
) -> None:
    workplace.config["checkpoint_step_interval"] = 100
    workplace.write()
    flags = ("--max_train_steps=400",)
    process = subprocess.Popen(
        [sys.executable, "-m", "simpletuner", "train", *flags],
        cwd=workplace.folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 120
        while not workplace.events("step") and time.monotonic() < deadline:
            time.sleep(0.05)
        if how == "signal":
            process.send_signal(signal.SIGTERM)
        else:
            (workplace.run().control / "stop").touch()
        _, error = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 75, error
    assert "Run the same command again to resume" in error
    end = workplace.events("end")[-1]
    assert (end["reason"], end["exit_code"]) == ("stopped", 75)
    steps = end["step"]
    assert [event["step"] for event in workplace.events("checkpoint")] == [steps]
    if steps < 3:
        assert workplace.train_apart().returncode == 0
        same_bytes(workplace)


def change_past_the_heads(model: Path) -> None:
    """Add 1 to 4,000 numbers of each tensor of `model`, after its first 4 KiB."""
    for file in model.rglob("*.safetensors"):
        tensors = load_file(file)
        for tensor in tensors.values():
            tensor.view(-1)[4096 // tensor.element_size() :][:4000] += 1
        save_file(tensors, file)


def test_another_base_model_is_refused(workplace: Workplace, capsys: pytest.CaptureFixture[str]) -> None:
    """A folder keeps its name when its weights change: the fingerprint tells, wherever in a tensor they change."""
    make(workplace.folder / "model")
    workplace.config |= {"pretrained_model_name_or_path": "model"}
    assert workplace.train("--max_train_steps=1") == 0
    change_past_the_heads(workplace.folder / "model")
    assert workplace.train() == 6
    assert "VAE encoder, text encoder, transformer: not the weights or settings" in capsys.readouterr().err


@pytest.mark.slow
def test_caches_of_another_base_model_are_not_used_and_not_lost(
    workplace: Workplace, capsys: pytest.CaptureFixture[str]
) -> None:
    make(workplace.folder / "model")
    make(workplace.folder / "other")
    change_past_the_heads(workplace.folder / "other")

    def cached(model: str) -> str:
        workplace.config |= {"pretrained_model_name_or_path": model}
        workplace.write()
        assert main(["dataset", "cache"]) == 0
        return capsys.readouterr().out

    assert " 0 already cached" in cached("model")
    of_model = tensors_below(workplace.folder / "cache")
    assert cached("other").count(" 0 already cached") == 2
    assert tensors_below(workplace.folder / "cache").items() > of_model.items()
    assert cached("model").count(": 0 encoded") == 2
    (workplace.folder / "moved").mkdir()
    for model in ("model", "other"):
        (workplace.folder / model).rename(workplace.folder / "moved" / model)
        assert cached(f"moved/{model}").count(": 0 encoded") == 2
