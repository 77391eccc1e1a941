"""The project's numerical ops, and the one rule that chooses the implementation, called the form, of an op.

Every op has the form `reference`, plain PyTorch, which is its specification. Most ops have more forms: `gpu`, in Triton
for CUDA GPUs, and `cpu`, in C++ that is compiled at its first use (PyTorch for `target_rank`). `dispatch.py` lists the
forms. `form="auto"` takes the fastest form that can run, unless the environment variable IISAN_FAST_FORM names one.
"""

if __name__ == "iisan_fast.kernels":
    from .checks import check_indices
    from .cpu.adam import AdamUpdate
    from .cpu.library import compiler_version, why_no_library
    from .cpu.step import CpuStep
    from .dispatch import FORM_VARIABLE, FormError, check_form, form_on, named_form
    from .gpu.configurations import CONFIGURATIONS, Configuration, as_architecture, table_entry
    from .gpu.launch import Launch, launches, recording
    from .ops import (
        adam,
        cpu_step,
        fold_heads,
        gpu_step,
        gpu_step_refusal,
        inbatch_cross_entropy,
        last_states,
        sequence_encoder,
        side_towers,
        step_refusal,
        target_rank,
        top_items,
    )
    from .reference.binary_cross_entropy import generalised_binary_cross_entropy
    from .reference.dropout import drop_factors, dropout_prefix, sequence_dropout
    from .threads import at_once, equal_parts, in_large_pieces
    from .types import (
        FLAT_ALIGNMENT,
        FLAT_LINE,
        HEADER,
        SITES_PER_BLOCK,
        TILE_ROWS,
        AdamState,
        AddedScores,
        Chain,
        FlatAdamState,
        RankSeam,
        RecommenderBatch,
        RecommenderWeights,
        SequenceDropout,
        SequenceGrid,
        SequenceWeights,
        States,
        StepOps,
        StepSeam,
        StepShape,
        StepTensors,
        Tower,
        WindowedStep,
    )

    __all__ = [
        "CONFIGURATIONS",
        "FLAT_ALIGNMENT",
        "FLAT_LINE",
        "FORM_VARIABLE",
        "HEADER",
        "SITES_PER_BLOCK",
        "TILE_ROWS",
        "AdamState",
        "AdamUpdate",
        "AddedScores",
        "Chain",
        "Configuration",
        "CpuStep",
        "FlatAdamState",
        "FormError",
        "Launch",
        "RankSeam",
        "RecommenderBatch",
        "RecommenderWeights",
        "SequenceDropout",
        "SequenceGrid",
        "SequenceWeights",
        "States",
        "StepOps",
        "StepSeam",
        "StepShape",
        "StepTensors",
        "Tower",
        "WindowedStep",
        "adam",
        "as_architecture",
        "at_once",
        "check_form",
        "check_indices",
        "compiler_version",
        "cpu_step",
        "drop_factors",
        "dropout_prefix",
        "equal_parts",
        "fold_heads",
        "form_on",
        "generalised_binary_cross_entropy",
        "gpu_step",
        "gpu_step_refusal",
        "in_large_pieces",
        "inbatch_cross_entropy",
        "last_states",
        "launches",
        "named_form",
        "recording",
        "sequence_dropout",
        "sequence_encoder",
        "side_towers",
        "step_refusal",
        "table_entry",
        "target_rank",
        "top_items",
        "why_no_library",
    ]
else:
    # In a program that runs in the repository root, transformers looks for the Hugging Face package `kernels` and finds
    # this folder. A module without a version, a file or any content counts as absent. So transformers goes on without
    # that package, and the ops are not loaded a second time under the wrong name.
    __file__ = None  # type: ignore[assignment]
    __path__ = []
