"""Prefill and training over unions of selections, with a stated number of members per union."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas.cases import Case, Matmul, Model
from kernels_pallas.sparse_attention import prefill_union
from kernels_pallas.sparse_attention.api import selection_form, sparse_attention
from kernels_pallas.sparse_attention.block_sizes_union import default_union_sizes
from kernels_pallas.sparse_attention.layout import WORD
from kernels_pallas.tpu import LANES, cdiv, current_chip

_DIM = 512
_WINDOW = 128
_PACKED_ROW = 584
"""Bytes of an entry as the best known kernel reads it, once for every query: the floor that the targets are set by."""


def _arrays(length: int, heads: int, entries: int, topk: int) -> dict[str, Any]:
    """Entries with rows in one piece, as caches hold them; selections in the form that the model takes."""
    a, i, b = jax.ShapeDtypeStruct, jnp.int32, jnp.bfloat16
    lines = _DIM // LANES
    form = selection_form(topk, entries, "pallas")
    name, width = ("selection", topk) if form == "list" else ("selection_mask", cdiv(entries, WORD))
    return {name: a((1, length, width), i)} | dict(
        q=a((1, length, heads, _DIM), b), keys=a((1, _WINDOW + length, _DIM), b), sink=a((heads,), jnp.float32),
        q_position=a((1, length), i), q_segment=a((1, length), i), key_segment=a((1, _WINDOW + length), i),
        entries=a((1, entries, lines, LANES), b), entry_end=a((1, entries), i), entry_segment=a((1, entries), i),
    )  # fmt: skip


def _joined(rows: jax.Array) -> jax.Array:
    return rows.reshape(*rows.shape[:2], _DIM)


def _fixed(arrays: dict[str, Any], d_out: Any = None, *, members: int, topk: int) -> Any:
    """The kernels with as many blocks as hold `members`; with d(out) the gradients too."""
    q, keys, sink = (arrays[name] for name in ("q", "keys", "sink"))
    entries = _joined(arrays["entries"])
    sizes = default_union_sizes(q.shape[2], q.dtype, current_chip())
    blocks = cdiv(members, sizes[0].rows)
    static = prefill_union.Static(_WINDOW, _DIM**-0.5, topk, *sizes, current_chip(), blocks)
    names = ("q_position", "q_segment", "key_segment", "selection", "selection_mask")
    places = prefill_union.Places(*(arrays.get(name) for name in names))  # pyright: ignore[reportArgumentType]
    out, stats = prefill_union.run(static, q, keys, sink, entries, places, with_stats=d_out is not None)
    if d_out is None:
        return out
    return out, prefill_union.gradients(static, q, keys, sink, entries, places, out, d_out, stats)


def _any_union(arrays: dict[str, Any], d_out: jax.Array, *, topk: int) -> Any:
    """The public function and its gradients, for unions of any size."""
    names = ("q", "keys", "sink", "entries")
    out, pullback = jax.vjp(
        lambda some: sparse_attention(
            **arrays | some | {"entries": _joined(some["entries"])},
            window=_WINDOW,
            scale=_DIM**-0.5,
            sound_topk=topk,
            implementation="pallas",
        ),
        {name: arrays[name] for name in names},
    )
    return out, pullback(d_out)


def _case(
    name: str, model: Model, heads: int, entries: int, topk: int, members: int | None, *, length: int = 2048,
    is_training: bool = False, target: float | None = None, in_ci: bool = False,
) -> Case:  # fmt: skip
    """A case; `members` of every union, None for what the data say."""

    def build() -> tuple[Callable[..., Any], tuple[Any, ...]]:
        arrays = _arrays(length, heads, entries, topk)
        own = _any_union if members is None else functools.partial(_fixed, members=members)
        return functools.partial(own, topk=topk), (arrays, arrays["q"]) if is_training else (arrays,)

    rows = length * heads
    said = "as many as the data say" if members is None else f"{members} members"
    return Case(
        op="sparse_attention", name=name, model=model, build=build,
        hbm_bytes=2 * (6 if is_training else 2) * rows * _DIM + length * topk * _PACKED_ROW,
        matmuls=(Matmul(2.0 * (7 if is_training else 2) * rows * (topk + _WINDOW) * _DIM, _DIM),),
        targets={} if target is None else {"v6e": target, "tpu7x": target}, target_kind="B", static=False,
        in_ci=in_ci, inputs=f"every tile's union has {said}; the fetch before the first tile is left out",
    )  # fmt: skip


_1M, _128K = 1 << 18, 1 << 15
UNION_CASES = (
    _case("csa_2048_128k_union_512", "flash", 64, _128K, 512, 512, target=1.4),
    _case("csa_2048_128k_union_1024", "flash", 64, _128K, 512, 1024, target=1.4),
    _case("csa_2048_128k_union_16384", "flash", 64, _128K, 512, 16384),
    _case("csa_2048_1m_union_1024", "flash", 64, _1M, 512, 1024, target=1.4),
    _case("csa_2048_1m_8_heads_union_1024", "flash", 8, _1M, 512, 1024),
    _case("csa_training_16k_of_64k_union_1024", "flash", 64, 1 << 14, 512, 1024, length=1 << 14, is_training=True),
    _case("csa_training_of_64k", "flash", 64, 1 << 14, 512, None, is_training=True, in_ci=True),
    _case("csa_training_of_1m_8_heads", "flash", 8, _1M, 512, None, length=256, is_training=True, in_ci=True),
    _case("csa_2048_128k_pro_union_2048", "pro", 128, _128K, 1024, 2048),
    _case("csa_2048_1m_pro_union_2048", "pro", 128, _1M, 1024, 2048),
    _case("csa_training_of_64k_pro", "pro", 128, 1 << 14, 1024, None, is_training=True),
    _case("csa_training_of_64k_16_heads_pro", "pro", 16, 1 << 14, 1024, None, is_training=True),
    _case("union_of_odd_lengths", "ugly", 24, 4443, 333, None, length=777, is_training=True),
)
