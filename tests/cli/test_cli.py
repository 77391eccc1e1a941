"""The command line as a person meets it: figures, JSON, and one clear line with exit code 2 for anything wrong."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import click
import pytest

from helpers.command_line import iisan_fast, refused
from helpers.compiler import needs_compiler
from iisan_fast.cli.views import chosen_views, view_options
from iisan_fast.config import ViewConfig
from iisan_fast.errors import InputError
from iisan_fast.states import placement
from iisan_fast.training import item_sources

FAST = ("--epochs", 2, "--batch-users", 16, "--embedding-dim", 16, "--bottleneck", 8)


@pytest.fixture(scope="module")
def finished_run(toy_run, tmp_path_factory) -> Path:
    dataset, cache = toy_run
    out = tmp_path_factory.mktemp("runs") / "run"
    result = iisan_fast("train", dataset, "--cache", cache, "--out", out, *FAST)
    assert result.returncode == 0, result.stderr
    assert "popularity" in result.stdout and "HR@10" in result.stdout and "epoch   2" in result.stderr
    return out


def test_help_of_every_command_shows_defaults():
    assert "extract" in iisan_fast().stdout
    for command in ("stats", "extract", "train", "evaluate"):
        result = iisan_fast(command, "--help")
        assert result.returncode == 0 and "Usage: iisan-fast" in result.stdout and "[" in result.stdout


def test_the_installed_program_answers_like_main():
    program = Path(sys.executable).with_name("iisan-fast")
    result = subprocess.run([program, "stats", "nowhere"], capture_output=True, text=True)
    assert result.returncode == 2 and result.stderr == refused("stats", "nowhere")


def test_stats_of_scientific(scientific_folder):
    counts = json.loads(iisan_fast("stats", scientific_folder, "--json").stdout)
    assert (counts["users"], counts["items"], counts["interactions"]) == (12076, 20314, 81711)
    table = iisan_fast("stats", scientific_folder).stdout
    assert "12,076" in table and "20,314" in table and "81,711" in table


def test_evaluate_prints_any_cut_off_of_either_split(finished_run):
    shown = json.loads(iisan_fast("evaluate", finished_run, "--k", 1, "--k", 20, "--json").stdout)
    saved = json.loads((finished_run / "test.json").read_text())
    assert shown["test"]["masked"]["mrr"] == saved["test"]["masked"]["mrr"]
    assert {"hr@1", "ndcg@20"} <= shown["test"]["unmasked"].keys()
    table = iisan_fast("evaluate", finished_run, "--split", "validation").stdout
    assert "unmasked" in table and "validation targets of 60 users" in table


def test_train_prints_json_and_saves_the_resolved_config(toy_run, tmp_path):
    dataset, cache = toy_run
    settings = tmp_path / "settings.json"
    settings.write_text(json.dumps({"model": {"bottleneck": 4}, "train": {"seed": 5, "max_epochs": 9}}))
    arguments = ("--config", settings, "--epochs", 1, "--views", "title", "--learning-rate", "heads=0.01", "--k", 5)
    result = iisan_fast("train", dataset, "--cache", cache, "--out", tmp_path / "run", *arguments, "--json")
    assert json.loads(result.stdout)["test"]["masked"].keys() >= {"hr@5", "ndcg@5"}
    saved = json.loads((tmp_path / "run" / "config.json").read_text())
    assert saved["model"]["bottleneck"] == 4 and saved["train"]["seed"] == 5 and saved["train"]["max_epochs"] == 1
    assert saved["views"] == ["title"] and saved["train"]["learning_rates"]["heads"] == 0.01
    assert saved["train"]["learning_rates"]["adapters"] == 1e-4


@pytest.mark.parametrize(
    ("placement", "home"),
    [
        ("auto", "on cpu"),
        ("device", "on cpu"),
        ("pinned", "in host memory, rows gathered ahead"),
        ("mapped", "in the store's file"),
    ],
)
def test_train_says_where_the_table_lies(toy_run, tmp_path, placement, home, caplog):
    dataset, cache = toy_run
    arguments = (*FAST, "--epochs", 1, "--device", "cpu", "--table", placement)
    assert iisan_fast("train", dataset, "--cache", cache, "--out", tmp_path / "run", *arguments).returncode == 0
    (line,) = [message for message in caplog.messages if message.startswith("feature table: ")]
    assert re.fullmatch(rf"feature table: 0 MiB, {home} \([\d.]+ [GM]iB free on cpu\)", line)
    caplog.clear()
    resumed = iisan_fast("train", "--resume", tmp_path / "run", "--table", "mapped", "--json")
    assert json.loads(resumed.stdout)["epochs"] == 1  # the place is none of a run's settings


@pytest.mark.slow
def test_the_line_about_the_table_is_printed(toy_run, tmp_path):
    dataset, cache = toy_run
    program = Path(sys.executable).with_name("iisan-fast")
    arguments = ("--out", tmp_path / "run", *FAST, "--table", "mapped", "--device", "cpu")
    command = [program, "train", dataset, "--cache", cache, *arguments, "--json"]
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "\nfeature table: 0 MiB, in the store's file (" in "\n" + result.stderr
    assert json.loads(result.stdout)["epochs"] == 2  # and not on standard output


def test_train_takes_the_next_free_run_folder(toy_run, tmp_path, monkeypatch):
    dataset, cache = toy_run
    monkeypatch.chdir(tmp_path)
    for number in (1, 2):
        assert iisan_fast("train", dataset, "--cache", cache, *FAST).returncode == 0
        assert (tmp_path / "runs" / f"toy-{number}" / "test.json").exists()


def test_resume_continues_and_takes_no_other_settings(finished_run):
    assert json.loads(iisan_fast("train", "--resume", finished_run, "--json").stdout)["epochs"] == 2
    assert "leave out --seed" in refused("train", "--resume", finished_run, "--seed", 1)
    assert "not a run folder" in refused("train", "--resume", finished_run / "no")


def test_an_interruption_gets_one_line(tmp_path, monkeypatch):
    def interrupted(**_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("iisan_fast.cli.stats.callback", interrupted)
    result = iisan_fast("stats", tmp_path)
    assert (result.returncode, result.stdout, result.stderr.strip()) == (130, "", "stopped")


def test_bad_input_gets_one_line_and_exit_code_2(toy_run, finished_run, tmp_path):
    dataset, cache = toy_run
    out = ("--out", tmp_path / "run")
    assert "no such folder" in refused("stats", tmp_path / "nowhere")
    assert "Missing argument 'DATASET'" in refused("stats")
    assert "No such option" in refused("stats", dataset, "--wrong")
    assert "cache: iisan needs hidden states; give a cache, features, or encoders that run" in refused(
        "train", dataset, *out
    )
    assert "not a cache of hidden states" in refused("train", dataset, "--cache", tmp_path, *out)
    assert "no view 'video'; it has image, title" in refused(
        "train", dataset, "--cache", cache, "--views", "video", *out
    )
    assert "already holds a run" in refused("train", dataset, "--cache", cache, "--out", finished_run)
    assert "expected GROUP=RATE" in refused("train", dataset, "--cache", cache, "--learning-rate", "heads", *out)
    assert "learning_rates.head: iisan has adapters, gates, heads, sequence_encoder" in refused(
        "train", dataset, "--cache", cache, "--learning-rate", "head=1e-3", *out
    )
    assert "--batch-users: expected 1 to" in refused("train", dataset, "--cache", cache, "--batch-users", 0, *out)
    assert "--table" in refused("train", dataset, "--cache", cache, "--table", "disk", *out)
    assert "--precision" in refused("train", dataset, "--cache", cache, "--precision", "float16", *out)
    assert "leave out --precision" in refused("train", "--resume", finished_run, "--precision", "float32")
    assert "device: expected auto, cpu" in refused("train", dataset, "--cache", cache, "--device", "tpu9", *out)
    assert "CUDA devices" in refused("train", dataset, "--cache", cache, "--device", "cuda:77", *out)
    items = dataset / "items.tsv"
    assert refused("stats", items) == f"error: DATASET: expected a folder, found the file {items}\n"
    config = refused("train", dataset, "--cache", cache, "--config", dataset, *out)
    assert config == f"error: --config: expected a file, found the folder {dataset}\n"
    nowhere = refused("train", dataset, "--cache", cache, *FAST, "--out", "/proc/nowhere")
    assert nowhere == "error: /proc/nowhere: No such file or directory\n"
    assert "Did you mean one of: '--epochs', " in refused("train", dataset, "--epoch", 3)
    assert "Did you mean 'train'?" in refused("trian")
    assert "No such file" in refused("train", dataset, "--cache", cache, "--config", tmp_path / "no.json", *out)
    assert "--k: expected at least 1, found 0" in refused("evaluate", finished_run, "--k", 0)
    assert "not a run folder" in refused("evaluate", tmp_path)
    assert "dataset: none given, and the demo takes no cache" in refused("train", "--cache", cache, *out)
    assert not (tmp_path / "run").exists()


def test_bad_views_get_one_line(toy_run, tmp_path):
    dataset, _ = toy_run
    cache = ("--cache", tmp_path / "cache")
    assert "views: none to encode" in refused("extract", dataset, *cache)
    assert "expected key=value, found 'title'" in refused("extract", dataset, *cache, "--view", "title")
    assert "encoder: missing setting" in refused("extract", dataset, *cache, "--view", "source=title")
    assert "--text-layers: expected a whole number, found 'a'" in refused(
        "extract", dataset, *cache, "--text-encoder", "x", "--text-layers", "a"
    )
    two = ("--view", "source=title encoder=x", "--view", "source=title encoder=y")
    assert "views: two have one name (title, title)" in refused("extract", dataset, *cache, *two)
    assert "source: expected one of" in refused("extract", dataset, *cache, "--view", "source=video encoder=x")
    assert "expected a folder images" in refused("extract", dataset, *cache, "--image-encoder", tmp_path)
    assert str(tmp_path / "none") in refused("extract", dataset, *cache, "--text-encoder", tmp_path / "none")
    assert not (tmp_path / "cache").exists()


def views_given(*arguments: str, layer_groups: int | None = None) -> list[ViewConfig]:
    """Return the views that a command's options ask for."""
    views = []

    @click.command()
    @view_options
    def command(**options) -> None:
        views.extend(chosen_views(options, layer_groups))

    command.main(list(arguments), standalone_mode=False)
    return views


