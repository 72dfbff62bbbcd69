"""What one pass of a model needs at the least, in weight bytes and FLOPs, whatever an implementation spends."""

import dataclasses
import math
import time
from collections.abc import Callable
from typing import Literal

import numpy as np
from jaxtyping import Int

from v4jax.checkpoint.names import Storage, section_parameters, sections
from v4jax.config import AttentionKind, ModelConfig, layer_plan

Run = Callable[[], float]
"""One piece of work: returns when its result is there, with the seconds that it took."""


def timed(work: Callable[[], None]) -> Run:
    """`work`, all of which counts."""

    def run() -> float:
        start = time.perf_counter()
        work()
        return time.perf_counter() - start

    return run


@dataclasses.dataclass(frozen=True)
class Workload:
    """One row: `batch` sequences; `length` of a prompt, a row, or the context that `steps` tokens are added to."""

    kind: Literal["prefill", "decode", "train"]
    batch: int
    length: int
    steps: int = 1

    @property
    def name(self) -> str:
        """As the tables call it."""
        if self.kind == "prefill":
            return f"prefill {self.length}"
        return f"decode {self.batch} at {self.length}" if self.kind == "decode" else f"train {self.batch}×{self.length}"

    @property
    def tokens(self) -> int:
        """Tokens that one repetition counts."""
        return self.batch * (self.steps if self.kind == "decode" else self.length)

    def draw(self, vocab_size: int) -> Int[np.ndarray, "B S"]:
        """Random token ids, always the same."""
        return np.random.default_rng(0).integers(0, vocab_size, (self.batch, self.length), dtype=np.int32)


def decode_bytes(config: ModelConfig, distinct_experts: float) -> float:
    """float32 weight bytes that a decoding step must read: not the embedding, nor experts that no sequence picked."""
    return 4 * _active_weights(config, distinct_experts, is_counted=lambda key, shape: True)


def workload_flops(config: ModelConfig, work: Workload) -> float:
    """FLOPs that a prefill or a training step needs: products with weights, attention over visible keys, index scores.

    A prefill forms logits of the last position. A training step counts three forward passes (one forward, two in the
    backward), but one for the indexer, which gets no gradient. Nothing recomputed counts.
    """
    tokens = work.batch * work.length
    head = 2 * config.vocab_size * config.hidden_size
    weights = 2 * _active_weights(config, config.num_experts_per_tok, is_counted=_is_multiplied) - head
    attention, index = attention_flops(config, work.length)
    index_weights = 2 * _active_weights(
        config, 0, is_counted=lambda key, shape: ".indexer." in key and _is_multiplied(key, shape)
    )
    forward = tokens * weights + work.batch * (attention + index)
    if work.kind == "prefill":
        return forward + work.batch * head
    return 3 * (forward + tokens * head) - 2 * (tokens * index_weights + work.batch * index)


def _active_weights(config: ModelConfig, experts: float, is_counted: Callable[[str, tuple[int, ...]], bool]) -> float:
    """Elements of the parameters that one pass touches, with so many routed experts per layer."""
    total = 0.0
    for section in sections(config.without_mtp()):
        for parameter in section_parameters(config, section):
            if parameter.key == "embed.weight" or parameter.storage is Storage.TABLE:
                continue
            if is_counted(parameter.key, parameter.shape):
                share = experts / config.n_routed_experts if parameter.storage is Storage.EXPERT else 1.0
                total += share * math.prod(parameter.shape)
    return total


def active_weights(config: ModelConfig, experts: float) -> float:
    """Elements of the matrices that a token of the backbone is multiplied with, `experts` routed experts per layer."""
    return _active_weights(config, experts, is_counted=_is_multiplied)


def _is_multiplied(key: str, shape: tuple[int, ...]) -> bool:
    return len(shape) > 1 and not key.endswith("ape")


def attention_flops(config: ModelConfig, length: int) -> tuple[int, int]:
    """(attention, indexer) FLOPs of one sequence: scores and values per visible key, index scores per visible entry."""
    position = np.arange(1, length + 1)
    window = np.minimum(position, config.sliding_window).sum()
    keys, entries = 0, 0
    for spec in layer_plan(config):
        visible = position // spec.ratio if spec.ratio else np.zeros_like(position)
        if spec.attention is AttentionKind.CSA:
            entries += visible.sum()
            visible = np.minimum(visible, config.index_topk)
        keys += window + visible.sum()
    per_key = 4 * config.num_attention_heads * config.head_dim
    return int(keys * per_key), int(entries * 2 * config.index_n_heads * config.index_head_dim)
