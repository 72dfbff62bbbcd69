"""The verb `info`: what a config or a checkpoint is, without reading a weight."""

import dataclasses
import json
import math
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.table import Table

from kernels_pallas import dispatch
from v4jax.checkpoint.location import Location, RemotePath, locate
from v4jax.checkpoint.names import (
    ParameterSpec,
    Section,
    Spelling,
    Storage,
    TensorSpec,
    released_tensors,
    section_parameters,
    sections,
    stored_tensors,
)
from v4jax.checkpoint.orbax_tree import orbax_bytes
from v4jax.checkpoint.reader import is_v4jax_directory, open_checkpoint
from v4jax.checkpoint.tensor_file import TensorInfo
from v4jax.checkpoint.verb import parse_size
from v4jax.config import LayerSpec, ModelConfig, SegmentSpec, layer_plan, mtp_plan, plan_segments
from v4jax.errors import UsageError, UserError, check_json_place

PRESETS = {
    "flash": ModelConfig.flash,
    "pro": ModelConfig.pro,
    "tiny": ModelConfig.tiny,
    "bench": ModelConfig.bench,
}
PLATFORMS = ("tpu", "gpu", "cpu")


@dataclasses.dataclass(frozen=True)
class Options:
    """Describe a model: its layers, parameters and tensors, and which implementation of each operation runs where."""

    path: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="MODEL")]]
    """Model directory (a path or a URL), config.json, or one of flash, pro, tiny, bench."""
    json: Path | None = None
    """Also write everything to this file."""
    implementation: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """Force an implementation, as op=pallas, op=xla or op=reference."""
    max_memory: str = "2GiB"
    """What `convert --to orbax` may hold; a note says if a model needs more."""


# ---- what there is to say --------------------------------------------------------------------------------------------
@dataclasses.dataclass(frozen=True)
class ParameterTotals:
    """Numbers of parameters; routing tables are not counted (architecture.md §17.4)."""

    backbone: int
    """With embedding and head."""
    active: int
    """What one token uses of the backbone: without the embedding, with the head."""
    mtp: int
    mtp_active: int


@dataclasses.dataclass(frozen=True)
class Description:
    """All that `info` prints."""

    config: ModelConfig
    tensors: tuple[TensorSpec | TensorInfo, ...]
    """Of the files where there are some, else of the released files of this config."""
    spelling: Spelling = Spelling.OFFICIAL
    """Of the tensors' names."""
    is_stored: bool = False
    """Whether the tensors are those of files."""
    notes: tuple[str, ...] = ()


def describe(path: str) -> Description:
    """Reads a preset's name, a `config.json`, or a model directory with its tensor files.

    Raises:
      UserError: if there is no such thing.
      ConfigError: for a config that is no V4 model's.
      CheckpointError: for tensors that do not fit it.
    """
    found = locate(path)
    if isinstance(found, RemotePath):
        return _describe_checkpoint(found)
    if not found.exists():
        if path not in PRESETS:
            raise UserError(
                f"{path}: no such file or directory; give a model directory, a config.json or {', '.join(PRESETS)}"
            )
        return _describe_config(PRESETS[path]())
    has_files = found.suffix == ".safetensors" or is_v4jax_directory(found) or any(found.glob("*.safetensors*"))
    if not has_files:
        return _describe_config(ModelConfig.from_hf(found))
    return _describe_checkpoint(found)


def _describe_checkpoint(place: Location) -> Description:
    checkpoint = open_checkpoint(place)
    notes = (*checkpoint.notes, *_unused_keys(checkpoint.config))
    return Description(checkpoint.config, tuple(checkpoint.inventory.values()), checkpoint.spelling, True, notes)


def _describe_config(config: ModelConfig) -> Description:
    notes = _unused_keys(config)
    if config.has_dspark:
        notes = ("DSpark speculative head ignored: the mtp.* tensors of its checkpoint are not used", *notes)
    return Description(config, tuple(released_tensors(config)), notes=notes)


def _unused_keys(config: ModelConfig) -> tuple[str, ...]:
    """Config keys that say nothing to this package, apart from those whose one supported value was checked."""
    unused = sorted(set(config.extra_fields) - set(ModelConfig.tiny().to_hf()) - {"quantization_config"})
    return (f"config keys not used: {', '.join(unused)}",) if unused else ()


