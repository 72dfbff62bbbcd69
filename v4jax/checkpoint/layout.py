"""The files of a converted checkpoint, planned before the first byte is written: names, dtypes, shapes, offsets.

A planned tensor knows how to make its bytes piece by piece, in order, out of the source's matrices.
"""

import dataclasses
import json
import math
from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple

import numpy as np

from kernels_pallas.formats import FP8_TILE, fp4_scale_shape, fp8_scale_shape
from v4jax.checkpoint.content import DEFAULT_RANGE_BYTES, Content, Encoded, Format, Recoded, Stored, Values, ranges
from v4jax.checkpoint.inventory import fp8_tile
from v4jax.checkpoint.location import RangeReader
from v4jax.checkpoint.matrix import Matrix, check_tile_boundary, find_matrix
from v4jax.checkpoint.names import (
    ParameterSpec,
    Section,
    Spelling,
    Storage,
    StoredTensor,
    section_file,
    section_name,
    section_parameters,
    sections,
    stored_tensors,
)
from v4jax.checkpoint.reader import Checkpoint
from v4jax.checkpoint.tensor_file import DTYPES, SINGLE_FILE, CheckpointError, TensorInfo

Weights = Literal["native", "bf16", "fp32", "fp8", "fp4"]
Target = Literal["v4jax", "hf"]
Layout = Literal["official", "transformers"]

DSPARK_FILE = "mtp/dspark.safetensors"
"""Where a v4jax directory keeps the tensors that are carried through untouched."""


class Piece(NamedTuple):
    """A run of bytes of an output tensor."""

    make: Callable[[], np.ndarray]
    is_deferred: bool
    """Whether to make it only after the pieces before it: it uses what was left over from them."""


@dataclasses.dataclass(frozen=True)
class PlannedTensor:
    """One tensor to be written."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    section: str
    """The section it belongs to, as `section_name` calls it."""
    parts: "tuple[_Part, ...]"

    @property
    def nbytes(self) -> int:
        """Its size in the file."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize

    def pieces(self, memory: int) -> Iterator[Piece]:
        """Its bytes in order, each piece costing about `memory` bytes at most."""
        for part in self.parts:
            yield from part.pieces(memory)


class _Part(NamedTuple):
    content: Content
    is_scale: bool

    def pieces(self, memory: int) -> Iterator[Piece]:
        take = self.content.scale if self.is_scale else self.content.weight
        for start, stop in ranges(self.content, memory):
            yield Piece(lambda start=start, stop=stop: _as_bytes(take(start, stop)), self.is_scale)


