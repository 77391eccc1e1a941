"""Count how often each loop of a Triton kernel runs, from its intermediate representation and a launch's arguments.

The kernel's scalars are computed, program by program: numbers of programs, sizes, and what is loaded of them from
memory whose contents are known, as a batch's true counts are. Tensors are left out, so that a loop whose bound comes
from one is not known. It counts as one trip, and is reported.
"""

from __future__ import annotations

import operator
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from .machine_code import Lines

MOST_PROGRAMS = 127  # of a launch that are computed, a prime: a stride through the grid meets every kind of program
MOST_TRIPS = 1 << 20  # of a loop with a condition

Memory = Callable[[str, int], int | None]  # the element of an argument's memory at an offset, where it is known
Environment = dict[str, Any]  # integers and pointers, which are (argument, offset), by name


class Pointer(NamedTuple):
    """An address in the memory of an argument."""

    argument: str
    offset: int


class TripCounts(NamedTuple):
    """The trips of the loops in all programs of a launch."""

    trips: dict[Lines, float]  # of all programs together, by the loop's lines in the source
    programs: float  # that do not leave at once
    unknown: frozenset[Lines]  # loops whose bounds are not known


@dataclass
class Operation:
    """One operation, with its regions."""

    name: str
    results: list[str]
    text: str  # what follows the name
    location: str = ""
    regions: list[list[Operation]] = field(default_factory=lambda: [])
    has_loop: bool = False  # inside

    @cached_property
    def operands(self) -> list[str]:
        """Return the names of the values that it reads."""
        return re.findall(r"%[\w.$#-]+", self.text)


class KernelFunction(NamedTuple):
    """A kernel's function: its operations, its arguments' names, and the source lines of its locations."""

    arguments: list[str]
    pointers: list[str]  # of them
    body: list[Operation]
    locations: dict[str, str]


