"""The verb `verify`: is a converted checkpoint what it should be.

Every tensor is compared with its source, then both run the same tokens, holding one layer at a time, and at last the
output may run beside transformers' implementation.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tyro

from v4jax.checkpoint.assets import differing_assets
from v4jax.checkpoint.compare import compare_tensors, differing_settings, harmed_files
from v4jax.checkpoint.location import locate
from v4jax.checkpoint.reader import Checkpoint, open_checkpoint
from v4jax.checkpoint.tensor_file import CheckpointError, summarise
from v4jax.dtypes import DTypePolicy
from v4jax.errors import UsageError
from v4jax.streaming import Stream
from v4jax.tokenizer import Tokenizer

_TEXT = "The converted model must say what the original says, word for word."
_MOST_TOKENS = 16
_TOLERANCE = 1e-4
"""Of the largest logit difference, in standard deviations: both sides run the same arithmetic on almost or exactly the
same weights, and differ in nothing if the weights are the same."""

Place = Annotated[str, tyro.conf.arg(metavar="PATH|URL")]


@dataclasses.dataclass(frozen=True)
class Options:
    """Check a converted checkpoint: its checksums, every tensor against the source, a forward pass against another."""

    path: tyro.conf.Positional[Place]
    """The converted model directory."""
    source: Place | None = None
    """What it was converted from."""
    against: Literal["transformers"] | None = None
    """Also run transformers' implementation beside ours, layer by layer (needs the parity extra)."""
    tokens: Path | None = None
    """.npy file with int [B, S] token ids for the forward passes; by default a sentence."""


def run(options: Options) -> None:
    """The verb."""
    if options.source is None and options.against is None:
        raise UsageError("nothing to verify against: give --source, --against transformers, or both")
    checkpoint = open_checkpoint(options.path)
    tokens = _tokens(checkpoint, options.tokens)
    if options.source is not None:
        verify_and_print(options.path, source=options.source, tokens=tokens)
    if options.against is not None:
        compare_with_transformers(checkpoint, tokens, print)


def _tokens(checkpoint: Checkpoint, file: Path | None) -> np.ndarray:
    """int32 [B, S]: those of the file; a sentence's; or, without a tokenizer, ids spread over the vocabulary."""
    if file is not None:
        from v4jax.logits import read_tokens

        return read_tokens(file, checkpoint.config.vocab_size, checkpoint.config.max_position_embeddings)
    if isinstance(checkpoint.path, Path) and (checkpoint.path / "tokenizer.json").is_file():
        ids = Tokenizer.from_directory(checkpoint.path).encode(_TEXT)[:_MOST_TOKENS]
        if ids and max(ids) < checkpoint.config.vocab_size:
            return np.asarray([ids], np.int32)
    return np.linspace(0, checkpoint.config.vocab_size - 1, _MOST_TOKENS).astype(np.int32)[None]


def verify_and_print(
    path: str, *, source: str, tokens: np.ndarray | None = None, write: Callable[[str], Any] = print
) -> None:
    """Compares a converted checkpoint with its source and says what was found.

    Args:
        path: the converted directory; that its inventory fits its config is checked by opening it.
        source: what it was converted from.
        tokens: int32 [B, S] for the forward passes.
        write: takes each line.

    Raises:
        CheckpointError: something differs; the message names the tensors.
    """
    harmed = harmed_files(locate(path))
    output, original = open_checkpoint(path), open_checkpoint(source)
    if original.config.num_mtp_layers > output.config.num_mtp_layers:
        write(f"note: {path} has no MTP block, {source} has: it is not compared")
        original = dataclasses.replace(original, config=original.config.without_mtp())
    count, lines, is_rounded = compare_tensors(output, original)
    if lines:
        raise CheckpointError(
            f"{path}: {len(lines)} of {count:,} tensors are not what they should be; one of the two directories was "
            "damaged, repair or convert again:\n" + summarise(lines)
        )
    lines = differing_settings(output.config, original.config)
    if lines:
        raise CheckpointError(
            f"{path}/config.json: says something else than the source's; correct it or convert again:\n"
            + summarise(lines)
        )
    lines = differing_assets(output.directory, original.directory)
    if lines:
        raise CheckpointError(
            f"{path}: {len(lines)} files beside the weights are not the source's; copy them or convert again:\n"
            + summarise(lines)
        )
    if harmed:
        raise CheckpointError(
            f"{path}: {', '.join(harmed)} no longer has its checksum although every tensor has its source's values: "
            "source and output were both changed, or the file's header; convert again"
        )
    write(f"verified: {count:,} tensors have the values of {source}{', rounded' if is_rounded else ''}")
    if tokens is None:
        tokens = _tokens(output, None)
    write(_compare_forward(output, original, tokens, is_exact=not is_rounded))