def count_parameters(config: ModelConfig) -> ParameterTotals:
    """Parameters in all and per token, from the table of names and shapes."""
    total: dict[str, int] = defaultdict(int)
    active: dict[str, int] = defaultdict(int)
    for section in sections(config):
        part = "mtp" if section[0] == "mtp" else "backbone"
        for parameter in section_parameters(config, section):
            size = _size(parameter)
            total[part] += size
            if parameter.storage is Storage.EXPERT:
                active[part] += size // config.n_routed_experts * config.num_experts_per_tok
            elif parameter.key != "embed.weight":
                active[part] += size
    return ParameterTotals(total["backbone"], active["backbone"], total["mtp"], active["mtp"])


def _size(parameter: ParameterSpec) -> int:
    return 0 if parameter.storage is Storage.TABLE else math.prod(parameter.shape)


def count_dtypes(tensors: Iterable[TensorSpec | TensorInfo]) -> dict[str, dict[str, int]]:
    """Number and bytes of the tensors of each dtype, the largest first."""
    counts: dict[str, dict[str, int]] = defaultdict(lambda: {"tensors": 0, "bytes": 0})
    for tensor in tensors:
        counts[tensor.dtype]["tensors"] += 1
        counts[tensor.dtype]["bytes"] += tensor.nbytes
    return dict(sorted(counts.items(), key=lambda item: -item[1]["bytes"]))


def resolve_implementations(choices: Iterable[str] = ()) -> dict[str, dict[str, str]]:
    """What runs for each operation on each platform.

    Raises:
      UsageError: for a choice that names no operation, or an implementation that it lacks.
    """
    try:
        forced = dispatch.parse_overrides(choices)
    except ValueError as error:
        raise UsageError(str(error)) from None
    return {
        name: {platform: operation.resolve(forced.get(name), platform) for platform in PLATFORMS}
        for name, operation in dispatch.operations().items()
    }


# ---- the verb --------------------------------------------------------------------------------------------------------
def run(options: Options) -> None:
    """Prints the description, and writes it as JSON if asked."""
    check_json_place(options.json)
    max_memory = parse_size(options.max_memory, "--max-memory")
    implementations = resolve_implementations(options.implementation)
    description = describe(options.path)
    if options.json is not None:
        options.json.write_text(json.dumps(to_json(description, implementations), indent=1) + "\n")
    # A pipe has no width; tables should not be cut to the 80 columns that rich then assumes.
    console = Console(width=None if sys.stdout.isatty() else 140, highlight=False)
    for title, table in _tables(description, implementations):
        console.print(f"[bold]{title}[/bold]")
        console.print(table)
        console.print()
    over = _orbax_note(description.config, max_memory)
    for note in (*description.notes, *over, *_missing_kernels(implementations)):
        console.print(f"note: {note}", markup=False, soft_wrap=True)


def to_json(description: Description, implementations: dict[str, dict[str, str]]) -> dict[str, Any]:
    """The object of `--json`."""
    config = description.config
    return {
        "config": config.to_hf(),
        "plan": [_spec_fields(spec) for spec in layer_plan(config)],
        "segments": [
            {"unit": [_spec_fields(spec) for spec in segment.unit], "repeats": segment.repeats}
            for segment in plan_segments(layer_plan(config))
        ],
        "mtp": [_spec_fields(spec) for spec in mtp_plan(config)],
        "parameters": dataclasses.asdict(count_parameters(config)),
        "tensors": len(description.tensors),
        "bytes": sum(tensor.nbytes for tensor in description.tensors),
        "dtypes": count_dtypes(description.tensors),
        "notes": list(description.notes),
        "implementations": implementations,
    }


def _orbax_note(config: ModelConfig, max_memory: int) -> tuple[str, ...]:
    need = orbax_bytes(config, is_bf16=True)
    if need <= max_memory:
        return ()
    return (
        f"convert --to orbax --weights bf16 holds {need:,} bytes in memory, more than the --max-memory of "
        f"{max_memory:,}; --to v4jax streams",
    )


def _spec_fields(spec: LayerSpec) -> dict[str, Any]:
    return {"attention": str(spec.attention), "router": str(spec.router), "ratio": spec.ratio}


def _missing_kernels(implementations: dict[str, dict[str, str]]) -> tuple[str, ...]:
    missing = [name for name, chosen in implementations.items() if chosen["tpu"] != "pallas"]
    return (f"no TPU kernel runs for {', '.join(missing)}: a TPU runs what the table says",) if missing else ()


# ---- tables ----------------------------------------------------------------------------------------------------------
def _tables(description: Description, implementations: dict[str, dict[str, str]]) -> Iterable[tuple[str, Table]]:
    config = description.config
    yield "Config", _config_table(config)
    yield "Layers", _plan_table(config)
    yield "Parameters", _parameter_table(description)
    yield "Totals", _totals_table(count_parameters(config))
    title = "Tensors in the files" if description.is_stored else "Tensors of a released checkpoint of this config"
    yield title, _dtype_table(count_dtypes(description.tensors))
    yield "Implementations", _implementation_table(implementations)