def count_trips(ir: str, grid: Sequence[int], arguments: Mapping[str, int], memory: Memory) -> TripCounts:
    """Count the trips of each loop in all programs of a launch, from evenly chosen ones where they are many.

    Args: ir: Triton's representation before it is optimised; arguments: the integers, by name; memory: see `Memory`.
    """
    kernel = parse(ir)
    sizes = (*grid, 1, 1)[:3]
    programs = sizes[0] * sizes[1] * sizes[2]
    computed = min(programs, MOST_PROGRAMS)
    environment: Environment = {f"%{name}": arguments.get(name, Pointer(name, 0)) for name in kernel.arguments}
    trips: Counter[Lines] = Counter()
    unknown: set[Lines] = set()
    staying = 0
    for index in range(computed):
        number = index * programs // computed
        place = (number % sizes[0], number // sizes[0] % sizes[1], number // (sizes[0] * sizes[1]))
        run = ProgramRun(kernel, memory, place, sizes)
        run.function(dict(environment))
        trips.update(run.trips)
        unknown |= run.unknown
        staying += not run.left_at_once
    factor = programs / computed
    return TripCounts({lines: count * factor for lines, count in trips.items()}, staying * factor, frozenset(unknown))


def products(ir: str) -> dict[Lines, int]:
    """Return, for each loop, how many elements its own matrix products make anew in a trip.

    A product that starts from zeros makes elements; one that is added to a sum folds them. Where a loop only adds, the
    elements of its sums count.
    """
    kernel = parse(ir)
    new_elements: dict[Lines, int] = {}

    def visit(operations: list[Operation], zeros: frozenset[str], loop: Operation | None) -> None:
        fresh = zeros | {one.results[0] for one in operations if one.name == "arith.constant" and one.results}
        sizes = {True: 0, False: 0}
        for one in operations:
            if one.name == "tt.dot":
                shape = re.search(r"-> tensor<([\dx]+)x\w+", one.text)
                assert shape is not None, one.text
                elements = 1
                for length in shape[1].split("x"):
                    elements *= int(length)
                sizes[one.operands[2] in fresh] += elements
            for region in one.regions:
                visit(region, fresh, one if one.name in LOOPS else loop)
        if loop is not None and (elements := sizes[True] or sizes[False]):
            lines = resolve(loop.location, kernel.locations)
            new_elements[lines] = new_elements.get(lines, 0) + elements

    visit(kernel.body, frozenset(), None)
    return new_elements


def memory_uses(ir: str) -> dict[str, int]:
    """Return, for each argument that is a pointer, 1 if its memory is read or written, 2 if both.

    A pointer that is chosen among several counts as each of them.
    """
    kernel = parse(ir)
    uses: dict[str, set[str]] = {"tt.load": set(), "tt.store": set()}
    bases = {f"%{name}": {name} for name in kernel.pointers}

    def visit(operations: list[Operation]) -> None:
        for one in operations:
            if one.name == "scf.for":
                for name, start in _carried(one):
                    bases[name] = bases.get(start, set())
            for region in one.regions:
                visit(region)
            if one.name in uses:
                uses[one.name] |= bases[one.operands[0]]
            elif one.regions:
                yielded = [region[-1].operands for region in one.regions if region and region[-1].name == "scf.yield"]
                for name, *choices in zip(one.results, *yielded):
                    bases[name] = set().union(*(bases.get(choice, set()) for choice in choices))
            elif "!tt.ptr" in one.text:
                sources = [bases[name] for name in one.operands if name in bases]
                bases.update(dict.fromkeys(one.results, set().union(*sources)))

    visit(kernel.body)
    used = {name: sum(name in names for names in uses.values()) for name in kernel.pointers}
    return {name: count for name, count in used.items() if count}


class ProgramRun:
    """The scalars of one program."""

    def __init__(self, kernel: KernelFunction, memory: Memory, place: Sequence[int], sizes: Sequence[int]) -> None:
        """Prepare the program at a place of a grid of these sizes, over memory of known values."""
        self.kernel = kernel
        self.memory = memory
        self.place = place
        self.sizes = sizes
        self.trips: Counter[Lines] = Counter()
        self.unknown: set[Lines] = set()
        self.left_at_once = False

    def function(self, values: Environment) -> None:
        """Run the function's blocks until it returns."""
        body = self.kernel.body
        labels = {one.text: index for index, one in enumerate(body) if one.name == "label"}
        index = seen = 0
        while index < len(body):
            one = body[index]
            seen += 1
            if one.name == "tt.return":
                break
            if one.name in ("cf.br", "cf.cond_br"):
                condition = 1 if one.name == "cf.br" else values.get(one.operands[0])
                targets = re.findall(r"\^\w+", one.text)
                index = labels[targets[0] if condition or condition is None and len(targets) == 1 else targets[-1]]
                continue
            self.operation(one, values)
            index += 1
        self.left_at_once = 2 * seen < len(body)

    def region(self, operations: list[Operation], values: Environment) -> list[Any]:
        """Run a region and return what it yields."""
        for one in operations:
            if one.name in ("scf.yield", "scf.condition"):
                return [values.get(name) for name in one.operands]
            self.operation(one, values)
        return []

    def operation(self, one: Operation, values: Environment) -> None:
        """Run one operation, with what it holds."""
        if one.name in LOOPS:
            results = self.loop(one, values) if one.name == "scf.for" else self.conditional_loop(one, values)
        elif one.name == "scf.if":
            results = self.branch(one, values)
        else:
            results = [self.scalar(one, values)]
        for name, value in zip(one.results, results):
            if value is not None:
                values[name] = value

    def loop(self, one: Operation, values: Environment) -> list[Any]:
        """Count the trips of a `for`; run its body only if there are loops in it."""
        header = re.match(r" (%\S+) = (%\S+) to (%\S+) step (%\S+)", one.text)
        assert header is not None, one.text
        variable, *bounds = header.groups()
        begin, end, step = (values.get(name) for name in bounds)
        carried = _carried(one)
        lines = resolve(one.location, self.kernel.locations)
        if None in (begin, end, step):
            self.unknown.add(lines)
            begin, end, step = 0, 1, 1
        count = max(0, -(-(end - begin) // step))
        self.trips[lines] += count
        state = [values.get(initial) for _, initial in carried]
        if not one.has_loop:
            return state if count == 0 else []
        for trip in range(count):
            inside = values | {name: value for (name, _), value in zip(carried, state) if value is not None}
            for (name, _), value in zip(carried, state):
                if value is None:
                    inside.pop(name, None)
            inside[variable] = begin + trip * step
            state = self.region(one.regions[0], inside)
        return state

    def conditional_loop(self, one: Operation, values: Environment) -> list[Any]:
        """Count the trips of a `while`. Raises ValueError for a loop that does not end."""
        lines = resolve(one.location, self.kernel.locations)
        carried = re.findall(r"(%\S+) = (%[^\s,)]+)", one.text)
        state = [values.get(initial) for _, initial in carried]
        names = [name for name, _ in carried]
        passed = one.regions[1][0].operands if one.regions[1] and one.regions[1][0].name == "label" else names
        for _ in range(MOST_TRIPS):
            inside = {**values, **_known(names, state)}
            condition, *state = self.region(one.regions[0], inside)
            if condition is None:
                self.unknown.add(lines)
                self.trips[lines] += 1
                return []
            if not condition:
                return state
            self.trips[lines] += 1
            state = self.region(one.regions[1], {**values, **_known(passed, state)})
        raise ValueError(f"a loop of more than {MOST_TRIPS} trips at {lines}")

    def branch(self, one: Operation, values: Environment) -> list[Any]:
        """Run the side of an `if` that is taken; where that is not known, the first one, whose results are not."""
        condition = values.get(one.operands[0])
        if condition is None:
            self.region(one.regions[0], dict(values))
            return []
        taken = 0 if condition else 1
        return self.region(one.regions[taken], dict(values)) if taken < len(one.regions) else []

    def scalar(self, one: Operation, values: Environment) -> Any:
        """Return the value of an operation on integers and pointers; None where it is not known."""
        if one.name == "arith.constant":
            constant = re.match(r" (-?\d+|true|false)( : (i\d+|index))?$", one.text)
            return None if constant is None else int(TRUTH.get(constant[1], constant[1]))
        if one.name in ("tt.get_program_id", "tt.get_num_programs"):
            of = self.place if one.name == "tt.get_program_id" else self.sizes
            return of["xyz".index(one.text.split()[0])]
        operands = [values.get(name) for name in one.operands]
        if one.name == "arith.select":
            return None if operands[0] is None else operands[1 if operands[0] else 2]
        if not operands or operands[0] is None:
            return None
        if one.name == "tt.load":
            pointer = operands[0]
            return self.memory(*pointer) if isinstance(pointer, Pointer) else None
        if None in operands:
            return None
        if one.name == "tt.addptr":
            return Pointer(operands[0].argument, operands[0].offset + operands[1])
        if any(isinstance(value, Pointer) for value in operands):
            return None
        if one.name == "arith.cmpi":
            return int(COMPARISONS[one.text.split(",")[0].strip()[-2:]](*operands))
        if one.name in ("arith.extsi", "arith.extui", "arith.trunci", "arith.index_cast"):
            return operands[0]
        return ARITHMETIC[one.name](*operands) if one.name in ARITHMETIC else None


def _carried(one: Operation) -> list[tuple[str, str]]:
    """Return the values that the trips of a `for` hand on: their names inside, and what they start from."""
    return re.findall(r"(%\S+) = (%[^\s,)]+)", one.text.partition("iter_args")[2])


def _known(names: Sequence[str], state: Sequence[Any]) -> Environment:
    """Return the variables whose values are known, by name; None in `state` means unknown."""
    return {name: value for name, value in zip(names, state) if value is not None}


def _divided(a: int, b: int) -> int:
    """Divide whole numbers towards zero, as machines do."""
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


LOOPS = ("scf.for", "scf.while")
TRUTH = {"true": "1", "false": "0"}
ARITHMETIC: dict[str, Callable[[int, int], int]] = {
    "arith.addi": operator.add,
    "arith.subi": operator.sub,
    "arith.muli": operator.mul,
    "arith.divsi": _divided,
    "arith.divui": operator.floordiv,
    "arith.remsi": lambda a, b: a - b * _divided(a, b),
    "arith.remui": operator.mod,
    "arith.ceildivsi": lambda a, b: -(-a // b),
    "arith.floordivsi": operator.floordiv,
    "arith.minsi": min,
    "arith.minui": min,
    "arith.maxsi": max,
    "arith.maxui": max,
    "arith.andi": operator.and_,
    "arith.ori": operator.or_,
    "arith.xori": operator.xor,
    "arith.shli": operator.lshift,
    "arith.shrsi": operator.rshift,
    "arith.shrui": operator.rshift,
}
COMPARISONS = {"eq": operator.eq, "ne": operator.ne, "lt": operator.lt, "le": operator.le}
COMPARISONS |= {"gt": operator.gt, "ge": operator.ge}
OPERATION = re.compile(r"\s*(?:(%.*?) = )?\"?([\w.]+)\"?(.*)$")
LOCATION = re.compile(r" ?loc\((#loc\d*|unknown)\)$")


def parse(ir: str) -> KernelFunction:
    """Read the public function of a module."""
    lines = ir.splitlines()
    locations = dict(match for line in lines for match in re.findall(r"^(#loc\d*) = loc\((.*)\)$", line))
    start = next(index for index, line in enumerate(lines) if "tt.func public" in line)
    arguments = re.findall(r"%(\w+): (\S+)", lines[start])
    pointers = [name for name, kind in arguments if kind.startswith("!tt.ptr")]
    body, _ = _block(lines, start + 1)
    return KernelFunction([name for name, _ in arguments], pointers, body, locations)


def _block(lines: list[str], index: int) -> tuple[list[Operation], int]:
    """Read operations up to the brace that closes their region; return them and the number of its line."""
    operations: list[Operation] = []
    while index < len(lines):
        line = lines[index].strip()
        if line.startswith("}"):
            return operations, index
        if line.startswith("^"):
            name = line.partition("(")[0].partition(":")[0]
            operations.append(Operation("label", [], name if "(" not in line.partition("//")[0] else line))
        elif match := OPERATION.match(LOCATION.sub("", line)):
            one = Operation(match[2], _results(match[1] or ""), match[3])
            if location := LOCATION.search(line):
                one.location = location[1]
            if line.endswith("{"):
                index = _regions(lines, index, one)
            one.has_loop = any(inner.name in LOOPS or inner.has_loop for part in one.regions for inner in part)
            operations.append(one)
        index += 1
    return operations, index


def _regions(lines: list[str], index: int, one: Operation) -> int:
    """Read the regions of an operation; return the number of the line that ends it."""
    while True:
        region, index = _block(lines, index + 1)
        one.regions.append(region)
        if not lines[index].rstrip().endswith("{"):
            break
    if location := LOCATION.search(lines[index].rstrip()):
        one.location = location[1]
    return index


def _results(text: str) -> list[str]:
    """Return the names of results: "%t:3" stands for %t#0, %t#1 and %t#2."""
    names: list[str] = []
    for part in text.split(", ") if text else []:
        name, _, count = part.partition(":")
        names += [f"{name}#{number}" for number in range(int(count))] if count else [name]
    return names


def resolve(location: str, locations: Mapping[str, str]) -> Lines:
    """Return the lines of a location, from where it stands to the kernel's own line."""
    text = locations.get(location, location)
    if match := re.match(r'"(.*)":(\d+):\d+', text):
        return ((Path(match[1]).name, int(match[2])),)
    if match := re.match(r"callsite\((#loc\d*) at (#loc\d*)\)", text):
        return resolve(match[1], locations) + resolve(match[2], locations)
    if match := re.search(r"\((#loc\d*)\)$|fused.*?(#loc\d*)", text):
        return resolve(match[1] or match[2], locations)
    return ()
