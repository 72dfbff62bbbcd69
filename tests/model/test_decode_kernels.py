"""Decoding with the attention kernels forced on: interpreted against the goldens, compiled for what it copies."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from v4jax import ops
from v4jax.loading import load

STEPS = 3
KERNEL_GOLDEN = 5e-4  # other people's code, and the kernels' powers of 2 in place of exponentials


@pytest.mark.parametrize("folder", ["flash_like_f32", "flash_like_quantized"])
def test_decoding_with_the_kernels_equals_the_goldens(shared: Path, folder: str) -> None:
    model = load(shared / "goldens" / folder, stacked=True)
    expected = np.load(shared / "goldens" / folder / "expected.npz")
    tokens, logits = expected["tokens"], expected["logits"]
    start = tokens.shape[1] - STEPS
    cache = model.init_cache(*tokens.shape)
    _, cache = jax.jit(lambda m, x, c: m.extend(x, c))(model, tokens[:, :start], cache)
    with ops.implementations(["sparse_attention_decode=pallas"]):
        step = jax.jit(lambda m, x, c: m.decode_step(x, c))
        mode = pltpu.InterpretParams(out_of_bounds_reads="raise", uninitialized_memory="nan")
        with pltpu.force_tpu_interpret_mode(mode):
            for position in range(start, tokens.shape[1]):
                got, cache = step(model, tokens[:, position], cache)
                assert np.abs(np.asarray(got) - logits[:, position]).max() <= KERNEL_GOLDEN


_COMPILE = """
import os
from kernels_pallas import aot
os.environ.update(aot.ENVIRONMENT)
import jax, jax.numpy as jnp
from kernels_pallas.tpu import CHIPS
from v4jax import ops
LAYERS, BATCH, HEADS, DIM, SLOTS = 4, 16, 16, 512, 4096

def step(q, rows, index, sink, cache, position):
    def body(cache, layer):
        batch = jnp.arange(BATCH)
        ring = cache["ring"].at[layer, batch, position % 128].set(rows, unique_indices=True, indices_are_sorted=True)
        by_rows = cache["rows"].at[layer, batch, position].set(rows.reshape(BATCH, 4, 128), mode="drop")
        pages = cache["pages"].at[layer, batch, position].set(rows, mode="drop")
        call = lambda *a: ops.sparse_attention_decode(
            q, ring, jnp.minimum(position + 1, 128), sink, *a, layer=layer, scale=DIM**-0.5)
        out = call(by_rows, position + 1, index) + call(pages, position + 1) + call()
        return dict(ring=ring, rows=by_rows, pages=pages), out
    return jax.lax.scan(body, cache, jnp.arange(LAYERS))

S = lambda *shape, of=jnp.bfloat16: jax.ShapeDtypeStruct(shape, of)
cache = dict(ring=S(LAYERS, BATCH, 128, DIM), rows=S(LAYERS, BATCH, SLOTS, 4, 128), pages=S(LAYERS, BATCH, SLOTS, DIM))
arguments = (S(BATCH, HEADS, DIM), S(BATCH, DIM), S(BATCH, 512, of=jnp.int32), S(HEADS, of=jnp.float32), cache,
             S(BATCH, of=jnp.int32))
with ops.implementations(["sparse_attention_decode=pallas"]):
    compiled = aot.compile_for(CHIPS["v6e"], step, arguments, donate_argnums=(4,))
print("temp", aot.memory_bytes(compiled)["temp"], "slice", BATCH * 128 * DIM * 2)
"""


@pytest.mark.tpu_compile
def test_no_layers_slice_of_a_stacked_cache_is_copied_on_a_tpu() -> None:
    pytest.importorskip("libtpu", reason="needs the TPU compiler: pip install 'jax[tpu]'")
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    found = subprocess.run([sys.executable, "-c", _COMPILE], env=environment, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr[-2000:]
    _, temp, _, ring_slice = found.stdout.split()
    # The smallest slice is a layer's windows, 2 MiB; entries have 64 MiB per layer.
    assert int(temp) < int(ring_slice)
