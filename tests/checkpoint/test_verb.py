"""`v4jax convert`."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

from v4jax import cli


def test_there_and_back_gives_the_same_tensors(shared, tmp_path, capfd):
    source = shared / "goldens" / "flash_like_f32"
    assert cli.main(["convert", str(source), str(tmp_path / "ours")]) == 0
    arguments = [str(tmp_path / "ours"), str(tmp_path / "theirs"), "--to", "hf", "--shard-size", "1MB"]
    assert cli.main(["convert", *arguments]) == 0
    assert "tensors" in capfd.readouterr().out
    index = json.loads((tmp_path / "theirs" / "model.safetensors.index.json").read_text())["weight_map"]
    want = load_file(source / "model.safetensors")
    assert set(index) == set(want)
    assert len(set(index.values())) > 3
    for file in set(index.values()):
        for name, got in load_file(tmp_path / "theirs" / file).items():
            np.testing.assert_array_equal(got, want[name], err_msg=name)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["/nowhere", "out"], 1, "/nowhere: no such file or directory"),
        (["/nowhere", "out", "--shard-size", "big"], 2, "--shard-size: got 'big'"),
        (["/nowhere", "out", "--weights", "int4"], 2, "invalid choice"),
        (["/nowhere"], 2, "Required"),
    ],
)
def test_refuses(arguments, code, message, capfd):
    assert cli.main(["convert", *arguments]) == code
    assert message in capfd.readouterr().err


def test_an_existing_output_is_left_alone(shared, tmp_path, capfd):
    (tmp_path / "note").write_text("mine")
    assert cli.main(["convert", str(shared / "goldens" / "flash_like_f32"), str(tmp_path)]) == 1
    assert str(tmp_path) in capfd.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["note"]
