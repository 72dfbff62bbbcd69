"""`convert --to orbax`: the whole model as one uncompressed orbax tree, for other JAX tools.

Orbax writes a tree that is in memory, so this is for models that fit; v4jax itself never needs it.
"""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from v4jax.checkpoint.assets import copy_assets
from v4jax.checkpoint.location import RemotePath, locate, write_json, writing
from v4jax.checkpoint.names import Storage, section_parameters, section_prefix, sections
from v4jax.checkpoint.reader import Checkpoint, open_checkpoint
from v4jax.checkpoint.tensor_file import CheckpointError
from v4jax.checkpoint.writer import Summary, dequantised_config, prepare_destination, stored_section
from v4jax.config import ModelConfig

TREE = "params"
"""The folder of the tree; `config.json` and the tokenizer lie beside it."""


def orbax_bytes(config: ModelConfig, *, is_bf16: bool) -> int:
    """Memory that the tree of a model takes, and with it `convert --to orbax`."""
    total = 0
    for section in sections(config):
        for parameter in section_parameters(config, section):
            wide = {Storage.TABLE: 4}.get(parameter.storage, 4 if parameter.storage.is_float32 or not is_bf16 else 2)
            total += math.prod(parameter.shape) * wide
    return total


def write_orbax(src: str | Path, dst: str | Path, *, weights: str, max_memory: int) -> Summary:
    """Writes the tree: official names as nested keys, each layer's experts stacked, layers under their numbers.

    Args:
        src: any model directory.
        dst: a new or empty local directory.
        weights: "bf16" or "fp32"; "native" for checkpoints without quantised weights.
        max_memory: bytes that the tree may take.

    Raises:
        CheckpointError: the tree is larger, or orbax has no dtypes for these weights, or reading or writing fails.
    """
    checkpoint, place = open_checkpoint(src), locate(dst)
    if isinstance(place, RemotePath):
        raise CheckpointError(f"{dst}: orbax trees are written to local directories; copy the result")
    if weights == "native" and checkpoint.config.quantization_config is None:
        dtypes = {info.dtype for info in checkpoint.inventory.values()}
        weights = "bf16" if "BF16" in dtypes else "fp32"
    if weights not in ("bf16", "fp32"):
        raise CheckpointError(
            f"--to orbax: got --weights {weights} for {src}, need bf16 or fp32: orbax has no FP4 and no E8M0 arrays"
        )
    need = orbax_bytes(checkpoint.config, is_bf16=weights == "bf16")
    if need > max_memory:
        raise CheckpointError(
            f"--to orbax: holds the whole tree in memory, {need:,} bytes, --max-memory allows {max_memory:,}; "
            "allow more, or convert --to v4jax, which streams"
        )
    path = prepare_destination(place)
    tree, count = _tree(checkpoint, "bf16" if weights == "bf16" else "fp32")
    import orbax.checkpoint as ocp

    with writing(path), ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_compression=False)) as saver:
        saver.save(path.absolute() / TREE, args=ocp.args.PyTreeSave(tree))
    copy_assets(checkpoint.directory, path)
    config = dequantised_config(checkpoint.config, "bf16" if weights == "bf16" else "fp32")
    write_json(path / "config.json", json.loads(json.dumps(config.to_hf())))
    return Summary(path, {TREE: {"bytes": need}}, count, need, checkpoint.notes)


def _tree(checkpoint: Checkpoint, weights: Any) -> tuple[dict[str, Any], int]:
    tree: dict[str, Any] = {}
    count = 0
    for section in sections(checkpoint.config):
        read = checkpoint.section(section, "bfloat16" if weights == "bf16" else "float32")
        for key, array in stored_section(checkpoint.config, section, read, weights).items():
            *folders, name = (section_prefix(section) + key).split(".")
            node = tree
            for folder in folders:
                node = node.setdefault(folder, {})
            node[name] = array.astype(np.int32) if array.dtype == np.int64 else array
            count += 1
    return tree, count


def restore_orbax(path: str | Path) -> dict[str, Any]:
    """The tree that `write_orbax` wrote, as NumPy arrays."""
    import jax
    import orbax.checkpoint as ocp

    handler = ocp.PyTreeCheckpointHandler()
    with ocp.Checkpointer(handler) as saver:
        place = Path(path).absolute() / TREE
        metadata: Any = saver.metadata(place)
        arguments = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), metadata.item_metadata.tree)
        return saver.restore(place, args=ocp.args.PyTreeRestore(restore_args=arguments))
