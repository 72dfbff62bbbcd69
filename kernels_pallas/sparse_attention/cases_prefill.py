"""Prefill and training shapes of `sparse_attention`: Flash and Pro, whole and one of 8 head shards, and ugly ones."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas.cases import Case, Figure, Matmul, Model
from kernels_pallas.sparse_attention.api import sparse_attention
from kernels_pallas.sparse_attention.block_sizes import default_block_sizes
from kernels_pallas.tpu import SUBLANES, cdiv, round_up

_DIM = 512
_WINDOW = 128


def _arrays(batch: int, length: int, heads: int, entries: int, has_mask: bool, dim: int, window: int) -> dict[str, Any]:
    a, i = jax.ShapeDtypeStruct, jnp.int32
    found: dict[str, Any] = dict(
        q=a((batch, length, heads, dim), jnp.bfloat16), keys=a((batch, window + length, dim), jnp.bfloat16),
        sink=a((heads,), jnp.float32), q_position=a((batch, length), i), q_segment=a((batch, length), i),
        key_segment=a((batch, window + length), i),
    )  # fmt: skip
    if entries:
        found |= dict(
            entries=a((batch, entries, dim), jnp.bfloat16), entry_end=a((batch, entries), i),
            entry_segment=a((batch, entries), i),
        )  # fmt: skip
    if has_mask:
        found["selection_mask"] = a((batch, length, cdiv(entries, 32)), i)
    return found


def _forward(arrays: dict[str, Any], *, window: int, dim: int) -> jax.Array:
    return sparse_attention(**arrays, window=window, scale=dim**-0.5, implementation="pallas")


def _training(arrays: dict[str, Any], d_out: jax.Array, *, window: int, dim: int) -> Any:
    names = [name for name in ("q", "keys", "sink", "entries") if name in arrays]
    function = lambda some: _forward(arrays | some, window=window, dim=dim)  # noqa: E731
    out, pullback = jax.vjp(function, {name: arrays[name] for name in names})
    return out, pullback(d_out)


def _case(
    name: str, model: Model, heads: int, entries: int = 0, *, length: int = 2048, batch: int = 1,
    has_mask: bool = False,
    is_training: bool = False, dim: int = _DIM, window: int = _WINDOW, best: Mapping[str, Figure] | None = None,
    targets: Mapping[str, float] | None = None, in_ci: bool = False,
) -> Case:  # fmt: skip
    def build() -> tuple[Callable[..., Any], tuple[Any, ...]]:
        arrays = _arrays(batch, length, heads, entries, has_mask, dim, window)
        function = functools.partial(_training if is_training else _forward, window=window, dim=dim)
        return function, (arrays, arrays["q"]) if is_training else (arrays,)

    rows = batch * length * heads
    products = 2 + 5 if is_training else 2
    # What must be read or written: q and the output; for the gradients also q, output, its cotangent and that of q.
    transfers = 6 if is_training else 2
    # The floors of the prefill rows count the entries of a long context alone, the window only where nothing else is.
    keys = (entries + (window if has_mask else 0)) or window
    tiles = cdiv(entries, default_block_sizes(round_up(heads, SUBLANES), entries, jnp.bfloat16).entries)
    # The first tile goes with the window, further ones rescale what is there, the last one is followed by the division.
    has_regions = tiles > 1 and not is_training
    shares = {"sparse_attention_forward": (1 / tiles, 1 - 1 / tiles, 1 / tiles)} if has_regions else {}
    return Case(
        op="sparse_attention", name=name, model=model, build=build,
        hbm_bytes=2 * (transfers * rows * dim + batch * (window + length + entries) * dim),
        matmuls=(Matmul(2.0 * products * rows * keys * dim, dim),), best=best or {}, targets=targets or {},
        target_kind="B" if best else "S", in_ci=in_ci, region_shares=shares,
        inputs="every query meets every tile of entries (a context that ends far behind them): the worst case",
    )  # fmt: skip


def _per_token(v6e: float, tpu7x: float) -> dict[str, Figure]:
    note = "per token at 8K context, times 2048"
    return {"v6e": Figure(2048 * v6e, "B", note), "tpu7x": Figure(2048 * tpu7x, "B", note)}


def _figures(v6e: float, tpu7x: float) -> dict[str, Figure]:
    return {"v6e": Figure(v6e, "B"), "tpu7x": Figure(tpu7x, "B")}


_FLASH = (
    _case("sliding_2048", "flash", 64, best=_figures(582e3, 490e3), targets={"v6e": 1.3, "tpu7x": 1.5}),
    _case("hca_2048_1024", "flash", 64, 1024, best=_figures(842e3, 885e3), targets={"v6e": 1.3, "tpu7x": 1.3}),
    _case(
        "csa_2048_8k", "flash", 64, 2048, has_mask=True, best=_per_token(2297, 1409),
        targets={"v6e": 1.4, "tpu7x": 1.4}, in_ci=True,
    ),
    _case("sliding_training_4k", "flash", 64, length=4096, is_training=True),
    _case("hca_training_16k", "flash", 64, 128, length=16384, is_training=True),
    _case("csa_training_16k", "flash", 64, 4096, length=16384, has_mask=True, is_training=True),
    _case("csa_training_8_heads", "flash", 8, 2048, length=8192, has_mask=True, is_training=True),
)  # fmt: skip
_PRO = (
    _case("sliding_2048_pro", "pro", 128),
    _case("hca_2048_1024_pro", "pro", 128, 1024),
    _case("csa_2048_8k_pro", "pro", 128, 2048, has_mask=True),
    _case("csa_training_8k_pro", "pro", 128, 2048, length=8192, has_mask=True, is_training=True),
    _case("csa_training_16_heads_pro", "pro", 16, 2048, length=8192, has_mask=True, is_training=True),
)
_UGLY = (
    _case("odd_lengths", "ugly", 24, 333, length=777, batch=3, has_mask=True, is_training=True, in_ci=True),
    _case("one_token", "ugly", 64, 5, length=1, has_mask=True, is_training=True),
    _case("window_150_dim_96", "ugly", 5, 130, length=300, dim=96, window=150, is_training=True),
)
PREFILL_CASES = (*_FLASH, *_PRO, *_UGLY)
