"""Reads what the TPU compiler's back end writes: static cycles, bundle listings, VMEM use."""

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

_ESTIMATE = re.compile(r"hlo_op_estimate \{(.*?)\n\}", re.DOTALL)
_BUNDLE = re.compile(r"\s*(?:0x)?[0-9a-f]+\s+([A-Z ]*):\s*((?:>\s*)*)\{(.*)")
_EXIT_TEST = re.compile(
    r"%(p\d+)_p\d+ = scmp\.\w+\.s32\.totalorder (?:\(%p\w+\), )?%(s\d+)_s\d+, (\d+) /\* loop exit test"
)
_STEP = re.compile(r"%(s\d+)_s\d+ = sadd\.s32 (?:\(%p\w+\), )?(\d+), %s")
_BRANCH = re.compile(r"sbr\.rel \(!?%(p\d+)_p\d+\)(?: target = \$region(\d+))?")


def flags(folder: Path, *, static: bool, bundles: bool) -> str:
    """`LIBTPU_INIT_ARGS` that make the compiler write into `folder` what the functions below read."""
    found = []
    if static:
        found.append(f"--xla_jf_dump_static_llo_profile_to={folder / 'static'}")
    if bundles:
        found += [
            f"--xla_jf_dump_to={folder / 'llo'}",
            "--xla_jf_dump_llo_text=true",
            "--xla_jf_dump_llo_pass_label_regex=.*final_bundles.*",
        ]
    return " ".join(found)


def static_cycles(folder: Path) -> dict[str, int]:
    """Estimated cycles per program of the compiled function: its kernels, and whatever XLA adds around them."""
    programs: dict[str, int] = {}
    for file in sorted((folder / "static").glob("*.textproto")):
        for estimate in _ESTIMATE.findall(file.read_text()):
            name = re.search(r'hlo_op_name: "([^"]*)"', estimate)
            cycles = re.search(r"estimated_cycles: (\d+)", estimate)
            count = re.search(r"num_equivalent_hlos: (\d+)", estimate)
            if name and cycles:
                programs[name[1]] = int(cycles[1]) * int(count[1] if count else 1)
    return programs


@dataclasses.dataclass
class _Loop:
    depth: int
    bundles: float = 0
    """Issued per trip, inner loops included."""
    is_grid: bool = False
    trips: float | None = None
    """Known from its closing branch on."""


def count_bundles(listing: str, shares: Sequence[float] = ()) -> int | None:
    """Issue cycles of a listing: bundles × trip counts, predicated regions counted as taken, no stalls.

    Args:
      shares: of a kernel whose grid step has so many predicated regions, which part of the steps takes each.

    Returns:
      None where a trip count is not a constant of the listing, or a grid step has other regions than said.
    """
    lines = listing.splitlines()
    taken = _taken(lines, shares)
    if taken is None:
        return None
    loops = [_Loop(0)]
    exits: dict[str, int] = {}
    steps: dict[str, int] = {}

    def leave(depth: int) -> None:
        while loops[-1].depth > depth and loops[-1].trips is not None:
            loop = loops.pop()
            # The grid's loop has two steps more than the grid: the pipeline's ramps, in which the body is skipped.
            loops[-1].bundles += loop.bundles * ((loop.trips or 0) - 2 * loop.is_grid)

    for number, line in enumerate(lines):
        bundle = _BUNDLE.match(line)
        if bundle is None:
            continue
        label, depth, text = bundle[1], bundle[2].count(">"), bundle[3]
        # Some bundles lack their marks, for instance empty ones: only past its closing branch can a loop be left.
        if not text.startswith("}"):
            leave(depth - 1 if "LB" in label else depth)
        if "LB" in label and depth:
            loops.append(_Loop(depth, is_grid="iteration index, stage" in text))
        loops[-1].bundles += taken.get(number, 1)
        steps.update((name, int(step)) for name, step in _STEP.findall(text))
        # An unrolled loop counts in steps of more than one.
        exits.update((name, -(-int(bound) // steps.get(index, 1))) for name, index, bound in _EXIT_TEST.findall(text))
        if (branch := _BRANCH.search(text)) and branch[1] in exits:
            loops[-1].trips = exits[branch[1]]
    leave(0)
    return round(loops[0].bundles) if len(loops) == 1 else None


def _taken(lines: list[str], shares: Sequence[float]) -> dict[int, float] | None:
    """Share of the grid steps for each line of the regions that a step may skip; None if there are others than said.

    The largest region is the step itself, which the ramps of the pipeline skip; those right inside it are meant.
    """
    if not shares:
        return {}
    regions = []
    for start, line in enumerate(lines):
        if branch := _BRANCH.search(line):
            to = re.compile(rf"PF:.*\bregion {branch[2]}\b")
            end = next((n for n in range(start + 1, len(lines)) if to.search(lines[n])), None)
            if end is not None:
                regions.append((start + 1, end))
    if not regions:
        return None
    first, last = max(regions, key=lambda region: region[1] - region[0])
    inside = [(a, b) for a, b in regions if first < a and b <= last]
    outermost = [(a, b) for a, b in inside if not any(c < a and b <= d for c, d in inside)]
    if len(outermost) != len(shares):
        return None
    return {n: share for (a, b), share in zip(outermost, shares, strict=True) for n in range(a, b)}


def bundles(folder: Path, shares: Mapping[str, Sequence[float]]) -> dict[str, int | None]:
    """Bundles per program, the compiler's start-up code left out.

    Args:
      shares: by kernel's name, what `count_bundles` wants.
    """
    found: dict[str, int | None] = {}
    for file in sorted((folder / "llo").glob("*-01-final_bundles.txt")):
        name = file.name.removesuffix("-01-final_bundles.txt").split("-", 1)[1]
        if name != "TLP" and not name.startswith("<"):
            found[name] = count_bundles(file.read_text(), shares.get(name.split(".")[0], ()))
    return found


def vmem_bytes(folder: Path) -> dict[str, int]:
    """VMEM that each program allots: blocks with their buffers, scratch, spills."""
    found: dict[str, int] = {}
    for file in (folder / "llo").glob("*vmem_report.html"):
        text = file.read_text()
        data = json.JSONDecoder().raw_decode(text[text.index("{", text.index("const DATA")) :])[0]
        for name, program in data["hlo_breakdowns"].items():
            if not name.startswith("<"):
                found[name] = program["total_size"]
    return found