def test_settings_of_encoders_need_encoders(toy_run, tmp_path):
    dataset, cache = toy_run
    for setting in (("--max-tokens", 5), ("--encoder-dtype", "float32"), ("--text-source", "caption")):
        message = refused("train", dataset, "--cache", cache, "--out", tmp_path / "run", *setting)
        assert (
            "max_tokens, encoder_dtype, revision, text_source, encoder_options: need image_encoder or text" in message
        )
    (view,) = views_given("--text-encoder", "t")
    assert (view.name, view.source, view.max_tokens, view.encoder_dtype) == ("title", "title", 30, "auto")


def test_what_methods_do_not_take_gets_one_line(toy_run, tmp_path):
    dataset, cache = toy_run
    train = ("train", dataset, "--out", tmp_path / "run")
    assert "cache: id reads no states" in refused(*train, "--method", "id", "--cache", cache)
    assert "method: lora trains encoders, so they have to run" in refused(*train, "--method", "lora", "--cache", cache)
    assert "uncached: no encoders to run" in refused(*train, "--uncached")
    assert "items_at_once: needs encoders that run" in refused(*train, "--cache", cache, "--items-at-once", 4)
    assert "inter: the inter tower joins two views" in refused(*train, "--cache", cache, "--views", "image", "--inter")
    demo = ("train", "--out", tmp_path / "demo", "--layer-groups", 9)
    assert "layer_groups: expected 1 to 6" in refused(*demo)
    assert not (tmp_path / "demo").exists() and not (tmp_path / "run").exists()


