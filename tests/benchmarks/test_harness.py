"""The harness: a description becomes a command, and every result has the same beginning."""

from __future__ import annotations

import io
import json
import shlex
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from rich.console import Console

from helpers.command_line import iisan_fast
from iisan_fast.benchmarks import harness
from iisan_fast.benchmarks.catalogue import BENCHMARKS, BY_NAME
from iisan_fast.benchmarks.harness import Benchmark, Folder, Setup, command_line, imported, run_benchmark, view_text
from iisan_fast.benchmarks.sweep_settings import MethodsSettings
from iisan_fast.benchmarks.tables import Column, ResultTable, label, mebibytes, quantile_column
from iisan_fast.cli import cli
from iisan_fast.cli.bench import _rich_table, bench_command
from iisan_fast.cli.views import parsed_view
from iisan_fast.config import ViewConfig
from iisan_fast.evaluation.efficiency import TPME_WEIGHTS
from iisan_fast.setting_fields import setting, settings_of

CPU = torch.device("cpu")
RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
COMMANDS = (
    "kernels",
    "train",
    "evaluate",
    "extract",
    "growth",
    "scale",
    "histories",
    "methods",
    "encoders",
    "uncached",
    "static",
    "serving",
)
NAMES = [benchmark.name for benchmark in BENCHMARKS]


@dataclass(frozen=True)
class TinySettings:
    users: int = setting(3, help="Users.")
    forms: tuple[str, ...] | None = setting(None, help="Forms.")
    epochs: bool = setting(True, help="Epochs.")
    hidden: int = 7


def figures(setup: Setup, settings: TinySettings) -> dict:
    return {"settings": asdict(replace(settings, users=2)), "rows": [{"seconds": 1.5}]}


TINY = Benchmark(
    name="tiny",
    function="tiny:figures",
    settings=TinySettings,
    tables=lambda result: [ResultTable("tiny", [Column("s", "seconds")], [result["rows"]])],
    summary="Measure nothing.",
    details="",
    examples=(),
    option_names={"forms": "form"},
)


def test_the_commands_keep_their_names():
    assert tuple(NAMES) == COMMANDS and tuple(cli.commands["bench"].commands) == COMMANDS


@pytest.mark.parametrize("name", COMMANDS)
def test_help_has_an_example_that_the_command_takes_and_fits_80_columns(name):
    page = iisan_fast("bench", name, "--help").stdout
    lines = page.splitlines()
    assert max(map(len, lines)) <= 80 and "Examples:" in lines
    assert BY_NAME[name].summary in page
    for example in BY_NAME[name].examples:
        program, group, command, *words = shlex.split(example.replace("\\\n", " "))
        assert (program, group, command) == ("iisan-fast", "bench", name)
        cli.commands["bench"].commands[name].make_context(name, words)  # parses them


@pytest.mark.parametrize("name", COMMANDS)
def test_every_setting_is_an_option_with_its_help(name):
    benchmark = BY_NAME[name]
    options = {option.name: option for option in cli.commands["bench"].commands[name].params}
    for setting_name, declared in settings_of(benchmark.settings).items():
        option = options[setting_name]
        flag = benchmark.option_names.get(setting_name, setting_name).replace("_", "-")
        assert f"--{flag}" in option.opts and option.help.startswith(declared.rules.help)


@pytest.mark.parametrize("name", COMMANDS)
def test_the_function_of_every_benchmark_is_there(name):
    assert callable(imported(BY_NAME[name].function))
    if BY_NAME[name].drawing:
        assert callable(imported(BY_NAME[name].drawing))


def test_a_result_says_where_its_figures_come_from(monkeypatch, tmp_path):
    monkeypatch.setattr(harness, "imported", {"tiny:figures": figures}.__getitem__)
    result = run_benchmark(TINY, TinySettings(forms=("eager, bf16", "triton")), Setup(None, CPU))
    assert list(result) == ["command", "dataset", "commit", "environment", "settings", "rows"]
    assert result["command"] == "iisan-fast bench tiny --users=2 '--form=eager, bf16' --form=triton --epochs"
    assert result["dataset"] == "demo" and result["settings"]["users"] == 2 and result["settings"]["hidden"] == 7
    assert {"device", "torch", "python", "native"} <= result["environment"].keys()
    counted = run_benchmark(replace(TINY, on_device=False, dataset=harness.NONE), TinySettings(), Setup(None, CPU))
    assert counted["dataset"] == "synthetic" and set(counted["versions"]) == {"torch", "triton"}
    folder = Folder("folder", "Folder.", required=True)
    (tmp_path / "DATA").mkdir()
    recorded = run_benchmark(replace(TINY, folder=folder), TinySettings(), Setup(tmp_path / "DATA", CPU, tmp_path))
    assert json.loads((tmp_path / "result.json").read_text()) == json.loads(json.dumps(recorded))
    assert recorded["dataset"] == "DATA"
    assert recorded["command"].startswith("iisan-fast bench tiny DATASET --folder=FOLDER")


