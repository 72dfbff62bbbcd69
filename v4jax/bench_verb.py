"""`v4jax bench model` and `v4jax bench kernels`."""

from typing import Annotated

from tyro.conf import subcommand

from v4jax import bench, bench_kernels

Options = (
    Annotated[bench.Options, subcommand("model")] | Annotated[bench_kernels.KernelOptions, subcommand("kernels")]
)  # fmt: skip


def run(options: bench.Options | bench_kernels.KernelOptions) -> None:
    """The verb."""
    if isinstance(options, bench_kernels.KernelOptions):
        bench_kernels.run(options)
    else:
        bench.run(options)
