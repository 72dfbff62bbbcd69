"""In which form selections go from the indexer to attention."""

import jax
import jax.numpy as jnp
import pytest

from v4jax import ops
from v4jax.config import AttentionKind, ModelConfig
from v4jax.dtypes import DTypePolicy
from v4jax.model.transformer import Transformer

TOKENS = jax.ShapeDtypeStruct((1, 128), jnp.int32)
KERNELS = ("index_topk=pallas", "sparse_attention=pallas")


@pytest.fixture(scope="module")
def model() -> Transformer:
    return Transformer.random(ModelConfig.tiny(), DTypePolicy.named("bfloat16"), stacked=False)


def test_kernels_take_bits_where_a_mask_is_not_much_larger_than_a_list():
    assert ops.selection_form(512, 4096) == "list"
    with ops.implementations(["sparse_attention=pallas"]):
        assert ops.selection_form(512, 1024) == ops.selection_form(512, 1 << 15) == "mask"
        assert ops.selection_form(512, (1 << 15) + 1) == "list"
        assert ops.selection_form(1024, 1 << 16) == "mask"


@pytest.mark.parametrize("is_cached", [False, True])
def test_the_model_asks_the_indexer_for_what_the_kernels_read(model, is_cached):
    def run(tokens: jax.Array) -> jax.Array:
        return model.extend(tokens, model.init_cache(1, 128))[0] if is_cached else model(tokens)

    with ops.implementations(KERNELS):
        text = str(jax.make_jaxpr(run)(TOKENS))
    assert "index_topk_mask" in text
    assert "index_topk_list" not in text
    assert "sparse_attention_bits" not in text


def test_recorded_selections_are_lists_whatever_attention_reads(model):
    with ops.implementations(KERNELS):
        recorded = jax.eval_shape(lambda tokens: model.hidden(tokens, record=True).choices, TOKENS)
    for kind, choices in zip(model.config.layer_types, recorded, strict=True):
        assert (choices.entries is not None) == (kind is AttentionKind.CSA)
        assert choices.entries is None or choices.entries.shape == (1, 128, model.config.index_topk)
