"""The public ops: which form runs and is reported, and what is refused."""

from __future__ import annotations

import logging
import os
import subprocess
import sys

import pytest
import torch

from helpers.compiler import needs_compiler
from helpers.kernel_cases import DEVICE, LossCase, SideCase, rank_case
from iisan_fast import kernels
from iisan_fast.kernels import AddedScores, States, checks, dispatch
from iisan_fast.kernels.cpu import library
from iisan_fast.kernels.gpu import inbatch_cross_entropy as loss_gpu
from iisan_fast.kernels.gpu import launch
from iisan_fast.kernels.reference import inbatch_cross_entropy as loss_reference

needs_cpu = pytest.mark.skipif(DEVICE != "cpu", reason="looks at CPU tensors")


@pytest.fixture(autouse=True)
def nothing_reported_or_named(monkeypatch) -> None:
    monkeypatch.delenv(kernels.FORM_VARIABLE, raising=False)
    monkeypatch.setattr(dispatch, "reported", set())


@pytest.fixture
def no_compiler(monkeypatch) -> str:
    """Make the C++ library unavailable; return the reason."""
    monkeypatch.setattr(dispatch, "why_no_library", lambda: "no compiler")
    return "no compiler"


@pytest.fixture
def loss() -> dict:
    case = LossCase(6, 40)
    return {"queries": case.queries, "items": case.items, **case.keywords}


class OnDevice:
    """A stand-in for a tensor, with the attributes that `choose` reads."""

    def __init__(self, device: str, dtype: torch.dtype = torch.bfloat16) -> None:
        self.device = torch.device(device)
        self.dtype = dtype


def chosen(op: str, device: str, form: str = "auto", dtype: torch.dtype = torch.float32, **refusals: str) -> str:
    reasons = {name: lambda reason=reason: reason for name, reason in refusals.items()}
    return dispatch.choose(op, form, [OnDevice(device, dtype)], reasons)


@needs_compiler
@pytest.mark.parametrize(
    ("op", "on_cuda", "on_cpu", "without_compiler"),
    [
        ("fold_heads", "reference", "cpu", "reference"),
        ("side_towers", "gpu", "cpu", "reference"),
        ("sequence_encoder", "gpu", "cpu", "reference"),
        ("last_states", "gpu", "cpu", "reference"),
        ("inbatch_cross_entropy", "gpu", "cpu", "reference"),
        ("target_rank", "gpu", "cpu", "cpu"),
        ("top_items", "gpu", "cpu", "cpu"),
        ("adam", "reference", "cpu", "reference"),
    ],
)
def test_auto_takes_the_fastest_form_that_can_run(op, on_cuda, on_cpu, without_compiler, monkeypatch):
    assert (chosen(op, "cuda"), chosen(op, "cpu"), chosen(op, "meta")) == (on_cuda, on_cpu, "reference")
    monkeypatch.setattr(dispatch, "why_no_library", lambda: "no compiler")
    assert chosen(op, "cpu") == without_compiler


def test_auto_takes_another_form_where_one_refuses(monkeypatch):
    monkeypatch.setattr(dispatch, "why_no_library", lambda: "")
    assert chosen("side_towers", "cpu", cpu="odd shapes") == "reference"
    assert chosen("side_towers", "cuda", dtype=torch.float64) == "reference"


@pytest.mark.parametrize("op", dispatch.FORMS)
def test_an_op_without_a_form_of_a_name_takes_the_reference(op):
    for form in ("gpu", "cpu"):
        if form not in dispatch.FORMS[op]:
            assert chosen(op, "cpu", form) == chosen(op, "cuda", form) == "reference"


@pytest.mark.parametrize(
    ("form", "device", "dtype", "refused", "message"),
    [
        (
            "cpu",
            "cuda",
            torch.float32,
            "",
            "form: cpu cannot run side_towers: it needs CPU tensors, found cuda; use gpu",
        ),
        ("cpu", "meta", torch.float32, "", "it needs CPU tensors, found meta; use reference"),
        ("cpu", "cpu", torch.float32, "", "form: cpu cannot run side_towers: no compiler; use reference"),
        ("cpu", "cpu", torch.float32, "odd shapes", "form: cpu cannot run side_towers: odd shapes; use reference"),
        ("gpu", "cuda", torch.float64, "", "it needs float32, bfloat16 or float16, found float64; use reference"),
    ],
)
def test_a_form_named_that_cannot_run_is_refused(form, device, dtype, refused, message, no_compiler):
    with pytest.raises(ValueError) as error:
        chosen("side_towers", device, form, dtype, cpu=refused)
    assert str(error.value).endswith(message) and "\n" not in str(error.value)
    assert not dispatch.reported


