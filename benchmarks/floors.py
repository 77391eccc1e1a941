"""Floors of the ops: the least time that their bytes, products and exponentials take on an H200.

A floor leaves out launches. It counts work that every form must do which stores neither logits nor gathered states:
operands read once a pass, each matrix product, and an exponential for every logit each time it is computed. Weights,
biases, results and masks are left out, so a floor is rather too low than too high.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

PASSES = ("forward", "both", "backward")  # "both": forward and backward in one

H200_BYTES_PER_S = 4.3e12  # copied within the GPU's memory: measured
H200_FLOPS = 790e12  # bf16 matrix product with fp32 sums: measured
H200_SMS = 132
H200_CLOCK_HZ = 1.98e9  # the highest clock of an SM
EXPONENTIALS = 16  # a clock and SM of compute capability 9.0: CUDA C++ Programming Guide, arithmetic instructions
BF16 = 2  # bytes


@dataclass(frozen=True)
class Rates:
    """The bytes, products and exponentials of a device in a second."""

    bytes: float
    flops: float
    exponentials: float


H200 = Rates(H200_BYTES_PER_S, H200_FLOPS, EXPONENTIALS * H200_SMS * H200_CLOCK_HZ)


@dataclass(frozen=True)
class Cost:
    """The least bytes, products and exponentials of one pass of an op."""

    bytes: float
    flops: float
    exponentials: float = 0

    def floor_ms(self, rates: Rates) -> float:
        """Return the largest of the three times, in milliseconds."""
        seconds = (self.bytes / rates.bytes, self.flops / rates.flops, self.exponentials / rates.exponentials)
        return 1000 * max(seconds)


def device_rates(device: torch.device) -> Rates | None:
    """Return an H200's rates, with the number of SMs and the clock that torch reports; None for another device."""
    if device.type != "cuda" or not re.search(r"\bH200\b", torch.cuda.get_device_name(device)):
        return None
    properties = torch.cuda.get_device_properties(device)
    clock_khz = getattr(properties, "clock_rate", None)  # not in every version of torch
    clock_hz = 1000 * clock_khz if clock_khz else H200_CLOCK_HZ
    return Rates(H200_BYTES_PER_S, H200_FLOPS, EXPONENTIALS * properties.multi_processor_count * clock_hz)


def side_network_costs(
    items: int, layers: int, width: int, bottleneck: int, towers: int = 3, views: int = 2
) -> dict[str, Cost]:
    """Return the cost of each pass of the side network.

    A pass reads the items' bf16 states once. A tower has two products a layer, and each has two gradients.
    """
    reading = BF16 * views * items * layers * width
    products = towers * layers * 2 * (2 * items * width * bottleneck)
    return {
        "forward": Cost(reading, products),
        "both": Cost(2 * reading, 3 * products),
        "backward": Cost(reading, 2 * products),
    }


def loss_costs(rows: int, items: int, d: int) -> dict[str, Cost]:
    """Return the cost of each pass of the loss.

    The logits are computed once forward and once for each of two gradients; a gradient is one product more.
    """
    reading, logits = BF16 * (rows + items) * d, rows * items
    product = 2 * logits * d
    return {
        "forward": Cost(reading, product, logits),
        "both": Cost(3 * reading, 5 * product, 3 * logits),
        "backward": Cost(2 * reading, 4 * product, 2 * logits),
    }


def rank_costs(users: int, items: int, d: int) -> dict[str, Cost]:
    """Return the cost of the rank: one product. There is no backward."""
    return {"forward": Cost(BF16 * (users + items) * d, 2 * users * items * d)}
