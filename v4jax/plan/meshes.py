"""All meshes that fit a model on a slice, ranked by the analytic model."""

import dataclasses
from collections.abc import Iterator

from v4jax.errors import UserError
from v4jax.plan.analytic import Estimate, estimate
from v4jax.plan.request import Request
from v4jax.sharding import AXES, MeshSizes, check_mesh, format_mesh


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A mesh and what the analytic model says of it."""

    mesh: MeshSizes
    estimate: Estimate
    fits: bool

    def explain(self) -> str:
        """Why it stands where it does."""
        seconds, gib = self.estimate.seconds, self.estimate.total_bytes / 2**30
        room = f"{gib:.1f} GiB per device" + ("" if self.fits else ", too much")
        return f"{format_mesh(self.mesh)}: {seconds.limit}-bound {1e3 * seconds.bound:.3g} ms per step, {room}"


def factorisations(count: int, parts: int) -> Iterator[tuple[int, ...]]:
    """All ordered products of `parts` numbers that give `count`."""
    if parts == 1:
        yield (count,)
        return
    for first in (n for n in range(1, count + 1) if count % n == 0):
        for rest in factorisations(count // first, parts - 1):
            yield first, *rest


def candidates(request: Request) -> list[Candidate]:
    """Every mesh that divides the model and the rows, best first: those that fit by their time, then by their bytes.

    Raises:
      UserError: no mesh fits the model's sizes.
    """
    found = []
    for sizes in factorisations(request.topology.devices, len(AXES)):
        mesh: MeshSizes = dict(zip(AXES, sizes, strict=True))  # pyright: ignore
        if not _is_sensible(request, mesh):
            continue
        try:
            check_mesh(request.config, mesh)
            guess = estimate(dataclasses.replace(request, mesh=mesh))
        except UserError:
            continue
        fits = guess.total_bytes <= request.topology.chip.hbm_limit
        found.append(Candidate(mesh, guess, fits))
    if not found:
        raise UserError(
            f"--mesh auto: no division of {request.topology.devices} devices divides the model's sizes; "
            "choose another --topology"
        )
    return sorted(found, key=_order)


def _order(candidate: Candidate) -> tuple[bool, float, float, int]:
    seconds = candidate.estimate.seconds
    # Of two meshes with one bound, the one whose other two times are smaller has more room for imperfect overlap.
    total = seconds.compute + seconds.hbm + seconds.ici
    if not candidate.fits:
        return True, candidate.estimate.total_bytes, total, 0
    return False, seconds.bound + 0.1 * total, total, candidate.estimate.total_bytes


def _is_sensible(request: Request, mesh: MeshSizes) -> bool:
    """Without axes that divide nothing of this step: they would only repeat its work."""
    rows = mesh["data"] * mesh["fsdp"] * (mesh["expert"] if request.step == "train" else 1)
    if request.batch % rows:
        return False
    if request.step != "decode" and request.tokens % (128 * mesh["sequence"]):
        return False
    # FSDP gathers every weight for each step: only training has the work to hide that behind.
    return request.step == "train" or mesh["fsdp"] == 1
