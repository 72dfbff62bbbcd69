"""Verbs of `v4jax` in several processes on this machine."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(
    model: Path, data: Path, out: Path, *, processes: int, mesh: str, devices: int, steps: int = 5, **flags: Any
) -> list[subprocess.Popen]:
    """`v4jax finetune` as `start_verb` starts it.

    `epsilon` keeps AdamW from turning the rounding of a gradient near 0 into a whole step.
    """
    settings = dict(
        data=data, out=out, steps=steps, warmup_steps=1, batch_size=4, sequence_length=32, learning_rate=1e-4,
        epsilon=1e-5, eval_every=1000, save_every=2, held_out_tokens=100, held_out_fraction=0.3, mesh=mesh,
    )  # fmt: skip
    return start_verb("finetune", model, out, processes=processes, devices=devices, **settings | flags)


def start_verb(
    verb: str, model: Path, log: Path, *, processes: int, devices: int, **flags: Any
) -> list[subprocess.Popen]:
    """Processes of `devices` virtual devices each; what they print goes to LOG.<process>.log (`output`)."""
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, "-m", "v4jax", verb, str(model)]
    for name, value in flags.items():
        command += [f"--{name.replace('_', '-')}", str(value)]
    port, started = free_port(), []
    for process in range(processes):
        group = ["--coordinator", f"127.0.0.1:{port}", "--processes", str(processes), "--process", str(process)]
        with open(f"{log}.{process}.log", "w") as file:
            started.append(
                subprocess.Popen(
                    command + (group if processes > 1 else []), env=environment, stdout=file, stderr=subprocess.STDOUT
                )
            )
    return started


def rows(out: Path) -> list[dict[str, Any]]:
    """The training rows of a run's metrics so far."""
    file = out / "metrics.jsonl"
    text = file.read_text() if file.is_file() else ""
    found = [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
    return [row for row in found if "loss" in row]


def output(out: Path, process: int) -> str:
    return Path(f"{out}.{process}.log").read_text()