def test_layer_groups_are_those_of_every_view():
    views = ("--image-encoder", "i", "--text-encoder", "t", "--view", "source=title encoder=e name=other")
    assert [view.layer_groups for view in views_given(*views, layer_groups=3)] == [3, 3, 3]
    for layers in (("--text-encoder", "t", "--text-layers", "0,2"), ("--view", "source=title encoder=e layers=0,1")):
        with pytest.raises(InputError, match="layer_groups: view 'title' names its layers already"):
            views_given(*layers, layer_groups=3)
    with pytest.raises(InputError, match="--text-layers: expected a whole number, found ''"):
        views_given("--text-encoder", "t", "--text-layers", "")


def test_extract_keeps_the_layers_of_its_groups(catalogue, encoder_views, tmp_path):
    views = ("--view", f"source=title encoder={encoder_views[1].encoder}")
    assert iisan_fast("extract", catalogue, "--cache", tmp_path / "c", *views, "--layer-groups", 2).returncode == 0
    assert json.loads((tmp_path / "c" / "manifest.json").read_text())["views"]["title"]["layers"] == [0, 3, 6]


def test_uncached_states_are_rounded_as_a_cache_of_their_dtype(catalogue, encoder_views, tmp_path):
    views = ("--text-encoder", encoder_views[1].encoder)
    assert iisan_fast("extract", catalogue, "--cache", tmp_path / "c", *views, "--dtype", "float32").returncode == 0
    losses = []
    for name, source in (("cached", ("--cache", tmp_path / "c")), ("uncached", ("--dtype", "float32", *views))):
        run = tmp_path / name
        assert iisan_fast("train", catalogue, *source, "--out", run, *FAST).returncode == 0
        assert json.loads((run / "views.json").read_text())["title"]["dtype"] == "float32"
        losses.append([json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()])
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)


