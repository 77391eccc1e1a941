"""The kernels' benchmark: floors, exact gradients, what a row says where nothing can be measured, and the search."""

from __future__ import annotations

import dataclasses
import json
import os

import pytest
import torch
from PIL import Image

from helpers.command_line import iisan_fast, refused
from helpers.datasets import make_sequences
from iisan_fast import demo
from iisan_fast.benchmarks import exact_gradients, op_rows, ops, tuning
from iisan_fast.benchmarks.floors import H200, PASSES, device_rates, loss_costs, rank_costs, side_network_costs
from iisan_fast.benchmarks.machine import demo_sequences
from iisan_fast.benchmarks.op_cases import NEEDS_CUDA, OpCase, OpForm, make_cases, random_tables
from iisan_fast.benchmarks.op_rows import MEASURED
from iisan_fast.benchmarks.result_tables import tuned_lines
from iisan_fast.benchmarks.settings import OPS, TUNED_OPS, KernelSettings
from iisan_fast.data.sequences import Sequences, load_dataset
from iisan_fast.errors import InputError
from iisan_fast.kernels.gpu import configurations
from iisan_fast.kernels.gpu.configurations import Configuration

CPU = torch.device("cpu")
SMALL = KernelSettings(users=(8,), width=24, layers=3, bottleneck=8, embedding_dim=8)
SMALL_OPTIONS = ("--users", 8, "--width", 24, "--layers", 3, "--bottleneck", 8, "--embedding-dim", 8, "--device", "cpu")


@pytest.fixture(scope="module")
def sequences() -> Sequences:
    return demo_sequences()


@pytest.fixture(autouse=True)
def little_time(monkeypatch):
    monkeypatch.setattr(op_rows, "CPU_SECONDS", 0.01)


@pytest.fixture
def cases(sequences) -> dict[str, OpCase]:
    tables = random_tables(sequences, SMALL, CPU)
    return {case.op: case for case in make_cases(sequences, 8, tables, SMALL, CPU)}


def test_floors_of_the_shapes_that_the_project_aims_at():
    """8,192 users of Scientific on an H200, in milliseconds."""
    loss = loss_costs(30_800, 12_900, 64)
    side = side_network_costs(12_900, 7, 768, 64)
    assert [round(loss[name].floor_ms(H200), 2) for name in ("forward", "both")] == [0.10, 0.32]
    assert [round(side[name].floor_ms(H200), 2) for name in ("forward", "both")] == [0.07, 0.20]
    assert loss["forward"].flops / H200.flops == pytest.approx(65e-6, rel=0.02)
    assert side["forward"].bytes / H200.bytes == pytest.approx(65e-6, rel=0.02)
    assert rank_costs(12_076, 20_314, 64)["forward"].flops == pytest.approx(31e9, rel=0.02)


def test_passes_add_up():
    for costs in (loss_costs(300, 200, 64), side_network_costs(200, 7, 768, 64)):
        assert tuple(costs) == PASSES
        for name in ("bytes", "flops", "exponentials"):
            parts = getattr(costs["forward"], name) + getattr(costs["backward"], name)
            assert getattr(costs["both"], name) == parts


def test_only_an_h200_has_floors(monkeypatch):
    assert device_rates(CPU) is None
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA GH200 480GB")
    assert device_rates(torch.device("cuda")) is None


def test_demo_histories_are_those_of_the_demo(sequences, tmp_path, monkeypatch):
    written = []
    monkeypatch.setattr(demo, "draw", lambda product: Image.new("RGB", (1, 1)))
    monkeypatch.setattr(demo, "write_text_encoder", lambda *arguments: written.append(arguments))
    monkeypatch.setattr(demo, "write_image_encoder", lambda *arguments: written.append(arguments))
    loaded = load_dataset(demo.write_demo(tmp_path)[0]).sequences
    assert (loaded.user_ids, loaded.item_ids) == (sequences.user_ids, sequences.item_ids)
    assert (loaded.items == sequences.items).all() and (loaded.offsets == sequences.offsets).all()
    assert loaded.max_inputs == sequences.max_inputs