def _as_bytes(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


@dataclasses.dataclass(frozen=True)
class PlannedFile:
    """One safetensors file to be written."""

    name: str
    tensors: tuple[PlannedTensor, ...]
    """In the order of their bytes."""
    header: bytes
    """Everything before the first tensor."""

    @property
    def nbytes(self) -> int:
        """Its size."""
        return len(self.header) + sum(tensor.nbytes for tensor in self.tensors)


def _planned_file(name: str, tensors: list[PlannedTensor]) -> PlannedFile:
    # Wide dtypes first, so that every tensor is aligned; a weight stays next to its scale.
    ordered = sorted(tensors, key=lambda tensor: -DTYPES[tensor.dtype].itemsize)
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}  # transformers asks for this mark
    offset = 0
    for tensor in ordered:
        end = offset + tensor.nbytes
        entries[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return PlannedFile(name, tuple(ordered), len(text).to_bytes(8, "little") + text)


# ---- which format ----------------------------------------------------------------------------------------------------
class Job(NamedTuple):
    """What is converted and how."""

    source: Checkpoint
    weights: Weights
    to: Target
    layout: Layout
    shard_bytes: int
    base: Checkpoint | None

    @property
    def spelling(self) -> Spelling:
        """Of the output's names."""
        if self.to == "v4jax":
            return Spelling.V4JAX
        return Spelling.OFFICIAL if self.layout == "official" else Spelling.TRANSFORMERS

    @property
    def tile(self) -> tuple[int, int]:
        """Of FP8 codes made anew."""
        return FP8_TILE if self.base is None else fp8_tile(self.base.config)


def _target_format(job: Job, parameter: ParameterSpec, source: Matrix, base: Matrix | None) -> Format:
    stored = Format(source.dtype, source.scale_dtype)
    storage, weights = parameter.storage, job.weights
    if weights in ("bf16", "fp32"):
        if storage is Storage.TABLE:
            return Format("I64")
        return Format("BF16" if weights == "bf16" and not storage.is_float32 else "F32")
    if weights == "native":
        is_kept = base is None or (source.scale is not None and source.dtype == base.dtype)
        return stored if is_kept or base is None else Format(base.dtype, base.scale_dtype)
    is_plain = storage not in (Storage.DENSE, Storage.EXPERT)
    if is_plain and job.source.config.quantization_config is not None:
        return stored
    if is_plain and base is not None:
        return Format(base.dtype)
    if is_plain:
        return Format({Storage.EXACT: "F32", Storage.TABLE: "I64"}.get(storage, "BF16"))
    wanted = "I8" if weights == "fp4" and storage is Storage.EXPERT else "F8_E4M3"
    for known in (source, base):
        if known is not None and known.dtype == wanted:
            return Format(wanted, known.scale_dtype)
    return Format(wanted, "F8_E8M0")


def _content(job: Job, source: Matrix, target: Format, base: Matrix | None) -> Content:
    if target == (source.dtype, source.scale_dtype):
        check_tile_boundary(source)
        return Stored(source)
    if target.scale is None:
        return Values(source, target.weight)
    if source.scale is not None:
        check_tile_boundary(source)
        if fp8_tile(job.source.config) != FP8_TILE:
            raise CheckpointError(
                f"{source.name}: FP8 scales of {list(fp8_tile(job.source.config))} values, FP4 becomes FP8 and back "
                f"with {list(FP8_TILE)} only; convert to bf16 first"
            )
        return Recoded(source, target)
    if base is not None and (base.dtype, base.scale_dtype) != target:
        base = None
    if target.weight == "I8" and source.columns % 2:
        raise CheckpointError(f"{source.name}: {source.columns} inputs, FP4 needs an even number; use --weights fp8")
    return Encoded(source, target, base, job.tile)


# ---- which tensors ---------------------------------------------------------------------------------------------------
class _Found(NamedTuple):
    order: tuple[int, int]
    target: StoredTensor
    format: Format
    content: Content


def plan_section(job: Job, section: Section, reader: RangeReader) -> list[PlannedTensor]:
    """The output tensors of one section.

    Raises:
        CheckpointError: stored bytes cannot be cut where this layout needs it, or do not belong together.
    """
    tensors: dict[str, list[_Found]] = {}
    for parameter in section_parameters(job.source.config, section):
        stored = stored_tensors(section, parameter, job.source.spelling)
        for source, target, base in zip(
            stored, stored_tensors(section, parameter, job.spelling), _bases(job, section, parameter), strict=False
        ):
            matrix = find_matrix(job.source, source, reader)
            base_matrix = find_matrix(job.base, base, reader) if job.base and base else None
            form = _target_format(job, parameter, matrix, base_matrix)
            content = _content(job, matrix, form, base_matrix)
            if parameter.storage is Storage.TABLE:
                content = _CheckedTable(content, job.source, source.name)
            order = (target.slab or 0, target.rows.start if target.rows else 0)
            tensors.setdefault(target.name, []).append(_Found(order, target, form, content))
    return [
        planned
        for name, found in tensors.items()
        for planned in _planned(job, name, section_name(section), sorted(found, key=lambda one: one.order))
    ]


def _bases(job: Job, section: Section, parameter: ParameterSpec) -> Iterator[StoredTensor | None]:
    if job.base is not None and section in sections(job.base.config):
        yield from stored_tensors(section, parameter, job.base.spelling)
    while True:
        yield None


class _CheckedTable(Content):
    """A hash table whose rows are looked at on their way."""

    def __init__(self, content: Content, checkpoint: Checkpoint, name: str) -> None:
        self._content, self._checkpoint, self._name = content, checkpoint, name
        self.rows, self.granularity, self.row_memory = content.rows, content.granularity, 4 * content.row_memory

    def weight(self, start: int, stop: int) -> np.ndarray:
        table = self._content.weight(start, stop)
        self._checkpoint.check_table(self._name, table, first_token=start)
        return table


def _planned(job: Job, name: str, section: str, found: list[_Found]) -> Iterator[PlannedTensor]:
    target, form = found[0].target, found[0].format
    for one in found[1:]:
        if one.format != form:
            raise CheckpointError(
                f"{name}: its experts are stored as {form}/{form.scale} and {one.format}/{one.format.scale}, which "
                "cannot be stacked; convert to bf16 or fp32"
            )
    shape = target.shape
    packed = (*shape[:-1], shape[-1] // 2) if form.weight == "I8" and form.scale else shape
    yield PlannedTensor(name, form.weight, packed, section, tuple(_Part(one.content, False) for one in found))
    if form.scale is None:
        return
    tile = job.tile if isinstance(found[0].content, Encoded | Recoded) else fp8_tile(job.source.config)
    if form.weight == "F8_E4M3" and len(found) > 1 and target.rows and (target.rows.stop - target.rows.start) % tile[0]:
        raise CheckpointError(
            f"{name}: {target.rows.stop - target.rows.start} rows of each of w1 and w3, which transformers fuses, need "
            f"a multiple of the {tile[0]} that share an FP8 scale; use --layout official, or bf16 or fp32"
        )
    scale_shape = fp4_scale_shape(shape) if form.weight == "I8" else fp8_scale_shape(shape, tile)
    scale_name = target.scale_names[0]
    if name.startswith("model.") or name.startswith("lm_head"):
        scale_name = target.scale_names[-1]
    yield PlannedTensor(scale_name, form.scale, scale_shape, section, tuple(_Part(one.content, True) for one in found))


class _Raw(Content):
    """The bytes of a tensor of another kind of model, which nothing here looks into."""

    def __init__(self, info: TensorInfo, reader: RangeReader) -> None:
        self._info, self._reader = info, reader
        self.rows, self.granularity, self.row_memory = info.nbytes, 1, 2

    def weight(self, start: int, stop: int) -> np.ndarray:
        return self._reader.read(self._info.file, self._info.offset + start, stop - start)


def plan_carried(job: Job) -> tuple[TensorInfo, ...]:
    """The tensors that are neither read nor changed: DSpark's. A base's, if the source lost its own."""
    holder = job.source
    if not holder.ignored and job.base is not None and holder.config.has_dspark:
        holder = job.base
    return holder.carried


# ---- which files -----------------------------------------------------------------------------------------------------
def plan_files(job: Job, reader: RangeReader) -> list[PlannedFile]:
    """All output files.

    Raises:
        CheckpointError: as `plan_section`.
    """
    parts = [(section, plan_section(job, section, reader)) for section in sections(job.source.config)]
    carried = [
        PlannedTensor(info.name, info.dtype, info.shape, "mtp", (_Part(_Raw(info, reader), False),))
        for info in plan_carried(job)
    ]
    if job.to == "v4jax":
        files = [_planned_file(section_file(section), tensors) for section, tensors in parts]
        return files + ([_planned_file(DSPARK_FILE, carried)] if carried else [])
    shards: list[list[PlannedTensor]] = [[]]
    size = 0
    for tensor in [*(tensor for _, tensors in parts for tensor in tensors), *carried]:
        if shards[-1] and size + tensor.nbytes > job.shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.nbytes
    count = len(shards)
    names = [f"model-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)] if count > 1 else [SINGLE_FILE]
    return [_planned_file(name, tensors) for name, tensors in zip(names, shards, strict=True)]


def largest_piece(files: list[PlannedFile]) -> int:
    """Bytes of memory that the most expensive piece needs, however small pieces are made."""
    contents = (part.content for file in files for tensor in file.tensors for part in tensor.parts)
    return max(
        (min(content.granularity, content.rows) * content.row_memory for content in contents),
        default=DEFAULT_RANGE_BYTES,
    )
