"""Models straight onto a mesh, and the verbs there: as on one device."""

from pathlib import Path

import jax
import numpy as np
import pytest
from checkpoint.random_checkpoint import as_stored, quantised_config, write_hf_directory
from tolerances import assert_logits_close
from train.tiny_run import run_config, write_model

import v4jax
from v4jax.checkpoint.placed import needed_experts
from v4jax.checkpoint.reader import open_checkpoint
from v4jax.cli import main
from v4jax.config import AttentionKind, RouterKind
from v4jax.distributed import Group, take_flags
from v4jax.errors import UsageError, UserError
from v4jax.model.tensors import named_variables
from v4jax.sharding import Placement, make_mesh, parse_mesh

MESH = "expert=2,sequence=2,tensor=2"


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("placed") / "model")


@pytest.mark.parametrize("stacked", [True, False], ids=["stacked", "per layer"])
def test_a_model_loaded_onto_a_mesh_has_the_same_parameters_in_parts(directory: Path, stacked: bool) -> None:
    want = named_variables(v4jax.load(directory, stacked=stacked))
    got = named_variables(v4jax.load(directory, stacked=stacked, mesh="fsdp=2,expert=2,tensor=2", recipe="train"))
    assert got.keys() == want.keys()
    for name, variable in got.items():
        np.testing.assert_array_equal(np.asarray(variable[...]), np.asarray(want[name][...]), err_msg=name)
    experts = next(v[...] for name, v in got.items() if name.endswith("experts.w1.weight"))
    assert experts.addressable_shards[0].data.size * 8 == experts.size


