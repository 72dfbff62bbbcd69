"""Memory of the host between steps: kept, not returned to the kernel and faulted in again page by page."""

import ctypes
import platform
import sys

import jax

# Parameters of glibc's mallopt(3).
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4


def keep_freed_memory() -> bool:
    """Lets the next step reuse the buffers that this one freed; whether the C library can do so (glibc alone).

    By default glibc maps each large buffer and unmaps it when freed: on CPU a training step of the 137M-parameter model
    spends a sixth of its time on page faults. Call it before JAX starts its threads. What the process has once used
    stays its own until it ends, so this is for commands that repeat one step, not for a library to do unasked.

    Only the first thread's heap grows without bound; the heaps of others still map what exceeds 64 MiB. So it is the
    first thread that starts programs on a CPU and takes their temporaries, and does not leave that to another one. (One
    heap for all would do as well, but the threads of the pool, which take scratch memory for every product, would wait
    for each other: a tenth of a training step.)
    """
    if not sys.platform.startswith("linux") or platform.libc_ver()[0] != "glibc":
        return False
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    mallopt = ctypes.CDLL(None).mallopt
    settings = ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, -1), (_TOP_PAD, 64 << 20))
    return all([mallopt(ctypes.c_int(key), ctypes.c_int(value)) == 1 for key, value in settings])
