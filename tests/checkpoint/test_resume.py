"""Interruptions, full disks, other places than local ones, and orbax trees."""

import json
import os
import re
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from random_checkpoint import as_stored, quantised_config, write_hf_directory

from v4jax import cli
from v4jax.checkpoint import location
from v4jax.checkpoint.convert import convert
from v4jax.checkpoint.names import section_prefix, sections
from v4jax.checkpoint.orbax_tree import orbax_bytes, restore_orbax, write_orbax
from v4jax.checkpoint.progress import UNFINISHED
from v4jax.checkpoint.reader import MANIFEST, open_checkpoint
from v4jax.checkpoint.tensor_file import CheckpointError

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    config = quantised_config()
    path = tmp_path_factory.mktemp("source") / "a"
    write_hf_directory(path, config, as_stored(config, float_dtype=ml_dtypes.bfloat16), shards=2)
    (path / "tokenizer_config.json").write_text("{}")
    return path


def contents(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


# ---- interrupted ----------------------------------------------------------------------------------------------------
@pytest.mark.slow
@pytest.mark.parametrize("to", ["v4jax", "hf"])
def test_a_conversion_killed_at_any_of_20_moments_resumes_to_the_same_bytes(tmp_path: Path, to: str, record_property):
    config = quantised_config(hidden_size=512, moe_intermediate_size=256, n_routed_experts=8, vocab_size=2000)
    write_hf_directory(tmp_path / "a", config, as_stored(config, float_dtype=ml_dtypes.bfloat16), shards=2)
    script = [sys.executable, str(Path(__file__).with_name("kill_conversion.py"))]
    command = [*script, str(tmp_path / "a"), str(tmp_path), to, "20"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    found = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    record_property("figure", found.stdout.strip())
    assert int(found.stdout.split()[0]) >= 8, found.stdout


@pytest.mark.parametrize("to", ["v4jax", "hf"])
def test_resume_keeps_what_is_right_and_repeats_what_is_not(tmp_path: Path, source: Path, monkeypatch, to: Any):
    options: dict[str, Any] = {"to": to, "max_shard_bytes": 60_000}
    want = convert(source, tmp_path / "want", **options)
    names = list(want.files)
    written: list[str] = []
    real = location.appearing_whole

    def fail_late(file: Path) -> Any:
        if file.suffix == ".safetensors":
            written.append(file.name)
        if len(written) == 4:
            raise OSError(28, "No space left on device")
        return real(file)

    monkeypatch.setattr("v4jax.checkpoint.transfer.appearing_whole", fail_late)
    with pytest.raises(CheckpointError, match=r"No space left on device.*free disk space and go on with --resume"):
        convert(source, tmp_path / "b", **options)
    monkeypatch.setattr("v4jax.checkpoint.transfer.appearing_whole", real)
    with pytest.raises(CheckpointError, match=r"did not finish|safetensors files and no"):
        open_checkpoint(tmp_path / "b")
    with pytest.raises(CheckpointError, match="unfinished conversion; go on with --resume"):
        convert(source, tmp_path / "b", **options)
    with pytest.raises(CheckpointError, match="begun with another source or other choices"):
        convert(source, tmp_path / "b", weights="bf16", resume=True, **options)
    record = json.loads((tmp_path / "b" / (MANIFEST if to == "v4jax" else UNFINISHED)).read_text())
    assert record["status"] == "running"
    finished = sorted(record["files"])
    assert 0 < len(finished) < len(names)
    times = {name: (tmp_path / "b" / name).stat().st_mtime_ns for name in finished}
    damaged = tmp_path / "b" / finished[0]
    whole = damaged.read_bytes()
    damaged.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    (tmp_path / "b" / f"{names[-1]}.partial").parent.mkdir(exist_ok=True)
    (tmp_path / "b" / f"{names[-1]}.partial").write_bytes(b"half")
    seen: list[tuple[int, int]] = []
    summary = convert(source, tmp_path / "b", resume=True, on_bytes=lambda *pair: seen.append(pair), **options)
    assert f"{finished[0]} was not as it had been written" in " ".join(summary.notes)
    assert summary.files == want.files
    assert all((tmp_path / "b" / name).stat().st_mtime_ns == times[name] for name in finished[1:])
    assert seen[-1][0] == seen[-1][1] == sum(entry["bytes"] for entry in want.files.values())
    got, expected = contents(tmp_path / "b"), contents(tmp_path / "want")
    got.pop(MANIFEST, None), expected.pop(MANIFEST, None)  # its notes tell of the damage
    assert got == expected
    before = contents(tmp_path / "b")
    assert convert(source, tmp_path / "b", resume=True, **options).files == want.files  # nothing is left to do
    assert contents(tmp_path / "b") == before


def test_a_source_that_changed_is_not_mixed_with_what_was_finished(tmp_path: Path, source: Path):
    shutil.copytree(source, tmp_path / "a")
    convert(tmp_path / "a", tmp_path / "b")
    time.sleep(0.01)
    (tmp_path / "a" / "model-00001-of-00002.safetensors").touch()
    with pytest.raises(CheckpointError, match="begun with another source"):
        convert(tmp_path / "a", tmp_path / "b", resume=True)


@pytest.mark.parametrize("to", ["v4jax", "hf"])
def test_resume_makes_good_what_lies_beside_the_weights(tmp_path: Path, source: Path, to: Any):
    convert(source, tmp_path / "b", to=to)
    before = contents(tmp_path / "b")
    (tmp_path / "b" / "config.json").write_text("{}")
    (tmp_path / "b" / "tokenizer_config.json").unlink()
    convert(source, tmp_path / "b", to=to, resume=True)
    assert contents(tmp_path / "b") == before
    again = convert(source, tmp_path / "b", to=to, resume=True)
    assert "was complete: nothing was written" in again.notes[-1]


@pytest.mark.parametrize("to", ["v4jax", "hf"])
def test_resume_removes_nothing_of_the_users(tmp_path: Path, source: Path, to: Any):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "thesis.partial").write_text("mine")
    with pytest.raises(CheckpointError, match="exists and is not empty"):
        convert(source, tmp_path / "b", to=to, resume=True)
    assert contents(tmp_path / "b") == {"thesis.partial": b"mine"}
    record = MANIFEST if to == "v4jax" else UNFINISHED
    (tmp_path / "b" / "thesis.partial").rename(tmp_path / "b" / f"{record}.partial")  # killed writing the first record
    convert(source, tmp_path / "b", to=to, resume=True)
    open_checkpoint(tmp_path / "b")


@pytest.mark.parametrize("files", [None, [], {"top.safetensors": 3}])
@pytest.mark.parametrize("option", ["resume", "keep_finished"])
def test_a_damaged_record_is_refused(tmp_path: Path, source: Path, files: Any, option: str):
    convert(source, tmp_path / "b")
    place = tmp_path / "b" / MANIFEST
    place.write_text(json.dumps(json.loads(place.read_text()) | {"files": files}))
    options: dict[str, Any] = {option: True}
    with pytest.raises(CheckpointError, match="is no record of a conversion"):
        convert(source, tmp_path / "b", **options)


# ---- disk space -----------------------------------------------------------------------------------------------------
def test_too_small_a_disk_is_refused_before_anything_is_written(tmp_path: Path, source: Path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=50_000))
    with pytest.raises(CheckpointError, match=r"the output takes [\d,]+ bytes, its disk has 50,000 free; free space"):
        convert(source, tmp_path / "b")
    assert list((tmp_path / "b").iterdir()) == []


