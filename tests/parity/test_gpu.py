"""The model on a GPU in bfloat16: against float32, and its speed beside transformers' on the same GPU.

On a machine with a GPU, jax[cuda12] and torch with CUDA:
XLA_PYTHON_CLIENT_PREALLOCATE=false JAX_PLATFORMS=cuda,cpu pytest -m gpu -s tests/parity/test_gpu.py
"""

import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import pytest
import tolerances

pytest.importorskip("transformers")
torch = pytest.importorskip("torch")

from v4jax.bench_sides import Ours  # noqa: E402
from v4jax.config import AttentionKind, ModelConfig, RouterKind  # noqa: E402
from v4jax.cost import Workload  # noqa: E402
from v4jax.dtypes import DTypePolicy  # noqa: E402
from v4jax.model.transformer import Transformer  # noqa: E402
from v4jax.peer import Transformers  # noqa: E402
from v4jax.train.recipes import TrainOptions  # noqa: E402

pytestmark = [pytest.mark.gpu, pytest.mark.parity]

# One layer of each kind, at a width that gives a GPU something to do.
CONFIG = dataclasses.replace(
    ModelConfig.bench().without_mtp(),
    hidden_size=2048, moe_intermediate_size=1024, num_hidden_layers=4, num_attention_heads=32, head_dim=512,
    q_lora_rank=1024, o_groups=8, o_lora_rank=512, index_n_heads=32, index_head_dim=128, index_topk=256,
    layer_types=(AttentionKind.SLIDING, AttentionKind.CSA, AttentionKind.HCA, AttentionKind.CSA),
    mlp_layer_types=(RouterKind.HASH,) + (RouterKind.TOPK,) * 3,
)  # fmt: skip
WORKLOADS = (Workload("prefill", 1, 2048), Workload("decode", 16, 1024, steps=16))
REPETITIONS = 5


@pytest.fixture(scope="module")
def device() -> jax.Device:
    try:
        found = jax.devices("gpu")[0]
    except RuntimeError:
        pytest.skip("no GPU, or hidden from JAX: JAX_PLATFORMS=cuda,cpu shows one")
    if not torch.cuda.is_available():
        pytest.skip("torch sees no GPU: install its CUDA build")
    return found


def median_seconds(run: Callable[[], Any]) -> float:
    """The median of runs after the first, each until the device is done."""
    found = []
    for _ in range(1 + REPETITIONS):
        start = time.perf_counter()
        run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        found.append(time.perf_counter() - start)
    return float(np.median(found[1:]))


def compare(
    config: ModelConfig, device: jax.Device, torch_device: str, length: int, workloads: tuple[Workload, ...]
) -> Iterator[str]:
    """Errors of one bfloat16 forward pass of both sides against our float32 on the CPU, then both sides' speeds."""
    cpu = jax.devices("cpu")[0]
    with jax.default_device(cpu):
        exact = Transformer.random(config, stacked=False)
        peer = Transformers(config, exact, TrainOptions(), threads=torch.get_num_threads())
        tokens = np.random.default_rng(0).integers(0, config.vocab_size, (1, length)).astype(np.int32)
        want = np.asarray(jax.jit(lambda model, x: model(x))(exact, tokens))
    peer.module.to(torch_device)
    theirs = torch.from_numpy(tokens).long().to(torch_device)

    def run_theirs() -> np.ndarray:
        with torch.inference_mode():
            return peer.module(theirs, use_cache=False).logits.float().cpu().numpy()

    # Where entries or experts are equally good, rounding chooses, and that position differs from there on. Few do.
    difference = np.median(np.abs(run_theirs() - want).max(axis=-1))
    assert difference <= 1e-3 * want.std(), "the two sides do not compute the same model"
    peer.module.to(torch.bfloat16)
    with jax.default_device(device):
        policy = DTypePolicy.named("bfloat16")
        half = jax.device_put(Transformer.from_tensors(config, policy, *exact.to_tensors(), stacked=False), device)
        forward = jax.jit(lambda model, x: model(x))
        run_ours = lambda: np.asarray(forward(half, tokens), np.float32)  # noqa: E731
        errors = [float(np.sqrt(np.mean((run() - want) ** 2)) / want.std()) for run in (run_ours, run_theirs)]
        times = [median_seconds(run) for run in (run_ours, run_theirs)]
        yield (
            f"{length} tokens: bfloat16 error {errors[0]:.2e} (transformers {errors[1]:.2e}) of a standard deviation, "
            f"{1e3 * times[0]:.1f} ms (transformers {1e3 * times[1]:.1f} ms)"
        )
        assert errors[0] <= tolerances.BFLOAT16_ERROR_RATIO * errors[1]
        ours = Ours(config, half, calls=1 + REPETITIONS)
        for work in workloads:
            speeds = [work.tokens / median_seconds(getattr(side, work.kind)(work)) for side in (ours, peer)]
            yield f"{work.name}: {speeds[0]:.0f} tokens/s (transformers {speeds[1]:.0f})"


def test_bfloat16_errs_no_more_than_transformers_and_both_are_timed(device: jax.Device, record_property: Any) -> None:
    for number, figure in enumerate(compare(CONFIG, device, "cuda", 2048, WORKLOADS)):
        record_property(f"figure {number}", figure)
        print(f"\n{device.device_kind}: {figure}", flush=True)
