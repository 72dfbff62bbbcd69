"""`v4jax info`: totals, inventory and implementations of the released models, without weights."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from kernels_pallas import dispatch
from v4jax import cli
from v4jax.checkpoint.verb import parse_size
from v4jax.config import ModelConfig
from v4jax.errors import UsageError
from v4jax.info import count_dtypes, count_parameters, describe, resolve_implementations

# architecture.md §14.1 and §17.4.
RELEASED = {
    "flash": {"backbone": 284.33, "active": 13.27, "mtp": 6.61, "tensors": 69_187, "bytes": 159_609_485_896},
    "pro": {"backbone": 1573.0, "active": 48.85, "mtp": 25.84, "tensors": 145_116, "bytes": 864_704_792_696},
}


@pytest.mark.parametrize("name", RELEASED)
def test_released_totals(name):
    totals = count_parameters(getattr(ModelConfig, name)())
    for part in ("backbone", "active", "mtp"):
        assert getattr(totals, part) / 1e9 == pytest.approx(RELEASED[name][part], abs=0.005)


@pytest.mark.parametrize("name", RELEASED)
def test_a_bare_released_config_gives_the_inventory_within_15_seconds(name, shared, tmp_path):
    report, root = tmp_path / "info.json", Path(__file__).resolve().parent.parent
    config = shared / "reference" / f"config_{name}.json"
    command = [sys.executable, "-m", "v4jax", "info", str(config), "--json", str(report)]
    environment = os.environ | {"PYTHONPATH": str(root)}
    found = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=15, check=False)
    assert found.returncode == 0, found.stderr
    for text in (
        f"{RELEASED[name]['bytes']:,}",
        "(HCA 128:1, TOPK) · (CSA 4:1, TOPK)",
        "mtp 0",
        "config keys not used",
    ):
        assert text in found.stdout
    data = json.loads(report.read_text())
    assert {"config", "plan", "segments", "parameters", "tensors", "bytes"} <= set(data)
    assert (data["tensors"], data["bytes"]) == (RELEASED[name]["tensors"], RELEASED[name]["bytes"])
    assert len(data["plan"]) == data["config"]["num_hidden_layers"]
    assert [segment["repeats"] for segment in data["segments"]] == [2, 1, 20 if name == "flash" else 29]


def test_small_models_count_every_parameter_but_the_tables():
    config = ModelConfig.tiny()
    tensors = describe("tiny").tensors
    dense = sum(tensor.nbytes // (4 if tensor.dtype == "F32" else 2) for tensor in tensors if tensor.dtype != "I64")
    totals = count_parameters(config)
    assert totals.backbone + totals.mtp == dense


def test_a_directory_is_described_by_its_files(shared, capfd):
    path = shared / "goldens" / "flash_like_quantized"
    description = describe(str(path))
    assert description.is_stored
    assert count_dtypes(description.tensors)["I8"]["tensors"] == 6 * 8 * 3
    assert cli.main(["info", str(path)]) == 0
    assert "Tensors in the files" in capfd.readouterr().out


def test_a_dspark_config_reports_the_head_that_is_not_used(tmp_path):
    data = ModelConfig.tiny().to_hf()
    data["compress_ratios"] += [0, 0]
    (tmp_path / "config.json").write_text(json.dumps(data | {"dspark_block_size": 5}))
    description = describe(str(tmp_path))
    assert any("DSpark" in note for note in description.notes)
    assert not any(tensor.name.startswith("mtp.") for tensor in description.tensors)
    assert count_parameters(description.config).mtp == 0


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["flsh"], 1, "flsh: no such file or directory; give a model directory, a config.json or flash"),
        (["tiny", "--implementation", "index_topk=pallas_v2"], 2, "got 'pallas_v2', need"),
        (["tiny", "--implementation", "topk=xla"], 2, "need op=implementation, op one of"),
        (["tiny", "--json", "/nowhere/info.json"], 1, "cannot write /nowhere/info.json: no such directory"),
        (["tiny", "--json", "/"], 1, "--json: cannot write /: it is a directory; name a file in it"),
        (["tiny", "--max-memory", "0"], 2, "--max-memory: got '0', need a positive size"),
    ],
)
def test_refuses_before_anything_is_printed(arguments, code, message, capfd):
    assert cli.main(["info", *arguments]) == code
    out, error = capfd.readouterr()
    assert message in error
    assert not out


@pytest.mark.parametrize("is_there", [False, True])
def test_refuses_a_report_that_may_not_be_written(is_there, tmp_path, monkeypatch, capfd):
    file = tmp_path / "info.json"
    if is_there:
        file.touch()
    locked = file if is_there else tmp_path
    monkeypatch.setattr(os, "access", lambda path, mode: path != locked)  # root may write everywhere
    assert cli.main(["info", "tiny", "--json", str(file)]) == 1
    assert f"--json: cannot write {file}: permission denied" in capfd.readouterr().err


def test_refuses_a_directory_whose_tensors_do_not_fit_its_config(shared, tmp_path, capfd):
    for file in (shared / "goldens" / "flash_like_quantized").iterdir():
        if file.name != "expected.npz":
            shutil.copyfile(file, tmp_path / file.name)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"q_lora_rank": 64}))
    assert cli.main(["info", str(tmp_path)]) == 1
    assert "layers.0.attn.wq_a.weight" in capfd.readouterr().err


# ---- implementations -------------------------------------------------------------------------------------------------
def test_defaults_are_pallas_on_tpu_where_it_exists_then_xla_then_reference():
    everything = {name: print for name in dispatch.IMPLEMENTATIONS}
    full = dispatch.Operation("full", everything)
    plain = dispatch.Operation("plain", {"reference": print})
    fast = dispatch.Operation("fast", {"pallas": print, "reference": print})
    assert [full.resolve(None, platform) for platform in ("tpu", "gpu", "cpu")] == ["pallas", "xla", "xla"]
    assert [plain.resolve(None, platform) for platform in ("tpu", "cpu")] == ["reference", "reference"]
    assert [fast.resolve(None, platform) for platform in ("tpu", "cpu")] == ["pallas", "reference"]


def test_a_forced_implementation_is_taken_or_refused_never_replaced():
    plain = dispatch.Operation("plain", {"xla": print, "reference": repr})
    assert plain.choose("reference", "tpu") is repr
    with pytest.raises(ValueError, match="implementation of plain: got 'pallas', need xla or reference"):
        plain.choose("pallas", "tpu")


@pytest.mark.parametrize("names", [{"xla"}, {"reference", "cuda"}])
def test_an_operation_needs_a_reference_and_known_names(names):
    with pytest.raises(ValueError, match="need reference and any of"):
        dispatch.declare("broken", **dict.fromkeys(names, print))
    assert "broken" not in dispatch.operations()


def test_every_operation_is_listed_with_what_runs_on_each_platform():
    found = resolve_implementations()
    assert set(found) == set(dispatch.operations())
    assert {"sparse_attention", "index_topk", "grouped_experts"} <= set(found)
    for name, chosen in found.items():
        assert set(chosen.values()) <= set(dispatch.operations()[name].implementations)
    forced = resolve_implementations(["index_topk=reference"])
    assert set(forced["index_topk"].values()) == {"reference"}


# ---- sizes -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("text", "size"), [("5GB", 5 * 10**9), ("500 MiB", 500 * 2**20), ("1kb", 1000), ("123", 123)])
def test_sizes_are_read(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "0", "-1GB", "5 parsecs", "1.5GB"])
def test_refuses_sizes(text):
    with pytest.raises(UsageError, match="--shard-size: got"):
        parse_size(text)