def test_a_file_the_system_refuses_to_grow_is_a_clear_error_and_resumable(tmp_path: Path, source: Path):
    """Really refused by the kernel: RLIMIT_FSIZE, as a full disk would."""
    command = [sys.executable, "-m", "v4jax", "convert", str(source), str(tmp_path / "b")]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    limit = (40_000, 40_000)
    found = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit),
    )  # fmt: skip
    assert found.returncode == 1
    assert "File too large" in found.stderr
    assert "go on with --resume" in found.stderr
    assert "Traceback" not in found.stderr
    assert cli.main(["convert", str(source), str(tmp_path / "b"), "--resume", "--verify"]) == 0


# ---- the command ----------------------------------------------------------------------------------------------------
def test_verify_names_a_damaged_tensor_and_does_not_repair_it(tmp_path: Path, source: Path, capfd):
    command = ["convert", str(source), str(tmp_path / "b"), "--verify"]
    assert cli.main(command) == 0
    out = capfd.readouterr().out
    assert re.search(r"verified: \d+ tensors", out)
    assert "through 4 layers, one at a time: logits differ by at most 0 standard" in out
    assert cli.main(command) == 0  # already complete: only verified
    info = open_checkpoint(tmp_path / "b").inventory["layers.2.attn.wq_b.weight"]
    content = bytearray(info.file.read_bytes())
    content[info.offset + 7] ^= 1
    info.file.write_bytes(content)
    assert cli.main(command) == 1
    assert "layers.2.attn.wq_b.weight: differs from layers.2.attn.wq_b.weight" in capfd.readouterr().err
    assert info.file.read_bytes() == bytes(content)
    assert cli.main(["verify", str(tmp_path / "b"), "--source", str(source)]) == 1
    assert cli.main(["convert", str(source), str(tmp_path / "b"), "--resume"]) == 0  # this repairs it
    assert cli.main(["verify", str(tmp_path / "b"), "--source", str(source)]) == 0
    assert cli.main(["verify", str(tmp_path / "b")]) == 2


