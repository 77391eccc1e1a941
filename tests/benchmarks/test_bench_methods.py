"""The comparison of methods: every cell is trained once, a stopped sweep goes on, and the table adds up."""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from iisan_fast.benchmarks import cells
from iisan_fast.benchmarks.cells import Cell
from iisan_fast.benchmarks.harness import Setup
from iisan_fast.benchmarks.methods import compare_methods, cost_order
from iisan_fast.benchmarks.processes import in_a_process
from iisan_fast.benchmarks.result_tables import methods_tables
from iisan_fast.benchmarks.samples import sample_users
from iisan_fast.benchmarks.sweep_settings import MethodsSettings
from iisan_fast.cli import cli
from iisan_fast.config import RunConfig, ViewConfig
from iisan_fast.data.sequences import load_dataset
from iisan_fast.errors import InputError
from iisan_fast.evaluation.efficiency import tpme
from iisan_fast.training.run_folder import RunFolder

CPU = torch.device("cpu")
RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
METHODS = ("full", "lora", "iisan-uncached", "iisan", "id")


@pytest.fixture
def settings(encoder_views) -> MethodsSettings:
    return MethodsSettings(METHODS, {"titles": (encoder_views[1],)}, seeds=(0, 1), epochs=2, batch_users=16, profiled=2)


def run(dataset, out, settings: MethodsSettings, device) -> dict:
    """Return the sweep's table, tested against its last method."""
    return compare_methods(Setup(dataset, device, out), settings)


def test_a_sweep_gives_a_row_for_every_method(settings, small_catalogue, tmp_path, in_this_process):
    result = run(small_catalogue, tmp_path / "sweep", settings, CPU)
    rows = result["encoders"]["titles"]["methods"]
    assert tuple(rows) == METHODS and result["encoders"]["titles"]["encoding_s"] > 0
    for method, row in rows.items():
        assert row["seeds"] == 2 and row["hr_sd"] is not None and row["epochs"] == [2, 2]
        assert row["losses"][1] < row["losses"][0]
        assert set(row["phases_ms"]) == {"encoding", "forward", "backward", "update"}
        memory = row["memory_bytes"]
        assert memory["gradients"] == memory["trained_weights"] == 4 * row["trainable_parameters"]
        assert memory["optimizer_states"] >= 2 * memory["gradients"] and memory["activations"] > 0
        assert (memory["frozen_weights"] > 100_000) == (method in ("lora", "iisan-uncached"))
        assert (row["p_value"] is None) == (method == "id")
    assert rows["iisan"]["losses"] == pytest.approx(rows["iisan-uncached"]["losses"], rel=1e-3)
    columns = ("epoch_s", "trainable_parameters", "peak_bytes")
    expected = tpme(*({method: row[name] for method, row in rows.items()} for name in columns))
    assert {method: row["tpme"] for method, row in rows.items()} == expected
    figures = [
        json.loads((Cell("titles", "id", seed).folder(tmp_path / "sweep") / "figures.json").read_text())
        for seed in (0, 1)
    ]
    assert rows["id"]["ndcg"] == pytest.approx(np.mean([cell["ndcg"] for cell in figures]))
    stored = RunFolder(Cell("titles", "iisan", 1).folder(tmp_path / "sweep") / "run").figures
    baselines = result["encoders"]["titles"]["baselines"]
    assert list(baselines) == ["popularity", "neighbours"] and baselines["neighbours"]["similarity"]
    for name, row in baselines.items():
        assert (row["hr"], row["ndcg"]) == tuple(stored[name]["masked"][metric] for metric in ("hr@10", "ndcg@10"))
        assert 0 < row["p_value"] <= 1 and row["hr_sd"] is None and "tpme" not in row


TEXT_BY_IMAGE = list(product(("bert", "deberta-v3"), ("vit", "clip")))


