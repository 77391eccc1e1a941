"""iisan-fast: IISAN, a side network on frozen encoders' hidden states, for multimodal sequential recommendation."""

from pathlib import Path

__version__ = "0.1.0"

# In a checkout, kernels/ and cli/ stand beside this folder; installed, they stand in it. Python started in a checkout
# finds this folder first, whatever is installed.
if (_checkout := Path(__file__).parents[1]).joinpath("kernels", "__init__.py").exists():
    __path__.append(str(_checkout))
