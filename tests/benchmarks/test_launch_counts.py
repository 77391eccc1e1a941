"""Launches, host reads and allocations of a toy step are counted on meta tensors."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from iisan_fast.benchmarks.launch_counts import LaunchCounter
from iisan_fast.kernels import Configuration
from iisan_fast.kernels.gpu.launch import launch


def test_operators_count_but_views_and_new_memory_do_not():
    with LaunchCounter() as counter:
        x = torch.empty(8, 4, device="meta")
        with counter.part("forward"):
            y = (x.view(4, 8).t()[1:] + 1).unsqueeze(0)
            y.relu_()
        with counter.part("copies"):
            torch.empty_like(y).copy_(y)
            x.zero_()
    assert counter.by_part() == {"forward": 2, "copies": 2} and counter.total() == 4
    assert counter.operators["forward"] == {"add": 1, "relu_": 1} and not counter.host_reads


def test_what_autograd_and_several_kernels_launch_counts():
    with LaunchCounter() as counter:
        norm = nn.LayerNorm(4, device="meta")
        x = torch.empty(8, 4, device="meta", requires_grad=True)
        with counter.part("forward"):
            loss = norm(x).sum()
        with counter.part("backward"):
            loss.backward()
    assert counter.by_part()["forward"] == 2
    assert counter.operators["backward"]["native_layer_norm_backward"] == 3


def test_a_fused_optimizer_launches_by_its_lists():
    with LaunchCounter() as counter:
        parameters = [nn.Parameter(torch.empty(10, device="meta")) for _ in range(50)]
        optimizer = torch.optim.Adam(parameters, fused=False, foreach=True)
        for parameter in parameters:
            parameter.grad = torch.empty_like(parameter)
        assert optimizer.param_groups[0]["foreach"]
        counter.forget_launches()
        torch._foreach_add_([parameter.grad for parameter in parameters], 1)
    assert counter.total() == 2  # of at most 36 tensors


@pytest.mark.parametrize("read", [torch.Tensor.item, bool, float, lambda x: torch.equal(x, x)])
def test_a_read_by_the_host_is_reported_with_its_part(read):
    with LaunchCounter() as counter, counter.part("record"):
        read(torch.empty((), device="meta"))
    assert [part for part, _ in counter.host_reads] == ["record"]


def test_a_result_whose_size_the_host_must_know_is_reported():
    with LaunchCounter() as counter:
        x = torch.empty(8, device="meta")
        with pytest.raises((NotImplementedError, RuntimeError)):
            x.nonzero()
    assert counter.host_reads == [("", "nonzero")]


def test_triton_launches_are_recorded_under_their_part_and_not_run():
    with LaunchCounter() as counter:
        x = torch.empty(8, device="meta")
        with counter.part("loss"):
            launch(None, "loss_forward", (2, 1), Configuration(), x, 3, BLOCK=16)
            launch(None, "loss_forward", (0, 1), Configuration(), x, 3, BLOCK=16)  # launches nothing
    ((part, recorded),) = counter.launches
    assert part == "loss" and recorded.name == "loss_forward" and recorded.meta == {"BLOCK": 16}
    assert counter.by_part() == {"loss": 1}


def test_allocations_are_followed_to_their_peak():
    with LaunchCounter() as counter:
        tensor = torch.empty(1024, device="meta")  # 4,096 bytes
        view = tensor[1:]
        passing = torch.empty(1, device="meta")  # rounded up to 512
        assert counter.allocated == 4096 + 512
        del tensor
        assert counter.allocated == 4096 + 512  # the view holds it
        del view, passing
        assert counter.allocated == 0
        torch.empty(256, device="meta")
        assert counter.peak == 4096 + 512 and counter.allocations == 3
        counter.forget_launches()
        assert counter.peak == 4096 + 512 and counter.allocations == 0
