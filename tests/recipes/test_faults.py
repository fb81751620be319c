"""`benchmarks/faults.py`: runs survive a kill at a random moment.

Of its ways to train those that no other test kills: LoRA, full training and every optimizer are killed at named moments
in `test_resume.py`, `test_full.py` and `test_optimizers.py`.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

FAULTS = Path(__file__).parents[2] / "benchmarks" / "faults.py"
SETUPS = ("8-bit AdamW, int8 base", "offload")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_that_was_killed_ends_as_if_nobody_had_touched_it(own_folder: Path) -> None:
    command = [sys.executable, "-P", str(FAULTS), "--kills", str(len(SETUPS)), "--seed", "3", "--jobs", "1"]
    command += [f"--setup={setup}" for setup in SETUPS]
    done = subprocess.run(command, cwd=own_folder, capture_output=True, text=True, check=False)
    lines = [json.loads(line) for line in Path("faults.jsonl").read_text().splitlines()]
    assert done.returncode == 0, [line for line in lines if not line["is_equal"]] or done.stderr
    assert [line["setup"] for line in lines] == list(SETUPS)
    again = subprocess.run(command, cwd=own_folder, capture_output=True, text=True, check=False)
    assert again.returncode == 0
    assert f"{len(SETUPS)} kills in all" in again.stdout
    assert len(Path("faults.jsonl").read_text().splitlines()) == len(SETUPS), "what is done is not done again"
