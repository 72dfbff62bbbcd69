"""What every verb refuses alike: missing paths, unknown flags, outputs that exist or cannot be written."""

from pathlib import Path

import pytest

from v4jax.cli import VERBS

# Verb → arguments after the model's path that are well formed. `{out}` is a place that can be written.
ARGUMENTS = {
    "info": [],
    "convert": ["{out}"],
    "verify": ["--source", "/nowhere/source"],
    "logits": ["--tokens", "tokens.npy", "--out", "{out}.npz"],
    "generate": ["--prompt", "def"],
    "finetune": ["--data", "stdlib", "--out", "{out}", "--recipe", "quickstart", "--sequence-length", "32"],
    "evaluate": ["--data", "stdlib"],
    "plan": ["--topology", "v6e:2x2", "--step", "decode", "--batch", "1", "--context", "256"],
}


def command(verb: str, model: object, out: Path) -> list[str]:
    return [verb, str(model), *(argument.format(out=out) for argument in ARGUMENTS[verb])]


def test_the_list_of_verbs_is_complete():
    assert set(ARGUMENTS) == set(VERBS) - {"bench"}


@pytest.mark.parametrize("verb", ARGUMENTS)
def test_a_missing_model_is_one_message(v4jax, tmp_path, verb):
    result = v4jax(*command(verb, "/nowhere/model", tmp_path / "out"))
    assert result.code == 1
    assert "/nowhere/model" in result.message
    assert "Traceback" not in result.err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("verb", ARGUMENTS)
def test_a_directory_without_a_model_is_one_message(v4jax, tmp_path, verb):
    (tmp_path / "model").mkdir()
    result = v4jax(*command(verb, tmp_path / "model", tmp_path / "out"))
    assert result.code == 1
    assert str(tmp_path / "model") in result.message
    assert "Traceback" not in result.err
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("verb", VERBS)
def test_an_unknown_flag_is_a_usage_error(v4jax, tmp_path, verb):
    arguments = command(verb, "model", tmp_path / "out") if verb in ARGUMENTS else [verb, "model"]
    result = v4jax(*arguments, "--no-such-flag", "1")
    assert result.code == 2
    assert "--no-such-flag" in result.err
    assert "Traceback" not in result.err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("verb", ["convert", "finetune"])
def test_an_existing_output_directory_is_left_as_it_was(v4jax, model_directory, tmp_path, verb):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    result = v4jax(*command(verb, model_directory, tmp_path / "out"))
    assert result.code == 1
    assert str(tmp_path / "out") in result.message
    assert "Traceback" not in result.err
    assert {path.name: path.read_text() for path in (tmp_path / "out").iterdir()} == {"thesis.txt": "mine"}


@pytest.mark.parametrize("verb", ["convert", "finetune"])
@pytest.mark.parametrize("place", ["file", "file/inside", "/proc/v4jax"], ids=["a file", "in a file", "in /proc"])
def test_an_unwritable_output_is_one_message(v4jax, model_directory, tmp_path, verb, place):
    (tmp_path / "file").write_text("mine")
    result = v4jax(*command(verb, model_directory, tmp_path / place))
    assert result.code == 1
    assert place in result.message
    assert "Traceback" not in result.err
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"file": "mine"}


def test_converting_a_model_onto_itself_is_refused(v4jax, model_directory):
    before = {path.name: path.read_bytes() for path in model_directory.iterdir()}
    assert v4jax("convert", model_directory, model_directory).code == 1
    assert {path.name: path.read_bytes() for path in model_directory.iterdir()} == before
