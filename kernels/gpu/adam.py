"""AdamW in Triton: one launch updates all trained parameters, which lie in one buffer; clipping takes one more."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..types import FLAT_LINE
from .configurations import only_configuration
from .launch import launch

SUMS_AT_ONCE = 512  # partial sums of squares that a program reads together


class FlatAdam:
    """Adam's step, equal to torch.optim.AdamW (Loshchilov and Hutter 2019, algorithm 2).

    There is no step after a loss that is not finite. It also writes the new parameters to the operands, their copy in
    the dtype of the matrix products.
    """

    def __init__(
        self,
        parameters: Tensor,
        gradients: Tensor,
        means: Tensor,
        squares: Tensor,
        operands: Tensor | None,
        line_groups: Tensor,
        rates: Tensor,
        decays: Tensor,
        betas: tuple[float, float],
        epsilon: float,
        steps: Tensor,
        record: Tensor,
        clip_norm: float | None = None,
        averages: Tensor | None = None,
        average_share: float = 1.0,
    ) -> None:
        """Store the buffers, all on one device.

        Args:
            parameters, gradients, means, squares: fp32 [n], n a multiple of 32.
            operands: [n] in the products' dtype, or None if that is fp32.
            line_groups: uint8 [n / 32], the group of each line of 32 parameters.
            rates, decays: fp32 [groups], learning rates and weight decays (decoupled: times the rate).
            betas, epsilon: as in torch.optim.AdamW.
            steps: fp32 scalar, the number of steps including the current one.
            record: fp64 [4]; nothing is updated if record[2] is not 0.
            clip_norm: the largest L2 norm of all gradients, to which longer ones are scaled as by
                torch.nn.utils.clip_grad_norm_; None for any.
            averages: fp32 [n], which follow the new parameters; None for none.
            average_share: the least share of the new parameters in the averages; it is 9 / (10 + steps) at first.

        Raises ValueError if n is not 32 times the number of lines.
        """
        if len(parameters) != FLAT_LINE * len(line_groups):
            expected = f"{FLAT_LINE} for each of {len(line_groups)} lines"
            raise ValueError(f"parameters: expected {expected}, found {len(parameters)}")
        self._operands = (parameters, gradients, means, squares, operands, line_groups, rates, decays, steps, record)
        self._betas = betas
        self._clip_norm = clip_norm
        self._averages = averages
        self._average_share = average_share
        chosen = only_configuration("square_sums", parameters.device)
        programs = 0 if clip_norm is None else triton.cdiv(len(gradients), chosen.blocks["BLOCK"])
        self._square_sums = torch.empty(programs, dtype=torch.float32, device=parameters.device)
        self._epsilon = epsilon

    def update(self) -> None:
        """Launch one step: write parameters, means, squares, operands and averages."""
        parameters, gradients, means, squares, operands, line_groups, *scalars = self._operands
        steps = scalars[2]
        clips = self._clip_norm is not None
        if clips:
            self._add_squares(gradients)
        lines = len(line_groups)
        chosen = only_configuration("adam", parameters.device)
        launch(
            _update,
            "adam",
            (triton.cdiv(lines, chosen.blocks["LINES"]),),
            chosen,
            parameters,
            gradients,
            means,
            squares,
            parameters if operands is None else operands,
            line_groups,
            *scalars,
            self._square_sums if clips else steps,
            steps if self._averages is None else self._averages,
            lines,
            len(self._square_sums),
            *self._betas,
            *(1 - beta for beta in self._betas),
            *map(math.log, self._betas),
            self._epsilon,
            self._clip_norm or 0.0,
            self._average_share,
            WRITES_OPERANDS=operands is not None,
            CLIPS=clips,
            AVERAGES=self._averages is not None,
            LINE=FLAT_LINE,
            SUMS=SUMS_AT_ONCE,
            **chosen.blocks,
        )

    def _add_squares(self, gradients: Tensor) -> None:
        """Launch the partial sums of the gradients' squares."""
        chosen = only_configuration("square_sums", gradients.device)
        grid = (len(self._square_sums),)
        launch(_add_up, "square_sums", grid, chosen, gradients, self._square_sums, len(gradients), **chosen.blocks)


@triton.jit
def _one_minus_exp(x):
    """Return 1 - exp(x) for x <= 0; a series replaces the subtraction where that would lose digits."""
    series = x * 0 + 1
    for i in tl.static_range(9, 1, -1):
        series = 1 + x / i * series
    return tl.where(x > -0.5, -x * series, 1 - tl.exp(x))


