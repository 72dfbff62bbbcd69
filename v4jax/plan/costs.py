"""What one device does in a compiled program: products, HBM traffic and collectives, loops as often as they run.

Counted from the text, since the compiler's own analysis takes every loop body once. A conditional counts as its dearest
branch. A kernel counts as its `CostEstimate` says, and is listed where it has none.
"""

import dataclasses
import functools
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping

import numpy as np

from kernels_pallas.loops import expected_share
from v4jax.plan.hlo import Computation, Instruction, Program, Shape
from v4jax.plan.products import Product

_SILENT = frozenset(
    {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id"}
    | {"domain", "iota", "rng-bit-generator", "opt-barrier", "optimization-barrier", "add-dependency"}
)
_SLICES = frozenset({"dynamic-slice", "slice", "gather"})
_COLLECTIVES = frozenset(
    {"all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute"}
    | {"collective-broadcast"}
)
_POINTWISE = frozenset(
    {"bitcast", "bitcast-convert", "convert", "negate", "not", "and", "or", "multiply", "add", "subtract", "select"}
    | {"compare", "shift-left", "shift-right-logical", "shift-right-arithmetic", "maximum", "minimum", "clamp", "copy"}
)
_PASSES = {"highest": 6, "high": 3}
"""Passes of the matrix unit over bfloat16 parts that a float32 product takes."""


@dataclasses.dataclass
class Costs:
    """Of one device and one run of a program or a part of it."""

    flops: float = 0.0
    """Of products: 2 per multiplied pair."""
    unit_flops: float = 0.0
    """The same in units of what the matrix unit does: float32 products at full precision count up to six times."""
    products: Counter[Product] = dataclasses.field(default_factory=Counter)
    """How often each `dot` runs, those with other operands and attributes apart."""
    hbm_bytes: float = 0.0
    """Read and written; what the compiler keeps in VMEM does not count."""
    collectives: Counter[tuple[str, str]] = dataclasses.field(default_factory=Counter)
    """Bytes that the device sends, by kind and mesh axes (`"fsdp"`, `"data+expert"`), rings assumed."""
    collective_calls: Counter[tuple[str, str]] = dataclasses.field(default_factory=Counter)
    largest_gather: int = 0
    """Bytes of the largest all-gathered result."""
    loops: list[str] = dataclasses.field(default_factory=list)
    """Loops that depend on data: `op_name: expected count`, or `op_name: unknown, counted once`."""
    uncosted: Counter[str] = dataclasses.field(default_factory=Counter)
    """Custom calls without an estimate, by target."""

    def add(self, other: "Costs", times: float = 1.0) -> None:
        """Adds `other`, run so often."""
        self.flops += times * other.flops
        self.unit_flops += times * other.unit_flops
        self.hbm_bytes += times * other.hbm_bytes
        for mine, its in (
            (self.products, other.products),
            (self.collectives, other.collectives),
            (self.collective_calls, other.collective_calls),
        ):
            for key, value in its.items():
                mine[key] += times * value  # pyright: ignore
        self.largest_gather = max(self.largest_gather, other.largest_gather)
        self.loops += [loop for loop in other.loops if loop not in self.loops]
        self.uncosted.update(other.uncosted)


def program_costs(text: str, mesh: Mapping[str, int] | None = None) -> Costs:
    """The costs of a compiled program, per device.

    Args:
      text: `compiled.as_text()` of a scheduled, partitioned module.
      mesh: sizes of the mesh axes in order, to name the axes of collectives.
    """
    program = Program(text)
    return _Reader(program, dict(mesh or {})).computation(program.entry)


class _Reader:
    def __init__(self, program: Program, mesh: dict[str, int]) -> None:
        self.program, self.mesh = program, mesh
        self._done: dict[str, Costs] = {}

    # ---- walking --------------------------------------------------------------------------------------------------
    def computation(self, home: Computation) -> Costs:
        """Everything that running this computation costs."""
        if home.name not in self._done:
            total = Costs()
            for one in home:
                self._instruction(home, one, total)
            self._done[home.name] = total
        return self._done[home.name]

    def _instruction(self, home: Computation, one: Instruction, total: Costs) -> None:
        operation = one.operation
        if operation in _SILENT or operation.endswith("-update-done"):
            return
        if operation == "while":
            trips = self.program.trips(home, one)
            if trips.source == "expected":
                total.loops.append(f"{one.op_name}: {trips.count:g}")
            elif trips.source == "unknown":
                total.loops.append(f"{one.op_name or one.name}: unknown, counted once")
            for name in one.called("body", "condition"):
                total.add(self.computation(self.program.computations[name]), trips.count)
        elif operation == "conditional":
            names = one.called("branch_computations", "true_computation", "false_computation")
            branches = [self.computation(self.program.computations[name]) for name in names]
            total.add(max(branches, key=lambda cost: (cost.flops, cost.hbm_bytes)))
        elif operation == "call":
            for name in one.called("to_apply"):
                total.add(self.computation(self.program.computations[name]))
        elif operation == "fusion":
            inner = self.program.computations[one.called("calls")[0]]
            total.add(self._without_traffic(inner))
            total.hbm_bytes += self._fusion_bytes(home, one, inner)
        elif operation in ("async-start", "call-start"):
            # What runs beside the program, such as a gather on a SparseCore; its end costs nothing more.
            for name in one.called("calls", "to_apply"):
                total.add(self.computation(self.program.computations[name]))
        elif operation in ("async-done", "call-done"):
            return
        elif operation.removesuffix("-start").removesuffix("-done") in _COLLECTIVES:
            self._collective(home, one, total)
        elif operation.endswith("-start"):
            return
        elif operation.endswith("-done"):
            start = home.instructions[one.operands[0]]
            total.hbm_bytes += self._moved(home, start, start.operation.removesuffix("-start"), one.shapes)
        else:
            self._product(home, one, total)
            if operation == "custom-call":
                self._custom_call(home, one, total)
            else:
                total.hbm_bytes += self._moved(home, one, operation, one.shapes)

    def _without_traffic(self, inner: Computation) -> Costs:
        """Products and collectives inside a fusion: what is between its parameters and its result stays on chip."""
        whole = Costs()
        for one in inner:
            if one.operation == "fusion":
                whole.add(self._without_traffic(self.program.computations[one.called("calls")[0]]))
            elif one.operation.removesuffix("-start") in _COLLECTIVES:
                self._collective(inner, one, whole)
            elif one.operation == "custom-call":
                self._custom_call(inner, one, whole)
            else:
                self._product(inner, one, whole)
        whole.hbm_bytes = 0.0
        return whole

    # ---- products -------------------------------------------------------------------------------------------------
    def _product(self, home: Computation, one: Instruction, total: Costs) -> None:
        if one.operation not in ("dot", "convolution"):
            return
        left, right = (home.instructions[name].shapes[0] for name in one.operands[:2])
        if one.operation == "dot":
            product = Product.of(home, one)
            count = product.flops
            total.products[product] += 1
        else:
            count = _convolution_flops(one, left, right)
        precision = re.search(r"operand_precision=\{([\w,]+)\}", one.attributes)
        is_float32 = "f32" in (left.dtype, right.dtype)
        passes = max(_PASSES.get(name, 1) for name in precision[1].split(",")) if precision and is_float32 else 1
        # Of an operand that was bfloat16 before, two of three parts are zero: the compiler leaves their products out.
        narrow = sum(self._was_bfloat16(home, name) for name in one.operands[:2])
        passes = (passes, -(-passes // 2), 1)[narrow]
        total.flops += count
        total.unit_flops += passes * count

    def _was_bfloat16(self, home: Computation, name: str) -> bool:
        one = home.instructions[name]
        while one.operation in ("bitcast", "copy", "reshape", "transpose"):
            one = home.instructions[one.operands[0]]
        given = home.instructions[one.operands[0]] if one.operation == "convert" else one
        return given.shapes[0].dtype == "bf16"

    def _custom_call(self, home: Computation, one: Instruction, total: Costs) -> None:
        target = re.search(r'custom_call_target="([^"]+)"', one.attributes)
        name = target[1] if target else "?"
        estimate = re.search(r'"cost_estimate":\s*\{([^}]*)\}', one.attributes)
        figures = dict(re.findall(r'"(\w+)":\s*"?(-?\d+)', estimate[1])) if estimate else {}
        share = expected_share(one.op_name)
        total.flops += share * float(figures.get("flops", 0))
        total.unit_flops += share * float(figures.get("flops", 0))
        if "bytes_accessed" in figures:
            # A kernel does not know what the compiler brought to VMEM for it: that was counted where it was read. An
            # array that is given several times counts once.
            given = [home.instructions[name].shapes for name in dict.fromkeys(one.operands)]
            on_chip = sum(shape.nbytes for shapes in (one.shapes, *given) for shape in shapes if shape.space == 1)
            total.hbm_bytes += max(share * float(figures["bytes_accessed"]) - on_chip, 0.0)
        else:
            total.hbm_bytes += self._moved(home, one, "custom-call", one.shapes)
        if name == "tpu_custom_call" and not figures:
            total.uncosted[one.op_name.removesuffix("/pallas_call").rsplit("/", 1)[-1] or name] += 1

    # ---- traffic --------------------------------------------------------------------------------------------------
    def _moved(self, home: Computation, one: Instruction, operation: str, results: Iterable[Shape]) -> float:
        """HBM bytes that one instruction outside of fusions reads and writes."""
        operands = [shape for name in one.operands for shape in home.instructions[name].shapes]
        written = _hbm(results)
        if operation in _SLICES:
            source = operands[0] if operands else None
            read = sum(shape.nbytes for shape in results) if source and source.space == 0 else 0
            return written + min(read, _hbm([source]) if source else 0)
        if operation == "dynamic-update-slice":
            return _hbm(operands[1:2]) + (operands[1].nbytes if operands[0].space == 0 else 0)
        if operation == "scatter":
            parts = (len(operands) - 1) // 2
            return 2 * _hbm(operands[parts + 1 :]) + _hbm(operands[parts : parts + 1])
        return written + _hbm(operands)

    def _fusion_bytes(self, home: Computation, one: Instruction, inner: Computation) -> float:
        total = 0.0
        for parameter, name in inner.operands_of(one):
            shapes = home.instructions[name].shapes
            if len(shapes) == 1 and shapes[0].space == 0:
                share = self._read_of(inner, parameter) / max(shapes[0].elements, 1)
                total += min(share, 1.0) * shapes[0].nbytes
        root = inner.root
        roots = [inner.instructions[name] for name in root.operands] if root.operation == "tuple" else [root]
        for shape, part in zip(one.shapes, roots, strict=False):
            if shape.space == 0:
                total += min(self._written_by(inner, part), shape.nbytes)
        return total

    def _read_of(self, inner: Computation, one: Instruction, at_root: Callable[[], float] = lambda: math.inf) -> float:
        """Elements of a fusion's parameter that its users look at; infinite for all of them.

        `at_root` says what is read of the fusion's result, where that is the parameter element by element.
        """
        total = 0.0
        if one.is_root:
            total += at_root()
        for user in inner.users(one.name):
            if user.operation in _SLICES and user.operands[0] == one.name:
                total += sum(shape.elements for shape in user.shapes)
            elif user.operation == "dynamic-update-slice" and user.operands[0] == one.name:
                continue  # written in place
            elif user.operation == "scatter" and one.name in user.operands[: (len(user.operands) - 1) // 2]:
                continue
            elif user.operation == "fusion":
                nested = self.program.computations[user.called("calls")[0]]
                after = functools.partial(self._read_of, inner, user, at_root)
                for parameter, name in nested.operands_of(user):
                    if name == one.name:
                        total += self._read_of(nested, parameter, after)
            elif user.operation == "tuple" and user.is_root:
                continue
            elif user.operation not in _POINTWISE or user.shapes[0].elements != one.shapes[0].elements:
                return math.inf
            else:
                # What is computed element by element is computed for the elements that are sliced out of it.
                total += self._read_of(inner, user, at_root)
        return total

    def _written_by(self, inner: Computation, one: Instruction) -> float:
        while one.operation == "bitcast":
            one = inner.instructions[one.operands[0]]
        if one.operation == "dynamic-update-slice":
            return inner.instructions[one.operands[1]].shapes[0].nbytes
        if one.operation == "scatter":
            parts = (len(one.operands) - 1) // 2
            return sum(inner.instructions[name].shapes[0].nbytes for name in one.operands[parts + 1 :])
        if one.operation == "fusion":
            nested = self.program.computations[one.called("calls")[0]]
            return self._written_by(nested, nested.root)
        if one.operation == "parameter":
            return 0.0  # handed through
        return math.inf

    # ---- collectives ----------------------------------------------------------------------------------------------
    def _collective(self, home: Computation, one: Instruction, total: Costs) -> None:
        if one.operation.endswith("-done"):
            started = home.instructions[one.operands[0]]
            if started.operation.endswith("-start"):
                self._count(home, started, one.shapes, total)
        elif not one.operation.endswith("-start"):
            self._count(home, one, one.shapes, total)

    def _count(self, home: Computation, one: Instruction, results: tuple[Shape, ...], total: Costs) -> None:
        kind = one.operation.removesuffix("-start")
        operands = [shape for name in one.operands for shape in home.instructions[name].shapes]
        size, axes = self._groups(one)
        if size <= 1:
            return
        given, made = (sum(shape.nbytes for shape in shapes) for shapes in (operands, results))
        share = (size - 1) / size
        sent = {
            "all-gather": made * share,
            "reduce-scatter": given * share,
            "all-reduce": 2 * made * share,
            "all-to-all": given * share,
            "ragged-all-to-all": operands[0].nbytes * share if operands else 0.0,
        }.get(kind, float(given))
        if kind == "all-reduce" and "all-reduce-scatter" in home.name:
            # How the TPU compiler writes a reduce-scatter: a fusion of the sum and a slice of it.
            kind, sent = "reduce-scatter", given * share
        total.collectives[kind, axes] += sent  # pyright: ignore
        total.collective_calls[kind, axes] += 1
        total.hbm_bytes += _hbm(operands) + _hbm(results)
        if kind == "all-gather":
            total.largest_gather = max(total.largest_gather, made)

    def _groups(self, one: Instruction) -> tuple[int, str]:
        """Devices that exchange with each other, and the mesh axes along which they lie."""
        devices = math.prod(self.mesh.values()) if self.mesh else 0
        pairs = re.search(r"source_target_pairs=\{([\d,{}]*)\}", one.attributes)
        if pairs:
            moves = np.asarray([int(n) for n in re.findall(r"\d+", pairs[1])], np.int64).reshape(-1, 2)
            moves = moves[moves[:, 0] != moves[:, 1]]
            return (2, self._axes(moves, devices)) if len(moves) else (1, "")
        groups = replica_groups(one.attributes, devices)
        return groups.shape[1], self._axes(groups, devices)

    def _axes(self, groups: np.ndarray, devices: int) -> str:
        if not self.mesh or groups.max(initial=0) >= devices:
            return "?"
        places = np.stack(np.unravel_index(groups, tuple(self.mesh.values())), -1)
        varies = (places != places[:, :1]).any(axis=(0, 1))
        return "+".join(axis for axis, is_varied in zip(self.mesh, varies, strict=True) if is_varied)


def _hbm(shapes: Iterable[Shape]) -> int:
    return sum(shape.nbytes for shape in shapes if shape.space == 0)


def replica_groups(attributes: str, devices: int) -> np.ndarray:
    """Device numbers [groups, size] of a collective, in either spelling; all devices where none are given."""
    listed = re.search(r"replica_groups=\{(\{[\d,{}]*\})\}", attributes)
    if listed:
        return np.asarray([[int(n) for n in group.split(",")] for group in re.findall(r"\{([\d,]+)\}", listed[1])])
    iota = re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes)
    if iota:
        shape, sizes = ([int(n) for n in part.split(",")] for part in (iota[1], iota[2]))
        order = np.arange(math.prod(sizes)).reshape(sizes)
        if iota[3]:
            order = order.transpose([int(n) for n in iota[3].split(",")])
        return order.reshape(shape)
    return np.arange(max(devices, 1))[None]


def _convolution_flops(one: Instruction, left: Shape, right: Shape) -> float:
    """Multiplied pairs of real values: the compiler writes batched products as convolutions over padded axes."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", one.attributes)
    if labels is None:
        return 0.0
    lhs, rhs, out = labels.groups()
    result = one.shapes[0]
    pairs = result.dims[out.index("b")] * result.dims[out.index("f")] * right.dims[rhs.index("i")]
    window = re.search(r"window=\{([^}]*)\}", one.attributes)
    fields = dict(re.findall(r"(\w+)=([\w_x\-]+)", window[1])) if window else {}
    count = sum(label.isdigit() for label in lhs)

    def per_axis(name: str, default: str) -> list[str]:
        return fields[name].split("x") if name in fields else [default] * count

    strides, dilated, spread = (per_axis(name, "1") for name in ("stride", "lhs_dilate", "rhs_dilate"))
    for axis, pad in enumerate(per_axis("pad", "0_0")):
        pairs *= _touching(
            left.dims[lhs.index(str(axis))], right.dims[rhs.index(str(axis))], result.dims[out.index(str(axis))],
            int(strides[axis]), int(pad.split("_")[0]), int(dilated[axis]), int(spread[axis]),
        )  # fmt: skip
    return 2.0 * pairs


def _touching(size: int, kernel: int, out: int, stride: int, pad: int, dilated: int, spread: int) -> int:
    """Pairs of an output and a kernel position along one axis that meet a real input value."""
    if kernel == 1 and pad == 0 and dilated == 1:
        return min(out, -(-size // stride))
    starts = np.arange(out, dtype=np.int64) * stride - pad
    total = 0
    for k in range(kernel):
        place = starts + k * spread
        total += int(((place >= 0) & (place % dilated == 0) & (place // dilated < size)).sum())
    return total
