"""Open a file of ready-made features, in any of its forms, as one memory-mapped array with the ids of its rows."""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path

from ..config import FeaturesConfig
from ..errors import InputError
from ..files import refuse_irregular
from .feature_content import DTYPES, FeatureContent, shaped
from .npy_arrays import open_npy
from .safetensors_features import open_safetensors

FORMS = "expected .npy, .safetensors, .parquet, or a folder of .parquet files"
CONVERSIONS = {  # of other files: how to make one that is read
    (".pt", ".pth", ".bin"): (
        "numpy.save('features.npy', torch.load(FILE, weights_only=True).float().numpy()) converts a tensor"
    ),
    (".npz",): "numpy.save('features.npy', numpy.load(FILE)[NAME]) converts an array of it",
    (".pkl", ".pickle"): "it may run code; convert it where you trust it, by numpy.save",
    (".csv", ".tsv", ".jsonl", ".feather"): "polars.read_csv(FILE).write_parquet('features.parquet') converts a table",
    (".h5", ".hdf5", ".mat"): "numpy.save('features.npy', FILE[NAME][:]) converts an array of it",
}


def open_content(config: FeaturesConfig, item_ids: Collection[str]) -> FeatureContent:
    """Open the file of a view. item_ids: of the run's items.

    Raises InputError if the file is missing, of another kind, damaged, or lacks what the settings name.
    """
    path = Path(config.path)
    openers: dict[str, Callable[[FeaturesConfig, Path, Collection[str]], FeatureContent]] = {
        ".npy": _open_npy,
        ".safetensors": open_safetensors,
        ".parquet": _open_parquet,
    }
    suffix = ".parquet" if path.is_dir() else path.suffix.lower()
    if suffix not in openers:
        remedies = [text for suffixes, text in CONVERSIONS.items() if suffix in suffixes]
        raise InputError(f"{path}: {FORMS}; {remedies[0]}" if remedies else f"{path}: {FORMS}, found another name")
    if suffix != ".parquet":
        refuse_irregular(path)
    if not path.exists():
        raise InputError(f"{path}: no such file; give the path of the features")
    _refuse_settings_of_other_forms(config, suffix)
    return openers[suffix](config, path, item_ids)


def _refuse_settings_of_other_forms(config: FeaturesConfig, suffix: str) -> None:
    """Raise InputError for a setting that is for another form of file."""
    homes = {"id_column": ".parquet", "column": ".parquet", "tensor": ".safetensors"}
    for name, home in homes.items():
        if getattr(config, name) is not None and suffix != home:
            raise InputError(f"{config.path}: {name}: is for {home} files; leave it out")


def _open_npy(config: FeaturesConfig, path: Path, item_ids: Collection[str]) -> FeatureContent:
    """Open a .npy file. Raises InputError for an array that holds no features."""
    array = open_npy(path)
    if array.dtype.newbyteorder("=").name not in DTYPES:
        raise InputError(f"{path}: expected {', '.join(DTYPES)}, found {array.dtype}; convert it by .astype('float32')")
    return FeatureContent(shaped(array, str(path)), DTYPES[array.dtype.newbyteorder("=").name], None)


def _open_parquet(config: FeaturesConfig, path: Path, item_ids: Collection[str]) -> FeatureContent:
    """Open Parquet. Raises InputError if it cannot be used, or if polars is missing."""
    from .parquet_features import open_parquet  # imports polars

    return open_parquet(config, path)