def test_a_process_reads_the_experts_of_its_own_devices(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    placement = Placement(make_mesh(parse_mesh("expert=2"), jax.devices()[:2]), "decode")
    variables = named_variables(v4jax.load(directory, mesh=placement.mesh).segments[0].layers[0])
    count = run_config().n_routed_experts
    assert needed_experts(variables, placement) == range(count)
    # As if the second device belonged to another process.
    second = jax.sharding.NamedSharding.addressable_devices_indices_map
    monkeypatch.setattr(
        jax.sharding.NamedSharding,
        "addressable_devices_indices_map",
        lambda self, shape: dict(list(second(self, shape).items())[1:]),
    )
    assert needed_experts(variables, placement) == range(count // 2, count)
    checkpoint = open_checkpoint(directory)
    part, whole = (checkpoint.section(("layers", 0), experts=e) for e in (range(count // 2, count), None))
    for key, values in whole.items():
        wanted = values[count // 2 :] if ".experts.w" in key and "shared" not in key else values
        np.testing.assert_array_equal(part[key], wanted, err_msg=key)


def test_logits_on_a_mesh_equal_those_of_one_device(directory: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "tokens.npy", np.random.default_rng(0).integers(0, 258, (2, 40)))
    results = []
    for name, flags in (("one", []), ("mesh", ["--mesh", MESH])):
        out = tmp_path / f"{name}.npz"
        assert (
            main(["logits", str(directory), "--tokens", str(tmp_path / "tokens.npy"), "--out", str(out), *flags]) == 0
        )
        results.append(np.load(out)["logits"])
    assert_logits_close(results[1], results[0])


@pytest.mark.nightly
def test_generated_text_on_a_mesh_is_that_of_one_device(directory: Path, capsys: pytest.CaptureFixture) -> None:
    command = ["generate", str(directory), "--prompt", "the cat sat", "--max-new-tokens", "30", "--temperature", "0"]
    texts = []
    for flags in ([], ["--mesh", MESH]):
        assert main([*command, *flags]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[1] == texts[0] != ""


@pytest.mark.parametrize(
    ("flags", "code", "words"),
    [
        (["--mesh", "expert=4"], 1, ["expert=4", "n_routed_experts=6", "1, 2, 3, 6"]),
        (["--mesh", "tensor=2,tensor=2"], 2, ["tensor", "twice"]),
        (["--mesh", "data=9"], 1, ["9 devices", "there are 8"]),
        (["--mesh", "data=2", "--stream"], 2, ["--stream", "--mesh"]),
        (["--processes", "2"], 2, ["--coordinator", "missing"]),
        (["--coordinator", "h:1", "--processes", "2", "--process", "2"], 2, ["--process 2"]),
        (["--coordinator", "h", "--processes", "2", "--process", "1"], 2, ["HOST:PORT"]),
    ],
)
def test_what_cannot_be_is_said(
    directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture, flags: list[str], code: int, words: list[str]
) -> None:
    np.save(tmp_path / "tokens.npy", np.zeros((1, 4), np.int32))
    out = tmp_path / "out.npz"
    command = ["logits", str(directory), "--tokens", str(tmp_path / "tokens.npy"), "--out", str(out), *flags]
    assert main(command) == code
    message = capsys.readouterr().err
    assert all(word in message for word in words), message
    assert not out.exists()


def test_the_flags_of_a_group_are_taken_off_a_command() -> None:
    rest, group = take_flags(["model", "--coordinator=host:1", "--processes", "4", "--data", "x", "--process", "3"])
    assert rest == ["model", "--data", "x"]
    assert group == Group("host:1", 4, 3)
    assert take_flags(["model"]) == (["model"], None)
    with pytest.raises(UsageError):
        take_flags(["--process"])


# ---- released bytes on a mesh ---------------------------------------------------------------------------------------
@pytest.fixture(scope="module", params=["fp4", "fp8"])
def quantised(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every matrix that a mesh divides in two has two whole FP8 tiles."""
    config = quantised_config(
        expert_dtype=request.param, hidden_size=256, num_attention_heads=16, o_groups=2, o_lora_rank=128,
        moe_intermediate_size=256, index_n_heads=16, n_routed_experts=4, num_hidden_layers=2, vocab_size=258,
        layer_types=(AttentionKind.CSA, AttentionKind.HCA), mlp_layer_types=(RouterKind.HASH, RouterKind.TOPK),
    )  # fmt: skip
    files = as_stored(config, scale_dtype="F8_E8M0" if request.param == "fp4" else "F32")
    return write_hf_directory(tmp_path_factory.mktemp(request.param), config, files)


@pytest.mark.parametrize("stacked", [True, False], ids=["stacked", "per layer"])
def test_native_weights_on_a_mesh_are_the_same_bytes_in_parts(quantised: Path, stacked: bool) -> None:
    want = named_variables(v4jax.load(quantised, stacked=stacked, weights="native"))
    got = named_variables(v4jax.load(quantised, stacked=stacked, weights="native", mesh="expert=2,tensor=2"))
    assert got.keys() == want.keys()
    for name, variable in got.items():
        assert variable[...].dtype == want[name][...].dtype, name
        parts, whole = (np.asarray(one[...]) for one in (variable, want[name]))
        assert parts.tobytes() == whole.tobytes(), name
        if name.endswith(("experts.w1.weight", "experts.w1.scale")) and "shared" not in name:
            assert variable[...].addressable_shards[0].data.nbytes * 4 == whole.nbytes


def test_logits_of_native_weights_on_a_mesh_are_those_of_dequantised_ones(quantised: Path) -> None:
    tokens = np.random.default_rng(0).integers(0, 258, (2, 24))
    for mesh in ("expert=2,tensor=2", "data=2,expert=4"):
        # On the same mesh, so that only what is multiplied differs and not in which order devices add it up.
        want = np.asarray(v4jax.load(quantised, mesh=mesh)(tokens))
        assert_logits_close(np.asarray(v4jax.load(quantised, weights="native", mesh=mesh)(tokens)), want)


def test_a_mesh_that_cuts_a_scale_is_refused(tmp_path: Path) -> None:
    config = quantised_config(num_attention_heads=8, o_groups=2, index_n_heads=16)
    write_hf_directory(tmp_path, config, as_stored(config, scale_dtype="F8_E8M0"))
    with pytest.raises(UserError, match=r"tensor=2 cuts .*attn\.w.*scale for every 128.*bf16"):
        v4jax.load(tmp_path, weights="native", mesh="tensor=2")
