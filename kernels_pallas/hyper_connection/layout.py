"""What the seam kernels share outside of their bodies: the variant, and how tokens lie in operands and blocks."""

import dataclasses

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.hyper_connection.block_sizes import Blocks
from kernels_pallas.tpu import LANES, round_up


@dataclasses.dataclass(frozen=True)
class Spec:
    """What distinguishes the variants of the kernel, all static."""

    streams: int
    """C."""
    width: int
    """D, before its padding to whole lanes."""
    has_write: bool
    """Whether the streams are written first."""
    is_head: bool
    """Whether only the reading gates exist (hc_head)."""
    iterations: int
    eps: float
    norm_eps: float
    blocks: Blocks

    @property
    def maps(self) -> int:
        """Rows of `fn`."""
        return self.streams if self.is_head else self.streams * (2 + self.streams)

    @property
    def fn_rows(self) -> int:
        """Rows of `fn`, padded to whole sublanes."""
        return round_up(self.maps, 8)


@dataclasses.dataclass(frozen=True)
class Layout:
    """Tokens as rows: sequences and rows of a batch are one dimension, every stream fills whole lanes."""

    batch: int
    length: int
    streams: int
    """C."""
    width: int
    """D."""

    @classmethod
    def of(cls, streams: jax.Array, gain: jax.Array) -> "Layout":
        """That of [B, S, C · D] streams beside a gain [D]."""
        batch, length, flat = streams.shape
        return cls(batch, length, flat // gain.shape[0], gain.shape[0])

    @property
    def total(self) -> int:
        """Tokens."""
        return self.batch * self.length

    @property
    def padded(self) -> int:
        """D in whole lanes."""
        return round_up(self.width, LANES)

    def rows(self, x: jax.Array) -> jax.Array:
        """[B, S, n · D] → [tokens, n · padded]."""
        return pad_streams(x.reshape(self.total, -1), x.shape[-1] // self.width, self.padded)


def rows_block(tokens: int, columns: int, part: int = 0) -> pl.BlockSpec:
    """A grid step's rows of an array with a row per token; of its columns, the given part of this width."""
    return pl.BlockSpec((tokens, columns), lambda t: (t, part))


def whole_block(*shape: int) -> pl.BlockSpec:
    """All of an array in every grid step."""
    return pl.BlockSpec(shape, lambda t: (0,) * len(shape))


def scalars_block() -> pl.BlockSpec:
    """An array of scalars."""
    return pl.BlockSpec(memory_space=pltpu.SMEM)


def pad_streams(x: jax.Array, count: int, padded: int) -> jax.Array:
    """[…, C · D] → […, C · padded] with zeros behind each stream; nothing to do where D fills whole lanes."""
    width = x.shape[-1] // count
    if width == padded:
        return x
    streams = x.reshape(*x.shape[:-1], count, width)
    streams = jnp.pad(streams, [(0, 0)] * (streams.ndim - 1) + [(0, padded - width)])
    return streams.reshape(*x.shape[:-1], -1)


def unpad_streams(x: jax.Array, count: int, width: int) -> jax.Array:
    """Undoes `pad_streams`."""
    if x.shape[-1] == count * width:
        return x
    return x.reshape(*x.shape[:-1], count, -1)[..., :width].reshape(*x.shape[:-1], count * width)
