"""Held-out loss, perplexity, bits per byte and accuracy, beside what counting models of the training text reach."""

import dataclasses
import json
import math
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from v4jax import distributed
from v4jax.config import ModelConfig
from v4jax.errors import UserError, check_json_place
from v4jax.loading import DType, QuantSim, load
from v4jax.model.transformer import Transformer
from v4jax.sharding import choose_mesh
from v4jax.train.baselines import Bigram, Unigram
from v4jax.train.data import Batch, evaluation_batches
from v4jax.train.step import evaluation_step
from v4jax.train.text import Corpus, load_corpora

_DEFAULT_ROW = 2048


@dataclasses.dataclass(frozen=True)
class Options:
    """Loss, perplexity, bits per byte and token accuracy on held-out text."""

    path: tyro.conf.Positional[str]
    """Model directory."""
    data: str
    """Text: a file, a directory, a glob pattern, or `stdlib` (the source files of Python's standard library)."""
    held_out_fraction: float = 0.05
    """Share of the documents that is read, chosen as by `finetune`; 1 for all. The rest is for the counting models."""
    sequence_length: int | None = None
    """Tokens per row; 2048 if not given, or the model's context where that is shorter."""
    batch_size: int = 8
    """Rows at a time."""
    max_tokens: int | None = None
    """Stop after so many tokens: always the same ones."""
    dtype: DType = "auto"
    """auto: float32 on CPU, bfloat16 elsewhere."""
    quant_sim: QuantSim = "auto"
    """Simulated quantisation: auto is on for FP4 checkpoints in bfloat16; a bare --quant-sim means on."""
    mesh: str | None = None
    """Devices to divide the model over, such as data=2,expert=4; chosen from their number if not given."""
    no_baselines: bool = False
    """Leave out the unigram and bigram models of the rest of the data."""
    json: Path | None = None
    """Also write the figures to this file."""


@dataclasses.dataclass(frozen=True, slots=True)
class Evaluation:
    """Means over predicted tokens, in nats."""

    loss: float
    accuracy: float
    mtp_loss: float | None
    """Of the MTP block, two tokens ahead; None without one."""
    tokens: int
    """Predicted tokens: the first of a document (or of a piece of one) is not."""

    @property
    def perplexity(self) -> float:
        """Of the loss: its exponential."""
        return perplexity(self.loss)


def run(options: Options) -> None:
    """The verb: a table on stdout."""
    _check(options)
    console = Console(stderr=True, highlight=False)
    config = ModelConfig.from_hf(options.path)
    length = _row_length(options.sequence_length, config.max_position_embeddings)
    mesh = choose_mesh(options.mesh, config, "prefill")
    model = load(options.path, dtype=options.dtype, quant_sim=options.quant_sim, mesh=mesh, recipe="prefill")
    with tempfile.TemporaryDirectory(prefix="v4jax-") as folder:
        corpora = load_corpora(options.path, model.config, options.data, Path(folder), options.held_out_fraction)
        corpus = corpora["held_out"]

        def batches() -> Iterable[Batch]:
            return evaluation_batches(
                corpus,
                sequence_length=length,
                batch_size=options.batch_size,
                max_tokens=options.max_tokens,
            )

        with console.status("evaluating"):
            result = evaluate(model, batches())
            levels = {}
            if corpora["train"].num_documents and not options.no_baselines:
                levels = evaluate_baselines(corpora["train"], batches(), model.config.vocab_size)
        report = _report(result, levels, corpus)
    if not distributed.is_first():
        return
    _print_report(report)
    if options.json is not None:
        options.json.write_text(json.dumps(report, indent=1) + "\n")


