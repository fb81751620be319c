"""A run that exports its LoRA for another program."""

from pathlib import Path

import pytest
from safetensors.torch import load_file
from tests.recipes.conftest import Workplace

from simpletuner.flux2.dialects import read_adapter
from simpletuner.flux2.lora_formats import lora_modules, write_adapter
from simpletuner.runs import finished
from simpletuner.runs.events import read_events
from simpletuner.runs.layout import EMA_FOLDER, LORA_NAME


@pytest.mark.slow
def test_a_run_exports_in_its_format_and_checkpoints_keep_diffusers_names(workplace: Workplace, tmp_path: Path) -> None:
    workplace.config |= {
        "lora_format": "kohya",
        "peft_lora_target_modules": ["to_q", "to_v", "norm_out.linear"],
        "max_train_steps": 1,
        "use_ema": True,
    }
    assert workplace.train() == 0
    events = list(read_events(workplace.run().events))
    first_step = next(at for at, event in enumerate(events) if event["type"] == "step")
    notices = [event["text"] for event in events[:first_step] if event["type"] == "notice"]
    assert (
        "In the kohya format, diffusers leaves out 1 of this LoRA's 5 layers, such as norm_out.linear. "
        "It reads all layers in the diffusers format." in notices
    )
    run = workplace.run()
    made = {}
    for name in ("", EMA_FOLDER):
        product = run.root / name / LORA_NAME
        kept = run.checkpoint(1) / name / LORA_NAME
        assert all(key.startswith("lora_unet_") for key in load_file(product))
        assert all(key.startswith("transformer.") for key in load_file(kept))
        file = read_adapter(product)
        back = tmp_path / f"back{name}.safetensors"
        write_adapter(back, lora_modules(file), "diffusers", file.header)
        assert back.read_bytes() == kept.read_bytes()
        made[product] = product.read_bytes()

    for product in made:
        product.unlink()
    assert workplace.train() == 0
    assert {product: product.read_bytes() for product in made} == made
    assert finished.missing_result(run, 1) is None
