"""The verb `plan`: what a step would need on a TPU slice, and how fast it could be at best."""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console

from v4jax.config import ModelConfig
from v4jax.errors import UsageError, UserError, check_json_place
from v4jax.info import PRESETS, resolve_implementations
from v4jax.loading import WeightsAtRunTime
from v4jax.plan import report, sweep
from v4jax.plan.compile import Compiled, Failure, compile_request
from v4jax.plan.meshes import candidates
from v4jax.plan.request import Request, Step
from v4jax.plan.topology import parse_topology, standard_topologies
from v4jax.sharding import check_mesh, parse_mesh


@dataclasses.dataclass(frozen=True)
class Options:
    """Compile a step for a TPU slice on this CPU: memory, FLOPs, traffic, and bounds on its speed. Needs libtpu."""

    model: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="MODEL")]]
    """flash, pro, tiny, bench, a config.json or a model directory."""
    topology: str
    """A slice: v5e, v5p, v6e or tpu7x, and its size, as in v6e:8x8 or tpu7x:4x4x4."""
    step: Step
    """train (full fine-tuning with AdamW), prefill (one chunk of a prompt) or decode (one token per sequence)."""
    context: int | None = None
    """Tokens of a row (train), of the prompt (prefill), or before the new token (decode); without it 8192, or the
    model's context if that is less."""
    batch: int = 1
    """Sequences."""
    mesh: str = "auto"
    """Such as expert=4,tensor=2; auto ranks all by formula, compiles the best few and explains its choice."""
    weights: WeightsAtRunTime = "native"
    """native: FP8 and FP4 bytes in device memory (inference); bf16: dequantised while loading."""
    chunk: int = 8192
    """Tokens of each sequence that one prefill step takes."""
    compiled: int = 2
    """Meshes to compile with --mesh auto."""
    sweep: bool = False
    """A table and a plot over contexts and batches, by formula; nothing is compiled."""
    plot: Path | None = None
    """With --sweep: the picture to write, such as a .png, .pdf or .svg."""
    seconds: int = 1800
    """CPU time that one compilation may take."""
    implementation: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """op=pallas|xla|reference, to force an implementation."""
    json: Path | None = None
    """Also write the facts to this file."""


def run(options: Options) -> None:
    """The verb."""
    request = read_request(options)
    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False)
    if options.sweep:
        facts: Any = sweep.sweep(request, options.model)
        console.print(sweep.table(facts))
        if options.plot is not None:
            sweep.plot(facts, options.plot)
    else:
        plan = choose(options, request, console) if options.mesh == "auto" else _compile(options, request)
        facts = report.to_json(plan)
        if options.mesh == "auto" and plan.is_too_large:
            larger = smallest_fitting(options, request, console)
            facts["smallest_fitting"] = None if larger is None else report.to_json(larger)
        console.print(report.table(facts))
        for note in plan.notes:
            console.print(f"note: {note}", markup=False, soft_wrap=True)
    if options.json is not None:
        options.json.write_text(json.dumps(facts, indent=1) + "\n")


def read_request(options: Options) -> Request:
    """The request that the flags mean; with --mesh auto, on one axis for the time being.

    Raises:
      UserError: flags that cannot be.
    """
    for name in ("context", "batch", "chunk", "compiled", "seconds"):
        if (value := getattr(options, name)) is not None and value < 1:
            raise UserError(f"--{name}: got {value}, need at least 1")
    check_json_place(options.json)
    if options.plot is not None:
        if not options.sweep:
            raise UsageError("--plot: only a sweep is plotted; add --sweep")
        sweep.check_plot(options.plot)
    resolve_implementations(options.implementation)
    topology, config = parse_topology(options.topology), read_config(options.model)
    longest = config.max_position_embeddings
    context = min(8192, longest) if options.context is None else options.context
    if context > longest:
        raise UserError(f"--context: got {context}, the model's context is {longest} tokens; give a smaller --context")
    mesh = parse_mesh("data=1" if options.mesh == "auto" else options.mesh)
    request = Request(
        config=config, topology=topology, step=options.step, context=context, batch=options.batch,
        mesh=mesh, weights=options.weights, chunk=options.chunk, implementation=options.implementation,
    )  # fmt: skip
    if options.mesh != "auto":
        count = 1
        for size in mesh.values():
            count *= size
        if count != topology.devices:
            raise UserError(
                f"--mesh {options.mesh} has {count} devices, {topology.name} has {topology.devices}; "
                "choose sizes with that product, or auto"
            )
        check_mesh(config, mesh)
    return request


def read_config(model: str) -> ModelConfig:
    """A preset, or the config of a path.

    Raises:
      UserError: there is no such thing.
    """
    if Path(model).exists():
        return ModelConfig.from_hf(Path(model))
    if model not in PRESETS:
        raise UserError(
            f"{model}: no such file or directory; give a config.json, its directory or {', '.join(PRESETS)}"
        )
    return PRESETS[model]()


def choose(options: Options, request: Request, console: Console) -> report.Plan:
    """The best of the meshes that rank first: compiled, and of those that fit the one with the smallest bound."""
    ranked = candidates(request)
    fitting = sum(one.fits for one in ranked)
    console.print(f"{len(ranked)} meshes divide the model and its rows; {fitting} fit by formula. The first ones:")
    for one in ranked[: max(5, options.compiled)]:
        console.print(f"  {one.explain()}", markup=False)
    plans = []
    for one in ranked[: options.compiled]:
        plan = _compile(options, dataclasses.replace(request, mesh=one.mesh))
        plans.append(plan)
        if isinstance(plan.compiled, Failure):
            outcome = f"does not compile: {plan.compiled.kind}"
        else:
            outcome = f"bound {1e3 * report.compiled_bound(plan)['step']:.3g} ms, fits: {plan.fits}"
        console.print(f"  compiled {one.explain().split(':')[0]}: {outcome}", markup=False)
    best = min(plans, key=lambda plan: (not plan.fits, _seconds(plan)))
    note = f"mesh chosen as the fastest by its compiled bounds among the first {len(plans)} of {len(ranked)} by formula"
    return dataclasses.replace(best, notes=(*best.notes, note))


def smallest_fitting(options: Options, request: Request, console: Console) -> report.Plan | None:
    """The step on the smallest larger slice of this chip on which it compiles and fits; None if none is found."""
    usual = standard_topologies(request.topology.chip)
    for topology in (one for one in usual if one.chips > request.topology.chips):
        own = dataclasses.replace(request, topology=topology)
        try:
            best = candidates(own)[0]
        except UserError:
            continue  # nothing divides the model or the rows among so many
        if not best.fits:
            console.print(f"  {topology.name} is too small by formula, {best.explain()}", markup=False)
            continue
        plan = _compile(options, dataclasses.replace(own, mesh=best.mesh))
        console.print(f"  compiled for {topology.name}, {best.explain()}: fits: {plan.fits}", markup=False)
        if plan.fits:
            return plan
    return None


def _seconds(plan: report.Plan) -> float:
    return report.compiled_bound(plan)["step"] if isinstance(plan.compiled, Compiled) else float("inf")


def _compile(options: Options, request: Request) -> report.Plan:
    made = compile_request(request, cpu_seconds=options.seconds)
    return report.make_plan(options.model, request, made)
