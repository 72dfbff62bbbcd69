"""Converts a checkpoint into a v4jax or a Hugging Face directory, a few rows of a few matrices at a time."""

import dataclasses
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_args

from v4jax.checkpoint.assets import copy_assets, differing_assets
from v4jax.checkpoint.content import Encoded
from v4jax.checkpoint.layout import Job, Layout, PlannedFile, Target, Weights, plan_carried, plan_files
from v4jax.checkpoint.location import Location, RangeReader, RemotePath, config_source, locate, write_json, writing
from v4jax.checkpoint.names import section_parameters, sections
from v4jax.checkpoint.progress import Conversion, Report
from v4jax.checkpoint.reader import Checkpoint, open_checkpoint, recorded_source
from v4jax.checkpoint.tensor_file import INDEX_FILE, CheckpointError, check_apart
from v4jax.checkpoint.transfer import Transfer, share_memory
from v4jax.checkpoint.writer import DEFAULT_SHARD_BYTES, Progress, Summary, dequantised_config
from v4jax.config import RELEASED_QUANTIZATION, ModelConfig
from v4jax.errors import UserError

DEFAULT_MEMORY = 2 << 30
_SLACK = 64 << 20
"""Of the free space, for what is not weights."""


def convert(
    src: str | Path,
    dst: str | Path,
    *,
    weights: Weights = "native",
    to: Target = "v4jax",
    layout: Layout = "official",
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    max_memory: int = DEFAULT_MEMORY,
    base: str | Path | None = None,
    resume: bool = False,
    keep_finished: bool = False,
    progress: Progress | None = None,
    on_bytes: Callable[[int, int], None] | None = None,
) -> Summary:
    """Converts between any two of the directory layouts, in either direction.

    Args:
        src: a Hugging Face directory in any spelling, a v4jax directory, or a safetensors file beside `config.json`; a
            path, or the URL of an object store such as `gs://bucket/model`.
        dst: a new or empty directory, or with `resume` one that an interrupted run left; a path or URL.
        weights: "native" keeps the stored bytes, FP8 and FP4 included, or restores the formats of `base`. "bf16" and
            "fp32" dequantise the matrices, while norms, hyper-connections, sinks and biases become F32 (exactly) and
            hash tables I64. "fp4" and "fp8" give the released formats, with FP4 or FP8 experts: from quantised weights
            value for value or not at all, from others by rounding to the nearest.
        to: "v4jax" (one file per layer, experts stacked) or "hf" (sharded).
        layout: for "hf", the official names with one tensor per expert, or those of transformers' modules, fused.
        max_shard_bytes: for "hf", the size at which a new shard begins.
        max_memory: bytes that buffers may take, beside the interpreter itself.
        base: the checkpoint that `src` was fine-tuned from. Tensors with its values keep its bytes; DSpark tensors
            that `src` lost are taken from it.
        resume: go on after an interruption: files that are finished and have their checksum are kept.
        keep_finished: leave a `dst` alone in which this very conversion is complete, instead of refusing it.
        progress: called with sections done, sections in all and the last one's name; from any thread.
        on_bytes: called with bytes written and bytes in all; from any thread.

    Raises:
        ConfigError: `src` has no valid `config.json`.
        CheckpointError: `src` cannot be read or not be converted like this, `dst` is not empty, too small or cannot be
            written, or they are the same.
    """
    source_place, destination = locate(src), locate(dst)
    _check_choices(source_place, destination, weights, to, layout)
    source = open_checkpoint(source_place)
    job = Job(source, weights, to, layout, max_shard_bytes, None if base is None else open_checkpoint(base))
    config = output_config(job)
    with RangeReader() as reader:
        files = plan_files(job, reader)
        budget = share_memory(files, max_memory)
        conversion = Conversion(job, files, destination)
        harmed = conversion.begin(resume=resume, keep_finished=keep_finished)
        notes = [*_notes(job), *(f"{name} was not as it had been written, and was written again" for name in harmed)]
        if conversion.is_complete and resume:
            if _has_side_files(job, config, destination):
                notes.append(f"{destination} was complete: nothing was written; --verify compares it with its source")
            else:
                conversion.is_complete = False
        todo = [file for file in files if file.name not in conversion.files]
        _check_space(destination, sum(file.nbytes for file in todo))
        report = Report(job, files, progress, on_bytes)
        report.add_files([file for file in files if file.name in conversion.files])
        if not conversion.is_complete:
            conversion.save()
            transfer = Transfer(
                destination, budget, reader.reuse, report.add_bytes, lambda tensor: report.add_tensor(tensor.section)
            )
            for file, record in transfer.write(todo):
                conversion.add(file.name, record)
            notes += _about_base(job, files)
            _finish(job, files, config, destination)
            conversion.finish(notes)
    tensors = [tensor for file in files for tensor in file.tensors]
    records = {file.name: conversion.files[file.name] for file in files}
    return Summary(destination, records, len(tensors), sum(tensor.nbytes for tensor in tensors), tuple(notes))


