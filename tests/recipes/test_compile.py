"""Compiled blocks in whole runs, each in a process of its own: the shapes that tests check cannot be compiled."""

import re
import sys

import pytest
from safetensors.torch import load_file
from tests.recipes.conftest import CONFIG, PICTURES, Workplace


def test_without_it_no_compiler_is_imported(uninterrupted: Workplace) -> None:
    """`dynamo_backend=no` is the run without the option, and starts as fast."""
    place = Workplace(uninterrupted.folder, config=CONFIG | {"output_dir": "output/no", "dynamo_backend": "no"})
    place.write()
    report = (
        "import sys; from simpletuner.cli.main import main; code = main(['train']); "
        "found = [name for name in sys.modules if name.startswith(('torch._inductor.compile_fx', 'triton'))]; "
        "print('found', *found); sys.exit(code)"
    )
    done = place.apart(sys.executable, "-c", report)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "found"
    assert place.run("no").lora.read_bytes() == uninterrupted.run().lora.read_bytes()
    assert "Compiled" not in done.stdout


def test_a_compiler_that_fails_ends_the_run_and_names_the_way_out(
    workplace: Workplace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert workplace.train("--dynamo_backend=inductor") == 2
    assert capsys.readouterr().err == (
        "dynamo_backend = inductor without the C++ compiler no-such-compiler. Install it, name another in CXX, or "
        "give --dynamo_backend=no to train uncompiled.\n"
    )


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_compiled_losses_are_those_of_eager_over_twenty_steps_and_three_buckets(
    workplace: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To 1e-4 of each loss, in fp32: fused kernels sum in another order, and twenty steps of training amplify it."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(workplace.folder / "inductor"))
    workplace.config |= {
        "max_train_steps": 20,
        "gradient_accumulation_steps": 1,
        "checkpoint_step_interval": 20,
        "flux_lora_target": "tiny",
        "eval_steps_interval": 10,
        "num_eval_images": 1,
    }
    shapes = {"crop_aspect": "closest", "crop_aspect_buckets": [1.0, 1.7, 0.6]}
    workplace.datasets[0] |= shapes
    workplace.datasets.insert(0, PICTURES | shapes | {"id": "held", "dataset_type": "eval", "cache_dir_vae": "cache/e"})
    for name, backend in (("eager", "no"), ("compiled", "inductor")):
        flags = (f"--dynamo_backend={backend}", f"--output_dir=output/{name}")
        workplace.write()
        done = workplace.apart(sys.executable, "-m", "simpletuner", "train", *flags, timeout_s=600)
        assert done.returncode == 0, done.stderr
    assert len(set(re.findall(r"(\d+x\d+) \(\d+\)", done.stdout))) == 3
    assert workplace.losses("compiled") == pytest.approx(workplace.losses("eager"), rel=1e-4)
    told = re.findall(r"Compiled: (\d+) compilations of 2 kinds of block \(at most 32\) by inductor", done.stdout)
    assert told == ["3"], done.stdout  # once, at the trial: the first double block, the others, the single blocks
    before = [event["loss"] for name in ("eager", "compiled") for event in workplace.events("validation", name)]
    assert before[0] == before[len(before) // 2]  # what is only looked at is not compiled
    a, b = (load_file(workplace.run(name).lora) for name in ("eager", "compiled"))
    assert max((a[key] - b[key]).abs().max().item() for key in a) < 1e-2 * max(t.abs().max().item() for t in a.values())
