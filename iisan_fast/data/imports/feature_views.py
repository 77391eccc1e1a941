"""Name the ready-made features in a folder of MMRec as views of a run."""

from __future__ import annotations

import shlex
from pathlib import Path

FEATURES = "_feat.npy"  # behind the name of a view, such as image


def feature_views(source: Path) -> list[str]:
    """Return the views of the features of a folder of MMRec, as the option --view of train takes them."""
    folder = source if source.is_dir() else source.parent
    paths = sorted(folder.resolve().glob(f"*{FEATURES}"))
    return [
        f"source=features path={shlex.quote(str(path))} name={path.name.removesuffix(FEATURES)} first_id=0"
        for path in paths
    ]
