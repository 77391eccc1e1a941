"""Define text encoders, bidirectional or causal: tokenizing, padding, and pooling over the tokens of a text."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoTokenizer

from ..config import ViewConfig
from ..errors import InputError
from .base import Backbone
from .batch_mates import EQUAL_LENGTHS, by_length
from .image_bytes import ModelInputs

PROBED_TOKENS = 64  # of the long text of `mixed_example`, at most
SHORT = 3  # tokens of its short text
SAME_TOKENS = "choose an encoder that neither pads nor shortens texts, such as BERT"
SHOWN = 100  # characters of a text in a message


class TextBackbone(Backbone):
    """A bidirectional or causal text encoder.

    Texts are padded on the right and masked. So the tokenizer needs no padding token, and pooling never reads padding.
    """

    kind = "text"
    unmixed = EQUAL_LENGTHS
    rows_at_once = 32
    input_names = ("input_ids", "attention_mask")

    def __init__(self, view: ViewConfig, device: torch.device, attention: str) -> None:
        """Load the encoder as `Backbone` does. Also raises InputError if it cannot take the view's max_tokens."""
        super().__init__(view, device, attention)
        least = self.processor.num_special_tokens_to_add() + 1
        most = self._positions()
        if not least <= view.max_tokens <= most:
            raise self._error(f"max_tokens: expected {least} to {most}, found {view.max_tokens}")

    def prepare(self, contents: Sequence[str]) -> ModelInputs:
        """Return input_ids and attention_mask, int64 [N, tokens], at most max_tokens wide, with special tokens.

        Raises InputError if a text gives no tokens at all.
        """
        return self.pad(self.tokenize(contents))

    @property
    def padding_token(self) -> int:
        """Return the id of the token that pads texts.

        Some encoders number positions by this token, so it matters although it is masked. A token that was added for
        padding, and has no embedding, is not used.
        """
        token = self.processor.pad_token_id or 0
        return token if token < self._embedded else 0

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the token ids of each text, at most max_tokens with special tokens.

        Raises InputError if a text gives no tokens at all, or a token for which the encoder has no embedding.
        """
        limit = self.view.max_tokens
        rows = self.processor(list(texts), truncation=True, max_length=limit, padding=False).input_ids
        for text, row in zip(texts, rows):
            if not row:
                raise self._error(f"the text {text!r} gives no tokens")
            if max(row) >= self._embedded:
                raise self._beyond_embeddings(text, max(row))
        return rows

    def pad(self, tokens: Sequence[Sequence[int] | np.ndarray]) -> ModelInputs:
        """Return input_ids and attention_mask, int64 [N, tokens], as wide as the longest of N token sequences."""
        ids = [torch.as_tensor(row, dtype=torch.int64) for row in tokens]
        return {
            "input_ids": nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=self.padding_token),
            "attention_mask": nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
        }

    def describe(self) -> dict[str, Any]:
        """Return the description of `Backbone.describe`, and the view's max_tokens."""
        return super().describe() | {"max_tokens": self.view.max_tokens}

    def _load_processor(self, encoder: str, **options: Any) -> Any:
        """Return the encoder's tokenizer. Raises InputError if it knows no words."""
        trusted = self.view.trust_remote_code
        tokenizer = AutoTokenizer.from_pretrained(encoder, trust_remote_code=trusted, **options)
        # If its files are missing, transformers may make a tokenizer that knows no words.
        if set(tokenizer.get_vocab().values()) <= set(tokenizer.all_special_ids):
            raise self._error("its tokenizer knows no word; expected tokenizer files beside the weights")
        return tokenizer

    def _processor_content(self) -> Any:
        """Return the class, the content and the special tokens of the tokenizer, as JSON values."""
        tokenizer = self.processor
        if tokenizer.is_fast:
            tokenizer.backend_tokenizer.no_truncation()
            tokenizer.backend_tokenizer.no_padding()
            content = tokenizer.backend_tokenizer.to_str()
        else:
            content = tokenizer.get_vocab()
        return [type(tokenizer).__name__, content, tokenizer.special_tokens_map]

    @functools.cached_property
    def _embedded(self) -> float:
        """Return the number of tokens for which the encoder has an embedding; infinity if it has no table of them."""
        try:
            return getattr(self.model.get_input_embeddings(), "num_embeddings", math.inf)
        except NotImplementedError:  # of encoders that compute embeddings
            return math.inf

    def _beyond_embeddings(self, text: str, token: int) -> InputError:
        """Return the error for a text with a token for which the encoder has no embedding."""
        written = self.processor.convert_ids_to_tokens(token)
        return self._error(
            f"the text {text[:SHOWN]!r} has the token {written!r} with id {token}, but the model has {self._embedded} "
            "embeddings, the first with id 0; take the tokenizer that belongs to these weights"
        )

    def _positions(self) -> int:
        """Return the most tokens that the encoder can read: the limit of its tokenizer, config or position table."""
        limits = [self.processor.model_max_length, getattr(self.model.config, "max_position_embeddings", None)]
        for name, module in self.model.named_modules():
            if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
                limits.append(module.num_embeddings - module.padding_idx - 1)  # positions start after the padding's
        return min((limit for limit in limits if limit is not None and limit > 0), default=math.inf)  # XLNet has -1

    def example(self) -> ModelInputs:
        """Return a batch of two invented texts of four and two tokens, on the encoder's device."""
        ids = torch.tensor([[1, 2, 3, 4], [5, 6, 0, 0]], device=self.device)
        return {"input_ids": ids, "attention_mask": (ids > 0).long()}

    def mixed_example(self) -> ModelInputs:
        """Return a batch of a long invented text and a short one, padded as usual, on the encoder's device."""
        special = set(self.processor.all_special_ids)
        known = getattr(self.model.config, "vocab_size", None) or math.inf
        words = sorted(token for token in set(self.processor.get_vocab().values()) - special if token < known)
        long = int(min(self.view.max_tokens, self._positions(), PROBED_TOKENS))
        ids = [words[place * len(words) // long] for place in range(long)]
        return self._moved(self.pad([ids, ids[-min(SHORT, max(1, long - 1)) :]]))

    def _last_states(self, inputs: ModelInputs) -> Tensor:
        """Return the last of the hidden states [N, tokens, D]. Raises InputError if there is not one for each token."""
        states = super()._last_states(inputs)
        tokens = inputs["input_ids"].shape[1]
        if states.shape[1] != tokens:
            raise self._error(f"expected a state for each of {tokens} tokens, found {states.shape[1]}; {SAME_TOKENS}")
        return states

    def _groups(self, inputs: ModelInputs) -> list[list[int]]:
        """Return the groups of rows that may share a batch."""
        if self.batches != EQUAL_LENGTHS:
            return super()._groups(inputs)
        return by_length(inputs["attention_mask"].sum(dim=1).tolist())

    def _only(self, inputs: ModelInputs, rows: Tensor) -> ModelInputs:
        """Return the inputs of some rows, int64 [n] on the CPU, padded to the longest of them."""
        chosen = super()._only(inputs, rows)
        longest = int(chosen["attention_mask"].sum(dim=1).max())
        return {name: tensor[:, :longest] for name, tensor in chosen.items()}

    def _poolings(self) -> tuple[str, ...]:
        """Return the poolings that the encoder allows, its default first.

        "cls" needs a class token before or after the text, and attention in both directions.
        """
        stands = self._class_place is not None
        return ("cls", "mean", "last") if stands and not self._is_causal() else ("mean", "last")

    @functools.cached_property
    def _class_place(self) -> int | None:
        """Return 0 if the class token stands before each text, -1 if it stands after it (XLNet), None without one."""
        cls = getattr(self.processor, "cls_token_id", None)
        ids = self.processor("a text").input_ids
        places = (place for place in (0, -1) if ids and cls is not None and ids[place] == cls)
        return next(places, None)

    @torch.no_grad()
    def _is_causal(self) -> bool:
        """Return True if a changed last token leaves the states of the first token unchanged."""
        inputs = self.example()
        first = self._hidden_states(inputs)
        inputs["input_ids"][0, -1] += 1
        second = self._hidden_states(inputs)
        return all(torch.equal(a[:, 0], b[:, 0]) for a, b in zip(first, second))

    def _pool(self, states: Tensor, inputs: ModelInputs) -> Tensor:
        """Return the class token's, the last or the mean state of each text's tokens: [N, tokens, D] -> [N, D]."""
        if self.pooling == "cls" and self._class_place == 0:
            return states[:, 0]
        mask = inputs["attention_mask"].to(states.device)
        if self.pooling in ("cls", "last"):
            return states[torch.arange(len(states), device=states.device), mask.sum(dim=1) - 1]
        total = torch.where(mask[..., None] > 0, states, 0).float().sum(dim=1)
        return (total / mask.sum(dim=1, keepdim=True)).to(states.dtype)
