"""Every function of the C++ library that Python calls refuses sizes that do not fit, before it reads or writes."""

from __future__ import annotations

import ctypes
from typing import NamedTuple

import pytest
import torch

from iisan_fast import kernels
from iisan_fast.kernels import AdamState, dispatch
from iisan_fast.kernels.cpu import library, schedule
from iisan_fast.kernels.cpu.adam import AdamUpdate
from iisan_fast.kernels.cpu.structs import (
    STRUCTS,
    AdamStruct,
    CallStruct,
    ColumnsStruct,
    EncoderBlockStruct,
    EncoderStruct,
    FlatAdamStruct,
    FoldStruct,
    GatherStruct,
    ItemVectorsStruct,
    LossStruct,
    RecordStruct,
    RowsStruct,
    SquareSumsStruct,
    SumStruct,
    TowerStruct,
)

pytestmark = pytest.mark.skipif(bool(library.why_no_library()), reason=library.why_no_library() or "C++ is here")

SUM = dict(count=8)
FOLD = dict(start=0, count=4, outputs=16, between=3, rows=4, width=16, stride=3)
LOSS = dict(rows=2, items=5, width=16, words=1)
ENCODER = dict(
    epsilon=1e-6,
    rows=2,
    width=16,
    hidden=16,
    heads=2,
    blocks=1,
    length=4,
    positions=4,
    user_count=1,
    memory_size=1 << 15,
)
TOWER = dict(layers=1, bottleneck=16, width=16, embedding=16, total=3, start=1, count=2, views=1, temperature=0.1)
GATHER = dict(bytes=4, layers=2, width=16, total=4, start=1, count=3, item=32, layer=16)
COLUMNS = dict(rows=3, items=2)
VECTORS = dict(items=2, width=16, towers=1, room=2)
ROWS = dict(rows=3, items=2, width=16)
RECORD = dict(rows=3, step=5)
ONE_STEP = torch.ones(())
LINES = dict(lines=4, start=1, length=2, group_count=1, beta1=0.9, beta2=0.999, epsilon=1e-8, steps=ONE_STEP.data_ptr())
SQUARES = dict(count=8 * 1200, start=1, length=1)
EMPTY_ADAM = dict(count=0, start=0, length=0, beta1=0.9, beta2=0.999, epsilon=1e-8)

WRONG_ADAM = [("count", -1), ("start", -1), ("start", 1), ("length", 1), ("length", -1)]
WRONG_FOLD = [("outputs", 8), ("outputs", 0), ("width", 24), ("between", 0), ("rows", 0), ("stride", 2), ("count", 5)]
WRONG_FOLD += [("count", -1), ("start", -1), ("start", 3)]
WRONG_LOSS = [("rows", -1), ("items", 0), ("width", 5), ("width", 0), ("words", 0), ("items", 33), ("row_users", None)]
WRONG_ENCODER = [("width", 24), ("width", 0), ("hidden", 8), ("heads", 0), ("heads", 3), ("blocks", 0), ("blocks", 65)]
WRONG_ENCODER += [("rows", -1), ("length", 0), ("length", 5), ("positions", 3), ("user_count", 0), ("memory_size", 100)]
WRONG_TOWER = [(name, 0) for name in ("layers", "bottleneck", "width", "embedding", "views", "temperature")]
WRONG_TOWER += [("views", 3), ("start", -1), ("start", 2), ("count", -1), ("count", 3), ("total", 2), ("gelu", 1)]
WRONG_GATHER = [("bytes", 3), ("layers", 0), ("width", 0), ("start", -1), ("start", 2), ("count", 4), ("table", None)]
WRONG_VECTORS = [(name, 0) for name in ("items", "width", "towers")] + [("room", 1), ("items", 3)]
WRONG_ROWS = [("rows", -1), ("items", 0), ("width", 0)]
WRONG_LINES = [("lines", 2), ("start", -1), ("start", 3), ("length", -1), ("group_count", 0), ("steps", None)]
WRONG_LINES += [("sum_count", -1)]
WRONG_SQUARES = [("count", -8), ("count", 9), ("start", -1), ("start", 2), ("length", -1), ("length", 2)]

