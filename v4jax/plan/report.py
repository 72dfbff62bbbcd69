"""What is said about a planned step: one object of JSON, and a table to read."""

import dataclasses
from collections import Counter
from typing import Any

from rich.table import Table

from v4jax.plan.analytic import Estimate, estimate, step_seconds
from v4jax.plan.compile import Compiled, Failure
from v4jax.plan.request import Request
from v4jax.sharding import format_mesh

GIB = 1 << 30


@dataclasses.dataclass(frozen=True)
class Plan:
    """A request, what the formulas say of it, and what the compiler made of it."""

    name: str
    request: Request
    estimate: Estimate
    compiled: Compiled | Failure
    notes: tuple[str, ...] = ()

    @property
    def fits(self) -> bool:
        """Whether the compiler placed it in the memory of a device."""
        limit = self.request.topology.chip.hbm_limit
        return isinstance(self.compiled, Compiled) and self.compiled.peak_bytes <= limit

    @property
    def is_too_large(self) -> bool:
        """Whether memory alone is why it does not fit."""
        return self.compiled.kind == "memory" if isinstance(self.compiled, Failure) else not self.fits


def make_plan(name: str, request: Request, compiled: Compiled | Failure, notes: tuple[str, ...] = ()) -> Plan:
    """A plan with its estimate."""
    return Plan(name, request, estimate(request), compiled, notes)


def to_json(plan: Plan) -> dict[str, Any]:
    """The object of `--json`: bytes, seconds, and FLOPs of the whole program unless a key says per device.

    Bytes moved are of all devices together too. Where the compiler gave no program its figures are null, and `failure`
    says why. `smallest_fitting`, null here, is for such an object of the next slice that is large enough.
    """
    request, guess, made = plan.request, plan.estimate, plan.compiled
    devices, chip = request.topology.devices, request.topology.chip
    facts: dict[str, Any] = {
        "model": plan.name,
        "step": request.step,
        "topology": request.topology.name,
        "devices": devices,
        "chips": request.topology.chips,
        "mesh": {axis: size for axis, size in request.mesh.items() if size > 1},
        "weights": "fp32" if request.step == "train" else request.weights,
        "context": request.context,
        "batch": request.batch,
        "tokens_per_step": request.batch * request.tokens,
        "steps_per_sequence": request.steps_per_sequence,
        "fits": plan.fits,
        "hbm_limit_bytes": chip.hbm_limit,
        "weight_bytes_per_device": guess.weight_bytes,
        "optimizer_bytes_per_device": guess.optimizer_bytes,
        "cache_bytes_per_device": guess.cache_bytes,
        "model_flops": guess.model_flops,
        "estimate": {
            "bytes_per_device": guess.total_bytes,
            "bound_seconds": dataclasses.asdict(guess.seconds),
            "ici_bytes_per_device": guess.ici_bytes,
        },
        "notes": list(plan.notes),
        "failure": None,
        "smallest_fitting": None,
    }
    if isinstance(made, Failure):
        missing = {"peak_bytes_per_device", "temp_bytes_per_device", "compiled_flops", "collective_bytes"}
        missing |= {"bound_seconds", "tokens_per_second_bound", "compile_seconds", "host_peak_bytes"}
        missing |= {"implementations", "versions"}
        facts |= dict.fromkeys(sorted(missing)) | {"failure": dataclasses.asdict(made)}
        facts["hbm_bytes_per_step"] = {"needed": devices * guess.hbm_bytes, "compiled": None}
        return facts
    costs = made.costs
    by_kind: Counter[str] = Counter()
    by_axis: dict[str, dict[str, float]] = {}
    for (kind, axes), sent in costs.collectives.items():
        by_kind[kind] += devices * sent
        by_axis.setdefault(kind, {})[axes] = devices * sent
    bound = compiled_bound(plan)
    tokens = request.batch * request.tokens
    seconds = bound["step"]
    return facts | {
        "peak_bytes_per_device": made.peak_bytes,
        "temp_bytes_per_device": made.temp_bytes,
        "argument_bytes_per_device": made.argument_bytes,
        "compiled_flops": devices * costs.flops,
        "compiled_flops_ratio": devices * costs.flops / guess.model_flops,
        "hbm_bytes_per_step": {"needed": devices * guess.hbm_bytes, "compiled": devices * costs.hbm_bytes},
        "collective_bytes": dict(by_kind),
        "collective_bytes_by_axis": by_axis,
        "bound_seconds": {name: bound[name] for name in ("compute", "hbm", "ici")},
        "tokens_per_second_bound": tokens / seconds,
        "tokens_per_second_per_chip_bound": tokens / seconds / request.topology.chips,
        "mfu_bound": guess.model_flops / (seconds * devices * chip.flops),
        "data_dependent_loops": costs.loops,
        "uncosted_kernels": dict(costs.uncosted),
        "hlo_lines": made.hlo_lines,
        "compile_seconds": made.compile_seconds,
        "trace_seconds": made.trace_seconds,
        "host_peak_bytes": made.host_peak_bytes,
        "implementations": made.implementations,
        "versions": made.versions,
    }


