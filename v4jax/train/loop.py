"""The verb `finetune`: from a model directory and text to a new model directory; a kill at any moment only delays it.

A run's directory:

    finetune.json   what the run is: settings, the data, and a fingerprint of the model directory
    data/           the tokens, train and held-out
    state/<step>/   training states (orbax)
    metrics.jsonl   one row per step and per evaluation
    loss.png        the curves
    model/          the result, a v4jax model directory; made last
"""

import collections
import contextlib
import dataclasses
import math
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import jax
import tyro
from jax.sharding import NamedSharding
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from v4jax import distributed
from v4jax.checkpoint.progress import describe_source
from v4jax.checkpoint.reader import open_checkpoint
from v4jax.checkpoint.store import DATA, RunDirectory, StateStore, abstract_like, fingerprint
from v4jax.checkpoint.writer import save_model
from v4jax.config import ModelConfig
from v4jax.dtypes import DTypePolicy
from v4jax.errors import UserError
from v4jax.host_memory import keep_freed_memory
from v4jax.loading import build
from v4jax.model.transformer import Transformer
from v4jax.sharding import Placement, choose_mesh, format_mesh
from v4jax.train.data import Batch, evaluation_batches, training_batches
from v4jax.train.evaluate import Evaluation, evaluate, evaluate_baselines
from v4jax.train.recipes import FREE_TO_CHANGE, ComputeDType, TrainOptions, resolve
from v4jax.train.report import MetricsLog, plot_losses
from v4jax.train.step import Arrays, Layout, StepMetrics, TrainState, make_train_step, take_apart
from v4jax.train.text import Corpus, Split, load_corpora

if TYPE_CHECKING:
    import grain

_BASELINE_TOKENS = 50_000_000
"""Beyond this much training text its counting models are not worth their time."""


@dataclasses.dataclass(frozen=True)
class Options:
    """Fine-tune on text. The same command again goes on where the run stopped.

    The flags after --recipe replace what the recipe says. The result is OUT/model.
    """

    path: tyro.conf.Positional[str]
    """Model directory."""
    data: str
    """Text: a file, a directory, a glob pattern, or `stdlib` (the source files of Python's standard library)."""
    out: Path
    """Directory of the run: new, empty, or that of the same run."""
    recipe: str = "full"
    """Settings to start from: full, from-scratch or quickstart."""
    steps: int | None = None
    """Optimiser steps."""
    batch_size: int | None = None
    """Rows per step."""
    accumulate: int | None = None
    """Parts that a batch is cut into, one after another, to save memory."""
    sequence_length: int | None = None
    """Tokens per row."""
    learning_rate: float | None = None
    """Peak learning rate."""
    final_learning_rate: float | None = None
    """Learning rate at the end, as a share of the peak."""
    warmup_steps: int | None = None
    """Steps of linear rise to the peak, before the cosine."""
    weight_decay: float | None = None
    """Decoupled weight decay of matrices and embeddings."""
    beta1: float | None = None
    """AdamW's decay of the mean gradient."""
    beta2: float | None = None
    """AdamW's decay of the mean squared gradient."""
    epsilon: float | None = None
    """Added to AdamW's denominator."""
    clip: float | None = None
    """Largest global norm of a gradient."""
    mtp_weight: float | None = None
    """Weight of the multi-token-prediction loss."""
    balance_weight: float | None = None
    """Weight of the sequence-wise balance loss of the routers."""
    bias_update_speed: float | None = None
    """Step of the router biases towards equal load."""
    freeze: tuple[str, ...] | None = None
    """Roles (`embedding`) or patterns over parameter names (`*.experts.*`) to leave as they are."""
    train_indexer: bool | None = None
    """Let the optimiser have the indexer too."""
    held_out_fraction: float | None = None
    """Share of documents kept for evaluation."""
    held_out_tokens: int | None = None
    """Tokens of them that an evaluation during training reads."""
    seed: int | None = None
    """Of the order of the data."""
    remat: bool | None = None
    """Recompute each layer in the backward pass instead of keeping its intermediates."""
    dtype: ComputeDType | None = None
    """Compute dtype; parameters and optimiser state are float32."""
    eval_every: int | None = None
    """Steps between evaluations."""
    save_every: int | None = None
    """Steps between saved states."""
    keep: int | None = None
    """Saved states to keep."""
    mesh: str | None = None
    """Devices to divide the run over, such as fsdp=2,expert=4; chosen from their number if not given. A run may go on
    with another one."""


def run(options: Options) -> None:
    """The verb."""
    given = {field.name: getattr(options, field.name) for field in dataclasses.fields(TrainOptions)}
    settings = resolve(options.recipe, **given)
    keep_freed_memory()
    with distributed.lost_processes_end_the_run(
        "start the same command again on all of them: the run goes on from its last saved state"
    ):
        result = finetune(options.path, options.data, options.out, settings, mesh=options.mesh)
    if distributed.is_first():
        print(result)


