"""bench static: a step's launches, reads and memory hold their limits, and its figures are printed and refused well."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
import torch

from helpers.command_line import iisan_fast, refused
from helpers.datasets import make_sequences, write_dataset_folder
from iisan_fast.benchmarks import static
from iisan_fast.benchmarks.catalogue import BY_NAME
from iisan_fast.benchmarks.harness import Setup, run_benchmark
from iisan_fast.benchmarks.machine_code import KernelReading
from iisan_fast.benchmarks.settings import StaticSettings
from iisan_fast.benchmarks.static import CountedBatch, host_microseconds, padded_shapes, variant_names
from iisan_fast.benchmarks.static_step import ARCHITECTURES, Sizes, count_step
from iisan_fast.benchmarks.tables import NOT_MEASURED
from iisan_fast.data.packed_batches import RunPlan
from iisan_fast.ranks import Ranks

MOST_LAUNCHES = 30  # a step
ON_RANKS = 4 + 3  # more launches where several ranks take it: one of Triton and three copies; and three exchanges
MOST_BYTES = 0.6e9  # at their peak, at 64 users of Scientific
IR = "  tt.func public @kernel() attributes {noinline = false} {\n    tt.return loc(#loc)\n  } loc(#loc)\n"


@pytest.fixture(scope="module")
def counted(scientific) -> CountedBatch:
    """Count the published sizes at 64 users a batch."""
    return CountedBatch(scientific, 64, Sizes())


@pytest.fixture
def dataset(tmp_path):
    histories = [[1 + (user + 3 * i) % 40 for i in range(5 + user % 9)] for user in range(24)]
    return write_dataset_folder(tmp_path / "toy", make_sequences(histories, items=40))


def test_a_step_takes_at_most_thirty_launches(counted):
    for name in ARCHITECTURES:
        assert 0 < counted.steps[name].counter.total() <= MOST_LAUNCHES, counted.steps[name].counter.by_part()


def test_every_launch_of_a_step_is_triton(counted):
    assert not counted.counter.operators, counted.counter.operators
    parts = {part.partition(".")[0] for part in counted.counter.by_part()}
    assert parts == {"batch", "fold", "towers", "sequence", "loss", "record", "collect", "adam"}


@dataclass(frozen=True)
class LoggedRanks(Ranks):
    """Ranks that log their exchanges in place of them."""

    exchanges: list[tuple[str, int]] = field(default_factory=list)  # each with the numbers that a rank receives

    def gather_into(self, whole: torch.Tensor, block: torch.Tensor) -> None:
        self.exchanges.append(("gather", whole.numel()))
        assert whole.numel() == self.count * block.numel()

    def add_into(self, block: torch.Tensor, whole: torch.Tensor) -> None:
        self.exchanges.append(("add blocks", block.numel()))
        assert whole.numel() == self.count * block.numel()

    def add_up(self, tensor: torch.Tensor) -> torch.Tensor:
        self.exchanges.append(("add", tensor.numel()))
        return tensor


def test_a_step_on_ranks_takes_seven_launches_more(counted, scientific):
    """Its exchanges have fixed sizes, its host reads nothing and it allocates nothing, so that a graph can hold it."""
    ranks = LoggedRanks(1, 4)
    plan = RunPlan.of(scientific, 64, seed=1, ranks=ranks)
    counter = count_step(plan, "sm_90", Sizes()).counter
    (gathered, added_blocks, added) = ranks.exchanges
    assert (
        plan.shape.encoded == 192 and gathered == ("gather", 4 * 192 * 64) and added_blocks == ("add blocks", 192 * 64)
    )
    assert added[0] == "add" and 4_113_877 < added[1] < 4_200_000
    assert counter.total() + len(ranks.exchanges) == counted.counter.total() + ON_RANKS <= MOST_LAUNCHES
    assert counter.operators == {"exchange": {"copy_": 3}}
    assert counter.host_reads == [] and counter.allocations == 0


def test_the_host_reads_nothing(counted):
    assert counted.counter.host_reads == []


def test_a_run_has_one_shape(counted):
    assert padded_shapes(counted.plan) == 1


def test_the_peak_of_allocations_holds_its_limit(counted):
    step = counted.steps["sm_90"]
    assert step.table_bytes == 2 * (len(counted.plan.sequences.item_ids) + 1) * 7 * 768 * 2
    assert step.table_bytes + 4 * 4 * 4_113_877 < step.counter.peak < MOST_BYTES  # weights, gradients, two moments


def test_a_step_does_not_allocate(counted):
    assert counted.counter.allocations == 0


def test_many_users_take_as_many_launches(scientific, counted):
    many = CountedBatch(scientific, 8192, Sizes())
    assert many.counter.by_part() == counted.counter.by_part() and not many.counter.host_reads


def test_the_host_time_of_a_batch_is_measured(counted):
    assert 1 < host_microseconds(counted.plan) < 10_000


@pytest.fixture
def no_compiler(monkeypatch) -> None:
    """Let every kernel's machine code be one of a few numbers."""
    read = KernelReading(registers=40, spilled=8, shared=2048, warps=4, instructions=1000, loops=(), ir=IR)
    monkeypatch.setattr(static, "readings", lambda wanted: [read for _ in wanted])