@pytest.mark.parametrize("chosen", [TEXT_BY_IMAGE[::3], pytest.param(TEXT_BY_IMAGE, marks=pytest.mark.long)])
def test_iisan_beside_full_fine_tuning_over_pairs_of_encoders(
    chosen, built, small_catalogue, tmp_path, in_this_process
):
    """The paper's figure 4, of tiny encoders: BERT and DeBERTa by ViT and CLIP."""
    pairs = {
        f"{text} {image}": (
            ViewConfig("image", "image", str(built("image", image))),
            ViewConfig("title", "title", str(built("title", text)), max_tokens=12),
        )
        for text, image in chosen
    }
    settings = MethodsSettings(("full", "iisan"), pairs, epochs=2, batch_users=16, profiled=1)
    result = run(small_catalogue, tmp_path / "sweep", settings, CPU)
    assert list(result["encoders"]) == list(pairs)
    for name, one in result["encoders"].items():
        full, side = one["methods"]["full"], one["methods"]["iisan"]
        assert full["losses"][1] < full["losses"][0] and side["losses"][1] < side["losses"][0], name
        assert full["trainable_parameters"] > side["trainable_parameters"] and full["p_value"] <= 1
        assert one["encoding_s"] > 0 and 0 < full["tpme"] + side["tpme"] <= 1 + 1e-9  # each column says one
    trained = {name: one["methods"]["full"]["trainable_parameters"] for name, one in result["encoders"].items()}
    assert len({*trained.values()}) == len(pairs)  # each its own encoders


def test_a_stopped_sweep_goes_on_where_it_stopped(settings, small_catalogue, tmp_path, in_this_process, monkeypatch):
    settings = replace(settings, methods=("iisan", "id"))
    out = tmp_path / "sweep"
    real = cells._train
    trained: list[tuple[str, int, bool]] = []

    def train(config: RunConfig, run, *others):
        begun = (run / "config.json").exists()
        trained.append((config.model.method, config.train.seed, begun))
        if len(trained) == 2:
            monkeypatch.setattr(cells, "train", stopping)
        return real(config, run, *others)

    def stopping(config, run, device, placement):
        def stop(line):
            raise KeyboardInterrupt

        monkeypatch.undo()
        from iisan_fast.training.start_run import train

        return train(config, run, device, stop, placement)

    with monkeypatch.context():
        monkeypatch.setattr(cells, "in_a_process", lambda function, *arguments: function(*arguments))
        monkeypatch.setattr(cells, "_train", train)
        with pytest.raises(KeyboardInterrupt):
            run(small_catalogue, out, settings, CPU)
    assert (Cell("titles", "iisan", 0).folder(out) / "figures.json").exists()
    lines = RunFolder(Cell("titles", "iisan", 1).folder(out) / "run").metrics
    monkeypatch.setattr(cells, "in_a_process", lambda function, *arguments: function(*arguments))
    first = json.loads((Cell("titles", "iisan", 0).folder(out) / "figures.json").read_text())
    result = run(small_catalogue, out, settings, CPU)
    assert len(lines.read_text().splitlines()) == 2
    assert json.loads((Cell("titles", "iisan", 0).folder(out) / "figures.json").read_text()) == first
    shutil.rmtree(out)
    whole = run(small_catalogue, out, settings, CPU)
    for method in ("iisan", "id"):
        resumed, expected = (sweep["encoders"]["titles"]["methods"][method] for sweep in (result, whole))
        assert resumed["ndcg"] == expected["ndcg"] and resumed["losses"] == expected["losses"]


def test_a_sweep_takes_more_cells_but_no_other_settings(settings, small_catalogue, tmp_path, in_this_process):
    few = replace(settings, methods=("frozen", "id"), seeds=(0,), epochs=1)
    run(small_catalogue, tmp_path / "sweep", few, CPU)
    more = replace(few, methods=("frozen", "id", "iisan"), seeds=(0, 1))
    assert set(run(small_catalogue, tmp_path / "sweep", more, CPU)["encoders"]["titles"]["methods"]) == {
        *("frozen", "id", "iisan")
    }
    with pytest.raises(InputError, match="sweep.json: epochs is 1 there, 3 now"):
        run(small_catalogue, tmp_path / "sweep", replace(few, epochs=3), CPU)
    other = {"titles": (replace(settings.encoders["titles"][0], max_tokens=5),)}
    with pytest.raises(InputError, match="the encoders 'titles' are others there"):
        run(small_catalogue, tmp_path / "sweep", replace(few, encoders=other), CPU)
    with pytest.raises(InputError, match="expected an empty folder or a sweep"):
        run(small_catalogue, tmp_path, few, CPU)


def test_a_refused_start_leaves_nothing_in_the_way(settings, small_catalogue, tmp_path, in_this_process):
    few = replace(settings, methods=("frozen", "id"), seeds=(0,), epochs=1)
    out = tmp_path / "sweep"
    wrong = {"titles": (replace(settings.encoders["titles"][0], encoder=str(tmp_path / "nowhere")),)}
    with pytest.raises(InputError, match="1 of 2 cells failed .*frozen/seed-0.*mend them"):
        run(small_catalogue, out, replace(few, encoders=wrong), CPU)
    with pytest.raises(InputError, match="sweep.json: the encoders 'titles' are others there"):
        run(small_catalogue, out, few, CPU)  # the cell of item numbers was trained
    shutil.rmtree(out / "titles")
    assert set(run(small_catalogue, out, few, CPU)["encoders"]["titles"]["methods"]) == {"frozen", "id"}


