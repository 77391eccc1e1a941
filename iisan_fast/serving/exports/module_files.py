"""Write a module as ONNX and as an exported program of PyTorch, and run what was written."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...errors import InputError

TOLERANCE = 1e-5  # of a deviation, beside the largest magnitude of the results
CHATTY = ("torch.onnx", "torch.export", "torch.fx", "onnxscript", "onnx_ir")

Case = tuple[tuple[Tensor, ...], tuple[Tensor, ...]]  # inputs, and the outputs that are expected, on the host


class PortableModule(NamedTuple):
    """A module to write, whose inputs and outputs have the same first dimension, of any size."""

    name: str  # of its files, without suffix
    module: nn.Module
    example: tuple[Tensor, ...]  # inputs of at least two rows
    inputs: list[str]  # the names of the inputs
    outputs: list[str]
    rows: str  # the name of the first dimension
    stacked: bool = False  # True if `forward` takes its inputs as *arguments

    @property
    def files(self) -> tuple[str, str]:
        """Return the names of its two files: ONNX, and the exported program."""
        return f"{self.name}.onnx", f"{self.name}.pt2"

    def shapes(self) -> dict[str, list[int | str]]:
        """Return the shape of each input, with the name of the first dimension in its place."""
        return {name: [self.rows, *part.shape[1:]] for name, part in zip(self.inputs, self.example)}


def write_module(portable: PortableModule, folder: Path) -> dict[str, int]:
    """Write both files of a module into a folder, and return the opset of each domain in the ONNX file."""
    rows = torch.export.Dim(portable.rows)
    onnx_file, program_file = portable.files
    dynamic: Any = tuple({0: rows} for _ in portable.example)
    names: Any = tuple({0: portable.rows} for _ in portable.example)
    with _silence(), torch.no_grad():
        program = torch.export.export(
            portable.module.eval(), portable.example, dynamic_shapes=(dynamic,) if portable.stacked else dynamic
        )
        torch.export.save(program, folder / program_file)
        written = torch.onnx.export(
            program,
            (),
            folder / onnx_file,
            input_names=portable.inputs,
            output_names=portable.outputs,
            dynamic_shapes=(names,) if portable.stacked else names,
            dynamo=True,
            external_data=False,
            verbose=False,
        )
    return {domain or "ai.onnx": version for domain, version in written.model.opset_imports.items()}


class WrittenModule:
    """Both files of a module, opened again to run them."""

    def __init__(self, portable: PortableModule, folder: Path) -> None:
        """Open the files, for the CPU."""
        import onnxruntime  # takes a moment

        onnx_file, program_file = portable.files
        self.name = portable.name
        self.inputs = portable.inputs
        with _silence():
            self.session = onnxruntime.InferenceSession(folder / onnx_file, providers=["CPUExecutionProvider"])
            self.program = torch.export.load(folder / program_file).module()

    def deviations(self, cases: Iterable[Case]) -> dict[str, float]:
        """Return the largest deviation of each file from the expected outputs, beside an output's largest magnitude.

        Raises InputError if a deviation is larger than TOLERANCE, or no number.
        """
        largest: dict[int, float] = defaultdict(float)
        differences: dict[tuple[str, int], float] = defaultdict(float)
        for inputs, expected in cases:
            for form, results in (("onnx", self._by_onnx(inputs)), ("pt2", self._by_program(inputs))):
                for place, (result, output) in enumerate(zip(results, expected)):
                    difference = float((result - output).abs().max())
                    differences[form, place] = max(difference, differences[form, place], key=_nan_first)
                    largest[place] = max(largest[place], float(output.abs().max()))
        deviations = {"onnx": 0.0, "pt2": 0.0}
        for (form, place), difference in differences.items():
            deviation = difference / (largest[place] or 1.0)
            if not deviation <= TOLERANCE:
                raise InputError(
                    f"{self.name}.{form}: expected the results of the run to {TOLERANCE:g}, found a deviation of "
                    f"{deviation:.2g}; nothing was exported; report it with the versions of torch and onnxruntime"
                )
            deviations[form] = max(deviations[form], deviation)
        return deviations

    def _by_onnx(self, inputs: tuple[Tensor, ...]) -> list[Tensor]:
        """Return the outputs of the ONNX file."""
        feeds = {name: part.numpy() for name, part in zip(self.inputs, inputs)}
        return list(map(torch.from_numpy, self.session.run(None, feeds)))

    def _by_program(self, inputs: tuple[Tensor, ...]) -> list[Tensor]:
        """Return the outputs of the exported program."""
        with torch.no_grad():
            outputs = self.program(*inputs)
        return [outputs] if isinstance(outputs, Tensor) else list(outputs)


def _nan_first(number: float) -> float:
    """Return a number to compare by, of which that of NaN is the largest."""
    return float("inf") if number != number else number


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Drop the messages, warnings and prints of the exporters in the block."""
    loggers = [logging.getLogger(name) for name in CHATTY]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels):
            logger.setLevel(level)
