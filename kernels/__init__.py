"""The project's numerical ops. Their plain PyTorch form in `reference` is the specification."""

if __name__ == "iisan_fast.kernels":
    from .reference import inbatch_cross_entropy, side_tower, target_rank

    __all__ = ["inbatch_cross_entropy", "side_tower", "target_rank"]
else:
    # Run from the repository root, transformers looks for the Hugging Face package `kernels`, imports this folder and
    # fails on an ImportError. A module without a version, a file or anything in it counts as absent, and the ops
    # cannot load a second time under the wrong name.
    __file__ = None
    __path__ = []
