"""The model on a GPU in bfloat16: against float32, and its speed beside transformers' on the same GPU.

On a machine with a GPU, jax[cuda12] and torch with CUDA:
XLA_PYTHON_CLIENT_PREALLOCATE=false JAX_PLATFORMS=cuda,cpu pytest -m gpu -s tests/parity/test_gpu.py
"""

import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest
import tolerances

pytest.importorskip("transformers")
torch = pytest.importorskip("torch")

from v4jax.config import ModelConfig  # noqa: E402
from v4jax.dtypes import DTypePolicy  # noqa: E402
from v4jax.model.transformer import Transformer  # noqa: E402
from v4jax.peer import Transformers  # noqa: E402
from v4jax.train.recipes import TrainOptions  # noqa: E402

pytestmark = [pytest.mark.gpu, pytest.mark.parity]


@pytest.fixture(scope="module")
def device() -> jax.Device:
    try:
        found = jax.devices("gpu")[0]
    except RuntimeError:
        pytest.skip("no GPU, or hidden from JAX: JAX_PLATFORMS=cuda,cpu shows one")
    if not torch.cuda.is_available():
        pytest.skip("torch sees no GPU: install its CUDA build")
    return found


def median_seconds(run: Callable[[], Any], repetitions: int = 5) -> float:
    run()
    found = []
    for _ in range(repetitions):
        start = time.perf_counter()
        run()
        found.append(time.perf_counter() - start)
    return float(np.median(found))


def compare(config: ModelConfig, device: jax.Device, torch_device: str, length: int) -> str:
    """One forward pass of both sides in bfloat16 and float32; errors against our float32, and both times."""
    exact = Transformer.random(config, DTypePolicy.named("float32"), stacked=False)
    peer = Transformers(config, exact, TrainOptions(), threads=torch.get_num_threads())
    peer.module.to(torch_device)
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (1, length)).astype(np.int32)
    theirs = torch.from_numpy(tokens).long().to(torch_device)

    def run_theirs() -> Any:
        with torch.inference_mode():
            return peer.module(theirs, use_cache=False).logits.float().cpu().numpy()

    with jax.default_device(device), jax.default_matmul_precision("highest"):
        forward = jax.jit(lambda model, x: model(x))
        want = np.asarray(forward(jax.device_put(exact, device), tokens))
    difference = float(np.abs(run_theirs() - want).max())
    top, layers, mtp = exact.to_tensors()
    half = Transformer.from_tensors(config, DTypePolicy.named("bfloat16"), top, layers, mtp, stacked=False)
    half = jax.device_put(half, device)
    peer.module.to(torch.bfloat16)
    with jax.default_device(device):
        run_ours = lambda: np.asarray(forward(half, tokens), np.float32)  # noqa: E731
        errors = [float(np.sqrt(np.mean((run() - want) ** 2)) / want.std()) for run in (run_ours, run_theirs)]
        times = [median_seconds(run) for run in (run_ours, run_theirs)]
    assert difference <= 1e-3 * want.std(), "the two sides do not compute the same model"
    assert errors[0] <= tolerances.BFLOAT16_ERROR_RATIO * errors[1]
    return (
        f"{length} tokens: bfloat16 error {errors[0]:.2e} (transformers {errors[1]:.2e}) of a standard deviation, "
        f"{1e3 * times[0]:.1f} ms (transformers {1e3 * times[1]:.1f} ms)"
    )


def test_bfloat16_errs_no_more_than_transformers_and_both_are_timed(device: jax.Device, record_property: Any) -> None:
    figures = compare(ModelConfig.bench().without_mtp(), device, "cuda", 2048)
    record_property("figure", figures)
    print(f"\n{device.device_kind}: {figures}")
