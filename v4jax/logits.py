"""The verb `logits`: logits of given tokens, at once, in chunks through the decode cache, or one layer at a time."""

import dataclasses
import functools
import os
import secrets
from pathlib import Path
from typing import Annotated

import jax
import numpy as np
import tyro

from v4jax import distributed, ops
from v4jax.cache import Cache
from v4jax.checkpoint.reader import Checkpoint, open_checkpoint
from v4jax.compilation import jit
from v4jax.dtypes import DTypePolicy
from v4jax.errors import UsageError, UserError
from v4jax.loading import DType, QuantSim, WeightsAtRunTime, build, choose_policy
from v4jax.model.transformer import Transformer
from v4jax.parallel import on_host
from v4jax.sharding import Placement, choose_mesh
from v4jax.streaming import Stream


@dataclasses.dataclass(frozen=True)
class Options:
    """Writes the logits of given tokens: `logits` float32 [B, S, V], and with --mtp `mtp_logits` [B, S−1, V]."""

    path: tyro.conf.Positional[Path]
    """Hugging Face or v4jax model directory."""
    tokens: Path
    """.npy file with int [B, S] token ids."""
    out: Path
    """.npz file to write."""
    mtp: bool = False
    """Also compute the MTP block's logits: position t predicts token t + 2."""
    dtype: DType = "auto"
    """auto: float32 on CPU, bfloat16 elsewhere."""
    quant_sim: QuantSim = "auto"
    """Simulated quantisation: auto is on for FP4 checkpoints in bfloat16; a bare --quant-sim means on."""
    weights: WeightsAtRunTime = "bf16"
    """native keeps FP8 and FP4 bytes in memory and dequantises inside the step; bf16 dequantises while loading."""
    chunks: str | None = None
    """Comma-separated chunk lengths that sum to S: run through the decode cache in these pieces."""
    stream: bool = False
    """Hold one layer at a time, for models larger than memory."""
    mesh: str | None = None
    """Devices to divide the model over, such as data=2,expert=4; chosen from their number if not given."""
    implementation: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """op=pallas|xla|reference, to force an implementation."""


def run(options: Options) -> None:
    """The verb."""
    if options.stream and options.chunks is not None:
        raise UsageError("--stream holds one layer at a time and has no cache for --chunks: give one of them")
    if options.stream and options.mesh is not None:
        raise UsageError("--stream holds one layer at a time, on one device: leave out --mesh")
    if options.stream and options.weights == "native":
        raise UsageError("--stream reads and dequantises one expert at a time: leave out --weights native")
    check_writable(options.out)
    checkpoint = open_checkpoint(options.path)
    if options.mtp and not checkpoint.config.num_mtp_layers:
        raise UserError(f"--mtp: {options.path} has no MTP block; leave the flag out")
    tokens = read_tokens(options.tokens, checkpoint.config.vocab_size, checkpoint.config.max_position_embeddings)
    chunks = None if options.chunks is None else parse_chunks(options.chunks, tokens.shape[1])
    policy = choose_policy(checkpoint, options.dtype, options.quant_sim, options.weights)
    with ops.implementations(options.implementation):
        if options.stream:
            results = stream_logits(checkpoint, policy, tokens, mtp=options.mtp)
        else:
            mesh = choose_mesh(options.mesh, checkpoint.config, "prefill")
            placement = None if mesh is None else Placement(mesh, "prefill")
            model = build(checkpoint, policy, stacked=False, placement=placement)
            results = all_logits(model, tokens, mtp=options.mtp, chunks=chunks)
    if distributed.is_first():
        write_atomically(options.out, results)


def read_tokens(file: Path, vocab_size: int, context: int) -> np.ndarray:
    """int32 [B, S] from an .npy file; checks rank, kind, range and length."""
    try:
        tokens = np.load(file, allow_pickle=False)
    except FileNotFoundError:
        raise UserError(f"--tokens: no file {file}") from None
    except Exception as error:  # a damaged header makes NumPy raise whatever its parser and the memory do
        reason = str(error) or type(error).__name__
        raise UserError(f"--tokens: {file} is not a readable .npy file ({reason}); write it with numpy.save") from None
    if not isinstance(tokens, np.ndarray) or tokens.ndim != 2 or not np.issubdtype(tokens.dtype, np.integer):
        found = f"{tokens.dtype} {tokens.shape}" if isinstance(tokens, np.ndarray) else "an archive"
        raise UserError(f"--tokens: {file} holds {found}, need integers of shape [batch, sequence]")
    if not tokens.size:
        raise UserError(f"--tokens: {file} has shape {tokens.shape}; need at least one token")
    if tokens.min() < 0 or tokens.max() >= vocab_size:
        wrong = tokens.max() if tokens.max() >= vocab_size else tokens.min()
        raise UserError(f"--tokens: {file} holds token id {wrong}, need 0 to {vocab_size - 1}, the model's vocabulary")
    if tokens.shape[1] > context:
        raise UserError(f"--tokens: {tokens.shape[1]} tokens per row; the model's context is {context}")
    return tokens.astype(np.int32)


