"""Writes model directories, section by section: v4jax's own (one file per layer, experts stacked) and Hugging Face's.

Every file appears under its name only when it is whole, and the file that makes a directory readable comes last:
v4jax's `conversion.json`, Hugging Face's `config.json`.
"""

import dataclasses
import hashlib
import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from v4jax.checkpoint.assets import copy_assets
from v4jax.checkpoint.location import Location, locate, write_json, writing
from v4jax.checkpoint.names import (
    Section,
    Storage,
    section_file,
    section_name,
    section_parameters,
    section_prefix,
    sections,
)
from v4jax.checkpoint.reader import MANIFEST
from v4jax.checkpoint.tensor_file import INDEX_FILE, SINGLE_FILE, CheckpointError
from v4jax.config import ModelConfig

Weights = Literal["native", "bf16", "fp32"]
Progress = Callable[[int, int, str], None]
"""Called with sections done, sections in all, and the name of the last one."""

Tensors = Mapping[str, Any]
"""One section: official keys, experts stacked; NumPy or JAX arrays."""

DEFAULT_SHARD_BYTES = 5_000_000_000


@dataclasses.dataclass(frozen=True)
class Summary:
    """What was written."""

    path: Any
    """The directory: a `Path`, or a `RemotePath` in an object store."""
    files: dict[str, dict[str, Any]]
    """`bytes` and `sha256` of each safetensors file."""
    tensors: int
    nbytes: int
    """Of all tensors."""
    notes: tuple[str, ...] = ()


# ---- from memory -----------------------------------------------------------------------------------------------------
def save_model(
    path: str | Path,
    config: ModelConfig,
    top: Tensors,
    layers: Iterable[Tensors],
    mtp: Iterable[Tensors] = (),
    *,
    weights: Literal["bf16", "fp32"] = "fp32",
    assets_from: str | Path | None = None,
    source: Mapping[str, Any] | None = None,
) -> Summary:
    """Writes a v4jax directory from flat dicts of parameters, taking the layers one at a time.

    Args:
        path: a new or empty directory.
        config: the model's; its quantisation is dropped, since the weights no longer have it.
        top: embedding, head, final norm, head hyper-connection.
        layers: one dict per layer.
        mtp: one dict per MTP block of `config`.
        weights: dtype of the matrices; norms, hyper-connections, sinks and biases are always F32, hash tables I64.
        assets_from: a model directory whose tokenizer and encoding files are copied.
        source: where the weights come from, for the record (`describe_source`).

    Raises:
        CheckpointError: the destination is not empty or cannot be written, or a parameter is missing, unknown or
            mis-shaped.
    """
    stream = _sections_in_memory(config, top, layers, mtp, weights)
    return write_v4jax(
        path, dequantised_config(config, weights), stream, weights=weights, assets_from=assets_from, source=source
    )


def save_hf(
    path: str | Path,
    config: ModelConfig,
    top: Tensors,
    layers: Iterable[Tensors],
    mtp: Iterable[Tensors] = (),
    *,
    weights: Literal["bf16", "fp32"] = "bf16",
    assets_from: str | Path | None = None,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
) -> Summary:
    """Writes a Hugging Face directory with official names from flat dicts; arguments as for `save_model`."""
    stream = _sections_in_memory(config, top, layers, mtp, weights)
    return write_hf(
        path,
        dequantised_config(config, weights),
        stream,
        assets_from=assets_from,
        max_shard_bytes=max_shard_bytes,
    )


def _sections_in_memory(
    config: ModelConfig, top: Tensors, layers: Iterable[Tensors], mtp: Iterable[Tensors], weights: Weights
) -> Iterator[tuple[Section, dict[str, np.ndarray]]]:
    parts = itertools.chain([top], layers, mtp)
    for section, tensors in itertools.zip_longest(sections(config), parts):
        if section is None or tensors is None:
            raise CheckpointError(
                f"got too {'few' if section else 'many'} layers or MTP blocks, need {config.num_hidden_layers} and "
                f"{config.num_mtp_layers}; give those of this config"
            )
        yield section, stored_section(config, section, tensors, weights)