def test_other_cells_go_on_where_one_fails(settings, small_catalogue, tmp_path, in_this_process, monkeypatch):
    few = replace(settings, methods=("frozen", "id"), seeds=(0, 1), epochs=1)
    real = cells._train

    def fail(config, folder, *others):
        if config.model.method == "frozen" and config.train.seed == 0:
            raise InputError("no luck")
        real(config, folder, *others)

    monkeypatch.setattr(cells, "_train", fail)
    with pytest.raises(InputError, match="1 of 4 cells failed"):
        run(small_catalogue, tmp_path / "sweep", few, CPU)
    done = sorted(str(path.relative_to(tmp_path / "sweep")) for path in (tmp_path / "sweep").rglob("figures.json"))
    assert done == [f"titles/{cell}/figures.json" for cell in ("frozen/seed-1", "id/seed-0", "id/seed-1")]


WAITING = """
import signal, sys
from iisan_fast.benchmarks.processes import in_a_process
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
in_a_process(exec, "import time; print('begun', flush=True); time.sleep(100)")
"""


def test_a_program_that_is_told_to_end_does_not_wait_for_its_cell():
    with subprocess.Popen([sys.executable, "-c", WAITING], stdout=subprocess.PIPE) as program:
        assert program.stdout.readline() == b"begun\n"
        program.terminate()
        assert program.wait(timeout=50) == 143
        assert not program.stdout.read()  # its cell has ended too, and closed this


@pytest.mark.long
def test_a_measured_process_logs_no_more_than_this_one():
    logger = logging.getLogger("iisan_fast")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        assert in_a_process(eval, "__import__('logging').getLogger('iisan_fast').level") == logging.ERROR
    finally:
        logger.setLevel(before)


def test_memory_of_a_run_that_another_process_finished_is_not_measured(
    settings, small_catalogue, tmp_path, in_this_process
):
    few = replace(settings, methods=("frozen", "id"), seeds=(0,), epochs=1)
    out = tmp_path / "sweep"
    run(small_catalogue, out, few, CPU)
    folder = Cell("titles", "id", 0).folder(out)
    for name in ("trained.json", "figures.json"):
        (folder / name).unlink()
    rows = run(small_catalogue, out, few, CPU)["encoders"]["titles"]["methods"]
    assert rows["id"]["peak_bytes"] == "not measured" and "tpme" not in rows["id"] and rows["frozen"]["peak_bytes"] > 0


def test_cells_that_cannot_be_are_refused_before_anything_is_trained(settings, small_catalogue, tmp_path):
    four = {"four": settings.encoders["titles"] * 4}
    with pytest.raises(InputError, match="views"):
        run(small_catalogue, tmp_path / "sweep", replace(settings, encoders=four), CPU)
    assert not (tmp_path / "sweep").exists()


def test_a_dataset_that_cannot_be_used_is_refused_before_anything_is_written(settings, small_catalogue, tmp_path):
    with pytest.raises(InputError, match="nowhere: no such folder; expected a dataset"):
        run(tmp_path / "nowhere", tmp_path / "sweep", settings, CPU)
    with pytest.raises(InputError, match="users: expected 1 to 64, those of .*, found 65"):
        run(small_catalogue, tmp_path / "sweep", replace(settings, users=65), CPU)
    assert not (tmp_path / "sweep").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"methods": ("iisan", "iisan")}, "methods: expected different ones"),
        ({"methods": ("iisan", "iisam")}, "methods: expected some of .*, found 'iisam'"),
        ({"methods": ("iisan", "neighbours")}, "methods: expected some of iisan, .*, found 'neighbours'"),
        ({"methods": ("iisan", "full-uncached")}, "found 'full-uncached'"),
        ({"encoders": {}}, "encoders: expected at least one"),
        ({"encoders": {"../up": ()}}, "encoders: expected a name of letters"),
        ({"seeds": (1, 1)}, "seeds: expected different ones"),
    ],
)
def test_settings_name_what_is_wrong(settings, change, message):
    with pytest.raises(InputError, match=message):
        replace(settings, **change)


