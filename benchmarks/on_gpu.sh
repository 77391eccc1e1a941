#!/usr/bin/env bash
# Measure the project on a GPU in at most eight minutes: benchmarks/on_gpu.sh DATASET OUT [options]
#
# DATASET is a dataset folder (items.tsv and users.tsv are enough), OUT the folder for results.json, log.txt and the
# profiles. The stages and what each one takes are listed by --help. Each stage is a process with a time limit, and
# results.json is written again as each ends, so that what was measured stays if the machine goes away.
#
#   --stages step,epochs   run these stages alone            --budget 480   start no stage beyond this many seconds
#   --commit ID            of a copy without .git            --dry-run      small sizes on a CPU, no GPU needed
#
# The machine needs a Python (PYTHON, by default python3) with torch, triton, transformers, numpy, pillow, rich, click,
# safetensors, filelock, pyyaml, pytest, hypothesis, pip and setuptools; no network and no package registry. Only the
# project itself is installed, unless it is already. Bring along what else is missing there, lmdb, platformdirs and
# xxhash above all: where registries can be reached, `pip download` their wheels for the machine's Python; on the machine
# unpack with `pip install --no-index --no-deps --target site wheels/*.whl`, and set PYTHONPATH=$PWD/site.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(dirname "$here")
python=${PYTHON:-python3}

if [[ $# -lt 2 || $1 == -* || $2 == -* ]]; then
    [[ ${1:-} == -h || ${1:-} == --help ]] && { cd / && exec "$python" -m iisan_fast.benchmarks.on_gpu --help; }
    echo "usage: on_gpu.sh DATASET OUT [--stages a,b] [--budget SECONDS] [--commit ID] [--dry-run]" >&2
    exit 2
fi
[[ -d $1 ]] || { echo "on_gpu.sh: expected a dataset folder, found nothing at $1" >&2; exit 2; }
[[ -f $1/items.tsv && -f $1/users.tsv ]] || { echo "on_gpu.sh: expected items.tsv and users.tsv in $1" >&2; exit 2; }
dataset=$(cd "$1" && pwd)
out=$2
[[ $out == /* ]] || out=$PWD/$out
shift 2

# `python -m` puts the current folder on the path, so it must not be the checkout with its folder called kernels.
cd /
installed="import importlib.util as u, sys; import iisan_fast
sys.exit(not iisan_fast.__file__.startswith(sys.argv[1]) or None in map(u.find_spec, ('iisan_fast.kernels', 'iisan_fast.benchmarks')))"
if ! "$python" -c "$installed" "$root/" 2>/dev/null; then
    "$python" -m pip install -q --disable-pip-version-check --no-index --no-deps --no-build-isolation -e "$root"
fi
exec "$python" -m iisan_fast.benchmarks.on_gpu "$dataset" "$out" --spent "$SECONDS" "$@"
