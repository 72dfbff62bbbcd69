"""What a step needs at the least, from the config and the mesh alone: bytes, FLOPs, traffic between devices, and times.

Bytes of weights, optimiser state and cache are those of the arrays' own divisions (`v4jax.sharding`). FLOPs are the
model's: products with weights, attention over the keys a query may see, index scores. The bound is the largest of three
times, as if products, HBM and links never waited for each other.
"""

import dataclasses
import functools
import math
from collections import Counter

import jax
import numpy as np
from jax.sharding import AbstractMesh

from v4jax import cost
from v4jax.cache import Cache, init_cache
from v4jax.checkpoint.names import Storage, section_parameters, sections
from v4jax.config import ModelConfig, layer_plan
from v4jax.dtypes import DTypePolicy
from v4jax.model.params import Role
from v4jax.model.tensors import named_variables
from v4jax.model.transformer import Transformer
from v4jax.plan.activations import training_bytes
from v4jax.plan.request import Request
from v4jax.plan.topology import Chip
from v4jax.sharding import AXES, Placement, cache_specs, divide, entry_multiple

_FLOAT32 = 4
_COMPUTE = 2
"""Bytes of the compute dtype, bfloat16."""
WORKSPACE = 1 << 30
"""Room for temporaries that no formula here covers."""


@dataclasses.dataclass(frozen=True)
class Seconds:
    """Lower bounds of a step's time by what limits it."""

    compute: float
    hbm: float
    ici: float

    @property
    def bound(self) -> float:
        """None of them can be beaten."""
        return max(self.compute, self.hbm, self.ici)

    @property
    def limit(self) -> str:
        """The name of the largest."""
        return max(("compute", "hbm", "ici"), key=lambda name: getattr(self, name))


@dataclasses.dataclass(frozen=True)
class Estimate:
    """One request by formula; bytes are per device."""

    weight_bytes: int
    optimizer_bytes: int
    cache_bytes: int
    activation_bytes: int
    model_flops: float
    """Of the whole step on all devices."""
    device_flops: float
    """Of the busiest device: what no axis divides is computed by each."""
    hbm_bytes: float
    """That one device must read and write."""
    ici_bytes: float
    """That one device must send."""
    seconds: Seconds

    @property
    def total_bytes(self) -> int:
        """Weights, optimiser state, cache and activations."""
        return self.weight_bytes + self.optimizer_bytes + self.cache_bytes + self.activation_bytes


def estimate(request: Request) -> Estimate:
    """The estimate of a request.

    Raises:
      UserError: an axis of the mesh does not divide what it must.
    """
    placement = abstract_placement(request)
    work = _Work(request, placement)
    weights, optimizer = work.parameter_bytes()
    cache = cache_bytes(request, placement)
    activations = work.activation_bytes()
    flops, device_flops = model_flops(request), work.device_flops()
    hbm = needed_hbm_bytes(request, placement)
    ici = work.ici_bytes()
    chip = request.topology.chip
    seconds = step_seconds(chip, device_flops, hbm, ici)
    return Estimate(weights, optimizer, cache, activations, flops, device_flops, hbm, ici, seconds)


def step_seconds(chip: Chip, flops: float, hbm_bytes: float, ici_bytes: float) -> Seconds:
    """Times of one device at its peak rates."""
    return Seconds(flops / chip.flops, hbm_bytes / chip.hbm_bytes_per_second, ici_bytes / chip.ici_bytes_per_second)


@dataclasses.dataclass(frozen=True)
class Parameter:
    """One array of the model, whole."""

    shape: tuple[int, ...]
    dtype: np.dtype
    axes: tuple[str | None, ...]
    role: str

    @property
    def nbytes(self) -> int:
        """Its size."""
        return math.prod(self.shape) * self.dtype.itemsize


def parameters(request: Request) -> dict[str, Parameter]:
    """The model's arrays by name, the same for every mesh."""
    return _parameters(request.config, request.policy, request.step == "train")


@functools.lru_cache(maxsize=8)
def _parameters(config: ModelConfig, policy: DTypePolicy, is_training: bool) -> dict[str, Parameter]:
    model = Transformer(config if is_training else config.without_mtp(), policy, stacked=True)
    found = {}
    for name, variable in named_variables(model).items():
        data, value = variable.get_metadata(), variable.get_value()
        found[name] = Parameter(tuple(value.shape), np.dtype(value.dtype), tuple(data["axes"]), str(data["role"]))
    return found


