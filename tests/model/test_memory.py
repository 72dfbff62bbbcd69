"""Memory that grows with the sequence, and never with its square."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from random_model import small_config

from v4jax.model.transformer import Transformer

LONG_FORWARD = """
import jax.numpy as jnp, numpy as np
from v4jax import ModelConfig
from v4jax.model.transformer import Transformer
config = ModelConfig.bench()
model = Transformer.random(config, stacked=False)
tokens = jnp.asarray(np.random.default_rng(0).integers(0, config.vocab_size, (1, 32768)), jnp.int32)
logits = model(tokens)
assert bool(jnp.isfinite(logits).all())
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(int(peak.split()[1]) / 2**20)
"""


@pytest.mark.slow
def test_a_forward_of_32768_tokens_stays_below_6_gib():
    done = subprocess.run([sys.executable, "-c", LONG_FORWARD], capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr[-2000:]
    peak = float(done.stdout.split()[-1])
    print(f"peak resident memory of a 32,768-token forward: {peak:.2f} GiB")
    assert peak < 6


@pytest.mark.parametrize("what", ["forward", "gradient"])
def test_temporaries_grow_linearly_with_the_sequence(what):
    config = small_config(vocab_size=16)
    model = Transformer(config)

    def forward(model, tokens):
        return jnp.sum(model.hidden(tokens).hidden)

    function = forward if what == "forward" else jax.grad(forward, allow_int=True)

    def temporaries(length):
        tokens = jax.ShapeDtypeStruct((1, length), jnp.int32)
        return jax.jit(function).lower(model, tokens).compile().memory_analysis().temp_size_in_bytes

    short, long = temporaries(4096), temporaries(16384)
    # A score array of [S, S/4] alone would make this ratio approach 16.
    assert long < 5 * short