ENTRIES = {
    "add_up": (SumStruct, SUM, [("count", -1), ("total", None), ("part", None)]),
    "adam_update": (AdamStruct, EMPTY_ADAM, WRONG_ADAM),
    "adam_advance": (AdamStruct, EMPTY_ADAM, [("count", -1)]),
    "fold_forward": (FoldStruct, FOLD, [*WRONG_FOLD, ("product", None)]),
    "fold_backward": (FoldStruct, FOLD, [*WRONG_FOLD, ("upstream", None)]),
    "loss_forward": (LossStruct, LOSS, WRONG_LOSS),
    "loss_backward": (LossStruct, LOSS, [*WRONG_LOSS, ("upstream", None)]),
    "sequence_forward": (EncoderStruct, ENCODER, WRONG_ENCODER),
    "sequence_backward": (EncoderStruct, ENCODER, [*WRONG_ENCODER, ("upstream", None)]),
    "side_forward": (TowerStruct, TOWER, WRONG_TOWER),
    "side_backward": (TowerStruct, TOWER, [*WRONG_TOWER, ("upstream", None)]),
    "side_encode": (TowerStruct, TOWER, [*WRONG_TOWER, ("bottleneck", 8), ("joined", None)]),
    "gather_panels": (GatherStruct, GATHER, WRONG_GATHER),
    "square_sums": (SquareSumsStruct, SQUARES, WRONG_SQUARES),
    "adam_update_lines": (FlatAdamStruct, LINES, WRONG_LINES),
    "loss_columns": (ColumnsStruct, COLUMNS, [("rows", 0), ("items", 0)]),
    "item_vectors": (ItemVectorsStruct, VECTORS, WRONG_VECTORS),
    "item_vectors_backward": (ItemVectorsStruct, VECTORS, [*WRONG_VECTORS, ("of_vectors", None)]),
    "gather_rows": (RowsStruct, ROWS, WRONG_ROWS),
    "add_rows": (RowsStruct, ROWS, WRONG_ROWS),
    "record_loss": (RecordStruct, RECORD, [("rows", 0), ("step", -1)]),
}


class Filled(NamedTuple):
    """A struct whose pointers each point to a separate array of zeros."""

    call: ctypes.Structure
    memory: list[torch.Tensor]


def filled(struct: type[ctypes.Structure], values: dict) -> Filled:
    """Return a filled struct in which these values are set."""
    call = struct()
    memory = []

    def zeros() -> int:
        memory.append(torch.zeros(1 << 14))
        return memory[-1].data_ptr()

    for name, kind in struct._fields_:
        if kind is ctypes.c_void_p:
            setattr(call, name, call.before if name == "after" else zeros())  # ReLU uses one buffer for both
        elif kind is ctypes.c_void_p * 2:
            setattr(call, name, kind(zeros(), zeros()))
        elif kind is ctypes.POINTER(EncoderBlockStruct):
            block = EncoderBlockStruct(*(zeros() for _ in EncoderBlockStruct._fields_))
            setattr(call, name, ctypes.pointer(block))
    for name, value in values.items():
        setattr(call, name, value)
    return Filled(call, memory)


@pytest.mark.parametrize("name", ENTRIES)
def test_sizes_that_fit_are_computed(name):
    struct, values, _ = ENTRIES[name]
    call, memory = filled(struct, values)
    schedule.run(getattr(library.library(torch.float32), name), call)
    assert all(tensor.isfinite().all() for tensor in memory) or name == "loss_columns"  # the logarithm of 0