def _check(options: Options) -> None:
    for name in ("batch_size", "max_tokens"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UserError(f"{name}: got {value}, need at least 1")
    if not 0 < options.held_out_fraction <= 1:
        raise UserError(f"held_out_fraction: got {options.held_out_fraction}, need a share above 0, at most 1")
    check_json_place(options.json)


def _row_length(given: int | None, context: int) -> int:
    """Tokens per row. Raises `UserError` for a row in which nothing is predicted, or longer than the context."""
    length = min(_DEFAULT_ROW, context) if given is None else given
    if length < 2:
        raise UserError(f"sequence_length: got {length}, need at least 2")
    if length > context:
        raise UserError(f"sequence_length: got {length}, the model's context is {context} tokens; use shorter rows")
    return length


def _report(result: Evaluation, levels: Mapping[str, float], corpus: Corpus) -> dict[str, Any]:
    """The object of `--json`."""
    own = {"model": result.loss} | dict(levels)
    rows = {name: _figures(loss, corpus) for name, loss in own.items()}
    rows["model"] |= {"accuracy": result.accuracy, "mtp_loss": result.mtp_loss}
    return {"tokens": result.tokens, "documents": corpus.num_documents} | rows


def _figures(loss: float, corpus: Corpus) -> dict[str, float | None]:
    return {"loss": loss, "perplexity": perplexity(loss), "bits_per_byte": bits_per_byte(loss, corpus)}


def _print_report(report: Mapping[str, Any]) -> None:
    table = Table(title=f"{report['tokens']:,} predicted tokens")
    for heading in ("", "loss (nats)", "perplexity", "bits per byte", "accuracy"):
        table.add_column(heading, justify="left" if not heading else "right")
    for name in (name for name in ("model", "bigram", "unigram") if name in report):
        row = report[name]
        accuracy = f"{row['accuracy']:.2%}" if "accuracy" in row else ""
        table.add_row(name, f"{row['loss']:.4f}", f"{row['perplexity']:.2f}", f"{row['bits_per_byte']:.4f}", accuracy)
    if (mtp_loss := report["model"]["mtp_loss"]) is not None:
        table.add_row("MTP, two ahead", f"{mtp_loss:.4f}", f"{perplexity(mtp_loss):.2f}", "", "")
    Console(highlight=False).print(table)


def evaluate(model: Transformer, batches: Iterable[Batch]) -> Evaluation:
    """Runs the model over the batches. Raises `UserError` if no token has a successor."""
    total = np.zeros(5)
    for batch in batches:
        sums = evaluation_step(model, batch)
        total += np.asarray(jax.device_get(sums[:5]), np.float64)
    loss, correct, mtp_loss, tokens, mtp_tokens = total.tolist()
    _require_tokens(tokens)
    return Evaluation(
        loss=loss / tokens,
        accuracy=correct / tokens,
        mtp_loss=mtp_loss / mtp_tokens if mtp_tokens else None,
        tokens=round(tokens),
    )


def evaluate_baselines(train: Corpus, batches: Iterable[Batch], vocab_size: int) -> dict[str, float]:
    """Mean losses of the unigram and bigram models of `train` over exactly the tokens that `evaluate` counts."""
    models = {"unigram": Unigram.fit(train, vocab_size), "bigram": Bigram.fit(train, vocab_size)}
    sums, tokens = dict.fromkeys(models, 0.0), 0
    for batch in batches:
        ids, segments = batch["tokens"], batch["segment_ids"]
        mask = (segments[:, :-1] == segments[:, 1:]) & (segments[:, 1:] != 0)
        previous, following = ids[:, :-1][mask], ids[:, 1:][mask]
        tokens += len(following)
        for name, model in models.items():
            sums[name] += float(model.losses(previous, following).sum())
    _require_tokens(tokens)
    return {name: value / tokens for name, value in sums.items()}


def perplexity(loss: float) -> float:
    """The exponential of a loss; infinite where that is beyond a float."""
    return math.exp(loss) if loss < 700 else math.inf


def bits_per_byte(loss: float, corpus: Corpus) -> float:
    """Nats per token as bits per byte of the text, by the corpus's mean length of a token."""
    return loss / math.log(2) * corpus.text_tokens / corpus.text_bytes


def _require_tokens(tokens: float) -> None:
    if not tokens:
        raise UserError("--data: no token has a successor in its document; give longer documents or rows")