def test_titles_stand_in_for_missing_captions_where_asked(catalogue, encoder_views, tmp_path):
    (catalogue / "captions.tsv").write_text("".join(f"i{number}\tsteel oak {number}\n" for number in range(1, 61)))
    encoder = encoder_views[1].encoder
    extract = ("extract", catalogue, "--cache", tmp_path / "c", "--text-source", "caption", "--text-encoder", encoder)
    assert "(no text), i62" in (message := refused(*extract)) and "missing_captions: title" in message
    assert iisan_fast(*extract, "--missing-captions", "title").returncode == 0
    train = ("train", catalogue, "--cache", tmp_path / "c", "--epochs", 1, "--out", tmp_path / "run")
    assert iisan_fast(*train).returncode == 0  # reads the captions as the cache was made from them
    (catalogue / "items.tsv").write_text((catalogue / "items.tsv").read_text().replace("i70\t", "i70\tother "))
    assert "the captions of 1 items are not those that were encoded (i70)" in refused(*train[:-1], tmp_path / "again")


def test_encoder_options_reach_the_views_they_are_for():
    both = ("--image-encoder", "i", "--text-encoder", "t")
    common = ("--encoder-option", "device_map=auto", "--encoder-option", "max_memory=null")
    quantized = ("--encoder-option", 'text:quantization_config={"bits": 4, "quant_method": "a=b"}')
    image, text = views_given(*both, *common, *quantized, "--encoder-option", "image:device_map=0")
    assert image.options == {"device_map": 0, "max_memory": None}
    quantization = {"bits": 4, "quant_method": "a=b"}
    assert text.options == {"device_map": "auto", "max_memory": None, "quantization_config": quantization}
    loading = """option.dtype=float16 option.max_memory='{"cpu": "1GB"}'"""
    (view,) = views_given("--view", f"source=title encoder=e {loading}")
    assert view.encoder_dtype == "float16" and view.options == {"max_memory": {"cpu": "1GB"}}


def test_bad_encoder_options_get_one_line(toy_run, tmp_path):
    extract = ("extract", toy_run[0], "--cache", tmp_path / "cache")
    text = (*extract, "--text-encoder", "x")
    for bad, part in (
        *(("load_in_4bit", "load_in_4bit"), ("=3", "=3")),
        *(("title:dtype=float32", "title:dtype"), ("text:=3", "text:")),
    ):
        message = f"--encoder-option: expected [image:|text:]NAME=VALUE, found {part!r}"
        assert message in refused(*text, "--encoder-option", bad)
    assert "options.trust_remote_code: is decided here" in refused(*text, "--encoder-option", "trust_remote_code=true")
    assert "image_options: needs image_encoder" in refused(*text, "--encoder-option", "image:a=1")
    view = ("--view", "source=title encoder=e")
    assert "encoder_options: need image_encoder or text_encoder" in refused(*extract, *view, "--encoder-option", "a=1")
    view = ("--view", "source=title encoder=e option.dtype=int3")
    assert "options.dtype: expected one of auto, float32" in refused(*extract, *view)


def test_bottlenecks_of_all_towers_and_of_some(toy_run, tmp_path):
    dataset, cache = toy_run
    train = ("train", dataset, "--cache", cache, "--out", tmp_path / "run", "--epochs", 1)
    result = iisan_fast(*train, "--bottleneck", 8, "--bottleneck", "first=12", "--bottleneck", "inter=4")
    assert result.returncode == 0, result.stderr
    model = json.loads((tmp_path / "run" / "config.json").read_text())["model"]
    assert model["bottleneck"] == 8 and model["bottlenecks"] == {"first": 12, "inter": 4}
    assert iisan_fast("evaluate", tmp_path / "run").returncode == 0
    train = ("train", dataset, "--cache", cache, "--out", tmp_path / "other")
    assert "--bottleneck: expected 1 to 65536, found -3" in refused(*train, "--bottleneck=-3")
    for bad in ("wide", "first="):
        assert f"--bottleneck: expected WIDTH or TOWER=WIDTH, found {bad!r}" in refused(*train, f"--bottleneck={bad}")
    assert "bottlenecks: expected one of first, second, inter" in refused(*train, "--bottleneck", "third=3")


def test_a_demo_with_bad_settings_leaves_nothing(tmp_path):
    bfloat16 = ("--precision", "bfloat16", "--device", "cpu")
    for bad in (("--epochs", 0), ("--learning-rate", "heads=x"), ("--k", 0), ("--seed", 10**30), bfloat16):
        refused("train", "--out", tmp_path / "run", *bad)
    assert not (tmp_path / "run").exists()


