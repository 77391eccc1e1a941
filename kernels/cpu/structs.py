"""The arguments of the C++ functions: ctypes structures that mirror the structs of `cpp/`, field by field.

Class XStruct mirrors the struct whose size the library exports as `size_of_X`. The sizes are compared when the library
is loaded. The fields are described in the C++ files.
"""

from __future__ import annotations

import ctypes

from ..types import BLOCK_WEIGHTS, Chain, Tower


def _fields(kind: type, *names: str) -> list[tuple[str, type]]:
    """Return ctypes fields of one type."""
    return [(name, kind) for name in names]


class CallStruct(ctypes.Structure):
    """`Call` of cpp/workers.cpp."""

    _fields_ = [*_fields(ctypes.c_void_p, "work", "arguments"), *_fields(ctypes.c_int32, "first", "last")]


class SumStruct(ctypes.Structure):
    """`Sum` of cpp/sums.cpp."""

    _fields_ = [*_fields(ctypes.c_void_p, "total", "part"), ("count", ctypes.c_int64)]


class AdamParameterStruct(ctypes.Structure):
    """`Parameter` of cpp/adam.cpp."""

    _fields_ = [
        *_fields(ctypes.c_void_p, "values", "mean", "square", "steps"),
        *_fields(ctypes.c_int64, "count", "mean_count", "square_count"),
    ]


class AdamStruct(ctypes.Structure):
    """`Adam` of cpp/adam.cpp."""

    _fields_ = [
        *_fields(ctypes.c_void_p, "parameters", "gradients", "rates", "decays", "gradient_counts"),
        *_fields(ctypes.c_int64, "count", "start", "length"),
        *_fields(ctypes.c_double, "beta1", "beta2", "epsilon"),
    ]


class FlatAdamStruct(ctypes.Structure):
    """`FlatAdam` of cpp/adam.cpp."""

    _fields_ = [
        *_fields(
            ctypes.c_void_p, "values", "gradient", "mean", "square", "groups", "rates", "decays", "steps", "record"
        ),
        *_fields(ctypes.c_int64, "lines", "start", "length"),
        ("group_count", ctypes.c_int32),
        *_fields(ctypes.c_double, "beta1", "beta2", "epsilon"),
        ("square_sums", ctypes.c_void_p),
        ("sum_count", ctypes.c_int64),
        ("clip_norm", ctypes.c_double),
        ("average", ctypes.c_void_p),
        ("average_share", ctypes.c_double),
    ]


class SquareSumsStruct(ctypes.Structure):
    """`SquareSums` of cpp/adam.cpp."""

    _fields_ = [*_fields(ctypes.c_void_p, "gradient", "sums"), *_fields(ctypes.c_int64, "count", "start", "length")]


class FoldStruct(ctypes.Structure):
    """`Fold` of cpp/fold.cpp."""

    _fields_ = [
        *_fields(ctypes.c_int32, "start", "count", "outputs", "between", "rows", "width", "stride"),
        *_fields(ctypes.c_void_p, *Chain._fields, "pair", "constant", "product", "bias", "upstream", "of_bias"),
        *_fields(ctypes.c_void_p, *(f"of_{name}" for name in Chain._fields)),
    ]


class LossStruct(ctypes.Structure):
    """`Loss` of cpp/cross_entropy.cpp."""

    _fields_ = [
        *_fields(ctypes.c_int32, "rows", "items", "width", "words"),
        *_fields(ctypes.c_void_p, "queries", "vectors", "targets", "row_users", "history_bits"),
        *_fields(ctypes.c_void_p, "column", "multiplicity", "probabilities", "losses", "upstream"),
        *_fields(ctypes.c_void_p, "of_queries", "of_vectors"),
    ]


class ColumnsStruct(ctypes.Structure):
    """`Columns` of cpp/cross_entropy.cpp."""

    OF_BATCH = ("distinct", "multiplicity", "log_popularity", "row_weights")  # fields of `RecommenderBatch`
    _fields_ = [
        *_fields(ctypes.c_int32, "rows", "items"),
        *_fields(ctypes.c_void_p, *OF_BATCH, "log_multiplicity", "column", "of_row_losses"),
    ]


