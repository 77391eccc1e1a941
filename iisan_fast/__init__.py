"""iisan-fast: IISAN, a side network on frozen encoders' hidden states, for multimodal sequential recommendation."""

__version__ = "0.1.0"
