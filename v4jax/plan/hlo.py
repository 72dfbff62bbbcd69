"""Reads the text of a compiled program: computations, instructions, shapes, and how often each loop runs.

The TPU compiler writes no trip counts, so they are found from the condition, the start value and the step. A loop whose
bound depends on data has no count in the text: whoever wrote it says what to expect by a named scope right around it
(`kernels_pallas.loops`), which the compiler keeps in the loop's `op_name`.
"""

import dataclasses
import math
import re
from collections.abc import Iterator

from kernels_pallas.loops import expected_trips

ITEM_BITS = {
    "pred": 8, "s2": 2, "u2": 2, "s4": 4, "u4": 4, "f4e2m1fn": 4, "s8": 8, "u8": 8, "f8e4m3fn": 8, "f8e5m2": 8,
    "f8e8m0fnu": 8, "s16": 16, "u16": 16, "f16": 16, "bf16": 16, "s32": 32, "u32": 32, "f32": 32, "s64": 64, "u64": 64,
    "f64": 64, "c64": 64, "c128": 128,
}  # fmt: skip

_ARRAY = re.compile(r"([a-z]\w*)\[([\d,<=]*)\](?:\{([^{}]*)\})?")
_SPACE = re.compile(r"S\((\d+)\)")
_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*(?:/\*.*)?$")
_NAME = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = ")
_OPERATION = re.compile(r"\s*([a-z][\w\-]*)\(")
_REFERENCE = re.compile(r"%([\w.\-]+)")
_BROKEN = re.compile(r'\{\n((?:"[^\n]*\n)+)\}')
"""An object of a kernel's configuration that the compiler spreads over lines, where it put the kernel into a fusion."""
_TRANSPARENT = frozenset({"copy", "bitcast", "convert", "reshape", "copy-done", "optimization-barrier", "opt-barrier"})


@dataclasses.dataclass(frozen=True, slots=True)
class Shape:
    """One array of an instruction's result."""

    dtype: str
    dims: tuple[int, ...]
    space: int = 0
    """0 is HBM; the compiler places others in VMEM, scalar memory and the like."""

    @property
    def elements(self) -> int:
        """Number of values."""
        return math.prod(self.dims)

    @property
    def nbytes(self) -> int:
        """Bytes without the padding of tiles; tokens and semaphores have none."""
        return (self.elements * ITEM_BITS.get(self.dtype, 0) + 7) // 8


@dataclasses.dataclass(frozen=True, slots=True)
class Instruction:
    """One line of a computation."""

    name: str
    operation: str
    shapes: tuple[Shape, ...]
    """The result's arrays, nested tuples flattened."""
    operands: tuple[str, ...]
    literal: str
    """What stands between the parentheses, for constants and parameters."""
    attributes: str
    is_root: bool

    def called(self, *keys: str) -> list[str]:
        """Names of the computations under these attributes."""
        names: list[str] = []
        for key in keys:
            for found in re.finditer(rf"\b{key}=(\{{[^}}]*\}}|%?[\w.\-]+)", self.attributes):
                names += re.findall(r"[\w.\-]+", found[1].replace("%", ""))
        return names

    def integer(self, key: str) -> int | None:
        """An attribute such as `index=3`."""
        found = re.search(rf"\b{key}=(-?\d+)", self.attributes)
        return int(found[1]) if found else None

    @property
    def op_name(self) -> str:
        """Where it comes from in the traced program."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found[1] if found else ""


@dataclasses.dataclass(frozen=True)
class Computation:
    """A named list of instructions in order."""

    name: str
    instructions: dict[str, Instruction]

    def __iter__(self) -> Iterator[Instruction]:
        return iter(self.instructions.values())

    @property
    def root(self) -> Instruction:
        """The instruction whose value is the result."""
        return next((one for one in self if one.is_root), list(self)[-1])

    def parameters(self) -> list[Instruction]:
        """In their order."""
        return sorted((one for one in self if one.operation == "parameter"), key=lambda one: int(one.literal))

    def operands_of(self, caller: Instruction) -> Iterator[tuple[Instruction, str]]:
        """Each parameter with the name of the caller's operand that it stands for; an unused one may be left out."""
        for parameter in self.parameters():
            yield parameter, caller.operands[int(parameter.literal)]

    def users(self, name: str) -> list[Instruction]:
        """Instructions that take this one as an operand."""
        return [one for one in self if name in one.operands]


