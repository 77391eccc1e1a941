"""The cost of a launch: instructions by the trips of its loops, and the bytes that it reads and writes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from helpers import small_kernels
from iisan_fast.benchmarks.kernel_costs import SLOTS_PER_S, KnownBatch, kernel_cost, loop_trips
from iisan_fast.benchmarks.loop_trips import TripCounts, memory_uses
from iisan_fast.benchmarks.machine_code import KernelReading, MachineLoop
from iisan_fast.kernels import Configuration, Launch, StepShape

SHAPE = StepShape(users=8, distinct=64, tiles=5, tile_rows=16, positions=10)
TYPES = {"header_ptr": "!tt.ptr<i32>", "left_ptr": "!tt.ptr<bf16>", "right_ptr": "!tt.ptr<bf16>"}
TYPES |= {"out_ptr": "!tt.ptr<f32>", "n": "i32"}
# A kernel of one argument that is read and written, one that is read, and a loop over a count in the first.
IR = """
#loc = loc("/a/kernel.py":10:1)
#loc1 = loc("/a/kernel.py":12:5)
module {
  tt.func public @all_loops(ARGUMENTS) attributes {noinline = false} {
    %zero = arith.constant 0 : i32 loc(#loc)
    %one = arith.constant 1 : i32 loc(#loc)
    %zeros = arith.constant dense<0.000000e+00> : tensor<16x32xf32> loc(#loc)
    %p = tt.addptr %header_ptr, %one : !tt.ptr<i32>, i32 loc(#loc)
    %rows = tt.load %p : !tt.ptr<i32> loc(#loc)
    %lefts = tt.splat %left_ptr : !tt.ptr<bf16> -> tensor<16x16x!tt.ptr<bf16>> loc(#loc)
    %outs = tt.splat %out_ptr : !tt.ptr<f32> -> tensor<16x32x!tt.ptr<f32>> loc(#loc)
    %total = scf.for %i = %zero to %rows step %one iter_args(%sum = %zeros) -> (tensor<16x32xf32>)  : i32 {
      %left = tt.load %lefts : tensor<16x16x!tt.ptr<bf16>> loc(#loc1)
      %made = tt.dot %left, %left, %zeros : tensor<16x16xbf16> * tensor<16x32xbf16> -> tensor<16x32xf32> loc(#loc1)
      %more = tt.dot %left, %left, %sum : tensor<16x16xbf16> * tensor<16x32xbf16> -> tensor<16x32xf32> loc(#loc1)
      scf.yield %more : tensor<16x32xf32> loc(#loc1)
    } loc(#loc1)
    %before = tt.load %outs : tensor<16x32x!tt.ptr<f32>> loc(#loc)
    tt.store %outs, %total : tensor<16x32x!tt.ptr<f32>> loc(#loc)
    tt.return loc(#loc)
  } loc(#loc)
} loc(#loc)
""".replace("ARGUMENTS", ", ".join(f"%{name}: {type_} loc(#loc)" for name, type_ in TYPES.items()))
FOR = (("kernel.py", 12),)


def reading(*loops: MachineLoop, instructions: int = 1000) -> KernelReading:
    return KernelReading(64, 0, 1024, warps=4, instructions=instructions, loops=loops, ir=IR)


@pytest.fixture
def batch() -> KnownBatch:
    words = np.zeros(SHAPE.starts()[-1], dtype=np.int32)
    words[:7] = [40, 33, 3, 8, 0, 0, 50]  # in the order of the header: distinct, rows, tiles, …
    return KnownBatch(SHAPE, words, table_rows=101)


def test_instructions_count_by_the_trips_that_the_batch_gives(batch):
    buffer = torch.empty(SHAPE.starts()[-1], dtype=torch.int32, device="meta")
    table, out = (torch.empty(size, 7, device="meta") for size in (101, SHAPE.rows))
    launch = Launch(
        small_kernels.all_loops, "x", (6,), Configuration(), (buffer[:8], table.bfloat16(), table, out, 3), {}
    )
    loop = MachineLoop(100, 199, 100, matrix=4, asynchronous=2, lines=FOR)
    cost = kernel_cost(launch, reading(loop), batch, {buffer.untyped_storage()._cdata: buffer})
    assert cost.slots == 4 * (6 * 900 + 6 * 33 * 100)  # warps, programs, rows
    assert cost.issue_ms == pytest.approx(1000 * cost.slots / SLOTS_PER_S)
    assert (cost.loop_instructions, cost.asynchronous, cost.unknown_loops) == (100, 2, 0)
    assert cost.per_element == pytest.approx(100 * 4 * 32 / (16 * 32))  # the product that begins with zeros
    # The header and the table's true rows are read, the true tiles' rows read and written, one argument not used.
    assert cost.bytes == 8 * 4 + 40 * 7 * 2 + 2 * 3 * 16 * 7 * 4


def test_a_count_that_no_memory_tells_is_reported(batch):
    header, table = torch.empty(8, dtype=torch.int32, device="meta"), torch.empty(2, 2, device="meta")
    launch = Launch(small_kernels.all_loops, "x", (6,), Configuration(), (header, table, table, table, 3), {})
    assert kernel_cost(launch, reading(), batch, {}).unknown_loops == 1


def test_loops_of_one_statement_share_its_trips():
    rest = MachineLoop(300, 309, 10, 0, 0, FOR)
    unrolled = MachineLoop(100, 199, 40, 0, 0, FOR)
    inside = MachineLoop(110, 115, 6, 0, 0, (("elsewhere.py", 1),))
    counts = TripCounts({FOR: 80.0}, programs=5, unknown=frozenset())
    trips = loop_trips(reading(rest, inside, unrolled), counts)
    assert trips == {unrolled: 20.0, rest: 0.0, inside: 20.0}
    assert loop_trips(reading(inside), counts) == {inside: 5}


CHOSEN = """
  tt.func public @chosen(%a: !tt.ptr<f32>, %b: !tt.ptr<f32>, %c: !tt.ptr<f32>, %d: !tt.ptr<f32>, %n: i32) {
    %zero = arith.constant 0 : i32
    %first = arith.constant true
    %either = scf.if %first -> (!tt.ptr<f32>) {
      scf.yield %a : !tt.ptr<f32>
    } else {
      %next = tt.addptr %b, %n : !tt.ptr<f32>, i32
      scf.yield %next : !tt.ptr<f32>
    }
    %value = tt.load %either : !tt.ptr<f32>
    %last = scf.for %i = %zero to %zero step %zero iter_args(%p = %b) -> (!tt.ptr<f32>)  : i32 {
      tt.store %p, %value : !tt.ptr<f32>
      %on = tt.addptr %p, %i : !tt.ptr<f32>, i32
      scf.yield %on : !tt.ptr<f32>
    }
    %one = arith.select %first, %c, %last : !tt.ptr<f32>
    tt.store %one, %value : !tt.ptr<f32>
    tt.return
  }
"""


def test_a_pointer_that_is_chosen_counts_as_each_of_its_choices():
    assert memory_uses(CHOSEN) == {"a": 1, "b": 2, "c": 1}
