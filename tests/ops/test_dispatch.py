"""The public ops: which backend runs, what is refused, and that they work as PyTorch operators."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from helpers.kernel_cases import DEVICE, LossCase, SideCase, rank_case
from iisan_fast import kernels
from iisan_fast.kernels import checks, dispatch, reference
from iisan_fast.kernels.gpu import (
    inbatch_cross_entropy as cross_entropy,
)
from iisan_fast.kernels.gpu import (
    launch,
)
from iisan_fast.kernels.gpu import (
    side_towers as side_network,
)
from iisan_fast.kernels.gpu import (
    target_rank as rank,
)
from iisan_fast.kernels.reference import States

ROOT = Path(__file__).parents[2]


@pytest.fixture
def loss() -> dict:
    case = LossCase(6, 40)
    return {"queries": case.queries, "items": case.items, **case.keywords}


@pytest.mark.parametrize(
    ("device", "reason", "expected"), [("cpu", "", "native"), ("cpu", "no compiler", "host"), ("cuda", "", "triton")]
)
def test_auto_takes_triton_on_cuda_and_the_forms_for_a_cpu_elsewhere(device, reason, expected, monkeypatch):
    monkeypatch.delenv(kernels.BACKEND_VARIABLE, raising=False)
    monkeypatch.setattr(dispatch, "why_not", lambda: reason)

    class StandIn:
        dtype = torch.bfloat16
        device = torch.device("cpu")

    StandIn.device = torch.device(device)
    assert dispatch._backend("op", "auto", [StandIn()]) == expected


def test_the_environment_variable_decides_for_auto_and_for_nothing_else(loss, monkeypatch):
    monkeypatch.setenv(kernels.BACKEND_VARIABLE, "triton")
    launch.launches.clear()
    kernels.inbatch_cross_entropy(**loss)
    assert launch.launches == {"loss_forward": 1}
    kernels.inbatch_cross_entropy(**loss, backend="torch")
    assert launch.launches == {"loss_forward": 1}
    monkeypatch.setenv(kernels.BACKEND_VARIABLE, "cuda")
    message = "IISAN_FAST_BACKEND: expected auto, torch, host, native, triton, found 'cuda'"
    with pytest.raises(ValueError, match=message):
        kernels.inbatch_cross_entropy(**loss)


def test_triton_asked_for_by_name_is_never_replaced(loss, monkeypatch):
    doubles = {k: v.double() if v.is_floating_point() else v for k, v in loss.items()}
    with pytest.raises(ValueError, match="backend: triton cannot run inbatch_cross_entropy: .* found float64"):
        kernels.inbatch_cross_entropy(**doubles, backend="triton")
    monkeypatch.setattr(cross_entropy, "launch", lambda *_, **__: None)  # as if the kernels did not run
    launch.launches.clear()
    losses = kernels.inbatch_cross_entropy(**loss, reduction="none", backend="triton")
    assert not launch.launches and not torch.allclose(losses, reference.row_losses(**loss))


def test_triton_on_cpu_tensors_needs_the_interpreter():
    program = (
        "import torch; from iisan_fast import kernels\n"
        "kernels.target_rank(torch.ones(1, 1), torch.ones(1, 1), torch.zeros(1, dtype=torch.int64),"
        " torch.zeros(1, 0, dtype=torch.int64), backend='triton')"
    )
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    result = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert "ValueError: backend: triton cannot run target_rank: it needs CUDA tensors" in result.stderr


def test_importing_the_package_imports_no_triton():
    program = (
        "import sys; sys.modules['triton'] = None; import torch\n"
        "import iisan_fast.training.trainer; from iisan_fast import kernels\n"
        "print(kernels.inbatch_cross_entropy(torch.ones(1, 1), torch.ones(1, 1), torch.tensor([0])).item())"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.stdout.strip() == "0.0", result.stderr


def test_the_choice_is_logged_once(loss, caplog, monkeypatch):
    dispatch._report.cache_clear()
    with caplog.at_level(logging.INFO, logger="iisan_fast.kernels"):
        for _ in range(3):
            kernels.inbatch_cross_entropy(**loss, backend="triton")
    assert caplog.messages == [f"kernels: triton on {DEVICE}"]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"queries": torch.ones(6, 8)}, r"queries: expected \[rows, 32\] as items are wide, found \[6, 8\]"),
        ({"queries": torch.ones(6, 32, dtype=torch.float64)}, "queries: expected float32 like items, found float64"),
        ({"items": torch.ones(40)}, r"items: expected 2 dimensions, found \[40\]"),
        ({"items": torch.ones(40, 32, dtype=torch.int64)}, "items: expected a floating-point dtype, found int64"),
        ({"targets": torch.zeros(6, dtype=torch.int32)}, "targets: expected int64, found int32"),
        ({"targets": torch.zeros(5, dtype=torch.int64)}, r"targets: expected \[6\], found \[5\]"),
        ({"targets": torch.full((6,), 40)}, "targets: expected indices from 0 to 39, found 40"),
        ({"targets": torch.full((6,), -1)}, "targets: expected indices from 0 to 39, found -1"),
        ({"row_users": torch.full((6,), 3)}, "row_users: expected indices from 0 to 2, found 3"),
        ({"row_users": None}, "row_users, history_bits: expected both or neither"),
        (
            {"history_bits": torch.zeros(3, 1, dtype=torch.int32)},
            "history_bits: expected at least 2 words for 40 items",
        ),
        ({"history_bits": torch.zeros(3, 2, dtype=torch.int64)}, "history_bits: expected int32, found int64"),
        ({"log_popularity": torch.zeros(39)}, r"log_popularity: expected \[40\], found \[39\]"),
        ({"log_multiplicity": torch.ones(40).long()}, "log_multiplicity: expected a floating-point dtype, found int64"),
        ({"items": torch.ones(40, 32, device="meta")}, "queries: expected device meta, found cpu"),
        ({"reduction": "sum"}, "reduction: expected mean or none, found 'sum'"),
        ({"backend": "cuda"}, "backend: expected auto, torch, host, native, triton, found 'cuda'"),
    ],
)
@pytest.mark.skipif(DEVICE != "cpu", reason="mixes devices by hand")
def test_the_loss_refuses(changed, message, loss):
    with pytest.raises(ValueError, match=message):
        kernels.inbatch_cross_entropy(**(loss | changed))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"targets": torch.full((4,), 9)}, "targets: expected indices from 0 to 8, found 9"),
        ({"excluded": torch.zeros(3, 2, dtype=torch.int64)}, "excluded: expected 4 rows, found 3"),
        ({"excluded": torch.full((4, 2), -2)}, "excluded: expected indices from -1 to 8, found -2"),
    ],
)
def test_the_rank_refuses(changed, message):
    names = ("queries", "items", "targets", "excluded")
    arguments = dict(zip(names, rank_case(4, 9, 8, 2), strict=True)) | {k: v.to(DEVICE) for k, v in changed.items()}
    with pytest.raises(ValueError, match=message):
        kernels.target_rank(**arguments)


def test_the_towers_refuse():
    case = SideCase(items=4)
    (first, rows), tower = case.states[0], case.towers[0]

    def refused(message: str, states=case.states, towers=case.towers, activation: str = "relu") -> None:
        with pytest.raises(ValueError, match=message):
            kernels.side_towers(states, towers, activation)

    refused("activation: expected relu or gelu, found 'tanh'", activation="tanh")
    refused("states: expected one or two views, found 0", states=[])
    refused("towers: expected 1 to 32, found 0", towers=[])
    refused(r"states\[0\].table: expected \[rows, 3, 48\], found \[7, 3, 40\]", states=[States(first[..., :40], rows)])
    refused(r"states\[0\].rows: expected int64, found int32", states=[States(first, rows.int())])
    refused(r"states\[1\]: expected 4 items as in states\[0\], found 7", states=[case.states[0], States(first)])
    refused("no gradient flows to states read by row", states=[States(first.clone().requires_grad_(), rows)])
    refused(r"towers\[0\].views: expected", towers=[tower._replace(views=(1, 0))])
    refused(r"towers\[0\].views: expected", states=case.states[:1], towers=[tower._replace(views=(1,))])
    refused(r"towers\[1\].gate: expected gates in all towers", towers=[tower, tower._replace(gate=None)])
    refused(r"towers\[0\].up_bias: expected \[3, 48\], found \[3\]", towers=[tower._replace(up_bias=tower.gate)])
    refused(r"towers\[0\].down_bias: expected \[3, 16\], found None", towers=[tower._replace(down_bias=None)])
    refused(r"towers\[0\].gate: expected float32, found float16", towers=[tower._replace(gate=tower.gate.half())])
    empty = tower._replace(down_weight=tower.down_weight[:0])
    refused(r"towers\[0\].down_weight: expected no empty dimension, found \[0, 16, 48\]", towers=[empty])
    if DEVICE == "cpu":
        beyond = [States(first, torch.full((4,), len(first)))]
        refused(r"states\[0\].rows: expected indices from 0 to 6, found 7", states=beyond, towers=[tower])
        last = torch.full((4,), len(first) - 1)  # one tensor for both views, of which the second has fewer rows
        views = [States(first, last), States(first[1:], last)]
        refused(r"states\[1\].rows: expected indices from 0 to 5, found 6", states=views)


def test_the_ops_are_sound_operators():
    """Schema, fake tensors, autograd registration and ahead-of-time dispatch agree with what the kernels do."""
    side, loss = SideCase(items=5, layers=2, dense=[1]), LossCase(5, 40)
    captured: list[tuple] = []
    for module, name in ((side_network, "_side_towers"), (cross_entropy, "_row_losses"), (rank, "_counts")):
        operator = getattr(module, name)

        def record(*arguments, operator=operator):
            captured.append((operator, arguments))
            return operator(*arguments)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, name, record)
            side.run(lambda *a: kernels.side_towers(*a, backend="triton"))
            loss.run(lambda *a, **k: kernels.inbatch_cross_entropy(*a, **k, reduction="none", backend="triton"))
            kernels.target_rank(*rank_case(4, 9, 8, 2), backend="triton")
    assert len(captured) == 3
    for operator, arguments in captured:
        detached = [a.detach().requires_grad_(a.requires_grad) if isinstance(a, torch.Tensor) else a for a in arguments]
        torch.library.opcheck(operator, detached)


@pytest.mark.parametrize("kinds", [((0,), (1,), (0, 1)), ((0,),)])
def test_the_ops_compile_as_one_graph(kinds):
    side, loss = SideCase(items=5, layers=2, kinds=kinds), LossCase(5, 40)
    names = [name for name, value in loss.keywords.items() if value is not None]

    def both(outputs_of: list, queries: torch.Tensor, items: torch.Tensor, values: list) -> torch.Tensor:
        towers = kernels.side_towers(side.states, outputs_of, backend="triton")
        keywords = dict(zip(names, values, strict=True))
        return sum(t.sum() for t in towers) + kernels.inbatch_cross_entropy(
            queries, items, **keywords, backend="triton"
        )

    leaves = [p.requires_grad_() for tower in side.towers for p in tower[1:]]
    leaves += [tensor.requires_grad_() for tensor in (loss.queries, loss.items)]
    arguments = (side.towers, loss.queries, loss.items, [loss.keywords[name] for name in names])
    compiled = torch.compile(both, backend="aot_eager", fullgraph=True)
    for ours, eager in zip(
        torch.autograd.grad(compiled(*arguments), leaves), torch.autograd.grad(both(*arguments), leaves), strict=True
    ):
        torch.testing.assert_close(ours, eager)


@pytest.mark.parametrize(
    ("dtype", "architectures", "options"),
    [("bfloat16", (80, 89, 90), []), ("float32", (80, 89, 90), []), ("bfloat16", (90,), ["--other-forms"])],
)
def test_every_kernel_compiles_ahead_of_time_within_a_gpus_means(dtype, architectures, options):
    """At every shipped configuration: shared memory fits, and no register is spilled. sm_89 stands for the default."""
    kilobytes = {80: 163, 89: 99, 90: 227}
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, str(ROOT / "tests" / "helpers" / "ahead_of_time.py"), "--dtype", dtype]
    command += [*options, "--architecture", *map(str, architectures)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    seen = {(line["kernel"], line["architecture"], line["size"]) for line in lines}
    sizes = {name: {size for _, size in entries} for name, entries in launch.CONFIGURATIONS.items()}
    of_dtype = {"fp32"} if dtype == "float32" else {"small", "large", "wide"}
    assert seen == {(name, a, size) for name in sizes for a in architectures for size in sizes[name] & of_dtype}
    for line in lines:
        print(line)
        assert line["shared"] <= kilobytes[line["architecture"]] * 1024, line
        assert line["spilled"] == 0, line


def test_the_table_of_configurations_is_whole():
    for name, entries in launch.CONFIGURATIONS.items():
        sizes = launch.SIZES if name.startswith("side_") else launch.ROW_SIZES
        assert {("default", size) for size in sizes} <= entries.keys(), name
        tiles = {frozenset(entry.blocks) for entry in entries.values()}
        assert len(tiles) == 1, f"{name}: entries name different tiles"


def test_a_view_on_the_host_is_checked_and_one_elsewhere_is_not():
    indices = torch.tensor([0, 4])
    with pytest.raises(ValueError, match="i: expected indices from 0 to 3, found 4"):
        checks.check_indices("i", indices, 2, 4, torch.device("cpu"))
    assert checks.check_indices("i", indices, 2, 5, torch.device("cpu")) is None
    assert checks.check_indices("i", indices.to("meta"), 2, 4, torch.device("meta")) is None