def test_launches_of_one_kernel_are_told_apart():
    def launch(name: str, first: int, grid: tuple[int, ...] = (7, 2), **meta: object) -> SimpleNamespace:
        kernel = SimpleNamespace(arg_names=["x", "first"])
        return SimpleNamespace(kernel=kernel, name=name, arguments=("pointer", first), meta=meta, grid=grid)

    launches = [launch("adam", 3), launch("rows", 0, ATTEND=True, P=9), launch("rows", 1, ATTEND=False, P=9)]
    assert variant_names(launches) == ["", "attend, first=0", "first=1"]
    assert variant_names([launch("rows", 0), launch("rows", 0, grid=(4,))]) == ["grid=7x2", "grid=4"]


def run(dataset, settings: StaticSettings) -> dict:
    return run_benchmark(BY_NAME["static"], settings, Setup(dataset, torch.device("cpu")))


def test_figures_stand_in_a_result(dataset, no_compiler, monkeypatch):
    monkeypatch.setattr(static, "SIZES", Sizes(width=32, layers=2, bottleneck=16))
    result = run(dataset, StaticSettings(users=(8, 16)))
    small, large = result["steps"]
    assert (small["users"], large["users"]) == (8, 16) and small["launches"] == sum(small["launches_by_part"].values())
    assert {*result["versions"]} == {"torch", "triton"} and result["dataset"] == "toy"
    rows = result["kernels"]
    assert {(row["users"], row["architecture"]) for row in rows} == {(u, a) for u in (8, 16) for a in ARCHITECTURES}
    of_small = [row for row in rows if row["users"] == 8 and row["architecture"] == "sm_90"]
    assert sum(row["launches"] for row in of_small) == small["launches"]
    adam = next(row for row in of_small if row["kernel"] == "adam")
    programs = adam["grid"][0]
    assert adam["issue_ms"] == pytest.approx(1000 * 4 * 1000 * programs / static.SLOTS_PER_S)
    assert all(row["issue_ms"] is None for row in rows if row["architecture"] == "default")
    (towers,) = (row for row in small["ops"] if row["op"] == "towers")
    assert towers["floor_ms"] > 0 and towers["bound_ms"] >= towers["issue_ms"] > 0


def test_the_command_prints_tables_and_json(dataset, tmp_path, no_compiler, monkeypatch):
    monkeypatch.setattr(static, "SIZES", Sizes(width=32, layers=2, bottleneck=16))
    out = tmp_path / "static.json"
    printed = iisan_fast("bench", "static", dataset, "--users", 8, "--out", out)
    assert printed.returncode == 0, printed.stderr
    for words in (
        "launches of towers.forward",
        "peak of allocations",
        "8 users, sm_90",
        "8 users, default",
        "loss, 8 users",
    ):
        assert words in printed.stdout
    result = json.loads(out.read_text())
    assert result["command"] == "iisan-fast bench static DATASET --users=8 --kernels"
    without = iisan_fast("bench", "static", dataset, "--users", 8, "--no-kernels", "--json")
    assert json.loads(without.stdout)["kernels"] == NOT_MEASURED
    assert json.loads(without.stdout)["steps"][0]["bytes"] == NOT_MEASURED


def test_bad_arguments_get_one_line(dataset, tmp_path, monkeypatch):
    assert "--users 25: expected at most 24, the users of toy" in refused("bench", "static", dataset, "--users", 25)
    assert "expected" in refused("bench", "static", tmp_path / "nowhere", "--users", 8)
    assert "--out" in refused("bench", "static", dataset, "--users", 8, "--out", tmp_path)
    monkeypatch.setattr(static, "find_spec", lambda name: None)
    assert "expected the package triton" in refused("bench", "static", dataset)


@pytest.mark.long
def test_the_kernels_bounds_hold_their_limits(scientific_folder):
    """Every kernel of the step is compiled for two architectures, which takes minutes."""
    result = run(scientific_folder, StaticSettings())
    _, many = result["steps"]
    ops = {row["op"]: row for row in many["ops"]}
    assert ops["loss"]["issue_ms"] <= 0.50 and ops["towers"]["bound_ms"] <= 0.60
    for row in result["kernels"]:
        assert row["registers"] <= 255 and row["unknown_loops"] == 0, row
