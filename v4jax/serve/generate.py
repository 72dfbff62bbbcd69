"""Text from a prompt: the core of generation, and the verb `generate`."""

import dataclasses
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

import jax
import numpy as np
import tyro

from v4jax import distributed, ops
from v4jax.config import ModelConfig
from v4jax.errors import UsageError, UserError
from v4jax.host_memory import keep_freed_memory
from v4jax.loading import DType, QuantSim, WeightsAtRunTime, load
from v4jax.model.transformer import Transformer
from v4jax.parallel import on_host
from v4jax.serve.decoder import MAX_STEPS, Decoder, Drawing, first_sample
from v4jax.serve.sampling import Sampling, sequence_keys
from v4jax.sharding import choose_mesh
from v4jax.tokenizer import Tokenizer

_SECONDS_PER_CALL = 0.2
"""What one call of the decoder may take before its tokens are shown."""
_STEPS_OF_PROCESSES = 8
"""Steps per call where several processes run the model together."""


def generate(
    model: Transformer | Decoder,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    sampling: Sampling | None = None,
    stop: Sequence[int] | None = None,
) -> Iterator[list[int | None]]:
    """Continues a batch of prompts, several steps per call of the decoder where they are short.

    Args:
        model: a `Decoder` to share compiled steps between calls, or a model.
        prompts: token ids, of any lengths.
        max_new_tokens: at most this many per sequence.
        sampling: temperature 1 and top-p 1 if None.
        stop: ids that end a sequence; the config's end-of-sequence ids if None.

    Yields:
        Per step one token per sequence, None for those that have ended. The stop token itself is yielded.

    Raises:
        UserError: before the first step, for empty prompts, unknown ids or a context that is too short.
    """
    decoder = model if isinstance(model, Decoder) else Decoder(model)
    config, sampling = decoder.model.config, sampling or Sampling()
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens: got {max_new_tokens}, need at least 1")
    stop = config.eos_token_ids if stop is None else stop
    ends = np.array([token for token in stop if 0 <= token < config.vocab_size], np.int32)
    longest = max((len(prompt) for prompt in prompts), default=0)
    logits, cache = decoder.prefill(prompts, longest + max_new_tokens)
    # The steps take float32.
    temperature = min(float(sampling.temperature), float(np.finfo(np.float32).max))
    drawing = Drawing(sequence_keys(sampling.seed, len(prompts)), temperature, float(sampling.top_p), ends)
    tokens = on_host(first_sample(logits, drawing.keys, cache.length, drawing.temperature, drawing.top_p))[None]
    is_open, left, seconds = np.ones(len(prompts), bool), max_new_tokens, None
    while True:
        for drawn in tokens:
            yield [int(token) if is_open[i] else None for i, token in enumerate(drawn)]
            is_open = is_open & ~np.isin(drawn, ends)
            left -= 1
            if not is_open.any() or not left:
                return
        count, start = min(_steps_per_call(seconds), left), time.perf_counter()
        block, cache = decoder.decode(tokens[-1], is_open, cache, drawing, count)
        tokens = on_host(block)[:count]
        seconds = (time.perf_counter() - start) / count


def _steps_per_call(seconds: float | None) -> int:
    """Steps that one call of the decoder takes, given how long the last ones took: text shall still flow."""
    if jax.process_count() > 1:  # all must do the same, and their clocks differ
        return _STEPS_OF_PROCESSES
    return 1 if seconds is None else min(max(int(_SECONDS_PER_CALL / seconds), 1), MAX_STEPS)


@dataclasses.dataclass(frozen=True)
class Options:
    """Continues a prompt, or answers a message with --chat. Text streams to the standard output."""

    path: tyro.conf.Positional[Path]
    """Hugging Face or v4jax model directory."""
    prompt: str
    """Text to continue; with --chat, the user's message. Text that starts with -- needs the form --prompt=TEXT."""
    chat: bool = False
    """Render the prompt as a conversation."""
    system: str | None = None
    """System text of the conversation (with --chat)."""
    thinking: bool = False
    """Let the model reason before it answers (with --chat)."""
    max_new_tokens: int = 256
    """Tokens at most."""
    temperature: float = 1.0
    """0 takes the likeliest token."""
    top_p: float = 1.0
    """Draw from the likeliest tokens that together have this probability."""
    seed: int = 0
    """Of the draws; the same seed gives the same text."""
    dtype: DType = "auto"
    """auto: float32 on CPU, bfloat16 elsewhere."""
    quant_sim: QuantSim = "auto"
    """Simulated quantisation: auto is on for FP4 checkpoints in bfloat16; a bare --quant-sim means on."""
    weights: WeightsAtRunTime = "bf16"
    """native keeps FP8 and FP4 bytes in memory and dequantises inside the step; bf16 dequantises while loading."""
    mesh: str | None = None
    """Devices to divide the model over, such as data=2,expert=4; chosen from their number if not given."""
    implementation: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """op=pallas|xla|reference, to force an implementation."""


def run(options: Options) -> None:
    """The verb."""
    if not options.chat and (options.system is not None or options.thinking):
        raise UsageError("--system and --thinking belong to a conversation: add --chat")
    sampling = Sampling(options.temperature, options.top_p, options.seed)
    if options.path.is_file():
        raise UserError(f"{options.path}: got a file, need a model directory; give {options.path.parent}")
    tokenizer = Tokenizer.from_directory(options.path)
    prompt = _encode(tokenizer, options)
    keep_freed_memory()
    with ops.implementations(options.implementation):
        mesh = choose_mesh(options.mesh, ModelConfig.from_hf(options.path), "decode")
        model = load(options.path, dtype=options.dtype, quant_sim=options.quant_sim, weights=options.weights, mesh=mesh)
        text, ends = tokenizer.stream(skip_special_tokens=True), tokenizer.eos_token_ids
        for (token,) in generate(model, [prompt], max_new_tokens=options.max_new_tokens, sampling=sampling, stop=ends):
            assert token is not None
            if distributed.is_first():
                sys.stdout.write(text.push(token))
                sys.stdout.flush()
        if distributed.is_first():
            sys.stdout.write(text.finish() + "\n")


def _encode(tokenizer: Tokenizer, options: Options) -> list[int]:
    if not options.prompt:
        raise UserError("--prompt is empty; give some text to continue")
    if not options.chat:
        return tokenizer.encode(options.prompt, add_bos=True)
    messages = [{"role": "user", "content": options.prompt}]
    if options.system is not None:
        messages.insert(0, {"role": "system", "content": options.system})
    return tokenizer.encode_chat(messages, thinking=options.thinking)