def _check_choices(source: Location, destination: Location, weights: Any, to: Any, layout: Any) -> None:
    if isinstance(source, Path) and isinstance(destination, Path):
        check_apart(source, destination)
    if source.resolve() == destination.resolve():
        raise CheckpointError(f"{destination}: is the checkpoint to be converted; give another output directory")
    for name, value, kind in (("weights", weights, Weights), ("to", to, Target), ("layout", layout, Layout)):
        if value not in get_args(kind):
            raise CheckpointError(f"{name}: got {value!r}, need one of {', '.join(get_args(kind))}")
    if layout == "transformers" and to != "hf":
        raise CheckpointError("layout: transformers is a layout of Hugging Face directories; give to=hf with it")


def output_config(job: Job) -> ModelConfig:
    """The config that describes the output.

    Raises:
        CheckpointError: the base is another model.
    """
    config, base = job.source.config, job.base.config if job.base else None
    if base is not None:
        _check_base(job.source, base)
    if job.weights in ("bf16", "fp32"):
        return dequantised_config(config, "bf16" if job.weights == "bf16" else "fp32")
    if job.weights == "native" and base is None:
        return config
    like = config if config.quantization_config or base is None else base
    experts = like.expert_storage if job.weights == "native" else job.weights
    extra = {key: value for key, value in config.extra_fields.items() if key not in ("dtype", "torch_dtype")}
    extra["torch_dtype"] = like.extra_fields.get("torch_dtype", "bfloat16")
    quantization = like.quantization_config
    if job.weights != "native":
        quantization = {**(quantization or RELEASED_QUANTIZATION)}
        quantization.pop("expert_dtype", None)
    if quantization is not None:
        extra["quantization_config"] = quantization
    return dataclasses.replace(config, expert_dtype=experts, extra=json.dumps(extra, sort_keys=True))


def _check_base(source: Checkpoint, base: ModelConfig) -> None:
    for section in sections(source.config):
        if section not in sections(base) and section[0] == "mtp":
            continue
        mine = section_parameters(source.config, section)
        theirs = section_parameters(base, section) if section in sections(base) else []
        differing = [parameter for parameter in mine if parameter not in theirs]
        if differing:
            one = differing[0]
            raise CheckpointError(
                f"--base: has no {one.key} {list(one.shape)} in {section}, the model to be converted has; "
                "give the checkpoint that it was fine-tuned from"
            )


def _check_space(destination: Location, need: int) -> None:
    if isinstance(destination, RemotePath) or not need:
        return
    free = shutil.disk_usage(destination).free
    if free < need + _SLACK:
        raise CheckpointError(
            f"{destination}: the output takes {need:,} bytes, its disk has {free:,} free; "
            "free space there or give another output directory"
        )


def _notes(job: Job) -> list[str]:
    notes = [note for note in job.source.notes if not note.startswith("DSpark")]
    carried = plan_carried(job)
    if carried:
        size = sum(info.nbytes for info in carried)
        notes.append(f"DSpark head carried through untouched: {len(carried)} tensors (mtp.*), {size:,} bytes")
    if job.base is None and job.source.config.quantization_config is None and job.weights in ("native", "fp4", "fp8"):
        origin = _origin(job.source.recorded_source)
        if origin:
            notes.append(f"the source was made from {origin}; --base {origin} keeps the bytes of what did not change")
    return notes


def _origin(path: str | None) -> str | None:
    """The quantised checkpoint at the beginning of a chain of v4jax directories, as far as their records tell."""
    seen: set[str] = set()
    while path is not None and path not in seen:
        seen.add(path)
        try:
            place = locate(path)
            is_quantised = ModelConfig.from_hf(config_source(place)).quantization_config is not None
            before = None if is_quantised else recorded_source(place)
        except UserError:  # it was moved, and its name may still help
            return path
        if is_quantised or before is None:
            return path
        path = before
    return path


def _about_base(job: Job, files: Sequence[PlannedFile]) -> list[str]:
    contents = [part.content for file in files for tensor in file.tensors for part in tensor.parts if not part.is_scale]
    decided = [one.is_same for one in contents if isinstance(one, Encoded) and one.is_same is not None]
    if job.base is None or not decided:
        return []
    return [
        f"{sum(decided):,} of {len(decided):,} quantised matrices have the values of {job.base.path} and kept its "
        f"bytes; {len(decided) - sum(decided):,} were quantised anew"
    ]


def _finish(job: Job, files: Sequence[PlannedFile], config: ModelConfig, destination: Location) -> None:
    """All that is not weights; a Hugging Face directory's config.json last, so that none looks whole before."""
    copy_assets(job.source.directory, destination)
    with writing(destination):
        if job.to == "hf" and len(files) > 1:
            total = sum(tensor.nbytes for file in files for tensor in file.tensors)
            weight_map = {tensor.name: file.name for file in files for tensor in file.tensors}
            write_json(destination / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": weight_map})
        write_json(destination / "config.json", config.to_hf())


def _has_side_files(job: Job, config: ModelConfig, destination: Location) -> bool:
    try:
        written = json.loads((destination / "config.json").read_text())
    except (OSError, ValueError, RecursionError):
        return False
    return written == json.loads(json.dumps(config.to_hf())) and not differing_assets(destination, job.source.directory)