@pytest.mark.parametrize(
    ("name", "field", "value"), [(name, *change) for name, (_, _, wrong) in ENTRIES.items() for change in wrong]
)
def test_sizes_that_do_not_fit_are_refused(name, field, value):
    struct, values, _ = ENTRIES[name]
    call, memory = filled(struct, {**values, field: value})
    sizes = [size for size, kind in struct._fields_ if kind in (ctypes.c_int32, ctypes.c_int64)]
    with pytest.raises(ValueError) as error:
        schedule.run(getattr(library.library(torch.float32), name), call)
    sizes_in_call = ", ".join(f"{size} {getattr(call, size)}" for size in sizes)
    assert str(error.value) == f"{name} in C++: expected sizes that fit, found {sizes_in_call}"
    assert not any(tensor.any() for tensor in memory)


@pytest.mark.parametrize("slots", [[0, 4], [-1, 0], [2, 1]])
def test_rows_off_the_grid_or_out_of_order_are_refused(slots):
    places = torch.tensor(slots)
    encoder = filled(EncoderStruct, {**ENCODER, "slots": places.data_ptr()})
    with pytest.raises(ValueError, match="sequence_forward in C"):
        schedule.run(library.library(torch.float32).sequence_forward, encoder.call)


def test_an_encoder_of_wrong_sizes_has_no_memory():
    measure = library.library(torch.float32).sequence_memory
    measure.restype = ctypes.c_int64
    assert measure(ctypes.byref(filled(EncoderStruct, {**ENCODER, "blocks": 0}).call)) == -1


def test_a_schedule_names_the_call_that_was_refused():
    compiled = library.library(torch.float32)
    calls = schedule.Schedule(torch.float32)
    total = filled(SumStruct, SUM)
    right, wrong = filled(GatherStruct, GATHER), filled(GatherStruct, {**GATHER, "bytes": 3})
    first = calls.add(compiled.add_up, [total.call])
    calls.add(compiled.gather_panels, [right.call, wrong.call], first)
    message = r"gather_panels in C\+\+: expected sizes that fit, found item 32, layer 16, bytes 3"
    with pytest.raises(ValueError, match=message):
        calls.run()


@pytest.mark.parametrize(("first", "last", "threads"), [(0, 2, 1), (1, 0, 1), (-1, 0, 1), (0, 0, 0)])
def test_calls_that_wait_for_later_ones_are_refused(first, last, threads):
    compiled = library.library(torch.float32)
    total = filled(SumStruct, SUM)
    call = CallStruct(ctypes.cast(compiled.add_up, ctypes.c_void_p).value, ctypes.addressof(total.call), first, last)
    running = ctypes.c_void_p()
    assert compiled.begin(ctypes.byref(call), 1, threads, ctypes.byref(running)) == schedule.WRONG_SIZES
    assert not running and compiled.end(running) == 0


def adam_state(numbers: int, moment: int) -> AdamState:
    return AdamState(torch.ones(numbers), torch.zeros(moment), torch.zeros(numbers), torch.tensor(0.0))


def test_moments_shorter_than_their_parameter_are_refused_by_the_op_and_by_the_library():
    """A damaged checkpoint can have such moments; C++ would write beyond their end."""
    state = adam_state(numbers=1000, moment=1)
    for form in ("auto", "reference"):
        with pytest.raises(ValueError, match=r"states\[0\].mean: expected \[1000\], found \[1\]"):
            kernels.adam([state], form=form)
    with pytest.raises(ValueError, match=r"states\[0\].mean: expected \[1000\], found \[1\]"):
        AdamUpdate([state])
    state = adam_state(numbers=1000, moment=1000)
    update = AdamUpdate([state])
    update._parameters[0].mean_count = 1  # as if the checks in Python were missing
    with pytest.raises(ValueError, match=r"adam_update in C\+\+: expected sizes that fit, found count 1, start 0"):
        update([torch.ones(1000)], [0.1], (0.9, 0.999), 1e-8)
    assert torch.equal(state.parameter, torch.ones(1000)) and not state.mean.any() and not state.steps


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(mean=torch.zeros(8, dtype=torch.float64)), "states: it needs parameters and moments of one dtype"),
        (dict(square=torch.zeros(16)[::2]), "states: it needs contiguous parameters and moments on a CPU"),
        (dict(steps=torch.zeros((), dtype=torch.int64)), "states: it needs step counts of float32 on a CPU"),
    ],
)
def test_moments_that_c_cannot_read_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        AdamUpdate([adam_state(8, 8)._replace(**change)])


