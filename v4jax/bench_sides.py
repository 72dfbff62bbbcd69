"""The two sides of `v4jax bench model`, each in a process of its own, as their users run them.

In one process they would share an allocator and thread pools, and each would be measured under settings that the other
chose: `finetune` keeps freed memory, for one, which no user of the peer does.
"""

import dataclasses
import multiprocessing
import statistics
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any, Literal, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from v4jax.bench_products import products_alone
from v4jax.compilation import jit
from v4jax.config import ModelConfig
from v4jax.cost import Run, Workload, timed
from v4jax.dtypes import DTypePolicy
from v4jax.errors import UserError
from v4jax.host_memory import keep_freed_memory
from v4jax.model.transformer import Transformer
from v4jax.peer import Transformers
from v4jax.serve.decoder import Decoder
from v4jax.serve.generate import generate
from v4jax.serve.sampling import Sampling
from v4jax.train.recipes import TrainOptions
from v4jax.train.step import make_train_step, take_apart

_GREEDY = Sampling(temperature=0.0)
_TRAINING = TrainOptions(learning_rate=1e-4, final_learning_rate=1.0, warmup_steps=0, weight_decay=0.0)
_STOP_SECONDS = 60


@runtime_checkable
class Side(Protocol):
    """An implementation under measurement: makes a workload ready and returns the part that is timed."""

    def prefill(self, work: Workload) -> Run:
        """Fills a new cache with a prompt and picks the next token."""
        ...

    def decode(self, work: Workload) -> Run:
        """Adds greedy tokens to a cache that holds the context."""
        ...

    def train(self, work: Workload) -> Run:
        """Forward, backward and AdamW on one batch."""
        ...


@dataclasses.dataclass(frozen=True)
class Setup:
    """What a side is made from; both draw the same weights from it."""

    side: Literal["ours", "transformers"]
    config: ModelConfig
    threads: int


class SideProcess:
    """A side in a process of its own. Use as a context manager."""

    def __init__(self, setup: Setup) -> None:
        """Starts the process; raises what making the side raised."""
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, setup), daemon=True)
        self._name = setup.side
        self._process.start()
        theirs.close()
        self.logit_difference: float | None = self._answer()
        """The peer's largest difference of any logit from ours on one prompt."""

    def prepare(self, work: Workload) -> None:
        """Makes a workload ready."""
        self._ask("prepare", work)

    def run(self) -> float:
        """Runs the workload that is ready once, and returns the seconds that it took."""
        return self._ask("run", None)

    def distinct_experts(self, work: Workload) -> float:
        """See `Ours.distinct_experts`."""
        return self._ask("distinct_experts", work)

    def products_alone(self, work: Workload) -> float:
        """See `Ours.products_alone`."""
        return self._ask("products_alone", work)

    def __enter__(self) -> "SideProcess":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pipe.close()
        self._process.join(_STOP_SECONDS)
        if self._process.is_alive():
            self._process.kill()

    def _ask(self, what: str, argument: Any) -> Any:
        self._pipe.send((what, argument))
        return self._answer()

    def _answer(self) -> Any:
        try:
            is_error, answer = self._pipe.recv()
        except EOFError:
            self._process.join()
            raise UserError(
                f"bench: the process of {self._name} ended with exit code {self._process.exitcode}; −9 is most often "
                f"a lack of memory: close other programs"
            ) from None
        if is_error:
            raise answer
        return answer


def _serve(pipe: Connection, setup: Setup) -> None:
    """The life of a side's process: made, then asked until the pipe closes. Whatever fails is raised at the asker's."""
    try:
        side, difference = _make(setup)
        pipe.send((False, difference))
        run: Run | None = None
        while True:
            what, argument = pipe.recv()
            answer = None
            if what == "prepare":
                run = getattr(side, argument.kind)(argument)
            elif what == "run":
                assert run is not None
                answer = run()
            else:
                answer = getattr(side, what)(argument)
            pipe.send((False, answer))
    except EOFError:
        pass
    except Exception as error:
        pipe.send((True, error if isinstance(error, UserError) else RuntimeError(f"{setup.side}: {error!r}")))


def _make(setup: Setup) -> tuple[Side, float | None]:
    if setup.side == "ours":
        keep_freed_memory()  # as `generate` and `finetune` do
    stacked = jax.default_backend() == "tpu"
    model = Transformer.random(setup.config, DTypePolicy.named("float32"), stacked=stacked)
    if setup.side == "ours":
        return Ours(setup.config, model), None
    peer = Transformers(setup.config, model, _TRAINING, setup.threads)
    return peer, peer.logit_difference(model)


class Ours:
    """The functions behind `v4jax generate` and `v4jax finetune`."""

    def __init__(self, config: ModelConfig, model: Transformer) -> None:
        self.config = config
        self._model: Transformer | None = model
        self._decoder = Decoder(model)
        self._lower_training: Callable[[], jax.stages.Lowered] | None = None

    def prefill(self, work: Workload) -> Run:
        """Starts generation: fills a new cache with a prompt and picks the next token."""
        prompts = work.draw(self.config.vocab_size).tolist()

        def prefill() -> None:
            next(generate(self._decoder, prompts, max_new_tokens=1, sampling=_GREEDY, stop=()))

        return timed(prefill)

    def decode(self, work: Workload) -> Run:
        """Goes on with a generation whose prompt is the context, read anew each time."""
        prompts = work.draw(self.config.vocab_size).tolist()

        def decode() -> float:
            stream = generate(self._decoder, prompts, max_new_tokens=1 + work.steps, sampling=_GREEDY, stop=())
            next(stream)
            start = time.perf_counter()
            for _ in stream:
                pass
            return time.perf_counter() - start

        return decode

    def train(self, work: Workload) -> Run:
        """Takes training steps on one batch. Training owns its model's arrays, so this comes last."""
        assert self._model is not None
        layout, state, frozen = take_apart(self._model, _TRAINING)
        self._model = None
        step = make_train_step(layout, self.config, _TRAINING)
        tokens = jnp.asarray(work.draw(self.config.vocab_size))
        batch = {"tokens": tokens, "segment_ids": jnp.ones_like(tokens)}

        def train() -> None:
            nonlocal state
            state, metrics = step(state, frozen, batch)
            metrics.loss.block_until_ready()

        self._lower_training = lambda: step.lower(state, frozen, batch)
        return timed(train)

    def products_alone(self, work: Workload) -> float:
        """Seconds that the matrix products of one run of a workload take, each timed alone (`bench_products`).

        Decoding reads each matrix from memory, once; other products get the same operands again and again, the best
        case. Of training, once that workload is ready.
        """
        if work.kind == "train":
            assert self._lower_training is not None
            lowered = self._lower_training()
        elif work.kind == "prefill":
            lowered = self._decoder.lower_prefill(work.batch, work.length, work.length + 1)
        else:
            lowered = self._decoder.lower_decode(work.batch, work.length + 1 + work.steps)
        seconds = products_alone(lowered, is_cold=work.kind == "decode")
        return seconds * (work.steps if work.kind == "decode" else 1)

    def distinct_experts(self, work: Workload) -> float:
        """Routed experts that one decoding step reads, per layer: what the last tokens of a batch of prompts picked."""
        tokens = dataclasses.replace(work, length=min(work.length, 128)).draw(self.config.vocab_size)
        choices = jit(lambda model, tokens: model.hidden(tokens, record=True).choices)(self._decoder.model, tokens)
        return statistics.mean(len(np.unique(layer.experts[:, -1])) for layer in choices)
