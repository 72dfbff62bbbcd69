"""The parts of a model's steps that run on every device of a mesh: backbone, MTP block, head, empty cache.

Each is the plain method where the model has no placement. Otherwise whole arrays come in, every device runs the same
method on its parts (`parallel.run`), and whole arrays go out; between the parts XLA sees ordinary arrays.
"""

import dataclasses
import math
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from v4jax import cache as caches
from v4jax import parallel, sharding
from v4jax.config import layer_plan, mtp_plan
from v4jax.model.inputs import Choices, LayerInputs
from v4jax.model.mtp import MTPBlock
from v4jax.parallel import Shard
from v4jax.sharding import Placement

if TYPE_CHECKING:
    from v4jax.model.transformer import ForwardOutput, Transformer


def backbone(
    model: "Transformer",
    inputs: LayerInputs,
    segments: tuple | None,
    *,
    replay: tuple[Choices, ...] | None = None,
    record: bool = False,
    remat: bool = False,
) -> tuple["ForwardOutput", tuple | None]:
    """`Transformer.local_backbone` on all devices."""
    from v4jax.model.transformer import ForwardOutput

    if model.placement is None:
        return model.local_backbone(inputs, segments, replay=replay, record=record, remat=remat)
    length = inputs.tokens.shape[1]
    shard = _shard(model, inputs, model.placement)
    inputs, replay = _fill_rows(model, shard, inputs, replay)
    tokens, _ = _specs(shard)

    def local(
        model: "Transformer", inputs: list[jax.Array], segments: tuple | None, replay: tuple[Choices, ...] | None
    ) -> tuple[tuple, tuple | None]:
        chunk = _own_chunk(jax.tree.unflatten(structure, inputs))
        output, segments = model.local_backbone(chunk, segments, replay=replay, record=record, remat=remat)
        return tuple(getattr(output, field.name) for field in dataclasses.fields(output)), segments

    cache_specs = sharding.cache_specs(segments, shard.placement, inputs.tokens.shape[0])
    leaves, structure = jax.tree.flatten(inputs)
    everywhere = PartitionSpec()
    out_specs = (tokens, tokens, everywhere, everywhere, tokens if record else None)
    fields, segments = parallel.run(
        local, shard, model, (leaves, segments, replay),
        (_input_specs(leaves, shard), cache_specs, tokens), (out_specs, cache_specs),
    )  # fmt: skip
    output = ForwardOutput(*fields)
    if output.hidden.shape[1] != length:
        cut = jax.tree.map(lambda a: a[:, :length], (output.hidden, output.streams, output.choices))
        output = dataclasses.replace(output, hidden=cut[0], streams=cut[1], choices=cut[2])
    return output, segments


def predict(
    model: "Transformer",
    block: MTPBlock,
    streams: jax.Array,
    following: jax.Array,
    inputs: LayerInputs,
    state: caches.LayerCache | None = None,
) -> tuple[jax.Array, caches.LayerCache | None]:
    """`MTPBlock.predict` with the embedding of the `following` tokens [B, S], on all devices."""
    if model.placement is None:
        hidden, state, _ = block.predict(streams, model.embed(following), inputs, state)
        return hidden, state
    length = inputs.tokens.shape[1]
    shard = _shard(model, inputs, model.placement)
    inputs, _ = _fill_rows(model, shard, inputs, None)
    missing = inputs.tokens.shape[1] - length
    streams, following = (jnp.pad(a, [(0, 0), (0, missing), *[(0, 0)] * (a.ndim - 2)]) for a in (streams, following))
    tokens, _ = _specs(shard)

    def local(
        parts: tuple[MTPBlock, Any], streams: jax.Array, following: jax.Array, inputs: list[jax.Array], state: Any
    ) -> tuple[jax.Array, Any]:
        block, embed = parts
        block = parallel.gathered(block)
        return block.predict(streams, embed(following), _own_chunk(jax.tree.unflatten(structure, inputs)), state)[:2]

    leaves, structure = jax.tree.flatten(inputs)
    cache_specs = sharding.cache_specs(state, shard.placement, inputs.tokens.shape[0])
    hidden, state = parallel.run(
        local, shard, (block, model.embed), (streams, following, leaves, state),
        (tokens, tokens, _input_specs(leaves, shard), cache_specs), (tokens, cache_specs),
    )  # fmt: skip
    return hidden[:, :length], state