def _compare_forward(output: Checkpoint, original: Checkpoint, tokens: np.ndarray, *, is_exact: bool) -> str:
    policy = DTypePolicy.named("float32")
    ours, theirs = Stream(output, policy, tokens), Stream(original, policy, tokens)
    last: Any = None
    number = -1
    for number, (mine, other) in enumerate(zip(ours.layers(), theirs.layers(), strict=True)):
        if not np.isfinite(np.asarray(mine.streams)).all():
            raise CheckpointError(f"{output.path}: layer {number} gives NaN or infinity; its weights are damaged")
        last = mine, other
    got, want = ours.logits(last[0].streams), theirs.logits(last[1].streams)
    difference = float(np.abs(got - want).max() / want.std())
    if is_exact and not difference <= _TOLERANCE:
        raise CheckpointError(
            f"{output.path}: its logits differ from the source's by {difference:.2g} standard deviations, need "
            f"{_TOLERANCE:.0e} since all tensors are the same; this is a defect of v4jax: report it"
        )
    return (
        f"verified: {tokens.size} tokens through {number + 1} layers, one at a time: logits differ by at most "
        f"{difference:.2g} standard deviations, the same next token at {_share(got, want, 1):.1%} of the positions"
    )


def _share(got: np.ndarray, want: np.ndarray, k: int) -> float:
    """How many of the k likeliest tokens of a position both have, on average."""
    mine, theirs = (np.argpartition(-x, k - 1, axis=-1)[..., :k] for x in (got, want))
    return float((mine[..., :, None] == theirs[..., None, :]).any(-1).mean())


def compare_with_transformers(
    checkpoint: Checkpoint, tokens: np.ndarray, write: Callable[[str], Any]
) -> dict[str, list[float]]:
    """Runs transformers' implementation beside ours in float32, both holding one layer at a time.

    Returns:
        Per layer the relative RMS error of the streams and the share of experts that both chose; of the logits
        `max` |Δ|, and the shares of the likeliest 1 and 10 tokens in common.

    Raises:
        UserError: torch or transformers is missing.
    """
    from v4jax.peer import StreamedPeer

    stream, peer = Stream(checkpoint, DTypePolicy.named("float32"), tokens), StreamedPeer(checkpoint, tokens)
    found: dict[str, list[float]] = {"error": [], "experts": []}
    write("layer  relative error  same experts")
    streams: Any = None
    for number, (mine, other) in enumerate(zip(stream.layers(), peer.layers, strict=True)):
        streams = mine.streams
        error = np.asarray(streams) - other.streams
        found["error"].append(float(np.linalg.norm(error) / np.linalg.norm(other.streams)))
        found["experts"].append(_shared(mine.experts, other.experts))
        write(f"{number:5}  {found['error'][-1]:14.3g}  {found['experts'][-1]:12.2%}")
    got, want = stream.logits(streams), peer.logits
    found |= {"max": [float(np.abs(got - want).max())], "top": [_share(got, want, 1), _share(got, want, 10)]}
    write(
        f"logits: max |Δ| {found['max'][0]:.3g} (standard deviation {want.std():.3g}), top-1 overlap "
        f"{found['top'][0]:.2%}, top-10 overlap {found['top'][1]:.2%}"
    )
    return found


def _shared(mine: np.ndarray, theirs: np.ndarray) -> float:
    return float((mine[..., :, None] == theirs[..., None, :]).any(-1).mean())