def _table(*columns: str) -> Table:
    """A table whose columns are text on the left and, where the name ends in `#`, numbers on the right."""
    table = Table(header_style="dim", box=None, pad_edge=False)
    for column in columns:
        table.add_column(column.removesuffix("#"), justify="right" if column.endswith("#") else "left", no_wrap=True)
    return table


def _config_table(config: ModelConfig) -> Table:
    table = _table("field", "value", "field", "value", "field", "value")
    hidden = ("layer_types", "mlp_layer_types", "mtp_layer_types", "rope_scaling", "extra")
    values = {f.name: str(getattr(config, f.name)) for f in dataclasses.fields(config) if f.name not in hidden}
    values["expert_dtype"] = str(config.expert_storage)
    scaling = config.rope_scaling
    if scaling is not None:
        values["yarn"] = f"{scaling.factor:g}×{scaling.original_max_position_embeddings}"
        values["yarn betas"] = f"{scaling.beta_fast:g}, {scaling.beta_slow:g}"
    cells = [cell for pair in values.items() for cell in pair]
    for start in range(0, len(cells), 6):
        table.add_row(*cells[start : start + 6])
    return table


def _plan_table(config: ModelConfig) -> Table:
    table = _table("layers#", "attention, router", "repeated#")
    start = 0
    for segment in plan_segments(layer_plan(config)):
        length = len(segment.unit) * segment.repeats
        table.add_row(_range("", start, length), _unit(segment), f"× {segment.repeats}")
        start += length
    for index, spec in enumerate(mtp_plan(config)):
        table.add_row(f"mtp {index}", _unit(SegmentSpec((spec,), 1)), "× 1")
    return table


def _range(prefix: str, start: int, length: int) -> str:
    return f"{prefix}{start}" if length == 1 else f"{prefix}{start}–{start + length - 1}"


def _unit(segment: SegmentSpec) -> str:
    return " · ".join(
        f"({spec.attention.name}{f' {spec.ratio}:1' if spec.ratio else ''}, {spec.router.name})"
        for spec in segment.unit
    )


def _parameter_table(description: Description) -> Table:
    """One row per parameter of one shape and stored dtype, over all layers that have it."""
    dtypes = {tensor.name: tensor.dtype for tensor in description.tensors}
    rows: dict[tuple[ParameterSpec, str], list[Section]] = defaultdict(list)
    for section in sections(description.config):
        for parameter in section_parameters(description.config, section):
            stored = next(stored_tensors(section, parameter, description.spelling))
            rows[parameter, dtypes[stored.name]].append(section)
    table = _table("name", "shape", "stored as", "in", "parameters#")
    for (parameter, dtype), places in rows.items():
        count = len(places) * _size(parameter)
        table.add_row(parameter.key, str(list(parameter.shape)), dtype, _places(places), f"{count:,}" if count else "–")
    return table


def _places(places: list[Section]) -> str:
    counts = Counter(place if isinstance(place, str) else place[0] for place in places)
    words = {"layers": "layer", "mtp": "mtp block"}
    return ", ".join(
        f"{count} {words[kind]}{'s' if count > 1 else ''}" if kind in words else kind for kind, count in counts.items()
    )


def _totals_table(totals: ParameterTotals) -> Table:
    table = _table("", "parameters#", "#", "")
    rows = (
        ("backbone", totals.backbone, "with embedding and head"),
        ("active", totals.active, "per token, without the embedding"),
        ("mtp", totals.mtp, f"{_billions(totals.mtp_active)} of them active"),
    )
    for name, count, note in rows:
        if count:
            table.add_row(name, f"{count:,}", _billions(count), note)
    return table


def _billions(count: int) -> str:
    return f"{count / 1e9:.2f} B" if count >= 1e7 else f"{count / 1e6:.2f} M"


def _dtype_table(counts: dict[str, dict[str, int]]) -> Table:
    table = _table("dtype", "tensors#", "bytes#")
    for dtype, count in counts.items():
        table.add_row(dtype, f"{count['tensors']:,}", f"{count['bytes']:,}")
    total = {key: sum(count[key] for count in counts.values()) for key in ("tensors", "bytes")}
    table.add_row("all", f"{total['tensors']:,}", f"{total['bytes']:,}", style="bold")
    return table


def _implementation_table(implementations: dict[str, dict[str, str]]) -> Table:
    table = _table("operation", *PLATFORMS, "has")
    operations = dispatch.operations()
    for name, chosen in implementations.items():
        table.add_row(name, *chosen.values(), ", ".join(operations[name].implementations))
    return table
