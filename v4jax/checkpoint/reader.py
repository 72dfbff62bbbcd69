"""Reads a checkpoint section by section: any spelling, sharded or single, Hugging Face or v4jax directory.

`open_checkpoint` reads headers only and checks the whole inventory; tensors are read, dequantised and checked when they
are asked for, one expert at a time, so that memory holds what was asked for and no more.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any, Literal

import ml_dtypes
import numpy as np

from kernels_pallas.formats import decode_fp4, decode_fp8
from v4jax.checkpoint.inventory import check_inventory, fp8_tile
from v4jax.checkpoint.location import Location, config_source, locate
from v4jax.checkpoint.names import (
    ParameterSpec,
    Section,
    Spelling,
    Storage,
    StoredTensor,
    detect_spelling,
    scale_key,
    section_file,
    section_parameters,
    sections,
    stored_tensors,
)
from v4jax.checkpoint.tensor_file import (
    RESUME,
    CheckpointError,
    TensorInfo,
    check_link,
    join,
    notes_on_index,
    read_header,
    read_shards,
    summarise,
)
from v4jax.config import ModelConfig

MANIFEST = "conversion.json"
"""What a v4jax directory is described by; written last."""

ParameterDType = Literal["float32", "bfloat16"]


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint whose inventory fits its config.

    Sections are read as flat dicts of official keys, as `v4jax.checkpoint.names` lists them, with each layer's experts
    stacked (`ffn.experts.w1.weight` [E, I, d]).
    """

    path: Any
    """A `Path`, or a `RemotePath` in an object store."""
    config: ModelConfig
    """Without the MTP block if the files have none."""
    spelling: Spelling
    inventory: dict[str, TensorInfo]
    """All tensors of the files by their own names, the ignored ones included."""
    ignored: tuple[str, ...] = ()
    """Tensors that this package has no use for."""
    notes: tuple[str, ...] = ()
    """What a user should know: an absent MTP block, ignored tensors."""

    @property
    def carried(self) -> tuple[TensorInfo, ...]:
        """The tensors that conversions pass on untouched: those of a DSpark head, by their names."""
        return tuple(self.inventory[name] for name in self.ignored)

    @property
    def directory(self) -> Any:
        """Where `config.json` and the tokenizer lie."""
        return self.path if self.path.is_dir() else self.path.parent

    @property
    def nbytes(self) -> int:
        """Size of all tensors."""
        return sum(info.nbytes for info in self.inventory.values())

    @property
    def recorded_source(self) -> str | None:
        """Where a v4jax directory's weights came from, if its record says so."""
        return recorded_source(self.path)

    def top(self, dtype: ParameterDType = "float32") -> dict[str, np.ndarray]:
        """Embedding, head, final norm and head hyper-connection."""
        return self.section("top", dtype)

    def layer(self, n: int, dtype: ParameterDType = "float32") -> dict[str, np.ndarray]:
        """Backbone layer `n`."""
        return self.section(("layers", n), dtype)

    def mtp(self, n: int, dtype: ParameterDType = "float32") -> dict[str, np.ndarray]:
        """MTP block `n`."""
        return self.section(("mtp", n), dtype)

    def section(
        self,
        section: Section,
        dtype: ParameterDType = "float32",
        *,
        skip: str | None = None,
        experts: range | None = None,
    ) -> dict[str, np.ndarray]:
        """One section, dequantised: matrices in `dtype`, what must stay exact in float32, hash tables in int32.

        Args:
            section: which.
            dtype: of the matrices.
            skip: keys that begin with it are left out.
            experts: those to read, all if None; the stacks then hold these alone.

        Raises:
            CheckpointError: a value is not finite, a hash table names no expert or one twice, or reading fails.
        """
        self._check_section(section)
        return {
            parameter.key: self._parameter(section, parameter, dtype, experts)
            for parameter in section_parameters(self.config, section)
            if skip is None or not parameter.key.startswith(skip)
        }

    def expert(
        self, section: Section, index: int, dtype: ParameterDType = "float32"
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """One routed expert's w1 [I, d], w2 [d, I] and w3 [I, d], dequantised.

        Raises:
            CheckpointError: as `section`.
        """
        self._check_section(section)
        matrices = {
            parameter.key: self._values(list(stored_tensors(section, parameter, self.spelling))[index])
            for parameter in section_parameters(self.config, section)
            if parameter.storage is Storage.EXPERT
        }
        target = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.float32
        w1, w2, w3 = (matrices[f"ffn.experts.w{n}.weight"].astype(target, copy=False) for n in (1, 2, 3))
        return w1, w2, w3

    def native(self, section: Section, *, experts: range | None = None) -> dict[str, np.ndarray]:
        """One section with the bytes of the files: FP4 codes as int8, scales under `attn.wq_a.scale` and the like.

        Args:
            section: which.
            experts: those to read, all if None; the stacks then hold these alone.

        Raises:
            CheckpointError: as `section`; or a fused FP8 tensor cannot be split because a scale spans both halves.
        """
        self._check_section(section)
        tensors: dict[str, np.ndarray] = {}
        for parameter in section_parameters(self.config, section):
            tensors |= self._native_parameter(section, parameter, experts)
        return tensors

    # ---- one parameter -------------------------------------------------------------------------------------------
    def _parameter(
        self, section: Section, parameter: ParameterSpec, dtype: ParameterDType, chosen: range | None
    ) -> np.ndarray:
        stored = list(stored_tensors(section, parameter, self.spelling))
        if parameter.storage is Storage.TABLE:
            table = self.inventory[stored[0].name].read()
            self.check_table(stored[0].name, table)
            return table.astype(np.int32)
        target = ml_dtypes.bfloat16 if dtype == "bfloat16" and not parameter.storage.is_float32 else np.float32
        if parameter.storage is not Storage.EXPERT:
            return self._values(stored[0]).astype(target, copy=False)
        stored = stored if chosen is None else stored[chosen.start : chosen.stop]
        experts = np.empty((len(stored), *parameter.shape[1:]), target)
        for expert, one in zip(experts, stored, strict=True):
            expert[...] = self._values(one)
        return experts

    def _values(self, stored: StoredTensor) -> np.ndarray:
        """Dequantised values, in the stored dtype where that is a float."""
        info, scale = self.inventory[stored.name], self._scale(stored)
        values = info.read(stored.slab)
        if scale is not None:
            _, scales = scale
            is_fp4 = info.dtype == "I8"
            values = decode_fp4(values, scales) if is_fp4 else decode_fp8(values, scales, fp8_tile(self.config))
        values = values[stored.rows or slice(None)]
        check_finite(stored.name, values)
        return values

    def _native_parameter(
        self, section: Section, parameter: ParameterSpec, chosen: range | None
    ) -> dict[str, np.ndarray]:
        stored = list(stored_tensors(section, parameter, self.spelling))
        if parameter.storage is not Storage.EXPERT:
            tensors = self._native_values(parameter.key, stored[0])
            if parameter.storage is Storage.TABLE:
                self.check_table(stored[0].name, tensors[parameter.key])
            return tensors
        stored = stored if chosen is None else stored[chosen.start : chosen.stop]
        stacks: dict[str, np.ndarray] = {}
        for expert, one in enumerate(stored):
            for key, values in self._native_values(parameter.key, one).items():
                if expert == 0:
                    stacks[key] = np.empty((len(stored), *values.shape), values.dtype)
                stacks[key][expert] = values
        return stacks

    def _native_values(self, key: str, stored: StoredTensor) -> dict[str, np.ndarray]:
        """A stored weight under its key and, if it has one, its scale."""
        info, scale = self.inventory[stored.name], self._scale(stored)
        tensors = {key: info.read(stored.slab)[stored.rows or slice(None)]}
        check_finite(info.name, tensors[key])
        if scale is not None:
            name, values = scale
            tensors[scale_key(key)] = values[self._scale_rows(stored, info)]
            check_finite(name, tensors[scale_key(key)])
        return tensors

    def _scale_rows(self, stored: StoredTensor, info: TensorInfo) -> slice:
        if stored.rows is None:
            return slice(None)
        tile = 1 if info.dtype == "I8" else fp8_tile(self.config)[0]
        if stored.rows.start % tile or stored.rows.stop % tile:
            raise CheckpointError(
                f"{stored.name}: one FP8 scale spans the {tile} rows where w1 meets w3, so the stored bytes cannot be "
                "split there; convert to bf16 or fp32"
            )
        return slice(stored.rows.start // tile, stored.rows.stop // tile)

    def _scale(self, stored: StoredTensor) -> tuple[str, np.ndarray] | None:
        """Name and values of a stored weight's scale, for all its rows."""
        for name in stored.scale_names:
            if name in self.inventory:
                values = self.inventory[name].read(stored.slab)
                # Older writers had no name for E8M0.
                return name, values.view(ml_dtypes.float8_e8m0fnu) if values.dtype == np.uint8 else values
        return None

    # ---- checks --------------------------------------------------------------------------------------------------
    def _check_section(self, section: Section) -> None:
        if section in sections(self.config):
            return
        if section[0] == "mtp" and self.config.num_mtp_layers == 0:
            raise CheckpointError(f"{self.path}: the checkpoint has no MTP block that can be used; leave out MTP")
        raise IndexError(f"section {section}: the model has {self.config.num_hidden_layers} layers")

    def check_table(self, name: str, table: np.ndarray, first_token: int = 0) -> None:
        """Refuses rows of a hash table, those from `first_token` on, that name no expert or one twice.

        Raises:
            CheckpointError: there are some; the message names the tensor.
        """
        experts = self.config.n_routed_experts
        outside = (table < 0) | (table >= experts)
        if outside.any():
            raise CheckpointError(
                f"{name}: got expert {table[outside][0]}, need 0 to {experts - 1}; the table is damaged: fetch it again"
            )
        ordered = np.sort(table, axis=-1)
        twice = (ordered[:, 1:] == ordered[:, :-1]).any(axis=-1)
        if twice.any():
            token = int(twice.argmax())
            raise CheckpointError(
                f"{name}: token {first_token + token} has one expert twice ({table[token].tolist()}), need distinct "
                "ones; the table was never filled or is damaged: take it from the released checkpoint"
            )


def check_finite(name: str, values: np.ndarray) -> None:
    """Refuses NaN and infinity in any stored float dtype; integers pass.

    Raises:
        CheckpointError: there are some; the message names the tensor.
    """
    if values.dtype == ml_dtypes.float8_e8m0fnu:
        is_finite = values.view(np.uint8) != 255
    elif values.dtype == ml_dtypes.bfloat16:
        is_finite = values.view(np.uint16) & 0x7F80 != 0x7F80
    elif values.dtype == ml_dtypes.float8_e4m3fn:
        is_finite = values.view(np.uint8) & 0x7F != 0x7F
    elif values.dtype.kind in "iu":
        return
    else:
        is_finite = np.isfinite(values)
    if not is_finite.all():
        count = values.size - np.count_nonzero(is_finite)
        raise CheckpointError(
            f"{name}: {count} of {values.size} values are NaN or infinite, need finite ones; "
            "the file is damaged, or its training diverged"
        )


# ---- opening ---------------------------------------------------------------------------------------------------------
def open_checkpoint(path: str | Path | Location) -> Checkpoint:
    """Opens a Hugging Face directory, a v4jax directory, or one safetensors file beside its `config.json`.

    Raises:
        ConfigError: `config.json` is missing or not a V4 model's.
        CheckpointError: files are missing, damaged or half-written, or the tensors do not fit the config; all
            missing, extra, mis-shaped and mis-typed ones are listed together.
    """
    path = locate(path)
    if isinstance(path, Path):
        check_link(path)
    if not path.exists():
        raise CheckpointError(f"{path}: no such file or directory; give a model directory")
    if is_v4jax_directory(path):
        inventory = _read_v4jax(path)
    else:
        inventory = read_shards(path) if path.is_dir() else read_header(path)
    config = ModelConfig.from_hf(config_source(path if path.is_dir() else path.parent))
    spelling = detect_spelling(inventory)
    if spelling is None:
        raise CheckpointError(
            f"{path}: its tensors have no names of a V4 model, such as layers.0.attn.wq_a.weight; it holds:\n"
            + summarise(sorted(inventory), limit=5)
        )
    notes: list[str] = []
    ignored: tuple[str, ...] = ()
    mtp = tuple(sorted(name for name in inventory if name.startswith("mtp.")))
    if config.has_dspark and mtp:
        ignored = mtp
        size = sum(inventory[name].nbytes for name in mtp)
        notes.append(
            f"DSpark speculative head ignored: {len(mtp)} tensors (mtp.*), {size:,} bytes; the backbone is complete"
        )
    elif config.has_dspark:
        notes.append("no DSpark speculative head in the files; the backbone is complete")
    elif config.num_mtp_layers and not mtp:
        config = config.without_mtp()
        notes.append("no MTP block in the files (transformers drops it when saving); the backbone is complete")
    notes += check_inventory(path, config, spelling, inventory, ignored)
    if path.is_dir() and not is_v4jax_directory(path):
        notes += notes_on_index(path, inventory)
    return Checkpoint(path, config, spelling, inventory, ignored, tuple(notes))


def is_v4jax_directory(path: Any) -> bool:
    """Whether this is a v4jax model directory, complete or not."""
    return (path / MANIFEST).is_file() or (path / "layers").is_dir() or (path / section_file("top")).is_file()


def _read_v4jax(directory: Any) -> dict[str, TensorInfo]:
    manifest = read_manifest(directory)
    for name, record in manifest["files"].items():
        file = directory / name
        size = file.stat().st_size if file.is_file() else None
        if size != record["bytes"]:
            found = "no such file" if size is None else f"{size} bytes"
            raise CheckpointError(f"{file}: got {found}, need {record['bytes']} bytes by {MANIFEST}; convert again")
    return join(read_header(directory / name) for name in manifest["files"] if name.endswith(".safetensors"))


def read_manifest(directory: Any) -> dict[str, Any]:
    """A v4jax directory's `conversion.json`.

    Raises:
        CheckpointError: it is missing, damaged, or does not say that the directory is complete.
    """
    file = directory / MANIFEST
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        manifest = {}
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: cannot be read ({error}); convert again") from None
    if not isinstance(manifest, dict) or manifest.get("status") != "complete":
        # Without a record there is nothing to go on from.
        remedy = RESUME if manifest else "remove the directory and convert again"
        raise CheckpointError(f"{directory}: its conversion did not finish ({MANIFEST} does not say so); {remedy}")
    files = manifest.get("files")
    is_valid = isinstance(files, dict) and all(
        isinstance(record, dict) and isinstance(record.get("bytes"), int) for record in files.values()
    )
    outside = [name for name in files or () if name.startswith("/") or ".." in name.split("/")] if is_valid else []
    if outside:
        raise CheckpointError(f"{file}: names {outside[0]!r}, need files of this directory; convert again")
    if not is_valid:
        raise CheckpointError(f"{file}: need the sizes of the files under 'files'; convert again")
    return manifest


def recorded_source(directory: Any) -> str | None:
    """Where a v4jax directory's weights came from, if it is one and its record says so."""
    manifest = read_manifest(directory) if (directory / MANIFEST).is_file() else {}
    source = manifest.get("source")
    found = source.get("path") if isinstance(source, dict) else None
    return found if isinstance(found, str) else None