def logits(model: "Transformer", hidden: jax.Array) -> jax.Array:
    """`Transformer.local_logits` of [B, …, D] on all devices: [B, …, V], divided over the vocabulary."""
    if model.placement is None or hidden.ndim < 2:
        return model.local_logits(hidden)
    placement = model.placement
    batch = placement.dividing("batch", hidden.shape[0])
    vocabulary = sharding.division_of(model.head.weight, placement).compute[0]
    sequence = placement.live(placement.rules.compute["sequence"])
    if hidden.ndim < 3 or hidden.shape[1] % placement.size(sequence):
        sequence = ()
    # Rows that the vocabulary's axes divide come together: they are the last to divide the rows.
    together = tuple(name for name in batch if name in vocabulary)
    kept = tuple(name for name in batch if name not in together)

    def local(model: "Transformer", hidden: jax.Array) -> jax.Array:
        return model.local_logits(parallel.join(hidden, together, 0))

    middle = () if hidden.ndim < 3 else (sharding.axis_entry(sequence), *[None] * (hidden.ndim - 3))
    return parallel.run(
        local, Shard(placement, batch, sequence), model, (hidden,),
        (PartitionSpec(sharding.axis_entry(batch), *middle),),
        PartitionSpec(sharding.axis_entry(kept), *middle, sharding.axis_entry(vocabulary)),
    )  # fmt: skip


def init_cache(model: "Transformer", batch: int, max_length: int, *, stacked: bool) -> caches.Cache:
    """Empty state on the mesh."""
    placement = model.placement
    assert placement is not None
    multiple = sharding.entry_multiple(placement)

    def empty() -> caches.Cache:
        return caches.init_cache(
            model.config, batch, max_length, model.policy, stacked=stacked, entry_multiple=multiple
        )

    abstract = jax.eval_shape(empty)
    shardings = jax.tree.leaves(sharding.cache_shardings(abstract, placement.mesh, placement.recipe))
    leaves = jax.jit(lambda: jax.tree.leaves(empty()), out_shardings=shardings)()
    return jax.tree.unflatten(jax.tree.structure(abstract), leaves)


def _shard(model: "Transformer", inputs: LayerInputs, placement: Placement) -> Shard:
    """How these tokens are divided: rows as far as their number allows, and tokens of a row unless they are few.

    Without a cache rows are filled up to equal parts. With one, a chunk is divided if its parts are equal and each is
    as long as what a device must know of the tokens before its own.
    """
    rows, length = inputs.tokens.shape
    sequence = placement.live(placement.rules.compute["sequence"])
    if inputs.start is not None and (
        length % placement.size(sequence) or length // placement.size(sequence) < _reach(model)
    ):
        sequence = ()
    return Shard(placement, placement.dividing("batch", rows), sequence)


def _reach(model: "Transformer") -> int:
    """Tokens before its own that a device must know of."""
    config = model.config
    plan = (*layer_plan(config), *mtp_plan(config))
    return max(config.sliding_window, *((2 if spec.is_overlapped else 1) * spec.ratio for spec in plan))


def _fill_rows(
    model: "Transformer", shard: Shard, inputs: LayerInputs, replay: tuple[Choices, ...] | None
) -> tuple[LayerInputs, tuple[Choices, ...] | None]:
    """Rows of equal parts, each of whole windows of every compressor, by padding at the end."""
    length = inputs.tokens.shape[1]
    if inputs.start is not None or not shard.sequence:
        return inputs, replay
    config = model.config
    ratios = {spec.ratio for spec in (*layer_plan(config), *mtp_plan(config)) if spec.ratio}
    whole = shard.size(shard.sequence) * math.lcm(*ratios)
    missing = -length % whole
    if not missing:
        return inputs, replay

    def fill(array: jax.Array, value: int = 0) -> jax.Array:
        return jnp.pad(array, [(0, 0), (0, missing), *[(0, 0)] * (array.ndim - 2)], constant_values=value)

    if replay is not None:
        parts = ((fill(one.experts), one.entries) for one in replay)
        replay = tuple(Choices(experts, None if chosen is None else fill(chosen, -1)) for experts, chosen in parts)
    return jax.tree.map(fill, inputs), replay


def _own_chunk(inputs: LayerInputs) -> LayerInputs:
    """Inputs with the bounds of this device's part of a chunk."""
    names = parallel.sequence_axes()
    if inputs.start is None or not names:
        return inputs
    assert inputs.end is not None
    length = inputs.tokens.shape[1]
    start = inputs.start + parallel.index(names) * length
    return dataclasses.replace(inputs, start=start, end=jnp.clip(inputs.end, start, start + length))


def _specs(shard: Shard) -> tuple[PartitionSpec, PartitionSpec]:
    """Of [B, S, …] and of [B]."""
    batch = sharding.axis_entry(shard.batch)
    return PartitionSpec(batch, sharding.axis_entry(shard.sequence)), PartitionSpec(batch)


def _input_specs(leaves: list[jax.Array], shard: Shard) -> list[PartitionSpec]:
    tokens, rows = _specs(shard)
    return [rows if leaf.ndim < 2 else tokens for leaf in leaves]
