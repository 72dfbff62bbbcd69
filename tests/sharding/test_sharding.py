"""Meshes and rules: what is divided how, and what is refused with which words."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from model.random_model import small_config
from sharding.tiny_steps import CONFIG, tiny_model

from v4jax.config import ModelConfig
from v4jax.dtypes import DTypePolicy
from v4jax.errors import UsageError, UserError
from v4jax.model.tensors import named_variables
from v4jax.model.transformer import Transformer
from v4jax.sharding import (
    AXES,
    Placement,
    cache_shardings,
    check_mesh,
    choose_mesh,
    default_mesh,
    divide,
    format_mesh,
    make_mesh,
    optimizer_shardings,
    parameter_shardings,
    parse_mesh,
)


def mesh_of(text: str) -> jax.sharding.Mesh:
    sizes = parse_mesh(text)
    return make_mesh(sizes, jax.devices()[: int(np.prod(list(sizes.values())))])


def test_a_mesh_is_read_and_written() -> None:
    assert parse_mesh("data=2,expert=4") == dict(data=2, fsdp=1, expert=4, sequence=1, tensor=1)
    assert format_mesh(parse_mesh(" expert=4 , data=2")) == "data=2,expert=4"
    assert mesh_of("data=2,tensor=4").axis_names == AXES


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("data=2,data=4", ["data", "twice"]),
        ("experts=2", ["experts", "data, fsdp, expert, sequence, tensor"]),
        ("data=0", ["data=0", "positive"]),
        ("data=-2", ["data=-2", "positive"]),
        ("data", ["axis=size"]),
        ("", ["axis=size"]),
    ],
)
def test_a_mesh_that_cannot_be_read_is_a_usage_error(text: str, words: list[str]) -> None:
    with pytest.raises(UsageError) as error:
        parse_mesh(text)
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("expert=3", ["expert=3", "n_routed_experts=8", "1, 2, 4, 8"]),
        ("tensor=3", ["tensor=3", "num_attention_heads=8", "1, 2, 4, 8"]),
        ("data=16", ["data=16", "16 devices", "there are 8"]),
    ],
)
def test_a_mesh_that_does_not_fit_names_both_numbers_and_what_would_do(text: str, words: list[str]) -> None:
    with pytest.raises(UserError) as error:
        choose_mesh(text, CONFIG, "train")
    assert all(word in str(error.value) for word in words), error.value


def test_a_dimension_that_an_axis_does_not_divide_is_refused() -> None:
    placement = Placement(mesh_of("tensor=8"), "train")
    with pytest.raises(UserError, match="tensor=8 does not divide a dimension heads of 12"):
        divide((12, 32), ("heads", "q_lora"), placement)


def test_no_axis_divides_two_dimensions_and_fsdp_takes_what_it_divides() -> None:
    placement = Placement(mesh_of("fsdp=2,expert=2,tensor=2"), "train")
    assert divide((8, 24, 32), ("experts", "expert_hidden", "hidden"), placement).spec(4) == P(
        None, "expert", "tensor", "fsdp"
    )
    assert divide((192, 20), ("heads", "q_lora"), placement).spec(2) == P(("tensor", "expert", "fsdp"), None)
    # 3 is odd: the other dimension is divided, or none.
    assert divide((3, 32), ("q_lora", "hidden"), placement).spec(2) == P(None, ("expert", "fsdp"))
    assert divide((3, 5), ("q_lora", "hidden"), placement).spec(2) == P(None, None)
    for module in (tiny_model(), Transformer(ModelConfig.flash(), DTypePolicy())):
        for name, sharding in zip(
            named_variables(module), jax.tree.leaves(parameter_shardings(module, placement.mesh, "train")), strict=True
        ):
            used = [axis for entry in sharding.spec for axis in ((entry,) if isinstance(entry, str) else entry or ())]
            assert len(used) == len(set(used)), name


def test_each_device_holds_its_share_of_flash() -> None:
    mesh, model = mesh_of("fsdp=2,expert=4"), Transformer(ModelConfig.flash(), DTypePolicy())
    shardings = jax.tree.leaves(parameter_shardings(model, mesh, "train"))
    leaves = jax.tree.leaves(model)
    whole = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
    own = sum(
        np.prod(s.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf, s in zip(leaves, shardings, strict=True)
    )
    assert own <= 1.02 * whole / 8


def test_moments_lie_as_their_parameters() -> None:
    mesh = mesh_of("fsdp=2")
    own = {"a": NamedSharding(mesh, P("fsdp", None)), "b": NamedSharding(mesh, P())}
    state = ({"mu": {"a": jnp.zeros((4, 2)), "b": jnp.zeros(3)}, "count": jnp.int32(0)},)
    got = optimizer_shardings(state, own, mesh)
    assert got[0]["mu"] == own
    assert got[0]["count"].spec == P()


def test_a_cache_is_divided_by_rows_and_places() -> None:
    model, mesh = tiny_model(), mesh_of("data=2,sequence=4")
    cache = model.place(mesh, "decode").init_cache(2, 100)
    csa = cache.segments[0][0]
    assert csa.entries.shape[2] == 64, "26 places, filled up to a tile of 16 for each of 4 devices"
    assert csa.entries.sharding.spec == P(None, "data", "sequence", None)
    assert csa.window.sharding.spec == P(None, "data", None, None)
    # Three rows: `data` does not divide them, so every device of it holds all.
    assert cache_shardings(model.init_cache(3, 127), mesh).length.spec == P(None)


@pytest.mark.parametrize("count", [1, 2, 4, 8, 16, 64, 512])
@pytest.mark.parametrize("recipe", ["train", "prefill", "decode"])
@pytest.mark.parametrize(
    "config", [ModelConfig.flash(), ModelConfig.pro(), small_config()], ids=["flash", "pro", "small"]
)
def test_the_default_mesh_uses_every_device_and_fits(config: ModelConfig, recipe: str, count: int) -> None:
    sizes = default_mesh(config, count, recipe)
    assert np.prod(list(sizes.values())) == count
    check_mesh(config, sizes)
    if config.hidden_size < 100 and recipe != "train":
        assert sizes["data"] == count, "a small model is copied, not divided"
    if config.hidden_size > 1000 and count > 1:
        assert sizes["expert"] > 1