def test_a_refusal_of_shapes_starts_no_compiler(monkeypatch):
    monkeypatch.setattr(dispatch, "why_no_library", lambda: pytest.fail("compiled"))
    with pytest.raises(ValueError, match="cpu cannot run fold_heads: odd shapes; use reference"):
        chosen("fold_heads", "cpu", "cpu", cpu="odd shapes")


@needs_cpu
def test_ranking_needs_no_compiler(monkeypatch):
    """The popularity baseline ranks without C++: nothing is compiled or loaded."""
    monkeypatch.setattr(library, "_library", lambda dtype: pytest.fail("compiled"))
    case = rank_case(4, 9, 8, 2)
    expected, _ = kernels.target_rank(*case, form="reference")
    for form in ("auto", "cpu"):
        masked, _ = kernels.target_rank(*case, form=form)
        assert torch.equal(masked, expected)
    assert dispatch.reported == {("target_rank", form) for form in ("reference", "cpu")}
    kernels.check_form(torch.device("cpu"))
    monkeypatch.setenv(kernels.FORM_VARIABLE, "cpu")
    kernels.check_form(torch.device("cpu"))


def test_the_form_of_a_device_is_the_fastest_or_the_one_named(monkeypatch):
    monkeypatch.setattr(dispatch, "why_no_library", lambda: "")
    assert (kernels.form_on(torch.device("cpu")), kernels.form_on(torch.device("cuda"))) == ("cpu", "gpu")
    monkeypatch.setattr(dispatch, "why_no_library", lambda: "no compiler")
    assert kernels.form_on(torch.device("cpu")) == "reference"
    monkeypatch.setenv(kernels.FORM_VARIABLE, "reference")
    assert kernels.form_on(torch.device("cpu")) == kernels.form_on(torch.device("cuda")) == "reference"
    monkeypatch.setenv(kernels.FORM_VARIABLE, "cpu")
    message = "IISAN_FAST_FORM: cpu cannot run on cuda: it needs CPU tensors, found cuda; use auto"
    with pytest.raises(ValueError, match=message):
        kernels.form_on(torch.device("cuda"))


def test_the_environment_variable_decides_only_for_auto(loss, monkeypatch):
    monkeypatch.setenv(kernels.FORM_VARIABLE, "gpu")
    launch.launches.clear()
    kernels.inbatch_cross_entropy(**loss)
    assert launch.launches == {"loss_forward": 1}
    kernels.inbatch_cross_entropy(**loss, form="reference")
    assert launch.launches == {"loss_forward": 1}
    monkeypatch.setenv(kernels.FORM_VARIABLE, "cuda")
    message = "IISAN_FAST_FORM: expected auto, reference, gpu, cpu, found 'cuda'"
    with pytest.raises(ValueError, match=message):
        kernels.inbatch_cross_entropy(**loss)


def test_a_form_that_is_named_is_never_replaced(loss, monkeypatch):
    doubles = {k: v.double() if v.is_floating_point() else v for k, v in loss.items()}
    with pytest.raises(ValueError, match="form: gpu cannot run inbatch_cross_entropy: .* found float64"):
        kernels.inbatch_cross_entropy(**doubles, form="gpu")
    monkeypatch.setattr(loss_gpu, "launch", lambda *_, **__: None)  # as if the kernels did not run
    launch.launches.clear()
    losses = kernels.inbatch_cross_entropy(**loss, reduction="none", form="gpu")
    assert not launch.launches and not torch.allclose(losses, loss_reference.inbatch_cross_entropy(**loss))


@pytest.mark.slow
def test_the_gpu_form_on_cpu_tensors_needs_the_interpreter():
    program = (
        "import torch; from iisan_fast import kernels\n"
        "kernels.target_rank(torch.ones(1, 1), torch.ones(1, 1), torch.zeros(1, dtype=torch.int64),"
        " torch.zeros(1, 0, dtype=torch.int64), form='gpu')"
    )
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    result = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert "FormError: form: gpu cannot run target_rank: it needs CUDA tensors" in result.stderr


