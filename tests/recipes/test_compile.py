"""Compiled blocks in whole runs, each in a process of its own: the shapes that tests check cannot be compiled."""

import json
import re
import sys
from collections.abc import Callable

import pytest
from safetensors.torch import load_file
from tests.recipes.conftest import CONFIG, PICTURES, Workplace

from simpletuner.config.load import load
from simpletuner.memory.world import World
from simpletuner.runs.events import EventLog
from simpletuner.runs.process import Requests
from simpletuner.train import job
from simpletuner.train.report import Reporter


@pytest.mark.slow
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
        "dynamo_backend = inductor on a machine that cannot compile: there is no C++ compiler no-such-compiler (CXX "
        "names another). Fix that, or give --dynamo_backend=no to train uncompiled.\n"
    )


def test_by_default_a_cpu_trains_uncompiled_and_the_record_says_so(uninterrupted: Workplace) -> None:
    assert "dynamo_backend" not in uninterrupted.config
    run = uninterrupted.run()
    assert json.loads(run.config.read_text())["dynamo_backend"] == "no"
    assert json.loads((run.checkpoint(3) / "state.json").read_text())["config"]["dynamo_backend"] == "no"
    assert "dynamo_backend" not in run.log.read_text()


@pytest.mark.slow
def test_what_auto_cannot_compile_is_trained_uncompiled_from_the_first_step(
    workplace: Workplace, same_bytes: Callable[[Workplace], None]
) -> None:
    """In this process nothing compiles, since shapes are checked."""
    workplace.write()
    loaded = load(["--dynamo_backend=inductor"], folder=workplace.folder, environ={})
    task = job.build(loaded, World.single())
    task.run.create()
    with EventLog(task.run.events) as events, Requests(task.run.control) as requests:
        attempt = job.Attempt(task, Reporter(events=events, log=task.run.log), requests)
        attempt.may_drop_compiled = True  # as after `auto` on a GPU that compiles
        attempt()
    told = re.findall(r"The blocks are not compiled \(dynamo_backend = auto\): .*", task.run.log.read_text())
    assert len(told) == 1
    assert "cannot be compiled" in told[0]
    assert json.loads(task.run.config.read_text())["dynamo_backend"] == "no"
    same_bytes(workplace)


@pytest.mark.slow
def test_a_resumed_run_keeps_what_it_began_with(
    workplace: Workplace, same_bytes: Callable[[Workplace], None], capsys: pytest.CaptureFixture[str]
) -> None:
    assert workplace.train("--max_train_steps=1", "--dynamo_backend=no") == 0
    assert workplace.train("--max_train_steps=2", "--dynamo_backend=auto") == 0
    assert workplace.train() == 0
    assert "dynamo_backend" not in capsys.readouterr().out
    assert json.loads(workplace.run().config.read_text())["dynamo_backend"] == "no"
    same_bytes(workplace)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.usefixtures("inductor_cache")
def test_compiled_losses_are_those_of_eager_over_twenty_steps_and_three_buckets(workplace: Workplace) -> None:
    """To 1e-4 of each loss, in fp32: fused kernels sum in another order, and twenty steps of training amplify it."""
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


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.usefixtures("inductor_cache")
def test_a_compiled_streamed_run_is_the_compiled_resident_one_bit_for_bit(workplace: Workplace) -> None:
    workplace.config |= {
        "dynamo_backend": "inductor",
        "max_train_steps": 2,
        "base_model_precision": "int8-quanto",
        "group_offload_blocks_per_group": 3,
        "activation_offload": True,
    }
    workplace.write()
    for name, is_streamed in (("resident", "false"), ("streamed", "true")):
        flags = (f"--enable_group_offload={is_streamed}", f"--output_dir=output/{name}")
        done = workplace.apart(sys.executable, "-m", "simpletuner", "train", *flags, timeout_s=400)
        assert done.returncode == 0, done.stderr
        assert "Compiled: 3 compilations of 2 kinds of block" in done.stdout
    assert "Streamed: 3 groups" in done.stdout
    assert workplace.losses("streamed") == workplace.losses("resident")
    assert workplace.run("streamed").lora.read_bytes() == workplace.run("resident").lora.read_bytes()


SHORT_ATTENTION = """
import torch
import torch.fx.experimental._config as symbols
from simpletuner.flux2.rotary import rotary
from simpletuner.flux2.transformer import attend


def joint(text, image, cos, sin):
    tokens = torch.cat([text, image], dim=1)
    return attend(tokens, tokens, tokens, (cos, sin))


symbols.use_duck_shape = False
text, image = (torch.randn(1, n, 2, 32, dtype=torch.bfloat16, requires_grad=True) for n in (7, 25))
angles = rotary(torch.arange(32)[:, None].expand(-1, 4), (8, 8, 8, 8), 2000.0)
torch.compile(joint, backend="inductor", fullgraph=True, dynamic=True)(text, image, *angles).sum().backward()
assert text.grad.isfinite().all() and image.grad.isfinite().all()
"""


@pytest.mark.slow
@pytest.mark.usefixtures("inductor_cache")
def test_attention_of_few_tokens_in_bf16_compiles(workplace: Workplace) -> None:
    """Its table of weights, as wide as text and image together, is one that inductor cannot take."""
    done = workplace.apart(sys.executable, "-c", SHORT_ATTENTION)
    assert done.returncode == 0, done.stderr
