"""Tiny models of the encoders that people use most, with random weights, by configuration."""

from __future__ import annotations

from typing import NamedTuple

import torch
import transformers as hf

BLOCKS, WIDTH, WORDS = 2, 32, 40
SIZES = {"hidden_size": WIDTH, "num_hidden_layers": BLOCKS, "num_attention_heads": 2, "intermediate_size": 48}
BERT = {**SIZES, "vocab_size": WORDS, "max_position_embeddings": 64}
RELATIVE = {**BERT, "type_vocab_size": 0, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]}
T5 = {"vocab_size": WORDS, "d_model": WIDTH, "d_kv": 16, "d_ff": 48, "num_layers": BLOCKS, "num_heads": 2}
GPT2 = {"vocab_size": WORDS, "n_embd": WIDTH, "n_layer": BLOCKS, "n_head": 2, "n_positions": 64}
GPT2 |= {"bos_token_id": 2, "eos_token_id": 3}
DISTIL = {"vocab_size": WORDS, "dim": WIDTH, "n_layers": BLOCKS, "n_heads": 2, "hidden_dim": 48}
XLNET = {"vocab_size": WORDS, "d_model": WIDTH, "n_layer": BLOCKS, "n_head": 2, "d_inner": 48}
BART = {"vocab_size": WORDS, "d_model": WIDTH, "max_position_embeddings": 64, "pad_token_id": 1}
for side in ("encoder", "decoder"):
    BART |= {f"{side}_layers": BLOCKS, f"{side}_attention_heads": 2, f"{side}_ffn_dim": 48}
LLM = {**BERT, "num_key_value_heads": 1, "head_dim": 16}
MODERN = {**BERT, **{f"{name}_token_id": 0 for name in ("pad", "bos", "eos", "cls", "sep")}}
VISION = {**SIZES, "image_size": 32, "patch_size": 8}
SWIN = {"image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [1, 2], "num_heads": [2, 2], "window_size": 4}


class Common(NamedTuple):
    """A family: the class of its model, the sizes of a tiny one, and its tokenizer's style or its image processor."""

    model_class: type[hf.PreTrainedModel]
    sizes: dict
    processor: str

    def build(self) -> hf.PreTrainedModel:
        return self.model_class(self.model_class.config_class(**self.sizes))


COMMON_TEXT = {
    "MPNet": Common(hf.MPNetModel, BERT, "cls"),
    "RoBERTa": Common(hf.RobertaModel, {**BERT, "pad_token_id": 1}, "cls"),
    "XLM-R": Common(hf.XLMRobertaModel, {**BERT, "pad_token_id": 1}, "cls"),
    "ELECTRA": Common(hf.ElectraModel, {**BERT, "embedding_size": 16}, "cls"),
    "ALBERT": Common(hf.AlbertModel, {**BERT, "embedding_size": 16}, "cls"),
    "DistilBERT": Common(hf.DistilBertModel, {**DISTIL, "max_position_embeddings": 64}, "cls"),
    "DeBERTa": Common(hf.DebertaModel, RELATIVE, "cls"),
    "DeBERTa-v3": Common(hf.DebertaV2Model, {**RELATIVE, "position_buckets": 8, "share_att_key": True}, "cls"),
    "Longformer": Common(hf.LongformerModel, {**BERT, "attention_window": 8, "pad_token_id": 1}, "cls"),
    "ModernBERT": Common(hf.ModernBertModel, MODERN, "cls"),
    "T5": Common(hf.T5EncoderModel, T5, "closed"),
    "mT5": Common(hf.MT5EncoderModel, {**T5, "feed_forward_proj": "gated-gelu"}, "closed"),
    "UMT5": Common(hf.UMT5EncoderModel, T5, "closed"),
    "LongT5": Common(hf.LongT5EncoderModel, {**T5, "local_radius": 4}, "closed"),
    "BART": Common(hf.BartModel, BART, "cls"),
    "XLNet": Common(hf.XLNetModel, XLNET, "xlnet"),
    "FNet": Common(hf.FNetModel, {**BERT, "tpu_short_seq_length": 64}, "cls"),
    "GPT-2": Common(hf.GPT2Model, GPT2, "bare"),
    "Qwen2": Common(hf.Qwen2Model, LLM, "bytes"),
    "Qwen3": Common(hf.Qwen3Model, LLM, "bytes"),
    "LLaMA": Common(hf.LlamaModel, LLM, "bos"),
    "Gemma": Common(hf.GemmaModel, LLM, "bos"),
    "Mixtral": Common(hf.MixtralModel, {**LLM, "num_local_experts": 4}, "bos"),
}
COMMON_IMAGE = {
    "DeiT": Common(hf.DeiTModel, VISION, "ViTImageProcessor"),
    "BEiT": Common(hf.BeitModel, {**VISION, "use_relative_position_bias": True}, "ViTImageProcessor"),
    "DINOv2": Common(hf.Dinov2Model, VISION, "BitImageProcessor"),
    "Swin": Common(hf.SwinModel, SWIN, "ViTImageProcessor"),
    "Swin v2": Common(hf.Swinv2Model, SWIN, "ViTImageProcessor"),
}
COMMON = COMMON_TEXT | COMMON_IMAGE


def common_model(family: str) -> hf.PreTrainedModel:
    """Build a family's tiny encoder, whose parts all have a visible effect."""
    torch.manual_seed(0)
    model = COMMON[family].build()
    with torch.no_grad():  # far from the initial 0.02
        for parameter in model.parameters():
            parameter.normal_(std=0.3) if parameter.dim() > 1 else parameter.add_(0.1 * torch.randn_like(parameter))
    model.config.use_cache = False
    return (model.get_encoder() if family == "BART" else model).eval()


def common_inputs(family: str) -> dict[str, torch.Tensor]:
    """Return inputs of three items: images, or texts of unlike lengths."""
    torch.manual_seed(1)
    if family in COMMON_IMAGE:
        return {"pixel_values": torch.randn(3, 3, 32, 32)}
    mask = torch.arange(7) < torch.tensor([7, 4, 6])[:, None]
    return {"input_ids": torch.randint(4, WORDS, (3, 7)), "attention_mask": mask.long()}