def test_a_gradient_of_another_size_than_its_parameter_is_refused():
    state = adam_state(numbers=1000, moment=1000)
    with pytest.raises(ValueError, match=r"gradients\[0\]: expected \[1000\], found \[999\]"):
        kernels.adam([state])([torch.ones(999)], [0.1], (0.9, 0.999), 1e-8)
    assert torch.equal(state.parameter, torch.ones(1000)) and not state.steps


@pytest.mark.parametrize(
    ("gradient", "description"),
    [(torch.ones(8, dtype=torch.bfloat16), "bfloat16 on cpu"), (torch.ones(8, device="meta"), "float32 on meta")],
)
def test_a_gradient_that_c_cannot_read_is_refused(gradient, description):
    state = adam_state(numbers=8, moment=8)
    with pytest.raises(ValueError, match=rf"gradients\[0\]: expected float32 on cpu, found {description}"):
        kernels.adam([state])([gradient], [0.1], (0.9, 0.999), 1e-8)
    assert torch.equal(state.parameter, torch.ones(8)) and not state.steps


def test_a_step_count_is_one_number():
    state = adam_state(8, 8)._replace(steps=torch.zeros(2))
    with pytest.raises(ValueError, match=r"states\[0\].steps: expected one number, found \[2\]"):
        kernels.adam([state])


@pytest.mark.parametrize("name", STRUCTS)
def test_a_struct_that_python_mirrors_wrongly_keeps_the_library_out(name, monkeypatch):
    class Longer(ctypes.Structure):
        _fields_ = [*STRUCTS[name]._fields_, ("more", ctypes.c_int64)]

    right = ctypes.sizeof(STRUCTS[name])
    monkeypatch.setitem(STRUCTS, name, Longer)
    monkeypatch.delenv(kernels.FORM_VARIABLE, raising=False)
    library._library.cache_clear()
    try:
        message = f"the struct {name} has {right} bytes in the compiled library, {ctypes.sizeof(Longer)} in Python"
        assert kernels.why_no_library().startswith(message) and "\n" not in kernels.why_no_library()
        with pytest.raises(library.NoLibrary, match=message):
            library.library(torch.float64)
        assert dispatch.choose("adam", "auto", [torch.ones(1)], {}) == "reference"
    finally:
        library._library.cache_clear()


@pytest.mark.parametrize("inputs", [[0, 2, 0], [-1, 0, 0]])
@pytest.mark.parametrize("name", ["gather_rows", "add_rows"])
def test_rows_of_items_out_of_range_are_refused(name, inputs):
    indices = torch.tensor(inputs)
    rows = filled(RowsStruct, {**ROWS, "inputs": indices.data_ptr()})
    with pytest.raises(ValueError, match=f"{name} in C"):
        schedule.run(getattr(library.library(torch.float32), name), rows.call)


def test_lines_of_a_group_without_a_rate_and_a_step_before_the_first_are_refused():
    groups = torch.ones(4, dtype=torch.uint8)
    none = torch.zeros(())
    for change in ({"groups": groups.data_ptr()}, {"steps": none.data_ptr()}):
        lines = filled(FlatAdamStruct, {**LINES, **change})
        with pytest.raises(ValueError, match="adam_update_lines in C"):
            schedule.run(library.library(torch.float32).adam_update_lines, lines.call)
