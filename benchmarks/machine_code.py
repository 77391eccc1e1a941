"""Compile Triton kernels for GPUs that need not be there, and read the machine code: registers, memory, loops.

Triton brings the assembler and the disassembler, and keeps what it has compiled in its cache, by source. Nothing here
works on interpreted kernels: where TRITON_INTERPRET is set, call `readings`, which compiles in other processes.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import re
import subprocess
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..kernels import Configuration, Launch

TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64"}
TYPES |= {torch.int64: "i64", torch.int32: "i32", torch.int16: "i16", torch.int8: "i8", torch.uint8: "u8"}
TYPES |= {torch.bool: "i1"}
MATRIX = re.compile(r"\b(HMMA|HGMMA|IMMA|IGMMA|QGMMA|DMMA)\b")
ASYNCHRONOUS = re.compile(r"\b(LDGSTS|UTMALDG|UBLKCP)\b")  # copies to shared memory that the loop need not wait for
BRANCH = re.compile(r"\bBRA\b.*`\((\.L\w+)\)")
SOURCE = re.compile(r'\s*//## File "(.*?)", line (\d+)')
LABEL = re.compile(r"(\.L\w+):")
INSTRUCTION = re.compile(r"\s+/\*[0-9a-f]{4,}\*/\s+(.*?);")
PROCESSES = 2  # that compile at once

Lines = tuple[tuple[str, int], ...]  # (file, line), then where it is inlined, the kernel's own line last


class Specialization(NamedTuple):
    """A kernel as a launch specialises it for one architecture; it can be sent to another process."""

    module: str
    function: str
    values: tuple[tuple[str, Any], ...]  # by argument: ("pointer", type), ("float", None) or ("integer", its value)
    meta: tuple[tuple[str, Any], ...]
    architecture: int  # 90 for sm_90
    warps: int
    stages: int


class MachineLoop(NamedTuple):
    """A loop of the machine code."""

    first: int  # numbers of its first and last instruction
    last: int
    instructions: int  # those of loops inside left out, as in the next two
    matrix: int  # instructions that multiply matrices
    asynchronous: int  # copies to shared memory
    lines: Lines  # of the statement that the branch back belongs to


class KernelReading(NamedTuple):
    """A compiled kernel's resources and instructions, read from its machine code."""

    registers: int  # a thread
    spilled: int  # bytes of stack a thread
    shared: int  # bytes of shared memory a program
    warps: int
    instructions: int
    loops: tuple[MachineLoop, ...]  # inner ones before those that hold them
    ir: str  # Triton's, before it is optimised


def specialization(launch: Launch, architecture: int) -> Specialization:
    """Describe the kernel that a launch needs on an architecture."""
    values = []
    for value in launch.arguments:
        if isinstance(value, torch.Tensor):
            values.append(("pointer", TYPES[value.dtype]))
        else:
            values.append(("float", None) if isinstance(value, float) else ("integer", value))
    function = launch.kernel.fn
    chosen = launch.configuration
    meta = tuple(launch.meta.items())
    where = function.__module__, function.__name__
    return Specialization(*where, tuple(values), meta, architecture, chosen.warps, chosen.stages)


def compile_kernel(
    kernel: Any,
    architecture: int,
    values: Iterable[tuple[str, Any]],
    meta: dict[str, Any],
    chosen: Configuration,
) -> Any:
    """Compile as the launcher would specialise: aligned pointers, integers known to be 1 or multiples of 16."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature: dict[str, str] = {}
    constants = dict(meta)
    attributes = {}
    for index, (name, (kind, value)) in enumerate(zip(kernel.arg_names, values)):
        if kind == "pointer":
            signature[name] = f"*{value}"
            attributes[(index,)] = [["tt.divisibility", 16]]
        elif kind == "float":
            signature[name] = "fp32"
        elif name in kernel.do_not_specialize:
            signature[name] = "i32"
        elif value == 1:
            signature[name] = "constexpr"
            constants[name] = 1
        else:
            signature[name] = "i32"
            if value % 16 == 0:
                attributes[(index,)] = [["tt.divisibility", 16]]
    signature |= dict.fromkeys(meta, "constexpr")
    source = ASTSource(kernel, signature, constants, attributes)
    options = {"num_warps": chosen.warps, "num_stages": chosen.stages}
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)


def resources(binary: Any) -> dict[str, int]:
    """Return a compiled kernel's shared memory, and registers and bytes of stack (what spills live in) a thread."""
    with _cubin(binary) as path:
        text = _run("cuobjdump", "-res-usage", path)
    (usage,) = re.findall(r"REG:(\d+) STACK:(\d+)", text)
    return {"shared": binary.metadata.shared, "registers": int(usage[0]), "spilled": int(usage[1])}


