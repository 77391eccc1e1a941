"""Read the command line of on_gpu.sh and run the stages."""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path

from .runner import BUDGET, STAGES, Measurement, run


def main() -> int:
    """Run the chosen stages and return the exit code: 0 where all of them are done."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that a stage under way is stopped too
    arguments = parser().parse_args()
    names = [stage.name for stage in STAGES]
    chosen = arguments.stages.split(",") if arguments.stages else names
    if unknown := [name for name in chosen if name not in names]:
        print(f"--stages: expected some of {','.join(names)}, found {','.join(unknown)}", file=sys.stderr)
        return 2
    measurement = Measurement(
        dataset=arguments.dataset,
        out=arguments.out,
        stages=tuple(stage for stage in STAGES if stage.name in chosen),
        budget=arguments.budget - arguments.spent,
        commit=arguments.commit,
        dry_run=arguments.dry_run,
    )
    return run(measurement)


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line, its help listing the stages."""
    stages = "\n".join(f"  {stage.name:13} {stage.limit:4.0f} s at most: {stage.measures}" for stage in STAGES)
    options = argparse.ArgumentParser(
        "on_gpu.sh",
        description="Measure the project on a GPU.",
        epilog=f"stages, in this order:\n{stages}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    options.add_argument("dataset", type=Path, metavar="DATASET", help="a dataset folder")
    options.add_argument("out", type=Path, metavar="OUT", help="the folder for the results")
    options.add_argument("--stages", help="names, separated by commas; all by default")
    options.add_argument("--budget", type=float, default=BUDGET, help="seconds for all stages together (%(default)s)")
    options.add_argument("--spent", type=float, default=0, help=argparse.SUPPRESS)  # of the budget, by installing
    options.add_argument("--commit", help="the commit of a copy without .git")
    options.add_argument("--dry-run", action="store_true", help="small sizes on a CPU, a stand-in for the graph")
    return options


if __name__ == "__main__":
    sys.exit(main())
