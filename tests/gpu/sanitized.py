"""Three streamed training steps, for a process with TORCH_CUDA_SANITIZER=1.

    python sanitized.py WAY [--without-waits]

WAY is a key of `WAYS` in test_residency.py.
"""

import sys
import tempfile
from pathlib import Path

import pytest
import torch
from delays import ignore_all_waits
from rehearsal import IS_REHEARSAL
from test_residency import WAYS, prepared
from tiny_training import train

if __name__ == "__main__":
    device = torch.device("cpu" if IS_REHEARSAL else "cuda")
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as monkeypatch:
        trained, _ = prepared("int8-quanto", device, WAYS[sys.argv[1]], Path(folder))
        if "--without-waits" in sys.argv:
            ignore_all_waits(monkeypatch)
        train(trained, 3)
