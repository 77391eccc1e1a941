"""Checksums: any changed bit, name, dtype or shape gives another one."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from iisan_fast import checksums
from iisan_fast.checksums import CHECKSUM_BYTES, checksum, tensor_checksums

TENSOR = torch.arange(12, dtype=torch.float32).reshape(3, 4)


def test_each_bit_counts():
    content = bytes(range(40))
    whole = checksum(content, b"name")
    assert len(whole) == CHECKSUM_BYTES and checksum(memoryview(content), b"name") == whole
    for position in range(8 * len(content)):
        flipped = bytearray(content)
        flipped[position // 8] ^= 1 << position % 8
        assert checksum(flipped, b"name") != whole


def test_the_name_counts():
    assert len({checksum(b"states", name) for name in (b"", b"a", b"b", b"a\0")}) == 4


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.int64, torch.bool])
def test_tensors_of_all_dtypes_and_shapes(dtype):
    for shape in ((), (0,), (1,), (2, 3)):
        tensor = torch.ones(shape, dtype=dtype)
        assert tensor_checksums({"a": tensor}) == tensor_checksums({"a": tensor.clone()})


@pytest.mark.parametrize(
    ("name", "other"),
    [
        pytest.param("a", TENSOR.reshape(4, 3), id="the shape"),
        pytest.param("a", TENSOR.view(torch.int32), id="the dtype"),
        pytest.param("b", TENSOR, id="the name"),
        pytest.param("a", TENSOR + torch.finfo(torch.float32).tiny, id="a value that prints alike"),
    ],
)
def test_form_and_name_of_a_tensor_count(name, other):
    assert [*tensor_checksums({name: other}).values()] != [*tensor_checksums({"a": TENSOR}).values()]


def test_counting_a_dataset_does_not_wait_for_torch(toy_run):
    code = (
        "import sys, pathlib; from iisan_fast.data import load_dataset, statistics; "
        "statistics(load_dataset(pathlib.Path(sys.argv[1])).sequences); print('torch' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code, toy_run[0]], capture_output=True, text=True)
    assert result.stdout == "False\n", result.stderr


def test_the_checksum_of_a_file_is_that_of_its_content(tmp_path, monkeypatch):
    monkeypatch.setattr(checksums, "BYTES_AT_ONCE", 7)
    for content in (b"", b"1234567", bytes(range(256))):
        (tmp_path / "file").write_bytes(content)
        for name in (b"", b"name"):
            assert checksums.file_checksum(tmp_path / "file", name) == checksums.checksum(content, name)
