"""Which implementation of an operation runs: an explicit choice, never a silent fallback.

Each `kernels_pallas/<op>/api.py` declares what it has and asks for one by name:

    _OP = declare("sparse_attention", xla=xla.sparse_attention, reference=reference.sparse_attention)

    def sparse_attention(..., implementation: Implementation | None = None):
        return _OP.choose(implementation)(...)
"""

import dataclasses
import importlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import jax

Implementation = Literal["pallas", "xla", "reference"]
IMPLEMENTATIONS: tuple[Implementation, ...] = get_args(Implementation)


@dataclasses.dataclass(frozen=True)
class Operation:
    """One operation and its implementations, all with the same arguments and results."""

    name: str
    implementations: Mapping[str, Callable[..., Any]]

    def resolve(self, implementation: str | None = None, platform: str | None = None) -> str:
        """The name of the implementation that runs.

        Args:
          implementation: one of `IMPLEMENTATIONS`, or None for the platform's default: the first of pallas (on a TPU
            only), xla, reference that this operation has.
          platform: "tpu", "gpu" or "cpu"; None means that of JAX's default backend. Give it when compiling for another
            machine than this one.

        Raises:
          ValueError: where this operation has no such implementation.
        """
        if implementation is None:
            platform = platform or jax.default_backend()
            order = IMPLEMENTATIONS if platform == "tpu" else IMPLEMENTATIONS[1:]
            return next(name for name in order if name in self.implementations)
        if implementation not in self.implementations:
            raise ValueError(
                f"implementation of {self.name}: got {implementation!r}, need {' or '.join(self.implementations)}"
            )
        return implementation

    def choose(self, implementation: str | None = None, platform: str | None = None) -> Callable[..., Any]:
        """The function of the implementation that `resolve` names."""
        return self.implementations[self.resolve(implementation, platform)]


_OPERATIONS: dict[str, Operation] = {}


def declare(name: str, **implementations: Callable[..., Any]) -> Operation:
    """Registers an operation. Every one has a reference."""
    if not {"reference"} <= set(implementations) <= set(IMPLEMENTATIONS):
        raise ValueError(
            f"implementations of {name}: got {sorted(implementations)}, need reference and any of {IMPLEMENTATIONS}"
        )
    found = {key: implementations[key] for key in IMPLEMENTATIONS if key in implementations}
    _OPERATIONS[name] = Operation(name, found)
    return _OPERATIONS[name]


def operations() -> dict[str, Operation]:
    """Every operation of this package, by name."""
    for api in sorted(Path(__file__).parent.glob("*/api.py")):
        importlib.import_module(f"{__package__}.{api.parent.name}.api")
    return dict(sorted(_OPERATIONS.items()))


def parse_overrides(choices: Iterable[str]) -> dict[str, str]:
    """Reads `op=implementation` choices, as the command line has them, and checks both names.

    Raises:
      ValueError: for another form, an unknown operation, or an implementation that it lacks.
    """
    known, overrides = operations(), {}
    for choice in choices:
        name, separator, implementation = choice.partition("=")
        if not separator or name not in known:
            raise ValueError(f"--implementation: got {choice!r}, need op=implementation, op one of {', '.join(known)}")
        overrides[name] = known[name].resolve(implementation)
    return overrides
