"""`jax.jit` for whole steps of the model: with each platform's compiler options, and never past a forced choice."""

import functools
from collections.abc import Callable
from typing import Any, Protocol, cast, runtime_checkable

import jax
from jax.extend.core import get_opaque_trace_state

from kernels_pallas.tpu import Chip, current_chip
from v4jax import ops

# XLA's default order on CPU allocates the loop buffers of all layers at once; this one is no slower, and a forward pass
# of 32,768 tokens of the 137M-parameter model needs 1.2 GiB of temporaries with it instead of 4.1. XLA fills half of a
# 512-bit vector unless told otherwise; all of it makes a prefill of 512 tokens 1 to 3 % faster, and nothing slower.
_CPU_OPTIONS = {
    "xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED",
    "xla_cpu_prefer_vector_width": "512",
}


def compiler_options(
    platform: str, *, chip: Chip | None = None, is_training: bool = False
) -> dict[str, str] | None:  # fmt: skip
    """What a step is compiled with on "cpu", "gpu" or "tpu"; `chip` is the one that is there by default."""
    if platform == "cpu":
        return _CPU_OPTIONS
    if platform == "tpu" and (chip or current_chip()).name == "tpu7x":
        # Otherwise XLA copies whole stacks of bfloat16 experts into another tiling.
        options = {"xla_tpu_control_large_2nd_minor_layout_for_x16": "false"}
        # As much as on v5p. With its own default, twice that, the compiler unrolls products twice as far: a training
        # step takes it half as long again.
        return options | ({"xla_tpu_scoped_vmem_limit_kib": "16384"} if is_training else {})
    return None


_UNTRACED = get_opaque_trace_state(convention="nnx")


@runtime_checkable
class Jitted(Protocol):
    """What `jit` returns."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the compiled function."""
        ...

    def lower(self, *args: Any, **kwargs: Any) -> jax.stages.Lowered:
        """Its program for these arguments, as of `jax.jit`."""
        ...


def jit(function: Callable[..., Any], *, is_training: bool = False, **options: Any) -> Jitted:
    """`jax.jit(function, **options)`, made at the first call, so that importing a module starts no backend.

    `compiler_options` says how it is compiled.
    Inside another transformation it is the plain function: compiler options belong to the outermost `jit`.
    One is made per platform and per set of forced implementations (`ops.implementations`): a program compiled under one
    choice never answers a call under another.
    """

    @functools.cache
    def compiled(platform: str, forced: frozenset[tuple[str, str]]) -> Jitted:
        # JAX keeps traces by function, so each choice needs a function of its own.
        @functools.wraps(function)
        def own(*args: Any, **kwargs: Any) -> Any:
            return function(*args, **kwargs)

        return jax.jit(own, compiler_options=compiler_options(platform, is_training=is_training), **options)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if get_opaque_trace_state(convention="nnx") != _UNTRACED:
            return function(*args, **kwargs)
        return compiled(jax.default_backend(), ops.forced_implementations())(*args, **kwargs)

    def lower(*args: Any, **kwargs: Any) -> jax.stages.Lowered:
        return compiled(jax.default_backend(), ops.forced_implementations()).lower(*args, **kwargs)

    call.lower = lower  # pyright: ignore[reportAttributeAccessIssue]
    return cast(Jitted, call)
