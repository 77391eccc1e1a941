"""Caption items with a Hugging Face image-text-to-text model: an item's pictures in, one line of text out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, ProcessorMixin
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

from ..errors import InputError
from ..fingerprints import weights_digest
from .attention import run_with_all_arguments
from .hub_files import cached_or_fetched, fetched_folder, model_folder
from .hugging_face import clear_errors, model_dtype, refuse_missing_weights
from .own_code import accepted_own_code
from .running_code import code_digest, own_model_class, refuse_other_classes
from .weight_types import refuse_cast_weights

KIND = "an image-text-to-text model"
INSTRUCTION = "Describe what is shown in one sentence."  # the default prompt of a model with a chat template
PROBE = Image.new("RGB", (224, 224), "white")


class Captioner:
    """An image-text-to-text model on a device. It decodes greedily, so the same pictures give the same caption.

    A model with a chat template reads a user's message of all pictures of an item and the prompt. A model without one
    reads one picture and continues the prompt.
    """

    def __init__(
        self,
        name: str,
        device: torch.device,
        prompt: str | None,
        max_tokens: int,
        pictures: int,
        dtype: str,
        trusted: bool = False,
    ) -> None:
        """Load the model, and run it once on blank pictures.

        name: a folder or a hub name; prompt: None for the default; max_tokens: of a caption; pictures: the most that an
        item has; dtype: one of config.ENCODER_DTYPES; trusted: whether code of the checkpoint's own may run. Raises
        InputError if the model cannot be found, lacks weights, brings code that may not run, or cannot read that many
        pictures.
        """
        self.name = name
        self.device = device
        self.max_tokens = max_tokens
        self.dtype = model_dtype(dtype, device)
        self.trusted = trusted
        with clear_errors(name, KIND):
            named = accepted_own_code(name, fetched_folder(name), "captions", trusted)
            config = cached_or_fetched(AutoConfig.from_pretrained, name, trust_remote_code=trusted)
            own_model = own_model_class(name, named, "captions")
            if own_model is None and type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
                raise InputError(f"{name}: {config.model_type} reads no images and a prompt; expected {KIND}")
            self.processor = self._load_processor(config.is_encoder_decoder)
            self.chats = self.processor.chat_template is not None
            if pictures > 1 and not self.chats:
                raise InputError(f"{name}: has no chat template, so it reads one picture; choose frames_per_item: 1")
            self.prompt = (INSTRUCTION if self.chats else "") if prompt is None else prompt
            self.model = self._load_model()
            self.code = self._code_that_runs()
            attention = self.model.config._attn_implementation
            probes = [[PROBE] * pictures]
            run_with_all_arguments(self.model, attention, lambda: self._generate(probes, max_tokens=1))

    def captions(self, items: Sequence[Sequence[Image.Image]]) -> list[str]:
        """Return one line for each item, given its RGB pictures; an empty line if the model generates no text."""
        return self._generate(items, self.max_tokens)

    def describe(self) -> dict[str, Any]:
        """Return everything that captions depend on, as JSON values.

        The digest of the model's weights is part of it, its name is not.
        """
        return {
            "weights": weights_digest(model_folder(self.name), with_code=self.code is not None),
            "prompt": self.prompt,
            "max_tokens": self.max_tokens,
            "dtype": str(self.dtype).removeprefix("torch."),
            **({"trust_remote_code": True, "code": self.code} if self.code is not None else {}),
        }

    def _code_that_runs(self) -> str | None:
        """Return the digest of the checkpoint's own code; None if it has none.

        Raises InputError if it names code that did not run, or that may not run. Of a hub name, some files are here
        only now that the model is loaded.
        """
        folder = model_folder(self.name)
        named = accepted_own_code(self.name, folder, "captions", self.trusted)
        parts = [getattr(self.processor, part, None) for part in self.processor.get_attributes()]
        running = [type(loaded) for loaded in (self.model.config, self.model, self.processor, *parts)]
        refuse_other_classes(self.name, named, "captions", running)
        return code_digest(running) if named or (folder / "custom_generate").is_dir() else None

    def _load_processor(self, encoder_decoder: bool) -> ProcessorMixin:
        """Return the processor, set to pad where generation needs it. Raises InputError if it reads no images."""
        processor = cached_or_fetched(AutoProcessor.from_pretrained, self.name, trust_remote_code=self.trusted)
        if not isinstance(processor, ProcessorMixin):
            raise InputError(f"{self.name}: {type(processor).__name__} is no processor of both images and text")
        tokenizer = processor.tokenizer
        tokenizer.padding_side = "right" if encoder_decoder else "left"  # a decoder continues after the last token
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        return processor

    def _load_model(self) -> Any:
        """Return the model on the device. Raises InputError if weights are missing or of another type."""
        options = {"dtype": self.dtype, "trust_remote_code": self.trusted, "output_loading_info": True}
        model, info = cached_or_fetched(AutoModelForImageTextToText.from_pretrained, self.name, **options)
        refuse_missing_weights(self.name, info["missing_keys"])
        refuse_cast_weights(self.name, model_folder(self.name), model)
        return model.to(self.device).eval()

    @torch.inference_mode()
    def _generate(self, items: Sequence[Sequence[Image.Image]], max_tokens: int) -> list[str]:
        """Return the generated text of each item on one line, without the prompt."""
        inputs = {name: self._moved(value) for name, value in self._inputs(items).items()}
        generated = self.model.generate(**inputs, max_new_tokens=max_tokens, do_sample=False, num_beams=1)
        texts = self._decoded(generated)
        prompts = self._decoded(inputs["input_ids"]) if "input_ids" in inputs else [""] * len(texts)
        # Most models repeat the prompt.
        return [text.removeprefix(prompt).strip() for text, prompt in zip(texts, prompts)]

    def _inputs(self, items: Sequence[Sequence[Image.Image]]) -> dict[str, Any]:
        """Return the model's inputs on the CPU."""
        if self.chats:
            return self.processor.apply_chat_template(
                [self._conversation(pictures) for pictures in items],
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
                processor_kwargs={"padding": True},
            )
        prompts = {"text": [self.prompt] * len(items), "padding": True} if self.prompt else {}
        return self.processor(images=[picture for (picture,) in items], return_tensors="pt", **prompts)

    def _conversation(self, pictures: Sequence[Image.Image]) -> list[dict[str, Any]]:
        """Return the message of a user that holds the pictures and the prompt."""
        shown = [{"type": "image", "image": picture} for picture in pictures]
        return [{"role": "user", "content": [*shown, {"type": "text", "text": self.prompt}]}]

    def _moved(self, value: Any) -> Any:
        """Return a tensor on the device, floats in the model's dtype; any other value unchanged."""
        if not isinstance(value, Tensor):
            return value
        return value.to(self.device, self.dtype if value.is_floating_point() else value.dtype)

    def _decoded(self, tokens: Tensor) -> list[str]:
        """Return each row of token ids as one line of text, single spaces between words."""
        return [" ".join(text.split()) for text in self.processor.batch_decode(tokens, skip_special_tokens=True)]
