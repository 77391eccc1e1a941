"""Name the ready-made features in a folder of MMRec as views of a run."""

from __future__ import annotations

import shlex
from pathlib import Path

FEATURES = "_feat.npy"  # behind the name of a view, such as image
USUAL = ("image", "text")
MOST = 2  # views of a run


def feature_views(source: Path) -> list[str]:
    """Return the views of the features of a folder of MMRec, as the option --view of train takes them.

    A run takes two, so of more than two the features of images and texts come first, and the others are left out.
    """
    folder = source if source.is_dir() else source.parent
    paths = {path.name.removesuffix(FEATURES): path for path in sorted(folder.resolve().glob(f"*{FEATURES}"))}
    names = [name for name in USUAL if name in paths] + [name for name in paths if name not in USUAL]
    return [
        f"source=features path={shlex.quote(str(paths[name]))} name={name} first_id=0" for name in sorted(names[:MOST])
    ]
