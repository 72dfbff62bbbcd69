"""`v4jax logits`: the same numbers at once, in chunks and one layer at a time; and what it refuses."""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tolerances

import v4jax as package
from v4jax.logits import write_atomically

LENGTH = 37
GOLDENS = ("flash_like_f32", "flash_like_quantized")


@pytest.fixture
def tokens(tmp_path: Path) -> Path:
    path = tmp_path / "tokens.npy"
    np.save(path, np.random.default_rng(0).integers(0, 300, (2, LENGTH)))
    return path


@pytest.fixture
def logits(v4jax: Callable, tmp_path: Path) -> Callable[..., dict[str, np.ndarray]]:
    """Runs the verb and returns the arrays of its file."""

    def run(*arguments: object) -> dict[str, np.ndarray]:
        out = tmp_path / "out.npz"
        result = v4jax("logits", *arguments, "--out", out)
        assert result.code == 0, result.err
        with np.load(out) as file:
            return dict(file)

    return run


def test_logits_are_those_of_the_loaded_model(logits, model_directory, tokens):
    got = logits(model_directory, "--tokens", tokens, "--mtp")
    assert {name: array.dtype for name, array in got.items()} == {"logits": np.float32, "mtp_logits": np.float32}
    assert got["logits"].shape == (2, LENGTH, 300)
    assert got["mtp_logits"].shape == (2, LENGTH - 1, 300)
    model = package.load(model_directory, dtype="float32")
    tolerances.assert_logits_close(got["logits"], model(np.load(tokens)))
    assert list(logits(model_directory, "--tokens", tokens)) == ["logits"]


@pytest.mark.parametrize(
    "arguments",
    [["--stream"], ["--chunks", "20,1,1,15"], ["--chunks", ",".join(["1"] * LENGTH)], ["--chunks", str(LENGTH)]],
    ids=["one layer at a time", "chunks", "token by token", "one chunk"],
)
def test_every_way_of_computing_gives_the_same_logits(logits, model_directory, tokens, arguments):
    want = logits(model_directory, "--tokens", tokens, "--mtp")
    got = logits(model_directory, "--tokens", tokens, "--mtp", *arguments)
    for name in ("logits", "mtp_logits"):
        tolerances.assert_logits_close(got[name], want[name])


@pytest.mark.parametrize("arguments", [[], ["--stream"], ["--chunks", "1"]], ids=["at once", "streamed", "chunk"])
def test_one_token_has_logits_and_predicts_nothing_further(logits, model_directory, tmp_path, arguments):
    np.save(tmp_path / "one.npy", [[5], [7]])
    got = logits(model_directory, "--tokens", tmp_path / "one.npy", "--mtp", *arguments)
    assert {name: array.shape for name, array in got.items()} == {"logits": (2, 1, 300), "mtp_logits": (2, 0, 300)}


def test_a_converted_directory_gives_the_same_logits(logits, v4jax, model_directory, tokens, tmp_path):
    assert v4jax("convert", model_directory, tmp_path / "converted").code == 0
    for got, want in zip(
        logits(tmp_path / "converted", "--tokens", tokens, "--mtp").values(),
        logits(model_directory, "--tokens", tokens, "--mtp").values(),
        strict=True,
    ):
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("name", GOLDENS)
@pytest.mark.parametrize(
    "arguments", [["--stream"], ["--chunks"]], ids=["one layer at a time", "chunks around the compression windows"]
)
def test_goldens(logits, shared, tmp_path, name, arguments):
    folder = shared / "goldens" / name
    expected = np.load(folder / "expected.npz")
    np.save(tmp_path / "golden.npy", expected["tokens"])
    length = expected["tokens"].shape[1]
    if arguments == ["--chunks"]:
        arguments = ["--chunks", f"129,127,1,1,1,{length - 259}"]
    got = logits(folder, "--tokens", tmp_path / "golden.npy", "--dtype", "float32", "--mtp", *arguments)
    for key in ("logits", "mtp_logits"):
        tolerances.assert_logits_close(got[key], expected[key], tolerances.OTHERS)


def test_a_bare_quant_sim_is_the_simulated_quantisation_of_the_goldens(logits, shared, tmp_path):
    folder = shared / "goldens" / "flash_like_quantized"
    expected = np.load(folder / "expected.npz")
    np.save(tmp_path / "golden.npy", expected["tokens"])
    got = logits(folder, "--tokens", tmp_path / "golden.npy", "--dtype", "float32", "--quant-sim", "--stream")
    tolerances.assert_quant_sim_close(got["logits"], expected["logits_quant_sim"])


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600)])
def test_who_may_read_the_result_follows_the_umask(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        write_atomically(tmp_path / "out.npz", {"logits": np.zeros(3)})
    finally:
        os.umask(before)
    assert [(path.name, path.stat().st_mode & 0o777) for path in tmp_path.iterdir()] == [("out.npz", mode)]


# ---- refusals --------------------------------------------------------------------------------------------------------
def _array(*shape: int, fill: int = 1) -> np.ndarray:
    return np.full(shape, fill)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (_array(1, 4, fill=300), "holds token id 300, need 0 to 299"),
        (_array(1, 4, fill=-1), "holds token id -1, need 0 to 299"),
        (_array(4), "holds int64 (4,), need integers of shape [batch, sequence]"),
        (_array(1, 4) * 0.5, "holds float64 (1, 4), need integers"),
        (_array(1, 4) > 0, "holds bool (1, 4), need integers"),
        (_array(1, 0), "has shape (1, 0); need at least one token"),
        (_array(1, 65), "65 tokens per row; the model's context is 64"),
        (np.array([[{}]]), "is not a readable .npy file"),
    ],
    ids=[
        "beyond the vocabulary",
        "negative",
        "one axis",
        "floats",
        "booleans",
        "empty",
        "beyond the context",
        "objects",
    ],
)
def test_unusable_tokens(v4jax, model_directory, tmp_path, array, message):
    np.save(tmp_path / "tokens.npy", array)
    _check_refused(v4jax, model_directory, tmp_path, message)