def test_a_comparison_takes_two_methods_and_one_of_them_to_compare_with(settings, small_catalogue, tmp_path):
    with pytest.raises(InputError, match="methods: expected two or more, found id"):
        run(small_catalogue, tmp_path / "sweep", replace(settings, methods=("id",)), CPU)
    with pytest.raises(InputError, match="TPME weights: expected three numbers from 0 that sum to 1"):
        run(small_catalogue, tmp_path / "sweep", replace(settings, weights=(1.0, 1.0, 1.0)), CPU)
    with pytest.raises(InputError, match="against: expected one of full, .*, found 'frozen'"):
        run(small_catalogue, tmp_path / "sweep", replace(settings, against="frozen"), CPU)
    assert not (tmp_path / "sweep").exists()


def test_the_order_of_costs_is_checked():
    seconds = {"full": 9.0, "lora": 5.0, "adapter": 6.0, "iisan-uncached": 4.0, "iisan": 1.0, "id": 0.5}
    assert cost_order(seconds) == {
        "expected": "full > lora, adapter > iisan-uncached > iisan",
        "holds": True,
        "violations": [],
    }
    order = cost_order(seconds | {"lora": 3.0})
    assert not order["holds"] and order["violations"] == ["iisan-uncached takes 4.00 s, lora 3.00 s"]


def test_a_sample_of_users_keeps_the_rest_of_the_dataset(small_catalogue, tmp_path):
    folder = sample_users(small_catalogue, tmp_path / "few", 20)
    whole = load_dataset(small_catalogue).sequences
    few = load_dataset(folder).sequences
    assert len(few.user_ids) == 20 and set(few.user_ids) < set(whole.user_ids)
    assert (folder / "images").is_symlink() and sample_users(small_catalogue, folder, 7) == folder
    with pytest.raises(InputError, match="users: expected 1 to 64"):
        sample_users(small_catalogue, tmp_path / "many", 65)


def test_the_command_prints_the_table(small_catalogue, encoder_views, tmp_path, in_this_process):
    out = tmp_path / "result.json"
    arguments = [
        "bench",
        "methods",
        str(small_catalogue),
        "--folder",
        str(tmp_path / "sweep"),
        "--methods",
        "frozen, id",
    ]
    pair = f"demo: source=title encoder={encoder_views[1].encoder}"
    answer = CliRunner().invoke(
        cli, [*arguments, "--epochs", "1", "--users", "40", "--pair", pair, "--out", str(out)], catch_exceptions=False
    )
    assert answer.exit_code == 0 and "p against id" in answer.output and "one seed" in answer.output
    assert all(f" {name} " in answer.output for name in ("frozen", "id", "popularity", "neighbours"))
    result = json.loads(out.read_text())
    assert json.loads((tmp_path / "sweep" / "result.json").read_text()) == result
    assert list(result["encoders"]) == ["demo"] and result["settings"]["users"] == 40
    assert "--folder=FOLDER" in result["command"] and "--pair" in result["command"]


def test_a_table_says_that_no_run_has_states_for_similarity():
    result = json.loads((RESULTS / "methods-titles.json").read_text())
    (compared,) = result["encoders"].values()
    figures = {"hr": 0.1, "hr_sd": None, "ndcg": 0.05, "ndcg_sd": None, "p_value": 0.5}
    for similarity, said in ((True, False), (False, True)):
        compared["baselines"] = {"popularity": figures, "neighbours": {**figures, "similarity": similarity}}
        (table,) = methods_tables(result)
        assert ("neighbours without similarity" in table.caption) == said
        assert [row["method"] for row in table.sections[0][-2:]] == ["popularity", "neighbours"]
        assert [column.text(table.sections[0][-1]) for column in table.columns[1:]] == [
            *("neighbours", "10.00", "5.00", "0.5000"),
            *("", "", "", ""),
        ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no encoders: give"),
        (["--pair", "nameless"], "expected a new name"),
        (["--pair", "a: source=title encoder=e", "--text-encoder", "e"], "--pair: leave out --view"),
        (["--text-encoder", "e", "--seeds", "x"], "--seeds: expected a whole number, found 'x'"),
    ],
)
def test_the_command_names_what_is_wrong(arguments, message, small_catalogue, tmp_path):
    with pytest.raises(InputError, match=message):
        command = ["bench", "methods", str(small_catalogue), "--folder", str(tmp_path / "s"), *arguments]
        CliRunner().invoke(cli, command, catch_exceptions=False)
