import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoint.random_checkpoint import as_stored, plain_config, quantised_config, write_hf_directory
from flax import nnx

from v4jax.checkpoint.reader import open_checkpoint
from v4jax.config import AttentionKind, RouterKind
from v4jax.dtypes import DTypePolicy, NativeWeights
from v4jax.errors import UserError
from v4jax.loading import build, choose_policy
from v4jax.logits import all_logits
from v4jax.model.tensors import named_variables
from v4jax.model.transformer import Transformer
from v4jax.quant import Codes, PackedCodes, PackedScales, Scales


@pytest.fixture(scope="module", params=["fp4", "fp8"])
def checkpoint(request, tmp_path_factory):
    """Uneven sizes, so that the last tile and block of most matrices is short; FP8 experts with float32 scales."""
    config = quantised_config(
        expert_dtype=request.param,
        index_n_heads=16,
        sliding_window=12,
        num_hidden_layers=2,
        layer_types=(AttentionKind.SLIDING, AttentionKind.CSA),
        mlp_layer_types=(RouterKind.HASH, RouterKind.TOPK),
    )
    files = as_stored(config, scale_dtype="F8_E8M0" if request.param == "fp4" else "F32")
    return open_checkpoint(write_hf_directory(tmp_path_factory.mktemp(request.param), config, files))


def models(checkpoint, dtype, *, stacked=False):
    return [
        build(checkpoint, choose_policy(checkpoint, dtype, "off", weights), stacked=stacked)
        for weights in ("bf16", "native")
    ]


def tokens(checkpoint, length=16):
    return np.random.default_rng(0).integers(0, checkpoint.config.vocab_size, (2, length), dtype=np.int32)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_native_weights_give_exactly_the_logits_of_the_dequantised_model(checkpoint, dtype):
    ids = tokens(checkpoint)
    chunks = [13, *[1] * 3]
    dequantised, native = (
        all_logits(model, ids, mtp=True) | {"cached": all_logits(model, ids, chunks=chunks)["logits"]}
        for model in models(checkpoint, dtype)
    )
    assert np.std(dequantised["logits"]) > 0
    for name, want in dequantised.items():
        np.testing.assert_array_equal(native[name], want, err_msg=name)


def test_stacked_segments_give_the_same(checkpoint):
    ids = tokens(checkpoint)
    dequantised, native = models(checkpoint, "float32", stacked=True)
    want = np.asarray(dequantised(ids))
    np.testing.assert_array_equal(np.asarray(native(ids)), want)


def test_the_released_bytes_are_what_lies_in_memory(checkpoint):
    _, native = models(checkpoint, "bfloat16")
    variables = named_variables(native)
    stored = checkpoint.native(("layers", 1))
    for name, array in stored.items():
        if name.startswith("ffn.experts") or name.endswith(".scale"):
            got = np.asarray(variables[f"segments.1.layers.0.{name}"].get_value())
            if isinstance(variables[f"segments.1.layers.0.{name}"], PackedCodes | PackedScales):
                got = np.ascontiguousarray(got.swapaxes(-1, -2))
            assert got.dtype == array.dtype
            np.testing.assert_array_equal(got.view(np.uint8), array.view(np.uint8), err_msg=name)
    kinds = {name: type(variable) for name, variable in variables.items()}
    assert all(issubclass(kind, Scales) for name, kind in kinds.items() if name.endswith(".scale"))
    assert {name for name, kind in kinds.items() if issubclass(kind, Codes)} == {
        name.removesuffix("scale") + "weight" for name, kind in kinds.items() if issubclass(kind, Scales)
    }
    trained = nnx.to_flat_state(nnx.split(native, nnx.Param, ...)[1])
    assert not any("experts" in path for path, _ in trained)


def test_native_weights_of_an_unquantised_checkpoint_are_refused(tmp_path):
    config = plain_config()
    checkpoint = open_checkpoint(write_hf_directory(tmp_path, config, as_stored(config)))
    with pytest.raises(UserError, match=r"weights native.*quantization_config.*bf16"):
        choose_policy(checkpoint, weights="native")


def test_no_step_holds_a_dequantised_stack_of_experts():
    """The compiled step's temporaries stay far below one layer's experts in float32."""
    config = quantised_config(
        expert_dtype="fp4", hidden_size=256, moe_intermediate_size=256, n_routed_experts=64, index_n_heads=16
    )
    policy = dataclasses.replace(DTypePolicy.named("float32"), native=NativeWeights("fp4"))
    model = jax.eval_shape(lambda: Transformer(config, policy, stacked=False))
    ids = jax.ShapeDtypeStruct((1, 32), jnp.int32)
    compiled = jax.jit(lambda model, ids: model.logits(model.hidden(ids).hidden)).lower(model, ids).compile()
    one_layer = 4 * 3 * 64 * 256 * 256
    assert compiled.memory_analysis().temp_size_in_bytes < one_layer / 4
