"""Models straight onto a mesh, and the verbs there: as on one device."""

from pathlib import Path

import jax
import numpy as np
import pytest
from tolerances import assert_logits_close
from train.tiny_run import run_config, write_model

import v4jax
from v4jax.checkpoint.placed import needed_experts
from v4jax.checkpoint.reader import open_checkpoint
from v4jax.cli import main
from v4jax.distributed import Group, take_flags
from v4jax.errors import UsageError
from v4jax.model.transformer import named_variables
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
