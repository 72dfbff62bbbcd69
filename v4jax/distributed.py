"""Several processes as one program: started by the command line alone, before anything asks for a device.

On a Cloud TPU pod every worker runs the same command and finds the others by itself. Elsewhere three flags say where
the first process listens, how many there are, and which one this is.
"""

import dataclasses
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NoReturn, TypeVar

from v4jax.errors import UsageError, UserError

_FLAGS = ("--coordinator", "--processes", "--process")
_HEARTBEAT_SECONDS = 20
"""A process that is silent for so long counts as lost, and the others end."""
_START_SECONDS = 300

Result = TypeVar("Result")


@dataclasses.dataclass(frozen=True)
class Group:
    """Where a group of processes meets, and this one's place in it."""

    coordinator: str
    processes: int
    process: int


def take_flags(arguments: Sequence[str]) -> tuple[list[str], Group | None]:
    """Splits `--coordinator HOST:PORT --processes N --process I` off a command line.

    Raises:
      UsageError: only some of the three, or values that cannot be.
    """
    rest, found = [], {}
    waiting = iter(arguments)
    for argument in waiting:
        flag, _, value = argument.partition("=")
        if flag in _FLAGS:
            found[flag] = value or next(waiting, "")
        else:
            rest.append(argument)
    if not found:
        return rest, None
    missing = [flag for flag in _FLAGS if not found.get(flag)]
    if missing:
        raise UsageError(f"{missing[0]}: missing; several processes need {', '.join(_FLAGS)} together")
    numbers = [found[flag] for flag in _FLAGS[1:]]
    if not all(number.isdecimal() for number in numbers) or not int(numbers[1]) < int(numbers[0]):
        raise UsageError(f"--processes {numbers[0]} --process {numbers[1]}: need a count, and a number from 0 below it")
    if ":" not in found["--coordinator"]:
        raise UsageError(f"--coordinator: got {found['--coordinator']!r}, need HOST:PORT of process 0")
    return rest, Group(found["--coordinator"], int(numbers[0]), int(numbers[1]))


def start(group: Group | None) -> bool:
    """Joins the group, or the pod that this machine is part of. Returns whether there is one.

    Raises:
      UserError: the other processes did not come.
    """
    workers = os.environ.get("TPU_WORKER_HOSTNAMES", "").split(",")
    if group is None and (len(workers) < 2 or os.environ.get("JAX_PLATFORMS") == "cpu"):
        return False
    import jax

    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    where = {} if group is None else _arguments(group)
    try:
        jax.distributed.initialize(
            **where, initialization_timeout=_START_SECONDS, heartbeat_timeout_seconds=_HEARTBEAT_SECONDS
        )
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"the group of processes did not form ({str(error).splitlines()[0]}); start the same command on all of "
            f"them within {_START_SECONDS} seconds, with one --coordinator and different --process"
        ) from error
    return True


def _arguments(group: Group) -> dict:
    return dict(coordinator_address=group.coordinator, num_processes=group.processes, process_id=group.process)


def leave(code: int) -> NoReturn:
    """Ends this process without waiting for the others, of which some may be gone."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def is_first() -> bool:
    """Whether this process writes the files."""
    import jax

    return jax.process_index() == 0


def meet(name: str) -> None:
    """Waits until all processes are here."""
    import jax

    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)


def in_first(what: str, function: Callable[[], Result]) -> Result | None:
    """Calls a function in the first process while the others wait; where it fails, it fails in all.

    Returns:
      Its result; None in the others.
    """
    import jax

    if jax.process_count() == 1:
        return function()
    import numpy as np
    from jax.experimental import multihost_utils

    error: UserError | OSError | None = None
    result: Result | None = None
    if is_first():
        try:
            result = function()
        except (UserError, OSError) as found:
            error = found
    has_failed = multihost_utils.broadcast_one_to_all(np.int32(error is not None))
    if error is not None:
        raise error
    if has_failed:
        raise UserError(f"{what}: failed in process 0, whose message says why")
    return result


def first_then_all(what: str, function: Callable[[], Result]) -> Result:
    """Calls a function in the first process, then in the others: what the first writes, they find written."""
    result = in_first(what, function)
    return function() if result is None else result


@contextmanager
def lost_processes_end_the_run(remedy: str) -> Iterator[None]:
    """Turns the failure of a collective or of a common write, when there are several processes, into one clear error.

    Where this process waits for nothing of the others, JAX itself ends it, and says that another task died.
    """
    import jax

    try:
        yield
    except (jax.errors.JaxRuntimeError, TimeoutError) as error:
        if jax.process_count() == 1:
            raise
        reason = str(error).splitlines()[0][:200]
        raise UserError(
            f"process {jax.process_index()} of {jax.process_count()}: the others cannot be reached ({reason}); {remedy}"
        ) from error
