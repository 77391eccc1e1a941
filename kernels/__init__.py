"""The project's numerical ops. Their plain PyTorch form in `reference` is the specification."""

# Run from the repository root, transformers probes for the Hugging Face package `kernels` and would find this folder:
# it must look absent there, or the ops would load a second time under the wrong name.
if __name__ != "iisan_fast.kernels":
    raise ImportError(f"{__name__!r} is not a package of its own; import iisan_fast.kernels")

from .reference import inbatch_cross_entropy, side_tower, target_rank

__all__ = ["inbatch_cross_entropy", "side_tower", "target_rank"]