def abstract_placement(request: Request) -> Placement:
    """The placement without devices."""
    mesh = AbstractMesh(tuple(request.mesh[axis] for axis in AXES), AXES)
    return Placement(mesh, request.step)


# ---- FLOPs -----------------------------------------------------------------------------------------------------------
def model_flops(request: Request) -> float:
    """FLOPs that the step needs, on all devices together; of a prefill, those of a mean step of the whole prompt."""
    config = request.config
    if request.step == "decode":
        return decode_flops(config, request.batch, request.context)
    work = cost.Workload(request.step, request.batch, request.context)
    own = config if request.step == "train" else config.without_mtp()
    flops = cost.workload_flops(own, work)
    if request.step == "train" and config.num_mtp_layers:
        flops += mtp_flops(config, request.batch * request.context)
    return flops / request.steps_per_sequence


def decode_flops(config: ModelConfig, batch: int, context: int) -> float:
    """FLOPs of one token of each of `batch` sequences that have `context` tokens before it."""
    weights = cost.active_weights(config, config.num_experts_per_tok)
    keys, entries = visible(config, context + 1)
    per_key, per_entry = (
        4 * config.num_attention_heads * config.head_dim,
        2 * config.index_n_heads * config.index_head_dim,
    )
    return batch * (2 * weights + keys * per_key + entries * per_entry)


def mtp_flops(config: ModelConfig, tokens: int) -> float:
    """FLOPs of the MTP blocks in a training step: three passes over their active weights, windows and the head."""
    weights = 0.0
    for section in sections(config):
        if section[0] != "mtp":
            continue
        for parameter in section_parameters(config, section):
            if len(parameter.shape) > 1 and parameter.storage is not Storage.TABLE:
                share = (
                    config.num_experts_per_tok / config.n_routed_experts if parameter.storage is Storage.EXPERT else 1
                )
                weights += share * math.prod(parameter.shape)
    head = config.vocab_size * config.hidden_size * config.num_mtp_layers
    window = 2 * config.num_attention_heads * config.head_dim * config.sliding_window * config.num_mtp_layers
    return 6.0 * tokens * (weights + head + window)


def visible(config: ModelConfig, length: int) -> tuple[int, int]:
    """Of the last of `length` tokens, over all layers: keys attended to, and entries scored by indexers."""
    keys = entries = 0
    for spec in layer_plan(config):
        own = length // spec.ratio if spec.ratio else 0
        if spec.has_indexer:
            entries += own if own > config.index_topk else 0
            own = min(own, config.index_topk)
        keys += min(length, config.sliding_window) + own
    return keys, entries


# ---- HBM -------------------------------------------------------------------------------------------------------------
def cache_bytes(request: Request, placement: Placement) -> int:
    """Decode state per device."""
    if request.step == "train":
        return 0
    shapes = cache_shapes(request, entry_multiple(placement))
    specs = cache_specs(shapes, placement, request.batch)
    flat = jax.tree.leaves(specs, is_leaf=lambda node: isinstance(node, jax.sharding.PartitionSpec))
    return sum(
        _nbytes(leaf) // _devices(spec, placement) for leaf, spec in zip(jax.tree.leaves(shapes), flat, strict=True)
    )


def cache_shapes(request: Request, multiple: int = 1) -> Cache:
    """The decode state without arrays."""
    config = request.config.without_mtp()
    return _cache_shapes(config, request.batch, request.cache_length, request.policy, multiple)


@functools.lru_cache(maxsize=64)
def _cache_shapes(config: ModelConfig, batch: int, length: int, policy: DTypePolicy, multiple: int) -> Cache:
    return jax.eval_shape(lambda: init_cache(config, batch, length, policy, entry_multiple=multiple))


def needed_hbm_bytes(request: Request, placement: Placement) -> float:
    """Bytes that one device must move: weights touched, cache visible or selected, optimiser state."""
    touched = optimizer = 0.0
    config = request.config
    picks = request.batch * request.tokens * config.num_experts_per_tok
    active = 1 - (1 - 1 / config.n_routed_experts) ** picks
    for name, variable in parameters(request).items():
        division = divide(variable.shape, variable.axes, placement)
        size = variable.nbytes
        used = size / math.prod(placement.size(names) for names in division.compute)
        stored = used / math.prod(placement.size(names) for names in division.storage)
        if name == "embed.weight" or variable.role == Role.TABLE:
            rows = min(request.batch * request.tokens, config.vocab_size)
            used = used * rows / config.vocab_size
        elif variable.axes[:1] == ("experts",):
            used *= active
        touched += used
        # Forward, recomputation and backward read each weight; AdamW reads and writes it and its two moments, and the
        # gradient is written and read once.
        optimizer += 8 * stored if request.step == "train" else 0
    if request.step == "train":
        return 3 * touched + optimizer
    return touched + _cache_traffic(request, placement)


