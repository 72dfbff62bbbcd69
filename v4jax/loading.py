"""`v4jax.load`: a model from a Hugging Face directory or a v4jax directory."""

import dataclasses
from pathlib import Path
from typing import Literal

import jax
from jax.sharding import Mesh

from v4jax.checkpoint.inventory import fp8_tile
from v4jax.checkpoint.placed import load_placed, read_section
from v4jax.checkpoint.reader import Checkpoint, open_checkpoint
from v4jax.config import ModelConfig
from v4jax.dtypes import DTypePolicy, NativeWeights
from v4jax.errors import UserError
from v4jax.model.transformer import Transformer
from v4jax.sharding import Placement, Recipe, choose_mesh

DType = Literal["auto", "float32", "bfloat16"]
QuantSim = Literal["auto", "on", "off"]
WeightsAtRunTime = Literal["bf16", "native"]


def load(
    path: str | Path,
    *,
    dtype: DType = "auto",
    quant_sim: QuantSim = "auto",
    weights: WeightsAtRunTime = "bf16",
    stacked: bool | None = None,
    mesh: Mesh | str | None = None,
    recipe: Recipe = "decode",
) -> Transformer:
    """Reads a checkpoint.

    Args:
        path: a Hugging Face directory (any of the three spellings) or a v4jax directory.
        dtype: of parameters and arithmetic. "auto" is float32 on CPU, where bfloat16 is slow, and bfloat16 elsewhere.
        quant_sim: the simulated quantisation that the released weights were trained with (architecture.md §12). "auto"
            is on iff the checkpoint has FP4 experts and the dtype is bfloat16.
        weights: "bf16" dequantises what is stored in FP8 or FP4 into the parameters' dtype; "native" keeps the stored
            bytes in device memory and dequantises inside the step, with the same results.
        stacked: whether segments are stacked for `lax.scan`, or every layer has its own arrays. None: stacked on TPU.
        mesh: devices to divide the model over: a mesh, or axes and sizes such as "expert=4,tensor=2"; None: one device.
        recipe: what is divided along which axes (`sharding.RULES`).

    Returns:
        A model ready to be called: `model(tokens) -> logits`, `model.mtp_logits(tokens)`.

    Raises:
        CheckpointError: the checkpoint is damaged, incomplete or of another model.
        UserError: the mesh does not divide the model.
    """
    checkpoint = open_checkpoint(path)
    policy = choose_policy(checkpoint, dtype, quant_sim, weights)
    if stacked is None:
        stacked = jax.default_backend() == "tpu"
    if isinstance(mesh, str):
        mesh = choose_mesh(mesh, checkpoint.config, recipe)
    return build(checkpoint, policy, stacked=stacked, placement=None if mesh is None else Placement(mesh, recipe))


def choose_policy(
    checkpoint: Checkpoint, dtype: DType = "auto", quant_sim: QuantSim = "auto", weights: WeightsAtRunTime = "bf16"
) -> DTypePolicy:
    """The dtypes that `--dtype`, `--quant-sim` and `--weights` mean for this checkpoint on this platform."""
    if quant_sim not in ("auto", "on", "off"):
        raise UserError(f"quant_sim: got {quant_sim!r}, need auto, on or off")
    if dtype == "auto":
        dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    has_fp4 = checkpoint.config.expert_storage == "fp4"
    is_simulated = quant_sim == "on" or (quant_sim == "auto" and has_fp4 and dtype == "bfloat16")
    policy = DTypePolicy.named(dtype, quant_sim=is_simulated)
    if weights not in ("bf16", "native"):
        raise UserError(f"weights: got {weights!r}, need bf16 or native")
    return policy if weights == "bf16" else dataclasses.replace(policy, native=native_weights(checkpoint.config))


def native_weights(config: ModelConfig) -> NativeWeights:
    """How a released checkpoint of this config stores its matrices.

    Raises:
        UserError: nothing is quantised.
    """
    if config.expert_storage is None or config.quantization_config is None:
        raise UserError(
            "weights native: the config has no quantization_config, so there are no FP8 or FP4 bytes to keep; "
            "use weights bf16"
        )
    return NativeWeights(config.expert_storage, fp8_tile(config))


def build(
    checkpoint: Checkpoint, policy: DTypePolicy, *, stacked: bool, placement: Placement | None = None
) -> Transformer:
    """The model of an open checkpoint; layers are read one at a time, and go to their devices if there is a mesh."""
    config = checkpoint.config
    if placement is not None:
        return load_placed(checkpoint, policy, placement, stacked=stacked)
    return Transformer.from_tensors(
        config,
        policy,
        read_section(checkpoint, policy, "top"),
        (read_section(checkpoint, policy, ("layers", n)) for n in range(config.num_hidden_layers)),
        (read_section(checkpoint, policy, ("mtp", n)) for n in range(config.num_mtp_layers)),
        stacked=stacked,
    )