def stored_section(config: ModelConfig, section: Section, tensors: Tensors, weights: Weights) -> dict[str, np.ndarray]:
    """One section in the dtypes of an unquantised checkpoint.

    Raises:
        CheckpointError: a parameter is missing, unknown or mis-shaped.
    """
    specs = {parameter.key: parameter for parameter in section_parameters(config, section)}
    wrong = sorted(specs.keys() ^ tensors.keys())
    wrong += [key for key in specs.keys() & tensors.keys() if tuple(tensors[key].shape) != specs[key].shape]
    if wrong:
        key = wrong[0]
        got = list(tensors[key].shape) if key in tensors else "none"
        need = list(specs[key].shape) if key in specs else "none"
        raise CheckpointError(
            f"{section_name(section)}: {len(wrong)} parameters do not fit the config, such as {key}: got {got}, "
            f"need {need}; give the parameters of this config"
        )

    def dtype(storage: Storage) -> Any:
        if storage is Storage.TABLE:
            return np.int64
        return ml_dtypes.bfloat16 if weights == "bf16" and not storage.is_float32 else np.float32

    return {key: np.asarray(tensors[key]).astype(dtype(spec.storage), copy=False) for key, spec in specs.items()}


def dequantised_config(config: ModelConfig, weights: Literal["bf16", "fp32"]) -> ModelConfig:
    """The config of the same model with plain weights of this dtype."""
    dropped = ("quantization_config", "dtype", "torch_dtype")
    extra = {key: value for key, value in config.extra_fields.items() if key not in dropped}
    extra["torch_dtype"] = {"bf16": "bfloat16", "fp32": "float32"}[weights]
    return dataclasses.replace(config, expert_dtype=None, extra=json.dumps(extra, sort_keys=True))


# ---- v4jax -----------------------------------------------------------------------------------------------------------
def write_v4jax(
    destination: str | Path,
    config: ModelConfig,
    stream: Iterable[tuple[Section, dict[str, np.ndarray]]],
    *,
    weights: Weights,
    assets_from: str | Path | None = None,
    source: Mapping[str, Any] | None = None,
    notes: Iterable[str] = (),
    progress: Progress | None = None,
) -> Summary:
    """Writes sections, as they come, into a v4jax directory.

    Args:
        destination: a new or empty directory.
        config: written as `config.json`.
        stream: sections with the arrays as they are to be stored.
        weights: what was chosen, for the record.
        assets_from: a model directory whose tokenizer and encoding files are copied.
        source: where the weights come from, for the record.
        notes: kept in the record and the summary.
        progress: told of each section.

    Raises:
        CheckpointError: the destination is not empty or cannot be written.
    """
    path = prepare_destination(destination)
    files, count, nbytes, total = {}, 0, 0, len(sections(config))
    for done, (section, tensors) in enumerate(stream, start=1):
        name = section_file(section)
        prefix = section_prefix(section)
        files[name] = _write_tensors(path / name, {prefix + key: array for key, array in tensors.items()})
        count, nbytes = count + len(tensors), nbytes + sum(array.nbytes for array in tensors.values())
        if progress:
            progress(done, total, section_name(section))
    if assets_from is not None:
        copy_assets(locate(assets_from), path)
    write_json(path / "config.json", config.to_hf())
    summary = Summary(path, files, count, nbytes, tuple(notes))
    manifest = {
        "format": "v4jax",
        "version": 1,
        "weights": weights,
        "source": dict(source or {}),
        "tensors": count,
        "bytes": nbytes,
        "files": files,
        "notes": list(notes),
        "status": "complete",
    }
    write_json(path / MANIFEST, manifest)
    return summary