@pytest.mark.parametrize("op", ["side-network", "loss", "loss-unmasked"])
def test_exact_gradients_in_parts_are_those_of_the_whole(cases, op, monkeypatch):
    whole = cases[op].exact()
    monkeypatch.setattr(exact_gradients, "EXACT_ITEMS", 7)
    monkeypatch.setattr(exact_gradients, "EXACT_LOGITS", 500)
    for part, all_at_once in zip(cases[op].exact(), whole):
        torch.testing.assert_close(part, all_at_once, rtol=1e-12, atol=1e-15)


def test_gradient_error_is_relative_to_all_gradients():
    exact = [torch.tensor([3.0, 0.0]).double(), torch.tensor([4.0]).double()]
    off = [torch.tensor([3.0, 0.5]), torch.tensor([4.0])]
    assert exact_gradients.gradient_error(off, lambda: exact) == pytest.approx(0.1)
    assert exact_gradients.gradient_error(exact, lambda: exact) == 0


def test_eager_gradients_are_exact_to_their_precision(cases):
    for op, bound in (("side-network", 1e-5), ("loss", 0.05), ("loss-unmasked", 0.05)):
        both = op_rows.timed_call(cases[op], cases[op].forms["eager"].make(), "both")
        assert 0 < exact_gradients.gradient_error(both(), cases[op].exact) < bound


def test_backward_alone_repeats_the_gradients_of_both(cases):
    for op in ("side-network", "loss"):
        run = cases[op].forms["eager"].make()
        both, backward = (op_rows.timed_call(cases[op], run, name) for name in ("both", "backward"))
        for _ in range(2):
            torch.testing.assert_close(both(), backward(), rtol=0, atol=0)


def test_what_fails_says_why_and_the_rest_goes_on(cases):
    def fail():
        raise RuntimeError("no room\nat all")

    case = cases["target-rank"]
    forms = {"broken": OpForm(fail, needs_cuda=False), "absent": OpForm(fail, module="no_such_module"), **case.forms}
    rows = op_rows.measure_case(dataclasses.replace(case, forms=forms), CPU, exact=True)
    assert {row["form"]: row["status"] for row in rows} == {
        "broken": "failed: RuntimeError: no room",
        "absent": "not installed",
        "eager": MEASURED,
        "torch.compile": NEEDS_CUDA,
        "triton": NEEDS_CUDA,
    }
    assert [row["p50_ms"] is not None for row in rows] == [False, False, True, False, False]


def test_batches_that_nobody_asked_for_are_left_out(sequences):
    sizes, left_out = ops.batch_sizes(sequences, "demo", KernelSettings(), CPU)
    assert sizes == [64, 512] and list(left_out) == ["8,192 users"]
    sizes, left_out = ops.batch_sizes(sequences, "demo", KernelSettings(), torch.device("cuda"))
    assert sizes == [64, 512] and left_out == {"8,192 users": "demo has 1,600 users"}
    assert ops.batch_sizes(sequences, "demo", KernelSettings(users=(9, 3, 9)), CPU) == ([9, 3], {})