def compiled_bound(plan: Plan) -> dict[str, float]:
    """Seconds that the compiled program takes at the least, by what limits it, and the largest as `step`."""
    assert isinstance(plan.compiled, Compiled)
    costs = plan.compiled.costs
    sent = sum(costs.collectives.values())
    seconds = step_seconds(plan.request.topology.chip, costs.unit_flops, costs.hbm_bytes, sent)
    return dataclasses.asdict(seconds) | {"step": max(seconds.bound, 1e-12)}


def rows(facts: dict[str, Any]) -> list[tuple[str, str]]:
    """What a reader wants to know, as (name, value)."""
    larger = facts["smallest_fitting"]
    if larger is None:
        return _rows(facts)
    return [*_rows(facts), ("smallest slice that fits", larger["topology"]), *_rows(larger)[1:]]


def _rows(facts: dict[str, Any]) -> list[tuple[str, str]]:
    limit = facts["hbm_limit_bytes"]
    mesh = format_mesh({axis: facts["mesh"].get(axis, 1) for axis in ("data", "fsdp", "expert", "sequence", "tensor")})
    lines = [
        ("step", f"{facts['model']} {facts['step']}, batch {facts['batch']}, context {facts['context']:,}"),
        ("on", f"{facts['topology']}: {facts['chips']} chips, {facts['devices']} devices, mesh {mesh}"),
        ("weights, per device", f"{_gib(facts['weight_bytes_per_device'])} ({facts['weights']})"),
        ("optimiser, per device", _gib(facts["optimizer_bytes_per_device"])),
        ("cache, per device", _gib(facts["cache_bytes_per_device"])),
    ]
    if facts["failure"] is not None:
        failure = facts["failure"]
        first = " ".join(failure["message"].split())[:300]
        return [*lines, ("fits", f"no program: {failure['kind']}"), ("compiler", first)]
    needed, compiled = (facts["hbm_bytes_per_step"][name] for name in ("needed", "compiled"))
    bound = facts["bound_seconds"]
    collectives = ", ".join(
        f"{kind} over {axes} {_gib(sent)}"
        for kind, parts in facts["collective_bytes_by_axis"].items() for axes, sent in parts.items()
    )  # fmt: skip
    return [
        *lines,
        ("temporaries, per device", _gib(facts["temp_bytes_per_device"])),
        ("peak, per device", f"{_gib(facts['peak_bytes_per_device'])} of {_gib(limit)}"),
        ("fits", "yes" if facts["fits"] else "no"),
        ("model FLOPs", f"{facts['model_flops']:.4g}"),
        ("compiled FLOPs", f"{facts['compiled_flops']:.4g} ({facts['compiled_flops_ratio']:.2f} × the model's)"),
        ("HBM bytes per step", f"{_gib(compiled)} ({compiled / needed:.2f} × what is needed)"),
        ("collectives", collectives or "none"),
        ("bounds, ms", ", ".join(f"{name} {1e3 * seconds:.3g}" for name, seconds in bound.items())),
        ("tokens/s per chip, at most", f"{facts['tokens_per_second_per_chip_bound']:.4g}"),
        ("MFU, at most", f"{100 * facts['mfu_bound']:.2f} %"),
        ("compile", f"{facts['compile_seconds']:.0f} s of CPU, {_gib(facts['host_peak_bytes'])} of host memory"),
        ("implementations", ", ".join(f"{name}={chosen}" for name, chosen in facts["implementations"].items())),
    ]


def table(facts: dict[str, Any]) -> Table:
    """The rows for a terminal."""
    made = Table(box=None, show_header=False, pad_edge=False)
    made.add_column(style="dim", no_wrap=True)
    made.add_column(overflow="fold")
    for name, value in rows(facts):
        made.add_row(name, value)
    return made


def _gib(count: float) -> str:
    return f"{count / GIB:.2f} GiB" if count >= 0.01 * GIB else f"{count / 2**20:.2f} MiB"
