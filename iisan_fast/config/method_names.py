"""Name the methods, and give the learning rates of their groups of parameters."""

from __future__ import annotations

SIDE_METHODS = ("iisan", "iisan-versa")  # read the hidden states of several layers
TUNING_METHODS = ("full", "adapter", "lora", "bitfit")  # train encoders, or what is put into them
STATE_METHODS = (*SIDE_METHODS, "frozen")  # read states that do not change, so that a cache can hold them
_SIDE_RATES = {"adapters": 1e-4, "gates": 2e-4, "heads": 2e-4, "sequence_encoder": 2e-4}
_HEAD_RATES = {"heads": 2e-4, "sequence_encoder": 2e-4}
LEARNING_RATES: dict[str, dict[str, float]] = {  # of each method's groups of parameters
    "iisan": _SIDE_RATES,
    "iisan-versa": _SIDE_RATES,
    "full": {"encoders": 5e-5, "heads": 1e-4, "sequence_encoder": 1e-4},
    "adapter": {"adapters": 1e-4, **_HEAD_RATES},
    "lora": {"adapters": 1e-4, **_HEAD_RATES},
    "bitfit": {"encoders": 1e-4, **_HEAD_RATES},
    "frozen": _HEAD_RATES,
    "id": {"item_embeddings": 1e-3, "sequence_encoder": 1e-3},
}
ITEM_IDS_RATE = {"item_embeddings": 1e-3}  # learning rate of the vectors that the setting item_ids adds
NEIGHBOURS = "neighbours"  # the method that trains nothing
METHODS = (*LEARNING_RATES, NEIGHBOURS)
