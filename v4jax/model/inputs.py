"""What every layer is given besides the streams, computed once per call and closed over by scans."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from v4jax.config import ModelConfig
from v4jax.model.rope import Rotation, layer_frequencies, rotation


class Choices(NamedTuple):
    """Discrete choices of one layer, to replay: routed experts and selected entries."""

    experts: jax.Array
    """int32 [B, S, K]."""
    entries: jax.Array | None = None
    """int32 [B, S, topk] with −1 for none; None where the layer selects nothing."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerInputs:
    """Token ids, positions and documents of the tokens being processed, and their rotations."""

    tokens: jax.Array
    """int32 [B, S]: hash routers need them."""
    positions: jax.Array
    """int32 [B, S]: position in the document."""
    segments: jax.Array
    """int32 [B, S]: document of each token, ≥ 1; 0 for padding."""
    plain: Rotation
    """Rotation of layers without compressed entries, and of MTP."""
    compressed: Rotation
    """Rotation of everything in a layer with compressed entries."""
    start: jax.Array | None = None
    """int32 [B]: tokens already in the cache; None without a cache."""
    end: jax.Array | None = None
    """int32 [B]: tokens in the cache afterwards."""
    layer: jax.Array | None = None
    """int32: which layer of a stack that is addressed by index this is; None where a layer has its own arrays."""
    is_packed: bool = dataclasses.field(default=False, metadata={"static": True})
    """Whether a row may hold several documents or padding."""

    def turn(self, ratio: int) -> Rotation:
        """The rotation of a layer with this compression ratio."""
        return self.compressed if ratio else self.plain

    @property
    def is_step(self) -> bool:
        """One token for every sequence, against the cache."""
        return self.start is not None and self.tokens.shape[1] == 1 and not self.is_packed


def document_positions(segment_ids: Int[Array, "B S"]) -> Int[Array, "B S"]:
    """Positions that restart at every change of segment."""
    index = jnp.arange(segment_ids.shape[1])[None]
    return index - jax.lax.cummax(jnp.where(_is_first(segment_ids), index, 0), axis=1)


def numbered_documents(segment_ids: Int[Array, "B S"]) -> Int[Array, "B S"]:
    """The documents of a row numbered in order, from 1; 0 stays padding. An id that returns is another document."""
    number = jnp.cumsum(_is_first(segment_ids), axis=1, dtype=jnp.int32)
    return jnp.where(segment_ids == 0, 0, number)


def _is_first(segment_ids: Int[Array, "B S"]) -> Bool[Array, "B S"]:
    return jnp.pad(segment_ids[:, 1:] != segment_ids[:, :-1], ((0, 0), (1, 0)), constant_values=True)


def full_inputs(config: ModelConfig, tokens: Int[Array, "B S"], segment_ids: Int[Array, "B S"] | None) -> LayerInputs:
    """Inputs of a whole forward pass, without a cache."""
    if segment_ids is None:
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1])[None], tokens.shape)
        segments = jnp.ones_like(tokens)
    else:
        positions, segments = document_positions(segment_ids), numbered_documents(segment_ids)
    return LayerInputs(tokens, positions, segments, *_rotations(config, positions), is_packed=segment_ids is not None)


def cached_inputs(
    config: ModelConfig, tokens: Int[Array, "B S"], start: Int[Array, " B"], lengths: Int[Array, " B"] | None
) -> LayerInputs:
    """Inputs of a chunk that continues each sequence at `start`; `lengths` of its tokens are real (all, if None)."""
    offsets = jnp.arange(tokens.shape[1])[None]
    positions = start[:, None] + offsets
    end = start + (tokens.shape[1] if lengths is None else lengths)
    segments = (positions < end[:, None]).astype(jnp.int32)
    turns = _rotations(config, positions)
    return LayerInputs(tokens, positions, segments, *turns, start=start, end=end, is_packed=lengths is not None)


def _rotations(config: ModelConfig, positions: jax.Array) -> tuple[Rotation, Rotation]:
    return tuple(rotation(positions, layer_frequencies(config, ratio)) for ratio in (0, 1))  # pyright: ignore