def _npy(header: bytes) -> bytes:
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no file"),
        (b"", "is not a readable .npy file"),
        (b"1 2 3\n", "is not a readable .npy file"),
        (_npy(b"{garbage(((((((\n"), "is not a readable .npy file"),
        (_npy(b"-" * 9000 + b"1\n"), "is not a readable .npy file (MemoryError)"),
        (_npy(b"{'descr': '<i8', 'fortran_order': False, 'shape': (1, %d)}\n" % 10**13), "is not a readable .npy file"),
        (_npy(b"{'descr': '<i8', 'fortran_order': False, 'shape': (1, %d)}\n" % 10**30), "is not a readable .npy file"),
    ],
    ids=["missing", "empty", "text", "garbage", "deep", "beyond the memory", "beyond 64 bits"],
)
def test_unreadable_tokens(v4jax, model_directory, tmp_path, content, message):
    if content is not None:
        (tmp_path / "tokens.npy").write_bytes(content)
    _check_refused(v4jax, model_directory, tmp_path, message)


def test_an_archive_is_not_tokens(v4jax, model_directory, tmp_path):
    with open(tmp_path / "tokens.npy", "wb") as file:
        np.savez(file, tokens=_array(1, 4))
    _check_refused(v4jax, model_directory, tmp_path, "holds an archive")


@pytest.mark.parametrize(
    ("chunks", "message"),
    [("3,2", "sum 5, need positive lengths that sum to 4"), ("5,-1", "need positive"), ("4,", "comma-separated")],
)
def test_chunks_that_do_not_fit(v4jax, model_directory, tmp_path, chunks, message):
    np.save(tmp_path / "tokens.npy", _array(1, 4))
    _check_refused(v4jax, model_directory, tmp_path, message, "--chunks", chunks)


def test_chunks_of_a_stream(v4jax, model_directory, tmp_path):
    np.save(tmp_path / "tokens.npy", _array(1, 4))
    _check_refused(v4jax, model_directory, tmp_path, "--stream", "--stream", "--chunks", "4", code=2)


def test_native_weights_of_a_stream(v4jax, model_directory, tmp_path):
    np.save(tmp_path / "tokens.npy", _array(1, 4))
    _check_refused(v4jax, model_directory, tmp_path, "--weights native", "--stream", "--weights", "native", code=2)


@pytest.mark.parametrize("arguments", [[], ["--stream"], ["--chunks", "4"]], ids=["plain", "stream", "chunks"])
def test_mtp_logits_of_a_model_without_mtp(v4jax, model_without_mtp, tmp_path, arguments):
    np.save(tmp_path / "tokens.npy", _array(1, 4))
    _check_refused(v4jax, model_without_mtp, tmp_path, "has no MTP block; leave the flag out", "--mtp", *arguments)


@pytest.mark.parametrize(
    ("choices", "message"),
    [(["index_topk=fast"], "got 'fast'"), (["nonsense", "sparse_attention=reference"], "nonsense")],
    ids=["one", "the first of two"],
)
def test_an_unknown_implementation(v4jax, model_directory, tmp_path, choices, message):
    np.save(tmp_path / "tokens.npy", _array(1, 4))
    flags = [part for choice in choices for part in ("--implementation", choice)]
    _check_refused(v4jax, model_directory, tmp_path, message, *flags, code=2)


def _check_refused(v4jax: Callable, model: Path, folder: Path, message: str, *arguments: str, code: int = 1) -> None:
    result = v4jax("logits", model, "--tokens", folder / "tokens.npy", "--out", folder / "out.npz", *arguments)
    assert result.code == code
    assert message in result.message
    assert "Traceback" not in result.err
    assert {path.name for path in folder.iterdir()} <= {"tokens.npy"}


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("out.npy", "need a name that ends in .npz"),
        ("nowhere/out.npz", "no directory"),
        ("tokens.npy/out.npz", "no directory"),
        ("folder.npz", "cannot write"),
    ],
    ids=["another suffix", "missing folder", "a file as folder", "a folder"],
)
def test_an_unwritable_output_is_refused_before_any_work(v4jax, tmp_path, out, message):
    np.save(tmp_path / "tokens.npy", _array(1, 4))
    (tmp_path / "folder.npz").mkdir()
    # There is no model: a check that comes after reading one would say so.
    result = v4jax("logits", tmp_path / "no_model", "--tokens", tmp_path / "tokens.npy", "--out", tmp_path / out)
    assert result.code == 1
    assert message in result.message


def test_a_full_disk_leaves_the_old_result_and_no_half_written_one(
    v4jax, model_directory, tokens, tmp_path, monkeypatch
):
    def full(file: object, **arrays: np.ndarray) -> None:
        raise OSError(28, "No space left on device")

    (tmp_path / "out.npz").write_bytes(b"the old one")
    monkeypatch.setattr(np, "savez", full)
    result = v4jax("logits", model_directory, "--tokens", tokens, "--out", tmp_path / "out.npz")
    assert result.code == 1
    assert "No space left on device" in result.message
    assert {path.name: path.stat().st_size for path in tmp_path.iterdir() if path != tokens} == {"out.npz": 11}