def test_the_command_writes_what_it_prints(tmp_path):
    out = tmp_path / "result.json"
    result = iisan_fast("bench", "kernels", *SMALL_OPTIONS, "--json", "--out", out)
    assert result.returncode == 0, result.stderr
    shown = json.loads(result.stdout)
    assert shown == json.loads(out.read_text())
    assert shown["dataset"] == "demo" and shown["environment"]["device"] == "cpu" and "commit" in shown
    assert shown["command"].startswith("iisan-fast bench kernels --users=8 --op=side-network")
    assert {row["op"] for row in shown["rows"]} == set(OPS) and not shown["not_measured"]
    for row in shown["rows"]:
        eager = row["form"] == "eager"
        assert (row["status"] == MEASURED) == eager and row["users"] == 8 and row["floor_share"] is None
        assert (row["p20_ms"] is None) != eager and row["launches"] is None and row["peak_bytes"] is None
        assert not eager or 0 < row["p20_ms"] <= row["p50_ms"] <= row["p80_ms"]
        has_error = eager and row["pass"] == "both"
        assert (row["gradient_error"] is not None) == has_error
    unmasked = {row["form"] for row in shown["rows"] if row["op"] == "loss-unmasked"}
    assert unmasked == {"eager", "torch.compile", "triton", "liger-kernel", "cut-cross-entropy"}


def test_the_table_says_what_was_not_measured(toy_run):
    options = [*SMALL_OPTIONS, "--op", "side-network", "--op", "target-rank", "--exact-users", 4]
    result = iisan_fast("bench", "kernels", toy_run[0], *options)
    assert result.returncode == 0, result.stderr
    assert "side-network, 8 users" in result.stdout and "target-rank, 8 users: 40 items" in result.stdout
    assert "not measured" in result.stdout and "…" not in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 120


def test_bad_input_gets_one_line(toy_run, tmp_path):
    command = ("bench", "kernels", toy_run[0], "--device", "cpu")
    assert "--tune needs a CUDA GPU" in refused(*command, "--tune")
    assert "--users 61: expected at most 60, the users of toy" in refused(*command, "--users", 61)
    assert "--users" in refused(*command, "--users", 0)
    assert "--op" in refused(*command, "--op", "softmax")
    assert "folder that exists" in refused(*command, "--out", tmp_path / "none" / "result.json")
    assert "expected a file, found the folder" in refused(*command, "--out", tmp_path)
    assert "no such folder" in refused("bench", "kernels", tmp_path / "nowhere", "--device", "cpu")


def test_help_of_the_group_names_its_commands():
    assert "kernels" in iisan_fast("bench", "--help").stdout and "--tune" in iisan_fast("bench", "kernels", "-h").stdout


def test_tuning_refuses_settings_that_it_would_ignore():
    cuda = torch.device("cuda")
    with pytest.raises(InputError, match="takes no --users"):
        tuning.check_tunable(KernelSettings(users=(64,), ops=TUNED_OPS), cuda)
    with pytest.raises(InputError, match="found loss-unmasked, target-rank-float32"):
        tuning.check_tunable(KernelSettings(ops=OPS), cuda)
    tuning.check_tunable(KernelSettings(ops=("loss",)), cuda)


def bowl(candidate: Configuration) -> float:
    """Fastest at BM 64, 8 warps, 3 stages; 128 rows do not fit."""
    if candidate.blocks["BM"] == 128:
        raise RuntimeError("out of resources")
    return 1 + abs(candidate.blocks["BM"] - 64) / 64 + abs(candidate.warps - 8) / 8 + abs(candidate.stages - 3)


def test_search_finds_the_fastest_and_counts_what_it_skips():
    shipped = Configuration({"BM": 16, "PROGRAMS": 256}, warps=2, stages=1)
    tuned = tuning.search("kernel", "large", shipped, bowl)
    assert (tuned.best.blocks["BM"], tuned.best.warps, tuned.best.stages) == (64, 8, 3)
    assert tuned.ms == 1 and tuned.shipped_ms == bowl(shipped) and tuned.skipped > 0
    assert tuned.tried < 60


def test_search_stays_where_nothing_is_better_than_noise():
    shipped = Configuration({"BM": 64}, warps=8, stages=3)
    tuned = tuning.search("kernel", "small", shipped, lambda candidate: 1 - 0.01 * (candidate != shipped))
    assert tuned.best == shipped and tuned.skipped == 0


