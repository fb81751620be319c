"""What every test may ask for: shapes checked at run time, one thread, a tiny model, a few pictures."""

import fcntl
import gc
import importlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

# Two workers on two cores: more threads than cores only make them wait. Read by torch when it is imported.
for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(variable, "1")
# As `cli/main.py` sets it: products whose last bits do not depend on where their inputs lie in memory.
os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")

# The options and caches of whoever runs the tests must not reach them, nor theirs reach a home folder.
for variable in [name for name in os.environ if name.startswith("SIMPLETUNER_")]:
    del os.environ[variable]
HOME_MADE_HERE = "PYTEST_SIMPLETUNER_HOME" not in os.environ  # xdist's workers inherit the controller's
if HOME_MADE_HERE:
    os.environ["PYTEST_SIMPLETUNER_HOME"] = tempfile.mkdtemp(prefix="simpletuner-tests-")
HOME = Path(os.environ["PYTEST_SIMPLETUNER_HOME"])
for variable in ("HF_HOME", "XDG_CACHE_HOME", "WANDB_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR"):
    (HOME / variable.lower()).mkdir(exist_ok=True)
    os.environ[variable] = str(HOME / variable.lower())
# No test reaches the network: nothing listens here, and those that speak HTTP start a server of their own.
os.environ["HF_ENDPOINT"] = "http://127.0.0.1:9"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["WANDB_MODE"] = "offline"

# Under `nohup` or a service HUP is ignored, and INT in what a script starts in the background. Tests of what a command
# does with them would see that.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Workers, and commands in processes of their own, import the same modules: compile each once.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

import jaxtyping  # noqa: E402  after the environment is set
from tests.shapes import jaxtyped_with_shapes  # noqa: E402

# Every signature with shapes of these rooms is checked on every call. Outside the tests the shapes cost nothing.
CHECKED = (
    *(f"simpletuner.{room}" for room in ("flow", "memory", "flux2", "data", "train")),
    "embedded_exam",
    "embedded_judge",
)
if loaded := [name for name in CHECKED if name in sys.modules]:
    raise RuntimeError(f"imported before their shapes could be checked: {', '.join(loaded)}")
jaxtyping.jaxtyped = jaxtyped_with_shapes  # type: ignore[assignment]  # the hook decorates by this name
jaxtyping.install_import_hook(CHECKED, "beartype.beartype")

import pytest  # noqa: E402
from PIL import Image  # noqa: E402

MODULES_PER_FREEZE = 50
NEEDED_BYTES = 4 * 2**30
frozen_modules = 0


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """After a test that imported many modules, take their objects out of later garbage collections.

    A run collects garbage after each phase. With the test libraries and all model libraries loaded, that takes 0.3 s
    each time; without them a tenth of it. Between two tests nothing else lives but fixtures of a wider scope.
    """
    global frozen_modules  # noqa: PLW0603  once per process
    if "torch" in sys.modules:  # as every command that computes
        from simpletuner.memory.cpu_products import multiply_bf16_in_fp32

        multiply_bf16_in_fp32()
    if len(sys.modules) > frozen_modules + MODULES_PER_FREEZE:
        gc.collect()
        gc.freeze()
        frozen_modules = len(sys.modules)


def pytest_configure() -> None:
    """Ask for room on the disk before 7,000 tests start: a training run stops where less than 2 GiB are free."""
    folder = tempfile.gettempdir()
    free = shutil.disk_usage(folder).free
    if HOME_MADE_HERE and free < NEEDED_BYTES:
        shutil.rmtree(HOME, ignore_errors=True)
        raise pytest.UsageError(
            f"{folder} has {free / 2**30:.1f} GiB free, the tests need {NEEDED_BYTES / 2**30:.0f}: "
            "free some space, or set TMPDIR to a folder on another disk"
        )


def pytest_unconfigure() -> None:
    if HOME_MADE_HERE:
        shutil.rmtree(HOME, ignore_errors=True)


