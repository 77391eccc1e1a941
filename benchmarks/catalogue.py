"""All benchmarks, as `iisan-fast bench` offers them."""

from __future__ import annotations

from . import result_tables as tables
from .harness import NONE, REQUIRED, Benchmark, Folder
from .settings import (
    EvaluateSettings,
    ExtractSettings,
    GrowthSettings,
    HistoriesSettings,
    KernelSettings,
    ScaleSettings,
    ServingSettings,
    StaticSettings,
    TrainSettings,
    UncachedSettings,
)
from .sweep_settings import EncodersSettings, MethodsSettings

RUNS = Folder("folder", "Folder of the runs; a stopped sweep goes on there.", required=True)
STATES = Folder("keep", "Folder for the cache of states; used again if it has one.")
HISTORIES = Folder("keep", "Folder for the dataset, its parsed arrays and the run; its dataset is used again.")
STAND_INS = Folder("keep", "Folder for encoders and dataset; used again if it has them.")

BENCHMARKS = (
    Benchmark(
        name="kernels",
        function="ops:measure_kernels",
        settings=KernelSettings,
        tables=tables.kernel_tables,
        summary="Time each kernel beside its reference and other libraries.",
        details="Batches come from the histories of DATASET, or of the embedded demo. Without CUDA only the eager "
        "references are timed. The extra 'bench' installs liger-kernel and cut-cross-entropy.",
        examples=("iisan-fast bench kernels DATASET --op loss --users 512",),
        option_names={"ops": "op", "forms": "form"},
    ),
    Benchmark(
        name="train",
        function="train:compare_training",
        settings=TrainSettings,
        tables=tables.train_tables,
        summary="Time training steps beside the dense reference.",
        details="Histories come from DATASET, or from the embedded demo. The losses of both must follow each other. "
        "Without CUDA, launches and CUDA memory are not measured.",
        examples=("iisan-fast bench train DATASET --out train.json", "iisan-fast bench train --no-epochs --rounds 4"),
    ),
    Benchmark(
        name="evaluate",
        function="evaluate:compare_evaluation",
        settings=EvaluateSettings,
        tables=tables.evaluate_tables,
        summary="Time the evaluation beside the released research code's.",
        details="Histories come from DATASET, or from the embedded demo. The ranks of both must agree. Without CUDA, "
        "CUDA memory is not measured.",
        examples=("iisan-fast bench evaluate DATASET --out evaluate.json",),
    ),
    Benchmark(
        name="extract",
        function="extract:compare_extraction",
        settings=ExtractSettings,
        tables=tables.extract_tables,
        summary="Time extraction beside a plain reference.",
        details="Items come from DATASET, or from the embedded demo. Both forms fill an empty cache, and their states "
        "must agree. Without CUDA, CUDA memory is not measured.",
        examples=("iisan-fast bench extract DATASET --source image \\\n  --encoder google/vit-base-patch16-224",),
    ),
    Benchmark(
        name="growth",
        function="growth:measure_growth",
        settings=GrowthSettings,
        tables=tables.growth_tables,
        summary="Time epochs and evaluations against batch and catalogue size.",
        details="The dataset is synthetic, with up to a million items.",
        examples=("iisan-fast bench growth --items 20000,100000 --plot growth.png",),
        dataset=NONE,
        drawing="growth:draw",
    ),
    Benchmark(
        name="scale",
        function="scale:measure_scale",
        settings=ScaleSettings,
        tables=tables.scale_tables,
        summary="Time training steps over catalogues beyond a device.",
        details="The dataset and the cache are synthetic; the cache takes 25 GB of disk for a million items, and is "
        "removed unless --keep names its folder. Tables are in memory, in the cache's file, and sharded over ranks on "
        "this machine. The losses of all must agree.",
        examples=("iisan-fast bench scale --items 20000,200000 --plot scale.png",),
        dataset=NONE,
        folder=STATES,
        drawing="scale:draw",
    ),
    Benchmark(
        name="histories",
        function="long_histories:measure_histories",
        settings=HistoriesSettings,
        tables=tables.histories_tables,
        summary="Measure stats and training on a hundred million interactions.",
        details="The dataset is synthetic; with its parsed arrays and a run it takes 2 GB of disk, and is removed "
        "unless --keep names its folder. Both commands run in new processes, whose private memory is watched.",
        examples=("iisan-fast bench histories --interactions 1000000",),
        dataset=NONE,
        folder=HISTORIES,
    ),
    Benchmark(
        name="methods",
        function="methods:compare_methods",
        settings=MethodsSettings,
        tables=tables.methods_tables,
        summary="Train several methods and compare their accuracy and cost.",
        details="Every method is trained on DATASET by the same trainer, over one or several sets of encoders. The "
        "test against --against is a paired randomisation test on the users' NDCG@10.",
        examples=(
            "iisan-fast bench methods DATASET --folder runs/methods --seeds 0,1 \\\n"
            "  --methods full,iisan --text-encoder bert-base-uncased",
        ),
        dataset=REQUIRED,
        takes_encoders=True,
        folder=RUNS,
        on_ranks=True,
    ),
    Benchmark(
        name="encoders",
        function="encoders:compare_encoders",
        settings=EncodersSettings,
        tables=tables.encoders_tables,
        summary="Train one method over several sets of encoders.",
        details="The table sets accuracy and cost against the size of the encoders, a row for each --pair.",
        examples=(
            "iisan-fast bench encoders DATASET --folder runs/encoders --plot encoders.png \\\n"
            '  --pair "BERT: source=title encoder=bert-base-uncased" \\\n'
            '  --pair "ViT: source=image encoder=google/vit-base-patch16-224"',
        ),
        dataset=REQUIRED,
        takes_encoders=True,
        folder=RUNS,
        on_ranks=True,
        drawing="encoders:draw",
        option_names={"methods": "method"},
    ),
    Benchmark(
        name="uncached",
        function="uncached:compare_uncached",
        settings=UncachedSettings,
        tables=tables.uncached_tables,
        summary="Time epochs in which the encoders run in every step.",
        details="Histories and titles come from DATASET, or from the embedded demo. Encoders have random weights, and "
        "images are noise: neither changes the cost of a step.",
        examples=("iisan-fast bench uncached DATASET --steps 20 --keep runs/stand-ins",),
        folder=STAND_INS,
    ),
    Benchmark(
        name="static",
        function="static:count_steps",
        settings=StaticSettings,
        tables=tables.static_tables,
        summary="Count the cost of a training step on a GPU, without a GPU.",
        details="Launches, memory and instructions of a step on the histories of DATASET. Only the host's time for a "
        "batch is measured. The first call compiles the kernels, which takes minutes; Triton keeps them.",
        examples=("iisan-fast bench static DATASET --users 64 --no-kernels",),
        dataset=REQUIRED,
        on_device=False,
    ),
    Benchmark(
        name="serving",
        function="serving:measure_serving",
        settings=ServingSettings,
        tables=tables.serving_tables,
        summary="Time recommending by a trained run.",
        details="RUN is the folder of a trained run, which stays as it is. A made catalogue shows the "
        "peak memory of a large one. A part whose library is not installed has the reason in place of figures.",
        examples=("iisan-fast bench serving RUN --out serving.json",),
        dataset=REQUIRED,
        argument="RUN",
    ),
)
BY_NAME = {benchmark.name: benchmark for benchmark in BENCHMARKS}