def test_a_demo_without_a_library_that_it_needs_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(item_sources, "find_spec", lambda name: None)
    assert "lora needs peft" in refused("train", "--out", tmp_path / "run", "--method", "lora")
    assert not (tmp_path / "run").exists()


def test_bfloat16_products_on_a_cpu_get_one_line(toy_run, tmp_path):
    dataset, cache = toy_run
    arguments = ("--out", tmp_path / "run", "--precision", "bfloat16", "--device", "cpu")
    message = refused("train", dataset, "--cache", cache, *arguments)
    assert message == (
        "error: precision: expected auto or float32 for iisan on a CPU, found bfloat16; "
        "train a run in float32, or choose the device cuda\n"
    )
    assert not (tmp_path / "run").exists()


def test_a_table_that_does_not_fit_where_it_was_asked_for_gets_one_line(toy_run, tmp_path, monkeypatch):
    dataset, cache = toy_run
    monkeypatch.setattr(placement, "free_memory", lambda device: 1000)
    arguments = ("--out", tmp_path / "run", "--device", "cpu", "--table", "pinned")
    message = refused("train", dataset, "--cache", cache, *arguments)
    assert message.startswith("error: table: pinned needs 0 MiB, found 0 MiB free; choose mapped")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "settings",
    [
        '{"train": 3}',
        '{"train": {"precision": "half"}}',
        '{"model": []}',
        '{"dataset": 3, "cache": ["y"]}',
        "[" * 100_000,
    ],
)
def test_settings_of_the_wrong_type_get_one_line(toy_run, tmp_path, settings):
    dataset, cache = toy_run
    path = tmp_path / "settings.json"
    path.write_text(settings)
    where = ("--config", path, "--out", tmp_path / "run", "--epochs", 3, "--method", "iisan")
    refused("train", *where)
    if "dataset" not in settings:
        refused("train", dataset, "--cache", cache, *where)
    assert not (tmp_path / "run").exists()


def test_devices_that_cannot_compute_are_refused(finished_run):
    for device in ("meta", "mps", "xpu"):
        assert "expected auto, cpu, cuda" in refused("evaluate", finished_run, "--device", device)


def test_names_are_printed_as_they_are(toy_run, tmp_path):
    odd = tmp_path / "w[bold]x[/y]"
    odd.mkdir(parents=True)
    for name in ("items.tsv", "users.tsv"):
        (odd / name).write_text((toy_run[0] / name).read_text())
    assert "w[bold]x[/y]" in "".join(iisan_fast("stats", odd).stdout.split())


def test_many_cut_offs_are_printed_whole(finished_run):
    arguments = [word for k in (1, 5, 10, 20, 50) for word in ("--k", k)]
    table = iisan_fast("evaluate", finished_run, *arguments).stdout
    assert all(f"{metric}@{k}" in table for metric in ("HR", "NDCG") for k in (1, 5, 10, 20, 50)) and "…" not in table


def test_a_form_that_cannot_run_here_is_refused_before_anything_is_written(toy_run, tmp_path, monkeypatch):
    dataset, cache = toy_run
    monkeypatch.setenv("IISAN_FAST_FORM", "cuda")
    message = refused("train", dataset, "--cache", cache, "--out", tmp_path / "run", "--device", "cpu")
    assert "IISAN_FAST_FORM: expected auto, reference, gpu, cpu, found 'cuda'" in message
    assert not (tmp_path / "run").exists()


@needs_compiler
def test_a_form_that_refuses_the_shapes_of_a_run_gets_one_line(toy_run, tmp_path, monkeypatch):
    dataset, cache = toy_run
    out = tmp_path / "run"
    settings = ("--cache", cache, "--epochs", 1, "--bottleneck", 8, "--device", "cpu")
    monkeypatch.setenv("IISAN_FAST_FORM", "cpu")
    assert refused("train", dataset, *settings, "--out", out) == (
        "error: IISAN_FAST_FORM: cpu cannot run side_towers: without gradients it needs a bottleneck that is a "
        "multiple of 16, found 8; use reference\n"
    )
    assert not out.exists()
    narrow = tmp_path / "narrow"
    monkeypatch.delenv("IISAN_FAST_FORM")
    assert iisan_fast("train", dataset, *settings, "--embedding-dim", 8, "--out", narrow).returncode == 0
    monkeypatch.setenv("IISAN_FAST_FORM", "cpu")
    assert refused("evaluate", narrow, "--device", "cpu") == (
        "error: IISAN_FAST_FORM: cpu cannot run last_states: it needs widths that are multiples of 16, "
        "found 8 and 32; use reference\n"
    )