@pytest.fixture
def said_deepspeed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """A DeepSpeed as far as a configuration asks for one: its version, and another after a call. Nothing of it can be
    imported.
    """
    place = tmp_path / "said-deepspeed"

    def say(version: str) -> None:
        shutil.rmtree(place, ignore_errors=True)
        folder = place / f"deepspeed-{version}.dist-info"
        folder.mkdir(parents=True)
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: deepspeed\nVersion: {version}\n")
        importlib.invalidate_caches()

    say("0.19.8")
    monkeypatch.syspath_prepend(str(place))
    return say


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A temporary folder that is the same one for all workers of this session."""
    folder = tmp_path_factory.getbasetemp()
    return folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder


def embedded_folder(shared_folder: Path, flavour: str) -> Path:
    """An embedded FLUX.2 as a diffusers folder, made once per session."""
    from simpletuner.flux2.tiny import make  # torch, only where a test needs it

    folder = shared_folder / f"{flavour}-flux2"
    with folder.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            make(folder, flavour)  # type: ignore[arg-type]
    return folder


@pytest.fixture(scope="session")
def tiny_folder(shared_folder: Path) -> Path:
    """The embedded model. Read only: copy it to change it."""
    return embedded_folder(shared_folder, "tiny")


@pytest.fixture(scope="session")
def tiny_klein_folder(shared_folder: Path) -> Path:
    """The embedded klein base. Read only: copy it to change it."""
    return embedded_folder(shared_folder, "tiny-klein")


@pytest.fixture(scope="session")
def tiny_klein_distilled_folder(shared_folder: Path) -> Path:
    """The embedded distilled klein. Read only: copy it to change it."""
    return embedded_folder(shared_folder, "tiny-klein-distilled")


@pytest.fixture(scope="session")
def acting_lora(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA of the tiny model that changes its pictures, in a folder of its own."""
    import torch

    from simpletuner.config.options.lora import LoraOptions
    from simpletuner.config.options.model import ModelOptions
    from simpletuner.flux2.export import save_lora
    from simpletuner.flux2.load import load_transformer
    from simpletuner.flux2.lora import attach
    from simpletuner.flux2.source import locate
    from simpletuner.runs.layout import LORA_NAME

    source = locate(ModelOptions(pretrained_model_name_or_path=str(tiny_folder)), report=print)
    adapter = attach(load_transformer(source, torch.float32, "cpu"), LoraOptions(flux_lora_target="mlp"), seed=0)
    generator = torch.Generator().manual_seed(0)
    for parameter in adapter.parameters():
        parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    path = tmp_path_factory.mktemp("lora") / LORA_NAME
    save_lora(path, adapter, metadata={"base_model": "another-model"})
    return path


@pytest.fixture(scope="session")
def pictures(shared_folder: Path) -> Path:
    """Six pictures of different shapes, each with a .txt caption. Read only: copy the folder to change it."""
    folder = shared_folder / "pictures"
    with (shared_folder / "pictures.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            draw_pictures(folder)
    return folder


def draw_pictures(folder: Path) -> None:
    """Gradients, so that a wrong crop or a flip shows in the numbers."""
    folder.mkdir()
    sizes = ((128, 128), (160, 96), (96, 160), (144, 112), (112, 144), (192, 128))
    for index, (width, height) in enumerate(sizes):
        across = Image.linear_gradient("L").rotate(90).resize((width, height))
        down = Image.linear_gradient("L").resize((width, height))
        level = Image.new("L", (width, height), 40 * index)
        Image.merge("RGB", (across, down, level)).save(folder / f"picture-{index}.png")
        (folder / f"picture-{index}.txt").write_text(f"a soft gradient, number {index}\n", encoding="utf-8")


@pytest.fixture(scope="session")
def example_folder(shared_folder: Path) -> Path:
    """The datasets of the example, and its caches, filled by a run of one step. Read only: copy `datasets` and `cache`
    to train on them. One for all workers.
    """
    folder = shared_folder / "example"
    command = ["train", "--example=tiny-lora", "--max_train_steps=1", "--train_batch_size=1", "--validation_disable"]
    with (shared_folder / "example.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "output").exists():
            folder.mkdir(exist_ok=True)
            filled = [sys.executable, "-P", "-m", "simpletuner", *command]
            subprocess.run(filled, cwd=folder, check=True, capture_output=True, text=True)
    return folder


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Each test works in a folder of its own, so a relative path in a config never lands in the checkout."""
    monkeypatch.chdir(tmp_path)
    return tmp_path
