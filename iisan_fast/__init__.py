"""iisan-fast: IISAN, a side network on frozen encoders' hidden states, for multimodal sequential recommendation."""

import os

__version__ = "0.1.0"

# Installed, this folder holds kernels/ and cli/. In a checkout they stand beside it, and are found there.
_folder = os.path.dirname(os.path.abspath(__file__))
if not all(os.path.isdir(os.path.join(_folder, name)) for name in ("kernels", "cli")):
    __path__.append(os.path.dirname(_folder))