def finetune(path: str | Path, data: str, out: Path, settings: TrainOptions, *, mesh: str | None = None) -> Path:
    """Runs, or goes on with, a training run.

    Of several processes the first alone writes the files of the run, in a directory that all of them see; the training
    states are written by all.

    Args:
        path: model directory, of any kind that `v4jax.load` reads.
        data: text (`TextSource`).
        out: directory of the run.
        settings: everything else.
        mesh: `--mesh`.

    Returns:
        The finished model directory, `out/model`.

    Raises:
        UserError: bad settings, data or directories; or a loss that is no longer finite.
    """
    console = Console(stderr=True, highlight=False, soft_wrap=True, quiet=not distributed.is_first())
    config = ModelConfig.from_hf(path)
    _check_fits(config, settings)
    devices = choose_mesh(mesh, config, "train")
    placement = None if devices is None else Placement(devices, "train")
    # A scan over stacked layers copies each layer's weights and gradients, which costs a third of the speed on CPU.
    stacked = jax.default_backend() != "cpu"
    identity = dataclasses.asdict(settings) | {"data": data, "model": fingerprint(Path(path)), "stacked": stacked}
    run_directory = distributed.in_first("--out", lambda: RunDirectory(out, identity, free=FREE_TO_CHANGE))
    result = out / "model"
    if result.is_dir():
        console.print(f"this run is complete: {result}")
        return result
    with run_directory.left_as_found_on_error() if run_directory else contextlib.nullcontext():
        corpora = distributed.first_then_all(
            "--data", lambda: load_corpora(path, config, data, out / DATA, settings.held_out_fraction)
        )
        _describe(console, corpora)
        layout, state, frozen = take_apart(_load(path, settings, placement, stacked=stacked), settings)
    if placement is None:
        # Committed to a device, as restored arrays are: a resumed run then runs the very same program.
        state, frozen = jax.device_put((state, frozen), jax.local_devices()[0])
    else:
        console.print(f"mesh: {format_mesh(placement.sizes)}, {jax.process_count()} process(es)")
    with StateStore(out / "state", keep=settings.keep) as store:
        batches = training_batches(
            corpora["train"],
            sequence_length=settings.sequence_length,
            batch_size=settings.batch_size,
            seed=settings.seed,
        )
        if (last := store.latest_step()) is not None:
            like = abstract_like(state)
            del state
            state, progress = store.restore(last, like)
            try:
                batches.set_state(progress)
            except (KeyError, TypeError, ValueError) as error:
                raise store.damaged(last, error) from error
            console.print(f"going on after step {last}")
        with MetricsLog(_first_only(out / "metrics.jsonl"), last_step=-1 if last is None else last) as log:
            run = _Run(
                config, settings, layout, frozen, corpora, batches, store, log, console, _first_only(out / "loss.png")
            )
            state = run.train(state)
    _export(layout.assemble(state.parameters, state.router_biases, frozen), Path(path), result)
    console.print(f"model written to {result}")
    return result


def _check_fits(config: ModelConfig, settings: TrainOptions) -> None:
    if settings.sequence_length > config.max_position_embeddings:
        raise UserError(
            f"sequence_length: got {settings.sequence_length}, the model's max_position_embeddings is "
            f"{config.max_position_embeddings}; use shorter rows"
        )


def _describe(console: Console, corpora: dict[Split, Corpus]) -> None:
    for split, corpus in corpora.items():
        console.print(
            f"{split.replace('_', '-'):>8}: {corpus.num_documents:,} documents, {len(corpus.tokens):,} tokens, "
            f"{corpus.text_bytes / max(corpus.text_tokens, 1):.2f} bytes per token"
        )


