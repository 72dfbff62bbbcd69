"""`compilation.jit`: one program per forced choice, and transparent inside other transformations."""

import jax
import numpy as np

from v4jax import ops
from v4jax.compilation import jit


def test_a_program_never_answers_for_another_forced_implementation():
    traced = []

    @jit
    def double(x):
        traced.append(ops.forced_implementations())
        return 2 * x

    for _ in range(2):
        assert double(3.0) == 6
        with ops.implementations(["index_topk=reference"]):
            assert double(3.0) == 6
    assert traced == [frozenset(), frozenset({("index_topk", "reference")})]


def test_it_can_be_differentiated_mapped_and_compiled_again():
    square = jit(lambda x: x * x)
    assert jax.grad(square)(3.0) == 6
    assert jax.jit(lambda x: square(x) + 1)(3.0) == 10
    assert jax.value_and_grad(jax.checkpoint(square))(3.0) == (9, 6)
    np.testing.assert_array_equal(jax.vmap(square)(np.arange(3.0)), [0, 1, 4])