def _cache_traffic(request: Request, placement: Placement) -> float:
    """Cache bytes that one step reads, per device: windows, entries seen, index keys scored."""
    config, length = request.config, request.context + (request.step == "decode")
    rows = request.batch / placement.size(placement.dividing("batch", request.batch))
    apart = placement.size(placement.rules.compute["entries"])
    total = 0.0
    for spec in layer_plan(config):
        row = config.head_dim * _COMPUTE
        total += rows * min(length, config.sliding_window) * row
        if not spec.ratio:
            continue
        count = length // spec.ratio
        seen = count
        if spec.has_indexer:
            # A prefill chunk's selections cover nearly all entries; one token's only the selected ones.
            seen = min(count, config.index_topk) if request.step == "decode" else count
            total += rows * (count if count > config.index_topk else 0) * config.index_head_dim * _COMPUTE / apart
        total += rows * seen * row / apart
        overlap = 2 if spec.is_overlapped else 1
        width = config.head_dim + (config.index_head_dim if spec.has_indexer else 0)
        total += rows * 2 * overlap * spec.ratio * overlap * width * _FLOAT32
    return total


# ---- one device's part -----------------------------------------------------------------------------------------------
class _Work:
    """Sizes of one device's part of a step."""

    def __init__(self, request: Request, placement: Placement) -> None:
        self.request, self.placement, self.config = request, placement, request.config
        self.variables = parameters(request)
        self.divisions = {
            name: divide(variable.shape, variable.axes, placement) for name, variable in self.variables.items()
        }
        self.rows = placement.dividing("batch", request.batch)
        sequence = placement.live(placement.rules.compute["sequence"])
        self.sequence = sequence if request.step != "decode" else ()
        self.tokens = request.batch * request.tokens / placement.size((*self.rows, *self.sequence))

    @property
    def is_training(self) -> bool:
        """Whether there is a backward pass."""
        return self.request.step == "train"

    def parameter_bytes(self) -> tuple[int, int]:
        """Of weights, and of AdamW's two moments."""
        weights = optimizer = 0
        for name, variable in self.variables.items():
            division = self.divisions[name]
            parts = math.prod(self.placement.size(names) for names in (*division.compute, *division.storage))
            own = variable.nbytes // parts
            weights += own
            is_trained = (
                self.is_training and ".indexer." not in name and ".gate.bias" not in name and "tid2eid" not in name
            )
            optimizer += 2 * own if is_trained else 0
        return weights, optimizer

    def activation_bytes(self) -> int:
        """A layer's widest intermediates; in training `activations.training_bytes`."""
        if self.is_training:
            return training_bytes(self.request, self.placement, self.tokens, self.variables, self.divisions)
        config = self.config
        streams = self.tokens * config.hc_mult * config.hidden_size * _COMPUTE
        heads = self.tokens * config.num_attention_heads * config.head_dim / self.placement.sizes["tensor"]
        return int(4 * streams + heads * (_COMPUTE + _FLOAT32) + WORKSPACE)

    def device_flops(self) -> float:
        """Model FLOPs of one device: whole-model FLOPs by part, each over the axes that divide it."""
        request, config, placement = self.request, self.config, self.placement
        tensor = placement.sizes["tensor"]
        apart = placement.size((*self.rows, *self.sequence))
        dense = sum(
            math.prod(variable.shape) * (2 if self._is_fp4(name) else 1)
            / math.prod(placement.size(names) for names in self.divisions[name].compute)
            for name, variable in self.variables.items() if self._is_dense(name)
        )  # fmt: skip
        routed_axes = set((*self.rows, *self.sequence)) | {"expert"}
        picks = request.batch * request.tokens * config.num_experts_per_tok
        expert_size = 3 * config.hidden_size * config.moe_intermediate_size
        layers = config.num_hidden_layers + (config.num_mtp_layers if self.is_training else 0)
        routed = 2 * layers * picks * expert_size / placement.size(tuple(routed_axes)) / tensor
        forward = 2 * self.tokens * dense + routed
        head = 2 * config.vocab_size * config.hidden_size
        vocabulary = math.prod(placement.size(names) for names in self.divisions["head.weight"].compute)
        head_tokens = request.batch * (request.tokens if self.is_training else 1)
        over = placement.size(tuple(name for name in self.rows if name not in self.divisions["head.weight"].compute[0]))
        forward += head_tokens * head / vocabulary / max(over, 1)
        attention = model_attention_flops(request) / apart / tensor
        if request.step == "decode":
            attention /= placement.size(placement.rules.compute["entries"])
        return (3 if self.is_training else 1) * (forward + attention)

    def _is_dense(self, name: str) -> bool:
        own = self.variables[name]
        is_matrix = own.role == Role.MATRIX and not name.endswith(".scale")
        return is_matrix and own.axes[:1] != ("experts",)

    def _is_fp4(self, name: str) -> bool:
        return self.variables[name].dtype == np.int8

    def ici_bytes(self) -> float:
        """Bytes that one device must send: sums over `tensor`, tokens to experts, FSDP's gathers, halos and entries."""
        config, placement = self.config, self.placement
        sizes, passes = placement.sizes, 3 if self.is_training else 1
        row = config.hidden_size * _FLOAT32
        total = 0.0
        layers = config.num_hidden_layers
        if sizes["tensor"] > 1:
            # The output projection and the experts are summed: in a ring, twice the array less the own part.
            total += passes * 2 * layers * self.tokens * row * 2 * _share(sizes["tensor"])
        if sizes["expert"] > 1:
            total += passes * layers * self._expert_traffic(row)
        for name, division in self.divisions.items():
            parts = placement.size(tuple(axis for names in division.storage for axis in names))
            if parts > 1:
                used = self.variables[name].nbytes / math.prod(placement.size(names) for names in division.compute)
                # Gathered for the forward pass, and in training again for the backward one, whose result is scattered.
                total += used * _share(parts) * (3 if self.is_training else 1)
        if self.is_training:
            total += self._gradient_traffic()
        if self.sequence:
            entries = sum(self.tokens / spec.ratio for spec in layer_plan(config) if spec.ratio)
            total += passes * entries * (sizes["sequence"] - 1) * config.head_dim * _COMPUTE
        elif sizes["sequence"] > 1:
            partial = config.num_attention_heads * (config.head_dim + 2) * _FLOAT32 / sizes["tensor"]
            total += layers * self.tokens * partial * 2 * _share(sizes["sequence"])
        return total

    def _expert_traffic(self, row: float) -> float:
        """Of one layer and one pass."""
        count = self.placement.sizes["expert"]
        if "expert" not in (*self.rows, *self.sequence):
            return self.tokens * row * 2 * _share(count)
        # A token goes once to each device that holds one of its experts, and a sum comes back from each.
        visited = count * (1 - (1 - 1 / count) ** self.config.num_experts_per_tok)
        visited *= _share(count)
        return self.tokens * visited * (self.config.hidden_size * _COMPUTE + row)

    def _gradient_traffic(self) -> float:
        """Gradients of parameters that several devices hold alike, summed in rings."""
        total = 0.0
        for name, variable in self.variables.items():
            division = self.divisions[name]
            divided = {axis for names in (*division.compute, *division.storage) for axis in names}
            alike = tuple(axis for axis in (*self.rows, *self.sequence) if axis not in divided)
            copies = self.placement.size(alike)
            if copies > 1 and variable.role != Role.TABLE:
                own = variable.nbytes / self.placement.size(tuple(divided))
                total += 2 * own * _share(copies)
        return total


def model_attention_flops(request: Request) -> float:
    """Attention and index scores of one step's forward pass, on all devices."""
    config = request.config
    per_key, per_entry = (
        4 * config.num_attention_heads * config.head_dim,
        2 * config.index_n_heads * config.index_head_dim,
    )
    if request.step == "decode":
        keys, entries = visible(config, request.context + 1)
        return request.batch * (keys * per_key + entries * per_entry)
    return request.batch * sum(cost.attention_flops(config, request.context)) / request.steps_per_sequence


def _share(count: int) -> float:
    """Of an array that a device of a ring of `count` sends."""
    return (count - 1) / count


def _nbytes(leaf: jax.ShapeDtypeStruct) -> int:
    return math.prod(leaf.shape) * leaf.dtype.itemsize


def _devices(spec: jax.sharding.PartitionSpec, placement: Placement) -> int:
    axes: Counter[str] = Counter()
    for part in spec:
        axes.update([part] if isinstance(part, str) else part or ())
    return placement.size(tuple(axes))
