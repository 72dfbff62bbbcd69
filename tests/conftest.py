"""What every test shares: eight virtual CPU devices, a compilation cache, runtime shape checks, and `../shared`."""

import gc
import os
from collections.abc import Iterator
from pathlib import Path

# Before jax is imported anywhere. The variables also reach the subprocesses that tests start.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# XLA ends the process when a collective waits for 40 seconds, as it can where eight devices share two busy cores.
_FLAGS = {
    "--xla_force_host_platform_device_count": 8,
    "--xla_cpu_collective_call_warn_stuck_timeout_seconds": 120,
    "--xla_cpu_collective_call_terminate_timeout_seconds": 600,
}
for _flag, _value in _FLAGS.items():
    if _flag not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_flag}={_value}".strip()
_CACHE = Path(os.environ.get("V4JAX_TEST_CACHE") or Path.home() / ".cache" / "v4jax-tests")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

import hypothesis  # noqa: E402
import jax  # noqa: E402
import jaxtyping  # noqa: E402
import pytest  # noqa: E402

# Every shape and dtype annotation of the packages is checked at each call that a test makes.
jaxtyping.install_import_hook(["v4jax", "kernels_pallas"], "typechecker.checked")

# A first call may compile, so no deadline; the same examples in every run, so no surprises in CI.
hypothesis.settings.register_profile("v4jax", deadline=None, derandomize=True, max_examples=50)
hypothesis.settings.load_profile("v4jax")

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def few_memory_maps() -> Iterator[None]:
    """Drops compiled programs before their memory maps reach Linux' limit of 65,530, where loading one more crashes."""
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > 30_000:
        jax.clear_caches()
        gc.collect()


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of reference data beside the repository; a clone of one's own may lack it."""
    path = ROOT.parent / "shared"
    if not path.is_dir():
        pytest.skip(f"needs the reference data in {path}")
    return path