def parse_chunks(text: str, length: int) -> list[int]:
    """Positive chunk lengths that sum to `length`."""
    try:
        chunks = [int(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"--chunks: got {text!r}, need comma-separated lengths such as 50,1,1") from None
    if min(chunks) < 1 or sum(chunks) != length:
        raise UserError(f"--chunks: got {text!r} with sum {sum(chunks)}, need positive lengths that sum to {length}")
    return chunks


def all_logits(
    model: Transformer, tokens: np.ndarray, *, mtp: bool = False, chunks: list[int] | None = None
) -> dict[str, np.ndarray]:
    """`logits` [B, S, V] and, with `mtp`, `mtp_logits` [B, S−1, V]; through the decode cache if `chunks` are given."""
    if chunks is None:
        results = {"logits": on_host(model(tokens))}
        return results | ({"mtp_logits": on_host(model.mtp_logits(tokens))} if mtp else {})
    cache = model.init_cache(*tokens.shape)
    pieces: dict[str, list[np.ndarray]] = {"logits": [], "mtp_logits": []}
    start = 0
    for size in chunks:
        logits, mtp_logits, cache = _chunk(model, tokens[:, start : start + size], cache, mtp=mtp)
        pieces["logits"].append(on_host(logits))
        if mtp_logits is not None:
            # The MTP block lags by one token: the first chunk's last row is still padding.
            pieces["mtp_logits"].append(on_host(mtp_logits)[:, : size - (start == 0)])
        start += size
    return {name: np.concatenate(parts, axis=1) for name, parts in pieces.items() if parts}


@functools.partial(jit, static_argnames="mtp")
def _chunk(model: Transformer, tokens: jax.Array, cache: Cache, *, mtp: bool) -> tuple:
    before = cache.length
    output, cache = model.extend(tokens, cache)
    mtp_logits = None
    if mtp:
        hidden, cache = model.extend_mtp(tokens, output.streams, before, cache)
        mtp_logits = model.logits(hidden)
    return model.logits(output.hidden), mtp_logits, cache


def stream_logits(
    checkpoint: Checkpoint, policy: DTypePolicy, tokens: np.ndarray, *, mtp: bool = False
) -> dict[str, np.ndarray]:
    """`all_logits` holding the weights of the top and of one layer at a time, of its experts one."""
    stream = Stream(checkpoint, policy, tokens)
    *_, last = stream.layers()
    results = {"logits": stream.logits(last.streams)}
    if mtp:
        results["mtp_logits"] = stream.mtp_logits(last.streams)
    return results


def check_writable(out: Path) -> None:
    """Refuses, before any work, a place where the result could not be written."""
    if out.suffix != ".npz":
        raise UserError(f"--out: got {out}, need a name that ends in .npz")
    if not out.parent.is_dir():
        raise UserError(f"--out: no directory {out.parent}; make it first")
    if not os.access(out.parent, os.W_OK) or out.is_dir():
        raise UserError(f"--out: cannot write {out}; choose another place")


def write_atomically(out: Path, arrays: dict[str, np.ndarray]) -> None:
    """Writes an .npz beside its place and moves it there, so that no half-written file carries the name."""
    # Not one of tempfile's, which are for their owner alone whatever the umask.
    temporary = out.with_name(f".{out.name}.{secrets.token_hex(4)}")
    try:
        with open(temporary, "xb") as file:
            np.savez(file, allow_pickle=False, **arrays)
        temporary.replace(out)
    except OSError as error:
        raise UserError(f"--out: cannot write {out} ({error.strerror}); free some space or choose another") from None
    finally:
        temporary.unlink(missing_ok=True)
