"""`v4jax.load`: a model from a Hugging Face directory or a v4jax directory."""

from pathlib import Path
from typing import Literal

import jax

from v4jax.checkpoint.reader import Checkpoint, ParameterDType, open_checkpoint
from v4jax.dtypes import DTypePolicy
from v4jax.errors import UserError
from v4jax.model.transformer import Transformer

DType = Literal["auto", "float32", "bfloat16"]
QuantSim = Literal["auto", "on", "off"]


def load(
    path: str | Path, *, dtype: DType = "auto", quant_sim: QuantSim = "auto", stacked: bool | None = None
) -> Transformer:
    """Reads a checkpoint, dequantising what is stored in FP8 or FP4.

    Args:
        path: a Hugging Face directory (any of the three spellings) or a v4jax directory.
        dtype: of parameters and arithmetic. "auto" is float32 on CPU, where bfloat16 is slow, and bfloat16 elsewhere.
        quant_sim: the simulated quantisation that the released weights were trained with (architecture.md §12). "auto"
            is on iff the checkpoint has FP4 experts and the dtype is bfloat16.
        stacked: whether segments are stacked for `lax.scan`, or every layer has its own arrays. None: stacked on TPU.

    Returns:
        A model ready to be called: `model(tokens) -> logits`, `model.mtp_logits(tokens)`.

    Raises:
        CheckpointError: the checkpoint is damaged, incomplete or of another model.
    """
    checkpoint = open_checkpoint(path)
    policy = choose_policy(checkpoint, dtype, quant_sim)
    if stacked is None:
        stacked = jax.default_backend() == "tpu"
    return build(checkpoint, policy, stacked=stacked)


def choose_policy(checkpoint: Checkpoint, dtype: DType = "auto", quant_sim: QuantSim = "auto") -> DTypePolicy:
    """The dtypes that `--dtype` and `--quant-sim` mean for this checkpoint on this platform."""
    if quant_sim not in ("auto", "on", "off"):
        raise UserError(f"quant_sim: got {quant_sim!r}, need auto, on or off")
    if dtype == "auto":
        dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    has_fp4 = checkpoint.config.expert_storage == "fp4"
    is_simulated = quant_sim == "on" or (quant_sim == "auto" and has_fp4 and dtype == "bfloat16")
    return DTypePolicy.named(dtype, quant_sim=is_simulated)


def build(checkpoint: Checkpoint, policy: DTypePolicy, *, stacked: bool) -> Transformer:
    """The model of an open checkpoint; layers are read one at a time."""
    config = checkpoint.config
    dtype: ParameterDType = "float32" if policy.param == jax.numpy.float32 else "bfloat16"
    return Transformer.from_tensors(
        config,
        policy,
        checkpoint.top(dtype),
        (checkpoint.layer(n, dtype) for n in range(config.num_hidden_layers)),
        (checkpoint.mtp(n, dtype) for n in range(config.num_mtp_layers)),
        stacked=stacked,
    )