def readings(specializations: Sequence[Specialization], processes: int = PROCESSES) -> list[KernelReading]:
    """Compile kernels in other processes, in none of which kernels are interpreted, and read their machine code."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(processes, len(specializations)) or 1, context, _not_interpreted) as pool:
        return list(pool.map(reading, specializations))


def reading(wanted: Specialization) -> KernelReading:
    """Compile a kernel and read its machine code."""
    kernel = getattr(importlib.import_module(wanted.module), wanted.function)
    chosen = Configuration(warps=wanted.warps, stages=wanted.stages)
    binary = compile_kernel(kernel, wanted.architecture, wanted.values, dict(wanted.meta), chosen)
    with _cubin(binary) as path:
        text = _run("nvdisasm", "--print-line-info-inline", "--print-code", path)
    count, loops = read_loops(text)
    return KernelReading(
        **resources(binary), warps=wanted.warps, instructions=count, loops=tuple(loops), ir=binary.asm["ttir"]
    )


def read_loops(text: str) -> tuple[int, list[MachineLoop]]:
    """Return the number of instructions of a disassembled kernel, and its loops, inner ones first.

    A loop is what a branch back spans. The endless loop of one instruction behind the kernel's end is none.
    """
    instructions, labels = _instructions(text)
    spans: list[tuple[int, int]] = []
    for index, (instruction, _) in enumerate(instructions):
        branch = BRANCH.search(instruction)
        if branch and labels[branch[1]] < index:
            spans.append((labels[branch[1]], index))
    loops: list[MachineLoop] = []
    for first, last in sorted(spans, key=lambda span: span[1] - span[0]):
        inside = {
            i for loop in loops if first <= loop.first <= loop.last <= last for i in range(loop.first, loop.last + 1)
        }
        body = [instructions[index][0] for index in range(first, last + 1) if index not in inside]
        matrix = sum(bool(MATRIX.search(instruction)) for instruction in body)
        asynchronous = sum(bool(ASYNCHRONOUS.search(instruction)) for instruction in body)
        loops.append(MachineLoop(first, last, len(body), matrix, asynchronous, instructions[last][1]))
    return len(instructions), loops


def _instructions(text: str) -> tuple[list[tuple[str, Lines]], dict[str, int]]:
    """Return each instruction with its lines of the source, and the number of the instruction behind each label."""
    instructions: list[tuple[str, Lines]] = []
    labels: dict[str, int] = {}
    lines: list[tuple[str, int]] = []
    begins = True  # the next line of the source is the first one of an instruction
    for line in text.splitlines():
        if match := SOURCE.match(line):
            lines = [] if begins else lines
            lines.append((Path(match[1]).name, int(match[2])))
            begins = False
        elif match := LABEL.match(line):
            labels[match[1]] = len(instructions)
        elif match := INSTRUCTION.match(line):
            instructions.append((match[1], tuple(lines)))
            begins = True
    return instructions, labels


@contextmanager
def _cubin(binary: Any) -> Iterator[str]:
    """Give the path of a temporary file that holds a compiled kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        yield file.name


def _run(tool: str, *words: str) -> str:
    """Run one of the tools that Triton brings, and return what it prints."""
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / tool
    return subprocess.run([path, *words], check=True, capture_output=True, text=True).stdout


def _not_interpreted() -> None:
    """Let kernels be compiled in this process, which has imported none yet; Triton tells nothing of its defaults."""
    os.environ.pop("TRITON_INTERPRET", None)
    warnings.filterwarnings("ignore", message="TRITON_DEFAULT_FP_FUSION")