# ---- object stores --------------------------------------------------------------------------------------------------
def test_object_stores_are_read_and_written(tmp_path: Path, source: Path):
    pytest.importorskip("fsspec")
    convert(source, "memory://bucket/ours")
    convert("memory://bucket/ours", "memory://bucket/theirs", to="hf", max_shard_bytes=60_000)
    convert("memory://bucket/theirs", tmp_path / "local", to="hf", max_shard_bytes=60_000)
    convert(source, tmp_path / "want", to="hf", max_shard_bytes=60_000)
    assert contents(tmp_path / "local") == contents(tmp_path / "want")
    again = convert(source, "memory://bucket/ours", resume=True)
    assert again.tensors == len(open_checkpoint("memory://bucket/ours").inventory)
    with pytest.raises(CheckpointError, match="exists and is not empty"):
        convert(source, "memory://bucket/ours")
    with pytest.raises(CheckpointError, match="is the checkpoint to be converted"):
        convert("memory://bucket/ours", "memory://bucket/ours/")


def test_a_scheme_that_needs_a_package_names_the_extra():
    with pytest.raises(CheckpointError, match=r"needs gcsfs, not installed; pip install 'v4jax\[remote\]'"):
        location.locate("gs://bucket/model")
    with pytest.raises(CheckpointError, match="Protocol not known"):
        location.locate("nonsense://bucket/model")


# ---- orbax ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("weights", ["bf16", "fp32"])
def test_an_orbax_tree_has_every_parameter(tmp_path: Path, source: Path, weights: str):
    write_orbax(source, tmp_path / "b", weights=weights, max_memory=1 << 30)
    tree, original = restore_orbax(tmp_path / "b"), open_checkpoint(source)
    for section in sections(original.config):
        for key, want in original.section(section).items():
            node: Any = tree
            for name in (section_prefix(section) + key).split("."):
                node = node[name]
            np.testing.assert_array_equal(np.asarray(node).astype(np.float32), want.astype(np.float32), err_msg=key)
    assert not list((tmp_path / "b").rglob("*.zst*"))


def test_an_orbax_tree_larger_than_allowed_is_refused_and_info_says_so(tmp_path: Path, source: Path, capsys):
    config = open_checkpoint(source).config
    need = orbax_bytes(config, is_bf16=True)
    with pytest.raises(CheckpointError, match=f"{need:,} bytes, --max-memory allows 1,000"):
        write_orbax(source, tmp_path / "b", weights="bf16", max_memory=1000)
    assert not (tmp_path / "b").exists()
    with pytest.raises(CheckpointError, match="need bf16 or fp32: orbax has no FP4"):
        write_orbax(source, tmp_path / "b", weights="native", max_memory=1 << 30)
    assert cli.main(["info", str(source), "--max-memory", "10KB"]) == 0
    assert f"--to orbax --weights bf16 holds {need:,} bytes in memory" in capsys.readouterr().out
    assert cli.main(["info", str(source)]) == 0
    assert "--to orbax" not in capsys.readouterr().out