@pytest.mark.slow
def test_importing_the_package_imports_no_triton():
    program = (
        "import sys; sys.modules['triton'] = None; import torch\n"
        "import iisan_fast.training.trainer; from iisan_fast import kernels\n"
        "print(kernels.inbatch_cross_entropy(torch.ones(1, 1), torch.ones(1, 1), torch.tensor([0])).item())"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.stdout.strip() == "0.0", result.stderr


def test_the_form_that_runs_is_logged_once_an_op(loss, caplog):
    with caplog.at_level(logging.INFO, logger="iisan_fast.kernels"):
        for _ in range(3):
            kernels.inbatch_cross_entropy(**loss, form="gpu")
            kernels.target_rank(*rank_case(4, 9, 8, 2), form="gpu")
    assert caplog.messages == ["kernels: inbatch_cross_entropy by gpu", "kernels: target_rank by gpu"]


@needs_cpu
@needs_compiler
def test_what_is_logged_is_the_form_that_ran_and_why_not_the_fastest(caplog):
    case = LossCase(6, 40, d=5)
    with caplog.at_level(logging.INFO, logger="iisan_fast.kernels"):
        kernels.inbatch_cross_entropy(case.queries, case.items, **case.keywords)
    reason = "cpu: it needs a width that is a multiple of 16, found 5"
    assert caplog.messages == [f"kernels: inbatch_cross_entropy by reference ({reason})"]


@needs_cpu
@needs_compiler
def test_towers_without_gradients_are_refused_by_name_where_c_does_not_encode_them():
    case = SideCase(items=4, bottleneck=8)
    projections = [torch.eye(48) for _ in case.towers]
    with pytest.raises(ValueError, match="cpu cannot run side_towers: it needs projections; use reference"):
        kernels.side_towers(case.states, case.towers, form="cpu")
    message = "without gradients it needs a bottleneck that is a multiple of 16, found 8; use reference"
    with pytest.raises(ValueError, match=message):
        kernels.side_towers(case.states, case.towers, "relu", projections, form="cpu")


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
        ({"form": "cpu-torch"}, "form: expected auto, reference, gpu, cpu, found 'cpu-torch'"),
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


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"offsets": torch.tensor([0, 1, 2, 4])}, r"added.offsets: expected \[5\], found \[4\]"),
        ({"offsets": torch.tensor([0, 1, 2, 3, 5])}, "added.offsets: expected indices from 0 to 4, found 5"),
        ({"offsets": torch.tensor([0, 1, 2, 3, 3])}, "added.offsets: expected offsets from 0 to 4, found 0 to 3"),
        ({"offsets": torch.tensor([0, 3, 1, 3, 4])}, "added.offsets: expected ascending offsets"),
        ({"offsets": torch.arange(5).int()}, "added.offsets: expected int64, found int32"),
        ({"items": torch.tensor([0, 1, 2, 9])}, "added.items: expected indices from 0 to 8, found 9"),
        ({"items": torch.tensor([[0, 1, 2, 8]])}, r"added.items: expected 1 dimensions, found \[1, 4\]"),
        ({"items": torch.tensor([1, 1, 5, 2])}, "added.items: expected ascending items .*, found 1 after 1"),
        ({"items": torch.tensor([1, 3, 2, 7])}, "added.items: expected ascending items .*, found 2 after 3"),
        ({"values": torch.zeros(3)}, r"added.values: expected \[4\], found \[3\]"),
        ({"values": torch.zeros(4).double()}, "added.values: expected float32 like queries, found float64"),
        ({"values": torch.zeros(4, device="meta")}, "added.values: expected device cpu, found meta"),
    ],
)
@needs_cpu
def test_the_rank_refuses_added_scores(changed, message):
    whole = AddedScores(torch.tensor([0, 0, 3, 3, 4]), torch.tensor([0, 1, 8, 2]), torch.zeros(4))
    arguments = rank_case(4, 9, 8, 2)
    assert kernels.target_rank(*arguments, added=whole)[0].shape == (4,)
    with pytest.raises(ValueError, match=message):
        kernels.target_rank(*arguments, added=whole._replace(**changed))


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
        last = torch.full((4,), len(first) - 1)  # one tensor for both views; the second view has fewer rows
        views = [States(first, last), States(first[1:], last)]
        refused(r"states\[1\].rows: expected indices from 0 to 5, found 6", states=views)


def test_a_view_on_the_host_is_checked_and_one_elsewhere_is_not():
    indices = torch.tensor([0, 4])
    with pytest.raises(ValueError, match="i: expected indices from 0 to 3, found 4"):
        checks.check_indices("i", indices, 2, 4, torch.device("cpu"))
    assert checks.check_indices("i", indices, 2, 5, torch.device("cpu")) is None
    assert checks.check_indices("i", indices.to("meta"), 2, 4, torch.device("meta")) is None
