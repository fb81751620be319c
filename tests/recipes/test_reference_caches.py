"""The latents of references by the real command: each once, held-out sets included, and whole after a kill."""

import json
import shutil
import signal

import pytest
from tests.recipes.conftest import Workplace, tensors_below

from simpletuner.cli.main import main


@pytest.mark.slow
def test_references_are_encoded_once_and_a_kill_changes_no_byte(
    workplace: Workplace, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each of six images has itself as a strict reference, three have a loose one too; a held-out set has the same."""
    images, before, style = (workplace.folder / "datasets" / name for name in ("pictures", "before", "style"))
    shutil.copytree(images, before)
    style.mkdir()
    for path in sorted(before.glob("*.png"))[:3]:
        shutil.copy(path, style)
    workplace.datasets[0]["conditioning_data"] = ["before", "style"]
    held = {"id": "held", "dataset_type": "eval", "cache_dir_vae": "cache/held"}
    condition = {"dataset_type": "conditioning", "type": "local"}
    workplace.datasets += [
        workplace.datasets[0] | held,
        condition | {"id": "before", "conditioning_type": "reference_strict", "instance_data_dir": "datasets/before"},
        condition | {"id": "style", "conditioning_type": "reference_loose", "instance_data_dir": "datasets/style"},
    ]
    killed = workplace.train_apart(kill_at="latents:20")
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    left = tensors_below(workplace.folder / "cache")
    assert main(["dataset", "cache", "--json"]) == 0
    out = capsys.readouterr().out
    train, held_out = json.loads(out[out.index("{") :])["sets"]
    assert train["references"] == [{"count": 1, "pictures": 3}, {"count": 2, "pictures": 3}] == held_out["references"]
    finished = tensors_below(workplace.folder / "cache")
    assert finished.items() > left.items()
    counts = {
        name: len(tensors_below(workplace.folder / "cache" / name))
        for name in ("vae", "held", "vae/before", "vae/style")
    }
    shutil.rmtree(workplace.folder / "cache")
    assert main(["dataset", "cache"]) == 0
    assert tensors_below(workplace.folder / "cache") == finished
    assert counts == {"vae": 15, "held": 6, "vae/before": 6, "vae/style": 3}, "6 images and 9 references in vae"
