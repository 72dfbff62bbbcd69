"""The run directory and its saved states."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from v4jax.checkpoint.store import RunDirectory, StateStore, abstract_like, fingerprint
from v4jax.errors import UserError


def state_of(value: float) -> dict:
    return {
        "a.b": jnp.full((300, 400), value),
        "optimizer": (jnp.int32(value), {"a.b": jnp.full(3, value, jnp.bfloat16)}),
    }


def test_a_state_comes_back_bit_for_bit(tmp_path: Path) -> None:
    state = {"w": jax.random.normal(jax.random.key(0), (50, 60)), "n": jnp.int32(7), "tiny": jnp.float32(1e-45)}
    with StateStore(tmp_path / "state", keep=2) as store:
        store.save(3, state, {"parent": {"next_index": 5}})
    with StateStore(tmp_path / "state", keep=2) as store:
        assert store.latest_step() == 3
        found, progress = store.restore(3, abstract_like(state))
    jax.tree.map(np.testing.assert_array_equal, found, state)
    assert progress == {"parent": {"next_index": 5}}


def test_the_saved_state_is_that_of_the_save_though_its_arrays_were_donated(tmp_path: Path) -> None:
    advance = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
    state, progress = state_of(1), {"n": 1}
    with StateStore(tmp_path / "state", keep=1) as store:
        store.save(1, state, progress)
        progress["n"] = 2
        for _ in range(50):
            state = advance(state)
        jax.block_until_ready(state)
        found, found_progress = store.restore(1, abstract_like(state))
    jax.tree.map(np.testing.assert_array_equal, found, state_of(1))
    assert found_progress == {"n": 1}


def test_only_the_newest_states_stay(tmp_path: Path) -> None:
    with StateStore(tmp_path / "state", keep=2) as store:
        for step in (1, 2, 5):
            store.save(step, state_of(step), {})
        store.wait()
        assert store.latest_step() == 5
    assert sorted(path.name for path in (tmp_path / "state").iterdir()) == ["2", "5"]


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    with StateStore(tmp_path / "state", keep=3) as store:
        store.save(1, state_of(1), {})
    (tmp_path / "state" / "3.orbax-checkpoint-tmp" / "state").mkdir(parents=True)
    (tmp_path / "state" / "notes.txt").write_text("somebody's")
    with StateStore(tmp_path / "state", keep=3) as store:
        assert store.latest_step() == 1
    assert sorted(path.name for path in (tmp_path / "state").iterdir()) == ["1", "notes.txt"]


def test_rejects_a_state_of_another_model(tmp_path: Path) -> None:
    with StateStore(tmp_path / "state", keep=1) as store:
        store.save(1, {"a": jnp.zeros(3)}, {})
        with pytest.raises(UserError, match="1: cannot be restored"):
            store.restore(1, {"b": jnp.zeros(3)})


@pytest.mark.parametrize("is_cut", [True, False], ids=["cut", "missing"])
def test_rejects_a_state_whose_files_are_damaged(tmp_path: Path, is_cut: bool) -> None:
    state = {"a": jnp.zeros(5000)}
    with StateStore(tmp_path / "state", keep=1) as store:
        store.save(1, state, {})
    largest = max((file for file in tmp_path.rglob("*") if file.is_file()), key=lambda file: file.stat().st_size)
    content = largest.read_bytes()
    largest.unlink()
    if is_cut:
        largest.write_bytes(content[: len(content) // 2])
    with StateStore(tmp_path / "state", keep=1) as store, pytest.raises(UserError, match="1: cannot be restored"):
        store.restore(1, abstract_like(state))


IDENTITY = {"steps": 10, "data": "stdlib", "freeze": ("norm",), "keep": 2}


@pytest.mark.parametrize("is_there", [True, False])
def test_a_new_or_empty_directory_becomes_the_run(tmp_path: Path, is_there: bool) -> None:
    out = tmp_path / "deep" / "run"
    if is_there:
        out.mkdir(parents=True)
        (out / "finetune.json.partial").write_text("{")
    RunDirectory(out, IDENTITY)
    assert json.loads((out / "finetune.json").read_text()) == json.loads(json.dumps(IDENTITY))
    RunDirectory(out, IDENTITY)


def test_rejects_another_configuration_and_names_all_that_differs(tmp_path: Path) -> None:
    RunDirectory(tmp_path, IDENTITY)
    with pytest.raises(UserError) as caught:
        RunDirectory(tmp_path, IDENTITY | {"steps": 20, "freeze": (), "keep": 5}, free={"keep"})
    message = str(caught.value)
    assert "steps: it has 10, now 20" in message
    assert "freeze: it has ['norm'], now []" in message
    assert "keep" not in message
    assert json.loads((tmp_path / "finetune.json").read_text())["steps"] == 10


def test_what_is_free_to_change_is_written_down_anew(tmp_path: Path) -> None:
    RunDirectory(tmp_path, IDENTITY)
    RunDirectory(tmp_path, IDENTITY | {"keep": 5}, free={"keep"})
    assert json.loads((tmp_path / "finetune.json").read_text())["keep"] == 5


def test_rejects_a_directory_that_is_something_else(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(UserError, match=r"holds other files and no finetune\.json"):
        RunDirectory(tmp_path, IDENTITY)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_rejects_a_file_in_place_of_the_directory(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    with pytest.raises(UserError, match="is a file, need a directory"):
        RunDirectory(tmp_path / "run", IDENTITY)


@pytest.mark.parametrize("out", ["/proc/v4jax-run", "/dev/null/run"])
def test_rejects_a_place_that_cannot_be_written(out: str) -> None:
    with pytest.raises(UserError, match=r"cannot be written|is a file"):
        RunDirectory(Path(out), IDENTITY)


@pytest.mark.parametrize("text", ["{", "[]"])
def test_rejects_a_damaged_marker(tmp_path: Path, text: str) -> None:
    (tmp_path / "finetune.json").write_text(text)
    with pytest.raises(UserError, match=r"finetune\.json: (not readable as JSON|got list)"):
        RunDirectory(tmp_path, IDENTITY)


def test_fingerprint_follows_contents_and_not_place_or_time(tmp_path: Path) -> None:
    def model(name: str, weights: bytes) -> Path:
        path = tmp_path / name
        (path / "layers").mkdir(parents=True)
        (path / "config.json").write_text("{}")
        (path / "layers" / "00.safetensors").write_bytes(weights)
        return path

    prints = [fingerprint(model(name, weights)) for name, weights in (("a", b"12"), ("b", b"12"), ("c", b"13"))]
    assert prints[0] == prints[1] != prints[2]
    model("a/runs/one/model", b"14")
    assert fingerprint(tmp_path / "a") == prints[0], "a run inside of the model's directory is none of its contents"
