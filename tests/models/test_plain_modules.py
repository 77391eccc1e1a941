"""The plain sequence encoder gives the states of the op, for histories of every length."""

from __future__ import annotations

import pytest
import torch

from iisan_fast import kernels
from iisan_fast.config import ModelConfig
from iisan_fast.models.plain_modules import PlainSequenceEncoder
from iisan_fast.models.sasrec import SASRec


@pytest.mark.parametrize(("blocks", "heads", "most"), [(2, 2, 10), (1, 4, 1), (3, 1, 7)])
def test_the_plain_sequence_encoder_gives_the_states_of_the_op(blocks, heads, most):
    torch.manual_seed(0)
    encoder = SASRec(ModelConfig(embedding_dim=16, blocks=blocks, attention_heads=heads), most).eval()
    lengths = torch.arange(1, most + 1)
    is_item = torch.arange(most) >= most - lengths[:, None]
    inputs = torch.randn(most, most, 16) * is_item[:, :, None]
    slots = is_item.flatten().nonzero()[:, 0]
    with torch.inference_mode():
        expected = encoder.last(inputs.flatten(0, 1)[slots], kernels.SequenceGrid(slots, most, most))
        states = PlainSequenceEncoder(encoder.weights())(inputs, lengths)
    torch.testing.assert_close(states, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
