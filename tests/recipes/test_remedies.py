"""Remedies of whole runs, typed as they are printed."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from tests.recipes.conftest import PICTURES, Workplace, commands_in

from simpletuner.base.storage import LocalStorage
from simpletuner.cli.main import main
from simpletuner.data.cache.store import HEADER_KEY, Store
from simpletuner.runs.layout import LORA_NAME
from simpletuner.train.checkpoint import STATE_NAME


def spoil_latents(cache: Path) -> None:
    """Make the first cached latents infinite, as a broken encoder would."""
    path = min(cache.rglob("*.safetensors"))
    with safe_open(path, "pt") as file:  # type: ignore[no-untyped-call]
        tensors = {name: torch.full_like(file.get_tensor(name), torch.inf) for name in file.keys()}  # noqa: SIM118
        header = json.loads(file.metadata()[HEADER_KEY])
    del header["sha256"]
    Store(LocalStorage(cache)).write(path.stem, tensors, header)


@pytest.mark.slow
def test_a_loss_that_is_not_finite_names_commands_that_go_on(
    cached_workplace: Workplace, capsys: pytest.CaptureFixture[str]
) -> None:
    workplace = cached_workplace
    workplace.config |= {"output_dir": "output/a run", "max_train_steps": 6}
    spoil_latents(workplace.folder / "cache" / "vae")
    assert workplace.train("--gradient_accumulation_steps=1", "--seed=6") == 3
    error = capsys.readouterr().err
    past, slower = commands_in(error)
    saved = max(event["step"] for event in workplace.events("checkpoint", "a run"))
    assert f"the loss of step {saved + 1} is not finite; it came from pictures/picture-" in error
    assert f"the run is saved at step {saved}" in error
    assert "learning_rate=0.0001" in " ".join(slower)

    assert main(slower) == 3, "the batch is as bad as before"
    assert workplace.events("checkpoint", "a run")[-2]["state"] != "damaged"
    assert f"Resuming from step {saved - 1} of 6" in (told := capsys.readouterr().out)
    assert f"From step {saved} on, this run is trained with learning_rate = 0.0001 (was 0.001)" in told

    assert main(past) == 0
    skipped = [event["text"] for event in workplace.events("notice", "a run") if "is skipped" in event["text"]]
    assert len(skipped) == 1
    assert skipped[0].startswith(f"the loss of step {saved + 1} is not finite; it came from pictures/picture-")
    state = json.loads((workplace.run("a run").checkpoint(6) / STATE_NAME).read_text())
    assert (state["step"], state["skipped_steps"]) == (6, [saved + 1])
    assert saved + 1 not in {event["step"] for event in workplace.events("step", "a run")}
    assert workplace.run("a run").lora.exists()


@pytest.mark.slow
def test_a_run_goes_on_with_another_learning_rate_and_says_so(
    cached_workplace: Workplace, capsys: pytest.CaptureFixture[str]
) -> None:
    workplace = cached_workplace
    assert workplace.train("--max_train_steps=1") == 0
    capsys.readouterr()
    assert workplace.train("--max_train_steps=2", "--learning_rate=5e-4", "--max_grad_norm=1") == 0
    told = capsys.readouterr().out
    assert "Changed since step 1: max_train_steps = 2 (was 1)." in told
    text = "From step 2 on, this run is trained with learning_rate = 0.0005 (was 0.001), max_grad_norm = 1.0 (was 2.0)"
    assert text in told
    assert any(event["text"].startswith(text) for event in workplace.events("notice"))
    assert [event["lr"] for event in workplace.events("step")] == [1e-3, 5e-4]
    assert json.loads(workplace.run().config.read_text())["learning_rate"] == 5e-4
    fingerprints = set()
    for step in (1, 2):
        with safe_open(workplace.run().checkpoint(step) / LORA_NAME, "pt") as file:  # type: ignore[no-untyped-call]
            fingerprints.add(file.metadata()["simpletuner.config"])
    assert len(fingerprints) == 2

    # What is left out stays as the last checkpoint has it.
    del workplace.config["learning_rate"]
    assert workplace.train() == 0
    assert workplace.events("step")[-1]["lr"] == 5e-4


@pytest.mark.slow
def test_other_images_go_on_from_the_weights_of_a_finished_run(
    cached_workplace: Workplace, capsys: pytest.CaptureFixture[str]
) -> None:
    workplace = cached_workplace
    workplace.config["output_dir"] = "output/a run"
    assert workplace.train("--max_train_steps=1") == 0
    folder = workplace.folder / PICTURES["instance_data_dir"]
    (folder / "another.png").write_bytes((folder / "picture-0.png").read_bytes())
    (folder / "another.txt").write_text("another")
    capsys.readouterr()

    assert workplace.train("--max_train_steps=1") == 0
    told = capsys.readouterr().out
    assert "This run is finished: 1 steps" in told
    longer, other_images, anew = commands_in(told)
    assert longer == ["train", "--max_train_steps=2"]
    assert anew == ["train", "--max_train_steps=1", "--output_dir=output/a run-2"]

    assert main(longer) == 6
    out, error = capsys.readouterr()
    assert (
        "pictures: images, captions, crops, references or masks have changed since output/a run/checkpoints/step-000001"
        in error
    )
    assert "Captions:" not in out, "known before an encoder loads"
    from_weights, _ = commands_in(error)
    assert from_weights == [
        "train",
        "--max_train_steps=2",
        "--output_dir=output/a run-2",
        "--init_lora=output/a run/pytorch_lora_weights.safetensors",
    ]
    assert other_images == [*from_weights[:1], "--max_train_steps=1", *from_weights[2:]]
    assert main(from_weights) == 0
    assert workplace.run("a run-2").lora.exists()
