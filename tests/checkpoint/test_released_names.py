import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(("model", "tensors"), [("flash", 69_187), ("pro", 145_116)])
def test_all_released_names_go_through_every_spelling_and_back_within_a_minute(model: str, tensors: int):
    # In a process of its own, where calls are not checked for their types: there are millions.
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "checkpoint" / "released_names.py"), model],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    used = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before
    assert (done.returncode, done.stdout) == (0, f"{tensors} tensors checked\n"), done.stderr[-4000:]
    assert used < 60  # of processor time: others may use the machine
