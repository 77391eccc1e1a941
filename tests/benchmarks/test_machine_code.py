"""Compiled kernels are read: registers and memory, the loops of the machine code, and how often each runs."""

from __future__ import annotations

import inspect

import pytest
import torch

from helpers import small_kernels
from iisan_fast.benchmarks import loop_trips, machine_code
from iisan_fast.kernels import Configuration, Launch

BLOCK = 32
ROWS = 130  # of five tiles in a grid of eight
DEPTH = 96


@pytest.fixture(scope="module")
def launch() -> Launch:
    kernel = small_kernels.all_loops
    header = torch.empty(2, dtype=torch.int32, device="meta")
    matrices = [torch.empty(size, BLOCK, dtype=torch.bfloat16, device="meta") for size in (3 * ROWS, DEPTH)]
    out = torch.empty(ROWS, BLOCK, device="meta")
    chosen = Configuration({"BLOCK": BLOCK}, warps=4, stages=3)
    return Launch(kernel, "all_loops", (8,), chosen, (header, *matrices, out, DEPTH), {"BLOCK": BLOCK})


@pytest.fixture(scope="module")
def read(launch) -> machine_code.KernelReading:
    """Compile the kernel for sm_90 in a process that does not interpret kernels."""
    (reading,) = machine_code.readings([machine_code.specialization(launch, 90)])
    return reading


def line_of(text: str) -> machine_code.Lines:
    """Return where a line of the kernel stands."""
    lines = inspect.getsource(small_kernels).splitlines()
    (number,) = (number for number, line in enumerate(lines, start=1) if text in line)
    return (("small_kernels.py", number),)


FOR, OUTER, INNER, WHILE = "for i_k in", "for i in", "for j in", "while last"


def test_a_kernels_means_are_read(read):
    assert 16 <= read.registers <= 255 and read.spilled == 0 and read.warps == 4
    assert read.shared >= 2 * 2 * BLOCK * BLOCK * 2  # two stages of two tiles of bf16
    assert read.instructions > 200


def test_loops_are_those_of_the_source(read):
    loops = {loop.lines: loop for loop in read.loops}
    assert {line_of(FOR), line_of(INNER), line_of(WHILE)} <= {*loops}
    product = loops[line_of(FOR)]
    assert product.matrix >= BLOCK**3 // (16 * 8 * 16) // read.warps and product.asynchronous >= 2
    assert 20 < product.instructions <= product.last - product.first + 1 < read.instructions
    assert all(loop.matrix == 0 for lines, loop in loops.items() if lines != line_of(FOR))


def test_trips_follow_from_the_arguments_and_the_known_memory(read):
    def memory(argument: str, offset: int) -> int | None:
        return ROWS if (argument, offset) == ("header_ptr", 1) else None

    counts = loop_trips.count_trips(read.ir, (8,), {"n": DEPTH}, memory)
    assert counts.programs == 5 and not counts.unknown
    assert counts.trips == {
        line_of(FOR): 5 * 3,
        line_of(OUTER): 0 + 1 + 2 + 3 + 4,
        line_of(INNER): 2 + (2 + 3) + (2 + 3 + 4) + (2 + 3 + 4 + 5),
        line_of(WHILE): 5 * 4,  # 130, 105, 80, 55
    }
    assert loop_trips.products(read.ir) == {line_of(FOR): BLOCK * BLOCK}


def test_a_bound_that_is_not_known_is_reported(read):
    counts = loop_trips.count_trips(read.ir, (8,), {"n": DEPTH}, lambda argument, offset: None)
    assert counts.unknown == {line_of(WHILE)}


def test_many_programs_are_counted_from_some(read, monkeypatch):
    monkeypatch.setattr(loop_trips, "MOST_PROGRAMS", 13)
    counts = loop_trips.count_trips(read.ir, (20, 2), {"n": DEPTH}, lambda argument, offset: 20 * BLOCK)
    assert counts.programs == pytest.approx(40) and counts.trips[line_of(FOR)] == pytest.approx(40 * 3)
    assert counts.trips[line_of(OUTER)] == pytest.approx(2 * sum(range(20)), rel=0.1)


TEXT = """
.text.nested:
        /*0000*/                   S2R R0, SR_TID.X ;
.L_x_1:
\t//## File "/a/kernel.py", line 13 inlined at "/a/kernel.py", line 40
\t//## File "/a/kernel.py", line 40
        /*0010*/                   LDGSTS.E.BYPASS.128 [R1], desc[UR8][R2.64] ;
.L_x_2:
        /*0020*/                   HMMA.16816.F32.BF16 R4, R8, R12, R4 ;
        /*0030*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], R24 ;
\t//## File "/a/kernel.py", line 20
        /*0040*/               @P0 BRA `(.L_x_2) ;
        /*0050*/                   FADD R1, R1, R2 ;
\t//## File "/a/kernel.py", line 12
        /*0060*/              @!P1 BRA `(.L_x_1) ;
        /*0070*/                   BRA `(.L_x_4) ;
.L_x_4:
        /*0080*/                   EXIT ;
.L_x_3:
        /*0090*/                   BRA `(.L_x_3) ;
"""


def test_nested_loops_are_told_apart():
    count, (inner, outer) = machine_code.read_loops(TEXT)
    assert count == 10
    assert inner == (2, 4, 3, 2, 0, (("kernel.py", 20),))
    assert outer == (1, 6, 3, 0, 1, (("kernel.py", 12),))
