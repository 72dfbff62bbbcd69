"""`v4jax convert`."""

import json

import numpy as np
import pytest
from random_checkpoint import as_stored, plain_config, write_hf_directory
from safetensors.numpy import load_file

from v4jax import cli
from v4jax.checkpoint.verb import _Log


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
        (
            ["/nowhere", "out", "--layout", "transformers"],
            2,
            "--layout transformers is one of Hugging Face",
        ),
        (["/nowhere", "out", "--max-memory", "9" * 5000], 2, "--max-memory: got '999"),
        (["no\0where", "out"], 1, "NUL"),
        (["memory://", "out"], 1, "names no folder"),
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


@pytest.mark.parametrize("folder", ["layers", "encoding", "mtp/deep"])
def test_an_output_that_would_change_its_source_is_refused(tmp_path, capfd, folder):
    source = write_hf_directory(tmp_path / "a", plain_config(), as_stored(plain_config()))
    (tmp_path / "link").symlink_to(source)
    for place in (source / folder, tmp_path / "link" / folder, f"file://{source}/{folder}"):
        assert cli.main(["convert", str(source), str(place)]) == 1
        assert f"its own {folder.split('/')[0]}" in capfd.readouterr().err
    assert cli.main(["convert", str(source), f"file://{source}"]) == 1
    assert "is the checkpoint to be converted" in capfd.readouterr().err
    assert sorted(file.name for file in source.iterdir()) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"hidden_size": 1, "hidden_size": 2}', "'hidden_size' twice"),
        ("[" * 100_000, "JSON"),
        ('{"vocab_size": ' + "9" * 5000 + "}", "4300 digits"),
        ('"text"', "JSON"),
    ],
)
@pytest.mark.parametrize("place", ["local", "remote"])
def test_a_broken_config_is_one_clear_message(tmp_path, capfd, place, text, message):
    source = write_hf_directory(tmp_path / "a", plain_config(), as_stored(plain_config()))
    (source / "config.json").write_text(text)
    url = str(source)
    if place == "remote":
        fs = pytest.importorskip("fsspec").filesystem("memory")
        url = f"memory://{tmp_path.name}"
        fs.put(str(source), url, recursive=True)
    assert cli.main(["convert", url, str(tmp_path / "b")]) == 1
    assert message in capfd.readouterr().err


@pytest.mark.parametrize("key", ["n_routed_experts", "num_nextn_predict_layers"])
def test_an_absurd_count_is_refused_before_it_costs_memory(tmp_path, capfd, key):
    source = write_hf_directory(tmp_path / "a", plain_config(), as_stored(plain_config()))
    config = json.loads((source / "config.json").read_text()) | {key: 10**8}
    (source / "config.json").write_text(json.dumps(config))
    assert cli.main(["info", str(source)]) == 1
    assert f"{key}: got 100000000, need at most" in capfd.readouterr().err


def test_info_reads_urls(tmp_path, capfd):
    fs = pytest.importorskip("fsspec").filesystem("memory")
    source = write_hf_directory(tmp_path / "a", plain_config(), as_stored(plain_config()))
    fs.put(str(source), f"memory://{tmp_path.name}", recursive=True)
    assert cli.main(["info", f"memory://{tmp_path.name}"]) == 0
    assert cli.main(["info", f"file://{source}"]) == 0
    assert "hidden_size" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ImportError("requires aiohttp"), "fsspec cannot open it (requires aiohttp); install what it names"),
        (ModuleNotFoundError("No module named 'pyarrow'", name="pyarrow"), "needs pyarrow, not installed; pip install"),
    ],
    ids=["named in the text", "named by the error"],
)
def test_a_package_that_a_url_needs_is_named(monkeypatch, capfd, error, message):
    def fail(scheme: str) -> None:
        raise error

    monkeypatch.setattr(pytest.importorskip("fsspec"), "filesystem", fail)
    assert cli.main(["info", "http://127.0.0.1:1/x"]) == 1
    assert message in capfd.readouterr().err


@pytest.mark.parametrize("to", ["v4jax", "hf"])
def test_info_says_how_to_go_on_with_an_interrupted_conversion(tmp_path, capfd, monkeypatch, to):
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    source = write_hf_directory(tmp_path / "a", plain_config(), as_stored(plain_config()))
    monkeypatch.setattr("v4jax.checkpoint.convert._finish", stop)
    assert cli.main(["convert", str(source), str(tmp_path / "b"), "--to", to]) == 130
    assert cli.main(["info", str(tmp_path / "b")]) == 1
    assert "its conversion did not finish" in (message := capfd.readouterr().err)
    assert "go on with `v4jax convert … --resume`, or remove the directory and convert again" in message


# ---- progress -------------------------------------------------------------------------------------------------------
def test_a_log_gets_a_line_now_and_then(capfd):
    seconds = 0.0
    log = _Log(lambda: seconds)
    log.on_bytes(40_000_000_000, 160_000_000_000)  # an earlier run's
    log.on_section(10, 45, "layers.8")
    for seconds in (10.0, 29.0, 31.0, 40.0, 62.0):
        log.on_bytes(int(40e9 + seconds * 200e6), 160_000_000_000)
    assert capfd.readouterr().err.splitlines() == [
        "layers.8 10/45: 46.20 of 160.00 GB, 200 MB/s, 9 min left",
        "layers.8 10/45: 52.40 of 160.00 GB, 200 MB/s, 9 min left",
    ]