@dataclasses.dataclass
class _Run:
    """What the loop holds on to."""

    config: ModelConfig
    settings: TrainOptions
    layout: Layout
    frozen: Arrays
    corpora: dict[Split, Corpus]
    batches: "grain.DatasetIterator[Batch]"
    store: StateStore
    log: MetricsLog
    console: Console
    picture: Path | None

    def train(self, state: TrainState) -> TrainState:
        """Steps until done. Metrics of a step are fetched while the next one runs."""
        is_divided = isinstance(state.step.sharding, NamedSharding)
        like = state if is_divided else None
        train_step = make_train_step(self.layout, self.config, self.settings, like)
        levels = self._baselines()
        begin, end = int(state.step), self.settings.steps
        if begin == 0:
            self._evaluate(state, 0)
        pending: tuple[int, StepMetrics] | None = None
        with self._progress() as progress:
            bar = progress.add_task("training", total=end, completed=begin, loss=math.nan, speed=0.0)
            speedometer = _Speedometer()

            def report() -> None:
                nonlocal pending
                if pending is not None:
                    row = self._row(*pending)
                    row |= speedometer.after(row["tokens"])
                    self.log.write(row)
                    speed = row.get("tokens_per_second", 0.0)
                    progress.update(bar, completed=row["step"], loss=row["loss"], speed=speed)
                    pending = None

            for step in range(begin + 1, end + 1):
                state, metrics = train_step(state, self.frozen, next(self.batches))
                report()
                pending = (step, metrics)
                is_last = step == end
                if is_last or step % self.settings.eval_every == 0:
                    report()
                    self._evaluate(state, step)
                    self._plot(levels)
                    speedometer.pause()
                if is_last or step % self.settings.save_every == 0:
                    report()
                    # After the rows of this step are written: a resumed run must not lack them.
                    self.store.save(step, state, self.batches.get_state())
        self.store.wait()
        self._plot(levels)
        return state

    def _progress(self) -> Progress:
        return Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]:.3f} · {task.fields[speed]:,.0f} tokens/s ·"),
            TimeRemainingColumn(),
            console=self.console,
        )

    def _row(self, step: int, metrics: StepMetrics) -> dict[str, float | int]:
        """Waits for a step's metrics; stops the run where they are not finite."""
        values = {name: float(value) for name, value in jax.device_get(metrics)._asdict().items()}
        if not math.isfinite(values["loss"]) or not math.isfinite(values["gradient_norm"]):
            last = self.store.latest_step()
            raise UserError(
                f"step {step}: loss {values['loss']}, gradient norm {values['gradient_norm']}: need finite numbers; "
                f"use a lower learning rate in a new --out (the last state saved here is that of step {last or 0})"
            )
        return {"step": step} | values | {"tokens": round(values["tokens"])}

    def _held_out(self) -> Iterator[Batch]:
        return evaluation_batches(
            self.corpora["held_out"],
            sequence_length=self.settings.sequence_length,
            batch_size=self.settings.batch_size // self.settings.accumulate,
            max_tokens=self.settings.held_out_tokens,
        )

    def _evaluate(self, state: TrainState, step: int) -> Evaluation:
        model = self.layout.assemble(state.parameters, state.router_biases, self.frozen)
        result = evaluate(model, self._held_out())
        row: dict[str, float | int] = {
            "step": step,
            "held_out_loss": result.loss,
            "held_out_perplexity": result.perplexity,
            "held_out_accuracy": result.accuracy,
            "held_out_tokens": result.tokens,
        }
        if result.mtp_loss is not None:
            row["held_out_mtp_loss"] = result.mtp_loss
        self.log.write(row)
        self.console.print(
            f"step {step}: held-out loss {result.loss:.4f}, perplexity {result.perplexity:.2f}, "
            f"token accuracy {result.accuracy:.1%}"
        )
        return result

    def _baselines(self) -> dict[str, float]:
        train = self.corpora["train"]
        if len(train.tokens) > _BASELINE_TOKENS:
            return {}
        levels = evaluate_baselines(train, self._held_out(), self.config.vocab_size)
        figures = ", ".join(f"{name} {level:.4f}" for name, level in levels.items())
        self.console.print(f"held-out loss of counting models of the training text: {figures}")
        return levels

    def _plot(self, levels: dict[str, float]) -> None:
        if self.picture is None:
            return
        try:
            plot_losses(self.log.rows, self.picture, levels)
        except ImportError:
            self.console.print("no loss.png: it needs matplotlib; install it with: pip install 'v4jax[plot]'")


class _Speedometer:
    """Tokens per second over the last steps: single ones mean little where the device runs ahead of the program."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._marks: collections.deque[tuple[float, float]] = collections.deque(maxlen=20)

    def after(self, tokens: float) -> dict[str, float]:
        """Timing of a step just found done: `seconds` since the start, and the speed once there is one."""
        now = time.perf_counter()
        self._marks.append((now, tokens))
        seconds = {"seconds": round(now - self._start, 3)}
        if len(self._marks) == 1:
            return seconds
        read = sum(tokens for _, tokens in self._marks) - self._marks[0][1]
        return seconds | {"tokens_per_second": round(read / (now - self._marks[0][0]), 1)}

    def pause(self) -> None:
        """What happened since the last step was no training."""
        self._marks.clear()


def _load(path: str | Path, settings: TrainOptions, placement: Placement | None, *, stacked: bool) -> Transformer:
    policy = DTypePolicy.named(settings.dtype, param="float32")
    return build(open_checkpoint(path), policy, stacked=stacked, placement=placement)


def _first_only(path: Path) -> Path | None:
    """A file that the first process writes."""
    return path if distributed.is_first() else None


def _export(model: Transformer, source: Path, result: Path) -> None:
    """Writes the model directory, which appears when whole."""
    partial = result.with_name(result.name + ".partial")
    if partial.exists() and distributed.is_first():
        shutil.rmtree(partial)
    top, layers, mtp = model.to_tensors()
    if not distributed.is_first():
        collections.deque(layers, maxlen=0)  # the first process needs our parts of each
    else:
        origin = describe_source(open_checkpoint(source))  # so that `convert` can say which --base to give
        save_model(partial, model.config, top, layers, mtp, weights="fp32", assets_from=source, source=origin)
        os.replace(partial, result)
    distributed.meet("model written")
