"""What a training step holds beside weights and optimiser state, by formula: bytes of one device.

The counts of arrays that are alive at once were read out of compiled steps (Flash and Pro on v5p); the sizes are the
model's. A candidate mesh is judged by them before any compilation, so they lean to the high side.
"""

import math
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING

from kernels_pallas.tpu import LANES, cdiv, round_up
from v4jax import ops
from v4jax.config import LayerSpec, layer_plan
from v4jax.model.travel import BUFFER_BYTES
from v4jax.plan.request import Request
from v4jax.sharding import Division, Placement

if TYPE_CHECKING:
    from v4jax.plan.analytic import Parameter

_FLOAT32, _COMPUTE, _INDEX = 4, 2, 4
_HEADS_ALIVE = 7
"""Arrays [tokens, heads, head_dim] in a layer's backward pass: queries before and after their norm and rotation, what
attention returns, its rotation, the gradients of both, and a change of layout."""
_STREAMS_ALIVE = 8
"""Arrays of streams there: those of two seams, recomputed, and their gradients."""
_ROWS_ALIVE = 10
"""Buffers of picked rows in an exchange with the experts' products in it, some of them float32."""
_OTHER = 4 << 30
"""Layers outside loops, the loss, copies."""


def training_bytes(
    request: Request,
    placement: Placement,
    tokens: float,
    parameters: Mapping[str, "Parameter"],
    divisions: Mapping[str, Division],
) -> int:
    """Kept between the passes, gradients, and the widest layer of the backward pass.

    Args:
      tokens: of one device.
    """
    config = request.config
    streams = tokens * (config.hc_mult + 1) * config.hidden_size * _COMPUTE
    maps = tokens * config.hc_mult * (2 + config.hc_mult) * _FLOAT32
    narrow = tokens * (config.hidden_size + config.q_lora_rank + config.head_dim) * _COMPUTE
    scores = tokens * config.n_routed_experts * _FLOAT32
    selections = sum(tokens * selection_bytes(request, spec) for spec in layer_plan(config))
    kept = config.num_hidden_layers * (streams + maps + narrow + scores) + selections
    heads = tokens * config.num_attention_heads * config.head_dim * _COMPUTE / placement.sizes["tensor"]
    picks = tokens * config.num_experts_per_tok * config.hidden_size * _COMPUTE
    layer = _HEADS_ALIVE * heads + _STREAMS_ALIVE * streams + _ROWS_ALIVE * min(picks, BUFFER_BYTES)
    # A layer's matrices are brought together in the compute dtype, and their gradients made in float32.
    layer += max(_layer_elements(placement, parameters, divisions).values()) * (_COMPUTE + _FLOAT32)
    gradients = sum(
        _elements(own, divisions[name], placement, stored=True) * _FLOAT32 for name, own in parameters.items()
    )
    return int(kept + layer + gradients + _OTHER)


def selection_bytes(request: Request, spec: LayerSpec) -> int:
    """What is kept of a token's selection in one layer, in the form that attention takes on a TPU."""
    topk, count = request.config.index_topk, request.context // spec.ratio if spec.has_indexer else 0
    if count <= topk:
        return 0
    with ops.implementations(["sparse_attention=pallas", *request.implementation]):
        is_mask = ops.selection_form(topk, count) == "mask"
    # Words of a mask lie in whole rows of lanes.
    return _INDEX * (round_up(cdiv(count, 32), LANES) if is_mask else topk)


def _layer_elements(
    placement: Placement, parameters: Mapping[str, "Parameter"], divisions: Mapping[str, Division]
) -> Counter[str]:
    """Of each unstacked layer of the backbone: elements that one device uses."""
    found: Counter[str] = Counter()
    for name, own in parameters.items():
        if not name.startswith("segments."):
            continue
        repeats = math.prod(own.shape[: len(own.shape) - len(own.axes)])
        found[".".join(name.split(".")[:4])] += _elements(own, divisions[name], placement, stored=False) // repeats
    return found


def _elements(own: "Parameter", division: Division, placement: Placement, *, stored: bool) -> int:
    """Elements that one device uses, or only stores."""
    names = (*division.compute, *(division.storage if stored else ()))
    return math.prod(own.shape) // math.prod(placement.size(axes) for axes in names)
