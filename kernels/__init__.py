"""The project's numerical ops, and the one rule that decides what runs them.

The side network, the loss and the target rank have a plain PyTorch form in `reference`, their specification, and a
Triton form. On a CPU there are host forms in PyTorch for the side network, the rank and the folding of weights, and
native ones in C++, compiled when they are first used: the folding, the side network, the sequence encoder, the loss,
all of these and their gradients at once, and Adam's update. `backend="auto"` takes Triton for CUDA tensors, C++
elsewhere, or the host forms where there is no compiler; the environment variable IISAN_FAST_BACKEND decides in its
place.
"""

if __name__ == "iisan_fast.kernels":
    from .checks import check_indices
    from .cpu.adam import AdamState, AdamUpdate
    from .cpu.library import compiler_version
    from .cpu.sequence_encoder import SequenceDropout, SequenceGrid, SequenceWeights
    from .cpu.whole_step import RecommenderGradients
    from .cpu.whole_step_plan import RecommenderBatch, RecommenderWeights
    from .dispatch import (
        BACKEND_VARIABLE,
        adam_update,
        backend_on,
        fold,
        inbatch_cross_entropy,
        last_states,
        recommender_gradients,
        sequence_encoder,
        side_towers,
        target_rank,
    )
    from .reference import Chain, States, Tower
    from .threads import at_once, equal_parts, in_large_pieces

    __all__ = [
        "BACKEND_VARIABLE",
        "AdamState",
        "AdamUpdate",
        "Chain",
        "RecommenderBatch",
        "RecommenderGradients",
        "RecommenderWeights",
        "SequenceDropout",
        "SequenceGrid",
        "SequenceWeights",
        "States",
        "Tower",
        "adam_update",
        "at_once",
        "backend_on",
        "check_indices",
        "compiler_version",
        "equal_parts",
        "fold",
        "in_large_pieces",
        "inbatch_cross_entropy",
        "last_states",
        "recommender_gradients",
        "sequence_encoder",
        "side_towers",
        "target_rank",
    ]
else:
    # Run from the repository root, transformers looks for the Hugging Face package `kernels`, imports this folder and
    # fails on an ImportError. A module without a version, a file or anything in it counts as absent, and the ops
    # cannot load a second time under the wrong name.
    __file__ = None  # type: ignore[assignment]
    __path__ = []