@dataclasses.dataclass(frozen=True)
class Trips:
    """How often a loop runs."""

    count: float
    source: str
    """"static", "expected" (by a named scope; depends on data) or "unknown" (counted once)."""


class Program:
    """A parsed HLO module."""

    def __init__(self, text: str) -> None:
        self.computations, self.entry = parse(text)
        self._caller: dict[str, tuple[Computation, Instruction]] = {}
        for computation in self.computations.values():
            for one in computation:
                if one.operation == "while":
                    for name in one.called("body", "condition"):
                        self._caller[name] = (computation, one)

    # ---- loops ----------------------------------------------------------------------------------------------------
    def trips(self, home: Computation, loop: Instruction) -> Trips:
        """How often the `while` instruction of a computation runs its body."""
        known = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes)
        if known:
            return Trips(int(known[1]), "static")
        count = self._static_trips(home, loop)
        if count is not None:
            return Trips(count, "static")
        expected = expected_trips(loop.op_name)
        return Trips(1, "unknown") if expected is None else Trips(expected, "expected")

    def _static_trips(self, home: Computation, loop: Instruction) -> int | None:
        condition = self.computations[loop.called("condition")[0]]
        compared = self._comparison(condition)
        if compared is None:
            return None
        (left_home, left), (right_home, right), direction = compared
        counter = self._tuple_index(left_home, left)
        limit = self.integer_value(right_home, right)
        if counter is None or limit is None:
            counter, limit = self._tuple_index(right_home, right), self.integer_value(left_home, left)
            direction = {"LT": "GT", "GT": "LT", "LE": "GE", "GE": "LE"}.get(direction, direction)
        start = None if counter is None else self._initial(home, loop, counter)
        step = None if counter is None else self._step(self.computations[loop.called("body")[0]], counter)
        if start is None or limit is None or not step:
            return None
        distance = {"LT": limit - start, "LE": limit - start + 1, "GT": start - limit, "GE": start - limit + 1}
        if direction == "NE":
            return max((limit - start) // step, 0)
        if direction not in distance or (step > 0) != (direction in ("LT", "LE")):
            return None
        return max(-(-distance[direction] // abs(step)), 0)

    def _comparison(self, condition: Computation) -> tuple[tuple, tuple, str] | None:
        """Both sides of the condition's comparison, each with its computation; entered if fused."""
        home, one = condition, condition.root
        outer: dict[str, str] = {}
        if one.operation == "fusion":
            inner = self.computations[one.called("calls")[0]]
            outer = {parameter.name: name for parameter, name in inner.operands_of(one)}
            home, one = inner, inner.root
        if one.operation != "compare":
            return None
        found = re.search(r"direction=(\w+)", one.attributes)

        def side(name: str) -> tuple[Computation, Instruction]:
            inside = self._through(home, home.instructions[name])
            if inside.name in outer:
                return condition, self._through(condition, condition.instructions[outer[inside.name]])
            return home, inside

        return side(one.operands[0]), side(one.operands[1]), found[1] if found else ""

    def _through(self, home: Computation, one: Instruction) -> Instruction:
        while one.operation in _TRANSPARENT:
            one = home.instructions[one.operands[0]]
        return one

    def _tuple_index(self, home: Computation, one: Instruction) -> int | None:
        """Which part of the loop's state this is, if it is one."""
        if one.operation != "get-tuple-element":
            return None
        source = home.instructions[one.operands[0]]
        return one.integer("index") if source.operation == "parameter" else None

    def _initial(self, home: Computation, loop: Instruction, index: int) -> int | None:
        start = self._through(home, home.instructions[loop.operands[0]])
        if start.operation != "tuple":
            return None
        return self.integer_value(home, home.instructions[start.operands[index]])

    def _step(self, body: Computation, index: int) -> int | None:
        """What one pass adds to a part of the state."""
        root = self._through(body, body.root)
        if root.operation != "tuple":
            return None
        after = self._through(body, body.instructions[root.operands[index]])
        operands = [(body, body.instructions[name]) for name in after.operands]
        if after.operation == "fusion":
            inner = self.computations[after.called("calls")[0]]
            places = {parameter.name: int(parameter.literal) for parameter in inner.parameters()}
            given, after = operands, inner.root
            names = [self._through(inner, inner.instructions[name]) for name in after.operands]
            operands = [given[places[one.name]] if one.name in places else (inner, one) for one in names]
        if after.operation not in ("add", "subtract") or len(operands) != 2:
            return None
        sign = 1 if after.operation == "add" else -1
        for (home, one), (other_home, other) in (operands, operands[::-1]):
            is_counter = home is body and self._tuple_index(body, self._through(body, one)) == index
            step = self.integer_value(other_home, other)
            if is_counter and step is not None:
                return sign * step
        return None

    def integer_value(self, home: Computation, one: Instruction) -> int | None:
        """The value of an integer scalar, if it is a constant: also one that a loop carries unchanged."""
        one = self._through(home, one)
        if one.operation == "constant":
            return int(one.literal) if re.fullmatch(r"-?\d+", one.literal) else None
        if one.operation != "get-tuple-element":
            return None
        index = one.integer("index")
        source = self._through(home, home.instructions[one.operands[0]])
        if index is None:
            return None
        if source.operation == "tuple":
            return self.integer_value(home, home.instructions[source.operands[index]])
        if source.operation == "while" and self._is_carried(source, index):
            return self._initial(home, source, index)
        if source.operation == "parameter" and home.name in self._caller:
            caller, loop = self._caller[home.name]
            if self._is_carried(loop, index):
                return self._initial(caller, loop, index)
        return None

    def _is_carried(self, loop: Instruction, index: int) -> bool:
        """Whether the loop's body hands this part of its state on as it got it."""
        body = self.computations[loop.called("body")[0]]
        root = self._through(body, body.root)
        if root.operation != "tuple":
            return False
        after = self._through(body, body.instructions[root.operands[index]])
        return self._tuple_index(body, after) == index


# ---- text ------------------------------------------------------------------------------------------------------------
def parse(text: str) -> tuple[dict[str, Computation], Computation]:
    """All computations of a module's text by name, and the entry.

    Raises:
      ValueError: the text has no entry computation.
    """
    computations: dict[str, Computation] = {}
    entry: Computation | None = None
    current: Computation | None = None
    for line in _BROKEN.sub(lambda found: "{" + found[1].replace("\n", "") + "}", text).splitlines():
        if current is None:
            head = _HEAD.match(line)
            if head:
                current = Computation(head[2], {})
                computations[current.name] = current
                entry = current if head[1] else entry
        elif line.startswith("}"):
            current = None
        else:
            one = _instruction(line)
            if one is not None:
                current.instructions[one.name] = one
    if entry is None:
        raise ValueError("HLO text: found no ENTRY computation; need the output of compiled.as_text()")
    return computations, entry


def _instruction(line: str) -> Instruction | None:
    head = _NAME.match(line)
    if head is None:
        return None
    shape_end = _end_of_type(line, head.end())
    operation = _OPERATION.match(line, shape_end)
    if operation is None:
        return None
    close = _closing(line, operation.end() - 1)
    inside = line[operation.end() : close]
    return Instruction(
        name=head[2],
        operation=operation[1],
        shapes=parse_shapes(line[head.end() : shape_end]),
        operands=() if operation[1] == "constant" else tuple(_REFERENCE.findall(inside)),
        literal=inside.strip() if operation[1] in ("constant", "parameter") else "",
        attributes=line[close + 1 :],
        is_root=bool(head[1]),
    )


def parse_shapes(text: str) -> tuple[Shape, ...]:
    """The arrays of a type, tuples flattened."""
    shapes = []
    for dtype, dims, layout in _ARRAY.findall(text):
        space = _SPACE.search(layout)
        sizes = tuple(int(size.removeprefix("<=")) for size in dims.split(",") if size)
        shapes.append(Shape(dtype, sizes, int(space[1]) if space else 0))
    return tuple(shapes)


def _end_of_type(line: str, start: int) -> int:
    if line[start] == "(":
        return _closing(line, start) + 1
    end = line.find(" ", start)
    return len(line) if end < 0 else end


def _closing(line: str, start: int) -> int:
    """Index of the parenthesis that closes the one at `start`."""
    depth = 0
    for found in re.finditer(r"[()]", line[start:]):
        depth += 1 if found[0] == "(" else -1
        if depth == 0:
            return start + found.start()
    return len(line)