class EncoderBlockStruct(ctypes.Structure):
    """`Block` of cpp/sequence_encoder.cpp."""

    _fields_ = _fields(ctypes.c_void_p, *(f"weight_{i}" for i in range(BLOCK_WEIGHTS)))


class EncoderStruct(ctypes.Structure):
    """`Encoder` of cpp/sequence_encoder.cpp."""

    GRADIENTS = ("of_position", "of_scale", "of_shift")  # gradients of the weights that belong to no block
    _fields_ = [
        *_fields(ctypes.c_int32, "rows", "width", "hidden", "heads", "blocks", "length", "positions", "drops"),
        *_fields(ctypes.c_int64, "user_count", "memory_size"),
        *_fields(ctypes.c_void_p, "slots", "users"),
        *_fields(ctypes.c_uint32, "prefix", "threshold"),
        *_fields(ctypes.c_double, "keep_scale", "epsilon"),
        *_fields(ctypes.c_void_p, "x", "position", "scale", "shift"),
        ("weights", ctypes.POINTER(EncoderBlockStruct)),
        *_fields(ctypes.c_void_p, "states", "memory", "upstream", "of_x", *GRADIENTS),
        ("of_weights", ctypes.POINTER(EncoderBlockStruct)),
    ]


class TowerStruct(ctypes.Structure):
    """`Tower` of cpp/tower.h."""

    _fields_ = [
        *_fields(ctypes.c_int32, "layers", "bottleneck", "width", "embedding"),
        *_fields(ctypes.c_int32, "total", "start", "count", "views", "gelu", "half"),
        *_fields(ctypes.c_void_p, *Tower._fields[1:], "projection"),
        ("hidden", ctypes.c_void_p * 2),
        *_fields(ctypes.c_void_p, "inputs", "before", "after", "projected", "upstream"),
        *_fields(ctypes.c_void_p, *(f"of_{name}" for name in Tower._fields[1:]), "of_projection"),
        ("of_hidden", ctypes.c_void_p * 2),
        ("temperature", ctypes.c_double),
        *_fields(ctypes.c_void_p, "joined", "joined_bias", "joined_projection", "joined_projection_bias"),
    ]


class GatherStruct(ctypes.Structure):
    """`Gather` of cpp/gather.cpp."""

    _fields_ = [
        *_fields(ctypes.c_void_p, "table", "rows", "panels"),
        *_fields(ctypes.c_int64, "item", "layer"),
        *_fields(ctypes.c_int32, "bytes", "layers", "width", "total", "start", "count"),
    ]


class ItemVectorsStruct(ctypes.Structure):
    """`ItemVectors` of cpp/item_vectors.cpp."""

    _fields_ = [
        *_fields(ctypes.c_int32, "items", "width", "towers", "room"),
        *_fields(ctypes.c_void_p, "projected", "biases", "bias", "vectors", "of_vectors", "of_bias"),
    ]


class RowsStruct(ctypes.Structure):
    """`Rows` of cpp/rows.cpp."""

    _fields_ = [
        *_fields(ctypes.c_int32, "rows", "items", "width"),
        *_fields(ctypes.c_void_p, "inputs", "vectors", "x"),
    ]


class RecordStruct(ctypes.Structure):
    """`Record` of cpp/loss_record.cpp."""

    _fields_ = [
        ("rows", ctypes.c_int32),
        ("step", ctypes.c_int64),
        *_fields(ctypes.c_void_p, "row_losses", "row_weights", "loss", "sums", "steps", "share"),
    ]


STRUCTS: dict[str, type[ctypes.Structure]] = {
    struct.__name__.removesuffix("Struct"): struct
    for struct in (
        CallStruct,
        SumStruct,
        AdamParameterStruct,
        AdamStruct,
        FlatAdamStruct,
        SquareSumsStruct,
        FoldStruct,
        LossStruct,
        ColumnsStruct,
        EncoderBlockStruct,
        EncoderStruct,
        TowerStruct,
        GatherStruct,
        ItemVectorsStruct,
        RowsStruct,
        RecordStruct,
    )
}