# ---- Hugging Face ----------------------------------------------------------------------------------------------------
def write_hf(
    destination: str | Path,
    config: ModelConfig,
    stream: Iterable[tuple[Section, dict[str, np.ndarray]]],
    *,
    assets_from: str | Path | None = None,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    notes: Iterable[str] = (),
    progress: Progress | None = None,
) -> Summary:
    """Writes sections, as they come, into a Hugging Face directory with official names, one tensor per expert.

    Arguments and errors as for `write_v4jax`; a shard exceeds `max_shard_bytes` only if one tensor does. A single shard
    is called `model.safetensors` and needs no index.
    """
    path = prepare_destination(destination)
    shards: list[tuple[Path, dict[str, Any], list[str]]] = []
    pending: dict[str, np.ndarray] = {}
    size = nbytes = 0

    def flush() -> None:
        file = path / f"model-{len(shards) + 1:05d}.unfinished"
        shards.append((file, _write_tensors(file, pending), list(pending)))
        pending.clear()

    total = len(sections(config))
    for done, (section, tensors) in enumerate(stream, start=1):
        for name, array in _unstacked(section, tensors):
            if pending and size + array.nbytes > max_shard_bytes:
                flush()
                size = 0
            pending[name] = array
            size, nbytes = size + array.nbytes, nbytes + array.nbytes
        if progress:
            progress(done, total, section_name(section))
    flush()
    files, weight_map = {}, {}
    for number, (file, record, names) in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else SINGLE_FILE
        with writing(path / name):
            file.replace(path / name)
        files[name] = record
        weight_map |= dict.fromkeys(names, name)
    if len(shards) > 1:
        write_json(path / INDEX_FILE, {"metadata": {"total_size": nbytes}, "weight_map": weight_map})
    if assets_from is not None:
        copy_assets(locate(assets_from), path)
    write_json(path / "config.json", config.to_hf())
    return Summary(path, files, len(weight_map), nbytes, tuple(notes))


def _unstacked(section: Section, tensors: Mapping[str, np.ndarray]) -> Iterator[tuple[str, np.ndarray]]:
    prefix, stack = section_prefix(section), "ffn.experts."
    for key, array in tensors.items():
        if key.startswith(stack):
            for expert, one in enumerate(array):
                yield f"{prefix}{stack}{expert}.{key.removeprefix(stack)}", one
        else:
            yield prefix + key, array


# ---- files -----------------------------------------------------------------------------------------------------------
def prepare_destination(path: str | Path | Location) -> Any:
    """Makes the directory to write into.

    Raises:
        CheckpointError: it exists and is not an empty directory, or cannot be made or written.
    """
    place = locate(path)
    with writing(place):
        if place.is_dir() and any(place.iterdir()):
            raise CheckpointError(f"{place}: exists and is not empty; remove it or give another output directory")
        place.mkdir(parents=True, exist_ok=True)
    if isinstance(place, Path) and not os.access(place, os.W_OK | os.X_OK):
        raise CheckpointError(f"{place}: no permission to write; change that or give another output directory")
    return place


def _write_tensors(file: Path, tensors: dict[str, np.ndarray]) -> dict[str, Any]:
    """Writes a safetensors file that appears only when whole; returns its size and checksum."""
    partial = file.with_name(f"{file.name}.partial")
    with writing(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        # The library writes each array's buffer as it lies, whatever its strides.
        arrays = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
        partial.touch()
        mode = partial.stat().st_mode  # by the umask; the library's file is for its owner alone
        save_file(arrays, partial, {"format": "pt"})  # transformers asks for this mark
        partial.chmod(mode)
        record = _sync_and_hash(partial)
        partial.replace(file)
    return record


def _sync_and_hash(file: Path) -> dict[str, Any]:
    digest = hashlib.sha256()
    with file.open("rb+") as stream:
        os.fsync(stream.fileno())
        while chunk := stream.read(1 << 24):
            digest.update(chunk)
        return {"bytes": stream.tell(), "sha256": digest.hexdigest()}