def test_a_description_is_a_command_that_prints_and_writes_its_result(monkeypatch, tmp_path):
    monkeypatch.setattr(harness, "imported", {"tiny:figures": figures}.__getitem__)
    out = tmp_path / "tiny.json"
    printed = CliRunner().invoke(bench_command(TINY), ["--form", "a, b", "--no-epochs", "--out", str(out)])
    assert printed.exit_code == 0 and "1.5" in printed.output
    result = json.loads(out.read_text())
    assert result["settings"] == {"users": 2, "forms": ["a, b"], "epochs": False, "hidden": 7}
    as_json = CliRunner().invoke(bench_command(TINY), ["--json"])
    assert json.loads(as_json.output)["rows"] == [{"seconds": 1.5}]


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("train", "train"),
        ("evaluate", "evaluate"),
        ("extract", "extract"),
        ("growth", "growth"),
        ("encoders", "encoders"),
        ("methods-titles", "methods"),
        ("static", "static"),
        ("serving", "serving"),
    ],
)
def test_committed_results_have_the_form_of_new_ones_and_are_shown(file, name):
    """Their settings are those of today, but for some that came later; their tables can be printed."""
    result = json.loads((RESULTS / f"{file}.json").read_text())
    benchmark = BY_NAME[name]
    origin = "environment" if benchmark.on_device else "versions"
    assert list(result)[:5] == ["command", "dataset", "commit", origin, "settings"]
    later = {"profiled", "missing_images", "attention", "table", "against", "weights"}
    fields = set(benchmark.settings.__dataclass_fields__)
    assert fields - later <= set(result["settings"]) <= fields
    shown = [part for part in benchmark.tables(result) if isinstance(part, ResultTable)]
    assert shown
    for table in shown:
        printed = Console(width=80, record=True, file=io.StringIO())
        printed.print(_rich_table(table, 80))
        text = printed.export_text()
        assert "…" not in text and max(map(len, text.splitlines())) <= 80
        for row in [row for section in table.sections for row in section]:
            assert all(word in text for column in table.columns for word in column.text(row).split())


def test_columns_that_do_not_fit_are_lines():
    columns = [label("", "name"), Column("HR@10", "hr", "{:.2f}"), Column("p", "p"), *[Column("x" * 20, "hr")] * 3]
    table = ResultTable("T", columns, [[{"name": "id", "hr": 0.5, "p": None}]])
    assert len(_rich_table(table, 120).columns) == 6
    listed = _rich_table(table, 80)
    heads, texts = ([str(cell) for cell in column.cells] for column in listed.columns)
    assert heads == ["", "HR@10", *["x" * 20] * 3] and texts == ["id", "0.50", "0.5", "0.5", "0.5"]


def test_the_command_of_a_static_result_is_the_committed_one():
    result = json.loads((RESULTS / "static.json").read_text())
    assert command_line(BY_NAME["static"], Path("Scientific"), result["settings"]) == result["command"]


def test_views_are_recorded_as_the_command_line_takes_them():
    view = ViewConfig("t", "title", "a model", "mean", (0, 2), max_tokens=64, options={"device_map": "auto"})
    assert parsed_view(view_text(asdict(view))) == view
    settings = MethodsSettings(encoders={"one two": (view, view)})
    command = command_line(BY_NAME["methods"], Path("d"), asdict(settings))
    pair = next(word for word in shlex.split(command) if word.startswith("--pair="))
    assert pair.startswith("--pair=one two: name=t source=title") and pair.count(";") == 1


def test_tpme_has_the_papers_weights_by_default():
    assert MethodsSettings(encoders={"e": (ViewConfig("t", "title", "e"),)}).weights == TPME_WEIGHTS


def test_columns_show_figures_text_and_nothing():
    row = {"name": "eager", "p20_ms": 1.0, "p50_ms": 2.25, "p80_ms": 3.0, "peak": 3 << 20, "why": "not measured"}
    assert label("", "name").text(row) == "eager"
    assert quantile_column("step, ", "ms", 1).text(row) == "1.0 / 2.2 / 3.0"
    assert Column("peak", "peak", mebibytes).text(row) == "3"
    assert Column("peak", "why", mebibytes).text(row) == "not measured"
    assert Column("ratio", lambda row: None, "{:.2f}").text(row) == ""
    with pytest.raises(KeyError):
        Column("ratio", "ratio").text(row)
