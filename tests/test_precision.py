"""Check the precision of a run for each method, setting and device."""

from __future__ import annotations

import pytest
import torch

from iisan_fast.config import (
    METHODS,
    NEIGHBOURS,
    SIDE_METHODS,
    STATE_METHODS,
    TUNING_METHODS,
    ModelConfig,
    RunConfig,
    TrainConfig,
    UncachedConfig,
    ViewConfig,
)
from iisan_fast.errors import InputError
from iisan_fast.precision import Precision, resolve_precision

CPU, CUDA = torch.device("cpu"), torch.device("cuda:1")
FLOAT = torch.float32
HALF = torch.bfloat16
VIEW = ViewConfig("title", "title", "encoder")


def run_config(method: str, precision: str) -> RunConfig:
    """Return the configuration of a run of the method with one view, from a cache if the method can read one."""
    model = ModelConfig(method=method)
    train = TrainConfig(precision=precision)
    if method in (*STATE_METHODS, NEIGHBOURS):
        return RunConfig("dataset", "cache", ("title",), model=model, train=train)
    return RunConfig("dataset", uncached=None if method == "id" else UncachedConfig((VIEW,)), model=model, train=train)


@pytest.mark.parametrize("method", SIDE_METHODS)
@pytest.mark.parametrize(
    ("precision", "device", "expected"),
    [
        ("auto", CPU, Precision(table=None, products=FLOAT)),
        ("float32", CPU, Precision(table=None, products=FLOAT)),
        ("auto", CUDA, Precision(table=HALF, products=HALF)),
        ("float32", CUDA, Precision(table=FLOAT, products=FLOAT)),
        ("bfloat16", CUDA, Precision(table=HALF, products=HALF)),
    ],
)
def test_a_side_network_multiplies_in_its_tables_dtype_on_cuda_and_in_float32_on_a_cpu(
    method, precision, device, expected
):
    assert resolve_precision(run_config(method, precision), device) == expected


@pytest.mark.parametrize("method", TUNING_METHODS)
@pytest.mark.parametrize(
    ("precision", "device", "products"),
    [
        ("auto", CPU, FLOAT),
        ("float32", CPU, FLOAT),
        ("bfloat16", CPU, HALF),
        ("auto", CUDA, HALF),
        ("float32", CUDA, FLOAT),
        ("bfloat16", CUDA, HALF),
    ],
)
def test_trained_encoders_take_bfloat16_products_on_every_device(method, precision, device, products):
    assert resolve_precision(run_config(method, precision), device) == Precision(None, products)


@pytest.mark.parametrize("precision", ["auto", "float32"])
@pytest.mark.parametrize(("device", "table"), [(CPU, None), (CUDA, None)])
def test_methods_with_only_heads_multiply_in_float32(precision, device, table):
    assert resolve_precision(run_config("id", precision), device) == Precision(table, FLOAT)
    frozen = resolve_precision(run_config("frozen", precision), device)
    on_cuda = {"auto": HALF, "float32": FLOAT}[precision]
    assert frozen == Precision(on_cuda if device == CUDA else None, FLOAT)


@pytest.mark.parametrize("method", SIDE_METHODS)
def test_bfloat16_products_of_a_side_network_on_a_cpu_are_refused_in_one_line(method):
    with pytest.raises(InputError) as refused:
        resolve_precision(run_config(method, "bfloat16"), CPU)
    assert str(refused.value) == (
        f"precision: expected auto or float32 for {method} on a CPU, found bfloat16; "
        "train a run in float32, or choose the device cuda"
    )


def test_every_method_has_a_precision_on_every_device():
    for method in METHODS:
        for device in (CPU, CUDA):
            assert isinstance(resolve_precision(run_config(method, "auto"), device), Precision)
