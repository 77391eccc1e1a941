"""The C++ library: it is compiled once and cached; if it is missing, one line says why."""

from __future__ import annotations

import ctypes
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from helpers.compiler import needs_compiler
from iisan_fast import kernels
from iisan_fast.kernels import States, Tower, dispatch
from iisan_fast.kernels.cpu import library, schedule
from iisan_fast.kernels.cpu import step_memory as memory
from iisan_fast.kernels.cpu.step_memory import Memory
from iisan_fast.kernels.reference import inbatch_cross_entropy as loss_reference

QUICK = tuple("-O0" if flag == "-O3" else flag for flag in library.FLAGS)  # for tests that do not run the compiled code


@pytest.fixture
def anew(monkeypatch, tmp_path):
    """Start without compiled files and without cached results; return the folder."""
    library._library.cache_clear()
    monkeypatch.setenv(library.CACHE_VARIABLE, str(tmp_path / "compiled"))
    yield tmp_path / "compiled"
    library._library.cache_clear()


@pytest.mark.long
@needs_compiler
def test_it_is_compiled_once_into_a_private_folder(anew, monkeypatch):
    monkeypatch.setattr(library, "FLAGS", QUICK)
    assert library.why_no_library() == ""
    assert sorted(path.suffix for path in anew.iterdir()) == ["", ".so"]  # the lock and the library
    assert anew.stat().st_mode & 0o077 == 0
    library._library.cache_clear()
    monkeypatch.setattr(library, "_compile", lambda *_: pytest.fail("compiled again"))
    assert library.library(torch.float32).side_forward


@pytest.mark.long  # all other tests of C++ run the default compiler's library
@pytest.mark.parametrize("compiler", ["g++", "clang++"])
def test_what_each_compiler_makes_computes_the_same(compiler, anew, monkeypatch):
    if shutil.which(compiler) is None:
        pytest.skip(f"{compiler} is not here")
    monkeypatch.setenv("CXX", compiler)
    towers, states, projections = small_side_network()
    parameters = [weight for tower in towers for weight in tower[1:]] + projections
    results = []
    for form in ("cpu", "reference"):
        outputs = kernels.side_towers(states, towers, projections=projections, form=form)
        results.append([*outputs, *torch.autograd.grad(sum(output.square().sum() for output in outputs), parameters)])
    assert len(list(anew.glob("*.so"))) == 1
    for actual, expected in zip(*results, strict=True):
        assert (actual - expected).norm() <= 2e-6 * expected.norm()


def small_side_network() -> tuple[list[Tower], list[States], list[torch.Tensor]]:
    """Return two fp32 towers of two layers over one view of 35 items; their widths are no multiples of a panel."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).requires_grad_()

    towers = [Tower((0,), random(2), random(2, 5, 20), random(2, 5), random(2, 20, 5), random(2, 20)) for _ in range(2)]
    return towers, [States(random(35, 2, 20).detach())], [random(9, 20) for _ in towers]


@needs_compiler
def test_other_sources_are_compiled_anew(anew, monkeypatch, tmp_path):
    before = library._key(library._compiler())
    sources = tmp_path / "sources"
    sources.mkdir()
    for path in library.CPP_FOLDER.iterdir():
        (sources / path.name).write_bytes(path.read_bytes())
    monkeypatch.setattr(library, "CPP_FOLDER", sources)
    assert library._key(library._compiler()) == before
    (sources / "panels.h").write_text("// changed\n")
    assert library._key(library._compiler()) != before


@needs_compiler
def test_an_error_of_the_compiler_is_one_line_and_leaves_nothing(anew, monkeypatch, tmp_path):
    sources = tmp_path / "sources"
    sources.mkdir()
    (sources / "broken.cpp").write_text("int broken( {")
    monkeypatch.setattr(library, "CPP_FOLDER", sources)
    reason = library.why_no_library()
    assert "exits with 1" in reason and "broken.cpp" in reason and "\n" not in reason
    assert [path.name for path in anew.iterdir()] == ["lock"]
    with pytest.raises(library.NoLibrary, match="exits with 1"):
        library.library(torch.float32)


def test_without_a_compiler_pytorch_runs_and_the_log_says_why(anew, monkeypatch, caplog):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.delenv(kernels.FORM_VARIABLE, raising=False)
    dispatch.reported.clear()
    queries = torch.randn(3, 16, requires_grad=True)
    items = torch.randn(5, 16)
    targets = torch.tensor([0, 4, 2])
    with caplog.at_level(logging.INFO, logger="iisan_fast.kernels"):
        losses = kernels.inbatch_cross_entropy(queries, items, targets, reduction="none")
    assert torch.equal(losses, loss_reference.inbatch_cross_entropy(queries, items, targets))
    reason = "no C++ compiler is here (c++, g++, clang++)"
    assert caplog.messages == [f"kernels: inbatch_cross_entropy by reference (cpu: {reason})"]
    with pytest.raises(ValueError) as refused:
        kernels.inbatch_cross_entropy(queries, items, targets, form="cpu")
    assert str(refused.value) == f"form: cpu cannot run inbatch_cross_entropy: {reason}; use reference"
    monkeypatch.setenv("CXX", "no-such-compiler -O2")
    library._library.cache_clear()
    assert library.why_no_library() == "CXX names no program: 'no-such-compiler -O2'"


@needs_compiler
def test_a_cache_that_cannot_be_written_is_a_reason(anew, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(library.CACHE_VARIABLE, str(tmp_path / "file" / "below"))
    assert library.why_no_library().startswith("the compiled library cannot be kept or loaded: ")


@pytest.mark.long
@needs_compiler
def test_processes_that_compile_at_once_do_not_disturb_one_another(tmp_path):
    program = "from iisan_fast.kernels.cpu import library\n"
    program += f"library.FLAGS = {QUICK}; print(library.why_no_library() or 'compiled')"
    environment = {**os.environ, library.CACHE_VARIABLE: str(tmp_path)}
    both = [
        subprocess.Popen(
            [sys.executable, "-c", program],
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[2],
        )
        for _ in range(2)
    ]
    assert [process.communicate()[0].strip() for process in both] == ["compiled", "compiled"]
    assert len(list(tmp_path.glob("*.so*"))) == 1


def test_memory_is_used_again_once_it_is_free_and_never_before(monkeypatch):
    monkeypatch.setattr(Memory, "free", [])
    first = Memory()
    one, other = (first.empty(torch.float32, 100, 16) for _ in range(2))
    assert one.data_ptr() % 64 == 0 and abs(one.data_ptr() - other.data_ptr()) >= one.nbytes
    places = {one.data_ptr(), other.data_ptr()}
    del first
    second = Memory()
    assert second.empty(torch.float32, 100, 16).data_ptr() in places


def test_unused_memory_is_freed(monkeypatch):
    monkeypatch.setattr(Memory, "free", [])
    Memory().empty(torch.uint8, 50_000)
    for _ in range(memory.KEPT_FOR + 1):
        assert [size > 50_000 for _, size, _ in Memory.free].count(True) == 1
        Memory().empty(torch.uint8, 100)
    Memory().empty(torch.uint8, 100)
    assert len(Memory.free) == 1 and Memory.free[0][1] < 1000


def test_memory_that_lacks_is_an_error():
    class Arguments(ctypes.Structure):
        _fields_ = [("rows", ctypes.c_int32)]

    with pytest.raises(MemoryError, match="lacks memory"):
        schedule.run(lambda arguments: 1, Arguments())
