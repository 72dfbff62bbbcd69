"""Whole runs of `finetune`: what they leave, and that interruptions change nothing."""

import dataclasses
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from train.tiny_run import SETTINGS, run_config, write_model, write_texts

from v4jax.checkpoint.reader import open_checkpoint
from v4jax.errors import UserError
from v4jax.loading import load
from v4jax.train import evaluate, loop
from v4jax.train.recipes import TrainOptions
from v4jax.train.report import MetricsLog
from v4jax.train.step import StepMetrics

TIMING = {"seconds", "tokens_per_second"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "model")


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_texts(tmp_path_factory.mktemp("texts") / "texts")


@pytest.fixture(scope="module")
def finished(model: Path, texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing interrupted."""
    out = tmp_path_factory.mktemp("runs") / "finished"
    loop.finetune(model, str(texts), out, SETTINGS)
    return out


def rows_of(out: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in TIMING} for row in rows]


def weights_of(out: Path) -> dict[str, str]:
    files = sorted((out / "model").rglob("*.safetensors"))
    assert files
    return {str(file.relative_to(out)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def test_a_run_leaves_a_model_its_metrics_and_its_curves(finished: Path, model: Path) -> None:
    assert (finished / "loss.png").read_bytes()[:4] == b"\x89PNG"
    rows = rows_of(finished)
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3, 4, 5, 6]
    assert [row["step"] for row in rows if "held_out_loss" in row] == [0, 3, 6]
    assert all(np.isfinite(value) for row in rows for value in row.values())
    assert (finished / "model" / "tokenizer.json").read_bytes() == (model / "tokenizer.json").read_bytes()
    assert open_checkpoint(finished / "model").recorded_source == str(model.resolve())
    trained, untrained = load(finished / "model"), load(model)
    assert trained.config == untrained.config
    assert not np.array_equal(trained.head_weight, untrained.head_weight)


def test_a_finished_run_is_left_as_it_is(finished: Path, model: Path, texts: Path) -> None:
    before = {file: file.stat().st_mtime_ns for file in finished.rglob("*") if file.name != "finetune.json"}
    loop.finetune(model, str(texts), finished, SETTINGS)
    assert {file: file.stat().st_mtime_ns for file in before} == before


@pytest.mark.parametrize("last_row", [2, 3, 6])
def test_an_interrupted_run_goes_on_to_the_same_bits(
    finished: Path, model: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, last_row: int
) -> None:
    out, write = tmp_path / "run", MetricsLog.write

    def write_then_stop(log: MetricsLog, row: dict[str, Any]) -> None:
        write(log, row)
        if row["step"] == last_row:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(MetricsLog, "write", write_then_stop)
        with pytest.raises(KeyboardInterrupt):
            loop.finetune(model, str(texts), out, SETTINGS)
    loop.finetune(model, str(texts), out, SETTINGS)
    assert weights_of(out) == weights_of(finished)
    assert rows_of(out) == rows_of(finished)


def test_an_unfinished_export_is_made_again(finished: Path, model: Path, texts: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    loop.finetune(model, str(texts), out, SETTINGS)
    (out / "model").rename(out / "model.partial")
    (out / "model.partial" / "conversion.json").unlink()
    loop.finetune(model, str(texts), out, SETTINGS)
    assert weights_of(out) == weights_of(finished)


@pytest.mark.slow
def test_kill_9_at_any_moment_changes_nothing(model: Path, texts: Path, tmp_path: Path) -> None:
    """Kills at random times of the whole run, and shortly after random rows of its metrics."""
    command = [sys.executable, "-m", "v4jax", "finetune", str(model), "--data", str(texts)]
    flags = dict(
        steps=40, warmup_steps=1, batch_size=2, sequence_length=24, learning_rate=1e-3, eval_every=7, save_every=3,
        held_out_tokens=200, held_out_fraction=0.3,
    )  # fmt: skip
    command += [part for name, value in flags.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    # The first run fills the compilation cache that the others read.
    start = time.monotonic()
    subprocess.run([*command, "--out", str(tmp_path / "whole")], check=True, capture_output=True)
    seconds = time.monotonic() - start
    rng, out, kills = random.Random(0), tmp_path / "killed", 0
    for attempt in range(9):
        process = subprocess.Popen(
            [*command, "--out", str(out)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        rows = len(_lines(out / "metrics.jsonl")) + rng.randint(1, 6)
        deadline = time.monotonic() + (rng.uniform(0, seconds) if attempt % 3 == 0 else 60 + 2 * seconds)
        while process.poll() is None and time.monotonic() < deadline and len(_lines(out / "metrics.jsonl")) < rows:
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.1))
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            kills += 1
        process.wait()
    assert kills >= 4
    subprocess.run([*command, "--out", str(out)], check=True, capture_output=True)
    assert weights_of(out) == weights_of(tmp_path / "whole")
    assert rows_of(out) == rows_of(tmp_path / "whole")


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.is_file() else []


def figures(model: Path, texts: Path, result: Path, **changes: Any) -> dict[str, Any]:
    fields = dict(held_out_fraction=0.3, sequence_length=24, batch_size=2, json=result) | changes
    evaluate.run(evaluate.Options(str(model), str(texts), **fields))
    return json.loads(result.read_text())


def test_evaluate_agrees_with_the_run_and_counts_the_same_tokens(
    finished: Path, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = figures(finished / "model", texts, tmp_path / "figures.json", max_tokens=200)
    last = rows_of(finished)[-1]
    assert report["tokens"] == last["held_out_tokens"]
    assert report["model"]["loss"] == pytest.approx(last["held_out_loss"], rel=1e-5)
    assert report["model"]["accuracy"] == pytest.approx(last["held_out_accuracy"])
    assert 0 < report["bigram"]["loss"] < report["unigram"]["loss"] < np.log(258)
    printed = capsys.readouterr().out
    assert all(word in printed for word in ("model", "bigram", "unigram", "bits per byte"))


def test_evaluate_reads_all_of_the_text_when_asked(model: Path, texts: Path, tmp_path: Path) -> None:
    report = figures(model, texts, tmp_path / "figures.json", held_out_fraction=1)
    assert report["documents"] == 40
    assert "bigram" not in report


def test_evaluate_reads_rows_no_longer_than_the_context(model: Path, texts: Path, tmp_path: Path) -> None:
    small = write_model(tmp_path / "small", dataclasses.replace(run_config(), max_position_embeddings=24))
    whole = figures(small, texts, tmp_path / "figures.json", sequence_length=24, max_tokens=100)
    assert figures(small, texts, tmp_path / "figures.json", sequence_length=None, max_tokens=100) == whole
    with pytest.raises(UserError, match="sequence_length: got 25, the model's context is 24 tokens"):
        figures(small, texts, tmp_path / "figures.json", sequence_length=25)


def test_evaluate_looks_for_the_place_of_its_figures_first(model: Path, texts: Path) -> None:
    with pytest.raises(UserError, match="--json: cannot write /nowhere/figures"):
        figures(model, texts, Path("/nowhere/figures.json"))


def test_the_command_line_has_a_flag_for_every_setting() -> None:
    flags = {field.name: field.default for field in dataclasses.fields(loop.Options)}
    for field in dataclasses.fields(TrainOptions):
        assert flags[field.name] is None, field.name


@pytest.mark.parametrize("is_there", [True, False])
def test_a_run_that_could_not_begin_leaves_nothing_behind(
    model: Path, texts: Path, tmp_path: Path, is_there: bool
) -> None:
    out = tmp_path / "run"
    if is_there:
        out.mkdir()
    with pytest.raises(UserError, match="matches no parameter and no role"):
        loop.finetune(model, str(texts), out, dataclasses.replace(SETTINGS, freeze=("nonsense",)))
    assert [path.name for path in tmp_path.rglob("*")] == (["run"] if is_there else [])


def test_a_run_interrupted_before_it_began_leaves_nothing_behind(
    model: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(loop, "take_apart", interrupted)
    with pytest.raises(KeyboardInterrupt):
        loop.finetune(model, str(texts), tmp_path / "run", SETTINGS)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("progress", ["{}", "[1]"])
def test_rejects_a_state_with_a_damaged_place_in_the_data(
    finished: Path, model: Path, texts: Path, tmp_path: Path, progress: str
) -> None:
    out = shutil.copytree(finished, tmp_path / "run", ignore=shutil.ignore_patterns("model"))
    newest = max((out / "state").iterdir(), key=lambda path: int(path.name))
    (newest / "progress" / "metadata").write_text(progress)
    with pytest.raises(UserError, match=f"{newest.name}: cannot be restored .*remove this state"):
        loop.finetune(model, str(texts), out, SETTINGS)


def test_going_on_with_a_run_in_vain_leaves_it_as_it_is(finished: Path, model: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    with pytest.raises(UserError, match="no text"):
        loop.finetune(model, "/nowhere", out, SETTINGS)
    (out.parent / "run").mkdir()
    marker = json.loads((finished / "finetune.json").read_text()) | {"data": "/nowhere"}
    (out / "finetune.json").write_text(json.dumps(marker))
    with pytest.raises(UserError, match="no text"):
        loop.finetune(model, "/nowhere", out, SETTINGS)
    assert [path.name for path in out.iterdir()] == ["finetune.json"]


def test_rejects_to_go_on_with_other_settings(finished: Path, model: Path, texts: Path) -> None:
    with pytest.raises(UserError, match="steps: it has 6, now 7"):
        loop.finetune(model, str(texts), finished, dataclasses.replace(SETTINGS, steps=7))


def test_rejects_to_go_on_with_another_model(finished: Path, texts: Path, tmp_path: Path) -> None:
    other = write_model(tmp_path / "other", run_config(vocab_size=300))
    with pytest.raises(UserError, match="model: it has"):
        loop.finetune(other, str(texts), finished, SETTINGS)


def test_rejects_rows_longer_than_the_context(model: Path, texts: Path, tmp_path: Path) -> None:
    settings = dataclasses.replace(SETTINGS, sequence_length=4096)
    with pytest.raises(UserError, match="sequence_length: got 4096, the model's max_position_embeddings is 1024"):
        loop.finetune(model, str(texts), tmp_path / "run", settings)
    assert not (tmp_path / "run").exists()


def test_rejects_a_tokenizer_larger_than_the_model(texts: Path, tmp_path: Path) -> None:
    small = write_model(tmp_path / "small", run_config(vocab_size=200))
    with pytest.raises(UserError, match="the tokenizer has 258 ids, the model's vocab_size is 200"):
        loop.finetune(small, str(texts), tmp_path / "run", SETTINGS)


def test_stops_at_a_loss_that_is_not_finite(
    model: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def make_broken_step(*_: Any) -> Any:
        values = [jnp.float32(np.nan)] * len(StepMetrics._fields)
        return lambda state, frozen, batch: (state._replace(step=state.step + 1), StepMetrics(*values))

    monkeypatch.setattr(loop, "make_train_step", make_broken_step)
    with pytest.raises(UserError, match=r"step 1: loss nan.* need finite numbers"):
        loop.finetune(model, str(texts), tmp_path / "run", SETTINGS)
    assert not list((tmp_path / "run" / "state").iterdir())
