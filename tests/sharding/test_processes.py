"""Several processes on this machine: as one process does it, and with an end when one is lost."""

import time
from pathlib import Path

import numpy as np
import pytest
from sharding import processes
from tolerances import TRAJECTORY_RELATIVE
from train.tiny_run import write_model, write_texts

pytestmark = pytest.mark.slow
MESH = "fsdp=2,expert=2"
START_SECONDS = 600
END_SECONDS = 60


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("inputs")
    return write_model(folder / "model"), write_texts(folder / "data")


def finish(started: list, out: Path) -> None:
    for number, process in enumerate(started):
        assert process.wait(START_SECONDS) == 0, processes.output(out, number)[-3000:]


@pytest.fixture(scope="module")
def alone(inputs: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one process with the same mesh."""
    out = tmp_path_factory.mktemp("alone") / "run"
    finish(processes.start(*inputs, out, processes=1, mesh=MESH, devices=4), out)
    return out


def assert_same_run(got: Path, want: Path, steps: int = 5) -> None:
    rows, wanted = processes.rows(got), processes.rows(want)
    assert [row["step"] for row in rows] == list(range(1, steps + 1))
    for name in ("loss", "mtp_loss", "gradient_norm"):
        a, b = ([row[name] for row in run[:steps]] for run in (rows, wanted))
        np.testing.assert_allclose(a, b, rtol=TRAJECTORY_RELATIVE, err_msg=name)
    assert len({row["loss"] for row in rows}) == steps


@pytest.mark.parametrize("count", [2, pytest.param(4, marks=pytest.mark.nightly)])
def test_five_steps_in_several_processes_equal_those_of_one(
    count: int, inputs: tuple[Path, Path], alone: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    finish(processes.start(*inputs, out, processes=count, mesh=MESH, devices=4 // count), out)
    assert_same_run(out, alone)
    assert (out / "model" / "conversion.json").is_file()


def test_two_processes_generate_the_text_of_one(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    settings = dict(prompt="def main", max_new_tokens=6, temperature=0.8, mesh="expert=2,tensor=2")
    texts = []
    for count in (1, 2):
        out = tmp_path / f"run-{count}"
        finish(processes.start_verb("generate", inputs[0], out, processes=count, devices=4 // count, **settings), out)
        texts.append(processes.output(out, 0).splitlines()[-1])
    assert texts[0] == texts[1]
    assert texts[0].strip()


@pytest.mark.nightly
def test_a_lost_process_ends_the_others_and_another_number_of_processes_goes_on(
    inputs: tuple[Path, Path], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    # More steps than can be done meanwhile.
    started = processes.start(*inputs, out, processes=2, mesh=MESH, devices=2, steps=100_000)
    deadline = time.monotonic() + START_SECONDS
    while len(processes.rows(out)) < 4:
        assert time.monotonic() < deadline, processes.output(out, 0)[-3000:]
        assert started[1].poll() is None, processes.output(out, 1)[-3000:]
        time.sleep(0.2)
    started[1].kill()
    lost = time.monotonic()
    code = started[0].wait(START_SECONDS)
    assert time.monotonic() - lost < END_SECONDS
    message = processes.output(out, 0)
    assert code != 0
    ours = "v4jax: process 0 of 2: the others cannot be reached" in message and "its last saved state" in message
    # JAX's own watch may be faster; it cannot be caught.
    assert ours or "another task died" in message, message[-3000:]

    done = processes.rows(out)[-1]["step"]
    again = processes.start(*inputs, out, processes=1, mesh="fsdp=2", devices=2, steps=100_000)[0]
    deadline = time.monotonic() + START_SECONDS
    try:
        while "going on after step" not in processes.output(out, 0) or processes.rows(out)[-1]["step"] <= done:
            assert time.monotonic() < deadline, processes.output(out, 0)[-3000:]
            assert again.poll() is None, processes.output(out, 0)[-3000:]
            time.sleep(0.2)
    finally:
        again.kill()
        again.wait()