@triton.jit
def _add_up(
    gradients_ptr,  # [n]
    sums_ptr,  # [n / BLOCK]
    n,
    BLOCK: tl.constexpr,
):
    """Add up the squares of BLOCK gradients."""
    o_g = tl.cast(tl.program_id(0), tl.int64) * BLOCK + tl.arange(0, BLOCK)
    gradient = tl.load(gradients_ptr + o_g, mask=o_g < n, other=0.0)
    tl.store(sums_ptr + tl.program_id(0), tl.sum(gradient * gradient, 0))


@triton.jit
def _clip_factor(sums_ptr, sum_count, clip_norm, SUMS: tl.constexpr):
    """Return the factor that brings the gradients to clip_norm, at most 1; NaN if a gradient is."""
    total = tl.zeros((SUMS,), tl.float32)
    for first in range(0, sum_count, SUMS):
        o_s = first + tl.arange(0, SUMS)
        total += tl.load(sums_ptr + o_s, mask=o_s < sum_count, other=0.0)
    factor = clip_norm / (tl.sqrt(tl.sum(total, 0)) + 1e-6)
    return tl.where(factor >= 1, 1.0, factor)


@triton.jit
def _update(
    parameters_ptr,  # [n], like the next four
    gradients_ptr,
    means_ptr,
    squares_ptr,
    operands_ptr,
    line_groups_ptr,  # [n / LINE]
    rates_ptr,  # [groups]
    decays_ptr,  # [groups]
    steps_ptr,  # [1]
    record_ptr,  # [4]
    sums_ptr,  # [sum_count]
    averages_ptr,  # [n]
    lines,
    sum_count,
    mean_beta,
    square_beta,
    mean_share,  # 1 - beta
    square_share,
    mean_log,  # log beta
    square_log,
    epsilon,
    clip_norm,
    average_share,
    WRITES_OPERANDS: tl.constexpr,
    CLIPS: tl.constexpr,
    AVERAGES: tl.constexpr,
    LINE: tl.constexpr,
    SUMS: tl.constexpr,
    LINES: tl.constexpr,
):
    """Update LINES lines of LINE parameters each; record[2] != 0 stops all updates."""
    if tl.load(record_ptr + 2) == 0:
        o_l = tl.program_id(0) * LINES + tl.arange(0, LINES)
        m_l = o_l < lines
        group = tl.load(line_groups_ptr + o_l, mask=m_l, other=0).to(tl.int32)
        steps = tl.load(steps_ptr)
        rate = tl.load(rates_ptr + group)
        step_size = rate / _one_minus_exp(steps * mean_log)
        shrink = rate * tl.load(decays_ptr + group)
        square_root = tl.sqrt(_one_minus_exp(steps * square_log))
        o_p = o_l.to(tl.int64)[:, None] * LINE + tl.arange(0, LINE)[None, :]
        m_p = m_l[:, None]
        parameter = tl.load(parameters_ptr + o_p, mask=m_p, other=0.0)
        gradient = tl.load(gradients_ptr + o_p, mask=m_p, other=0.0)
        if CLIPS:
            gradient *= _clip_factor(sums_ptr, sum_count, clip_norm, SUMS)
        mean = mean_beta * tl.load(means_ptr + o_p, mask=m_p, other=0.0) + mean_share * gradient
        square = square_beta * tl.load(squares_ptr + o_p, mask=m_p, other=0.0) + square_share * gradient * gradient
        step = step_size[:, None] * mean / (tl.sqrt(square) / square_root + epsilon)
        parameter -= shrink[:, None] * parameter + step
        tl.store(parameters_ptr + o_p, parameter, mask=m_p)
        tl.store(means_ptr + o_p, mean, mask=m_p)
        tl.store(squares_ptr + o_p, square, mask=m_p)
        if WRITES_OPERANDS:
            tl.store(operands_ptr + o_p, parameter.to(operands_ptr.dtype.element_ty), mask=m_p)
        if AVERAGES:
            average = tl.load(averages_ptr + o_p, mask=m_p, other=0.0)
            share = tl.maximum(average_share, 9 / (10 + steps))
            tl.store(averages_ptr + o_p, average + share * (parameter - average), mask=m_p)
