"""Train as a rank of a job that `ranks.py` starts by torchrun, and write what the first rank measures.

torchrun … -m iisan_fast.benchmarks.on_gpu.rank_worker SETTINGS RESULT
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...runtime import prepare_program
from .settings import Settings

if TYPE_CHECKING:
    from ...ranks import Ranks


def main() -> None:
    """Measure with the settings and into the file that the command line names."""
    settings = json.loads(sys.argv[1])
    result = Path(sys.argv[2])
    prepare_program()  # before torch is imported
    from ...ranks import joined_ranks

    ranks = joined_ranks()
    rows = rows_of(Settings(**settings | {name: Path(settings[name]) for name in ("dataset", "out")}), ranks)
    if ranks.is_first:
        result.write_text(json.dumps(rows))


def rows_of(settings: Settings, ranks: Ranks) -> list[dict[str, Any]]:
    """Return a row for each form and size of a whole batch: the first losses, and the milliseconds of a step."""
    from ..stopwatch import quantiles
    from ..train import follow, start, timed
    from .common import captured_forms, device_of, histories, random_states, train_settings

    sequences = histories(settings)
    device = device_of(settings)
    tables = random_states(sequences, settings)
    sizes = [settings.users, min(settings.many_users, len(sequences.user_ids))]
    rows = []
    for name, form in captured_forms(settings).items():
        for users in sizes:
            started = start(form, sequences, tables, train_settings(settings, users), device, ranks)
            started.capture()
            losses = follow(started.step, settings.steps)
            times = [time for _ in range(settings.rounds) for time in timed(started.step, settings.steps, device)]
            rows.append({"form": name, "users": users, "losses": losses, **quantiles(times, "ms")})
    return rows


if __name__ == "__main__":
    main()