def test_search_needs_the_shipped_configuration_to_run():
    with pytest.raises(RuntimeError, match="out of resources"):
        tuning.search("kernel", "small", Configuration({"BM": 128}), bowl)


def test_neighbours_differ_by_a_step_and_tiles_may_move_together():
    neighbours = list(tuning.neighbours(Configuration({"BM": 16, "BN": 16}, warps=8, stages=1)))
    for blocks in ({"BM": 32, "BN": 16}, {"BM": 32, "BN": 32}):
        assert Configuration(blocks, 8, 1) in neighbours
    for warps, stages in ((4, 1), (8, 2)):
        assert Configuration({"BM": 16, "BN": 16}, warps, stages) in neighbours
    assert len(neighbours) == 5


OPS_THAT_ARE_TUNED = ("side_", "loss_", "target_")  # by size; a kernel with one entry for all sizes is not


def test_every_tile_of_the_table_has_a_ladder():
    tables = [table for kernel, table in configurations.CONFIGURATIONS.items() if kernel.startswith(OPS_THAT_ARE_TUNED)]
    shipped = [entry for table in tables for (_, size), entry in table.items() if size != configurations.ANY_SIZE]
    assert shipped and {name for entry in shipped for name in entry.blocks} <= tuning.LADDERS.keys()


def test_configured_restores_the_table():
    before = dict(configurations.CONFIGURATIONS["target_rank"])
    other = Configuration({"BM": 32, "BN": 32, "PROGRAMS": 132})
    with tuning.configured("target_rank", "sm_90", "small", other):
        assert configurations.table_entry("target_rank", "sm_90", "small") == other
    with pytest.raises(KeyError), tuning.configured("target_rank", "default", "small", other):
        raise KeyError
    assert configurations.CONFIGURATIONS["target_rank"] == before


def test_entries_are_printed_as_the_table_writes_them(monkeypatch):
    monkeypatch.setattr(tuning, "architecture", lambda device: "sm_90")
    best = Configuration({"BM": 64, "BD": 32}, warps=8, stages=3)
    tuned = [tuning.TunedKernel("side_project", size, best, 0.5, 1.0, 9, 2) for size in ("small", "large")]
    text = "\n".join(tuned_lines(tuning.as_json(tuned, CPU)))
    assert '("sm_90", "large"): Configuration({"BM": 64, "BD": 32}, warps=8, stages=3),' in text
    assert eval(f"{{{text}}}") == {"side_project": {("sm_90", "small"): best, ("sm_90", "large"): best}}
    assert tuning.as_json(tuned, CPU)[1]["size"] == "large"


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs Triton's interpreter")
def test_tuning_a_kernel_takes_the_fastest_that_agrees(monkeypatch):
    """Interpreted, with made-up times: tiles of unequal sides do not compile, and one candidate computes nonsense."""
    monkeypatch.setattr(tuning, "architecture", lambda device: "default")
    monkeypatch.setattr(tuning, "LADDERS", {"BM": (16, 32, 64), "BN": (16, 32, 64)})
    now = configurations.CONFIGURATIONS["target_rank"]
    monkeypatch.setattr(tuning, "cuda_graph_ms", lambda call: 1 / now["default", "fp32"].blocks["BM"])
    toy = make_sequences([[item, item + 1, item + 2, item + 3, item + 4] for item in range(1, 16)])
    (case,) = make_cases(toy, 15, [], dataclasses.replace(SMALL, ops=("target-rank-float32",)), CPU)
    ((kernel, call),) = tuning.tunable(case)

    def nonsense_at_64():
        masked, unmasked = call()
        return masked, unmasked * (1 + (now["default", "fp32"].blocks["BM"] == 64))

    tuned = tuning.tune_kernel(kernel, "fp32", nonsense_at_64, CPU)
    assert kernel == "target_rank" and tuned.best.blocks["BM"] == tuned.best.blocks["BN"] == 32
    assert tuned.shipped_ms == 1 / 16 and tuned.skipped >= 3
