"""Documents are right: commands and snippets run or parse, links lead somewhere, figures are in the results."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import click
import pytest
import yaml

from helpers import quoted_figures, shell_blocks
from helpers.document_folder import fill_folder
from helpers.documents import (
    DOCUMENTS,
    ROOT,
    Block,
    anchors,
    blocks_of,
    figures_of,
    inline_code,
    link_targets,
    problem_of,
)
from helpers.settings_table import settings_tables
from iisan_fast.errors import InputError
from iisan_fast.setting_sources import base_settings

BLOCKS = [block for document in DOCUMENTS for block in blocks_of(document)]
SHELL_BLOCKS = [block for block in BLOCKS if block.language == "sh"]
FIGURES = [figures for document in DOCUMENTS for figures in figures_of(document)]
FOLDERS = {path.name for path in ROOT.iterdir() if path.is_dir()}
OTHER_OPTIONS = {"--slowest", "--results"}  # of pytest, by tests/helpers/durations.py


def name_of(document: Path) -> str:
    return document.relative_to(ROOT).as_posix()


def with_runs(is_long: bool) -> list[Path]:
    """Return the documents with blocks that `make test` (or `make test-long`) runs."""
    chosen = {block.document for block in BLOCKS if block.runs and block.is_long == is_long}
    return [document for document in DOCUMENTS if document in chosen]


@pytest.fixture(scope="session")
def filled_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("documents") / "folder"
    fill_folder(folder)
    return folder


@pytest.fixture
def working_folder(filled_folder, tmp_path, monkeypatch) -> Path:
    """Copy the documents' folder, and work in the copy."""
    copy = tmp_path / "work"
    subprocess.run(["cp", "-r", filled_folder, copy], check=True)
    monkeypatch.chdir(copy)
    return copy


def run_blocks(blocks: list[Block]) -> dict:
    """Run blocks one after the other, as a reader would, and return the names that the Python ones leave."""
    names: dict = {}
    for block in blocks:
        if block.language == "python":
            exec(compile("\n" * (block.line - 1) + block.text, str(block.document), "exec"), names)
        else:
            for line in shell_blocks.logical_lines(block.text):
                shell_blocks.run(line)
    return names


def test_every_document_is_read():
    assert {"README.md", "docs/README.md", "recipes/README.md"} <= {name_of(document) for document in DOCUMENTS}


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_every_block_has_a_class(document):
    assert [problem for block in blocks_of(document) if (problem := problem_of(block))] == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("```\nls\n```", "language ''"),
        ("    indented\n", "language ''"),
        ("```sh quick\nls\n```", "marks 'quick'"),
        ("```sh long gpu\nls\n```", "marks 'long gpu'"),
        ("```text\niisan-fast train\n```", "commands want a block of sh"),
        ("```json long\n{}\n```", "takes no mark"),
    ],
)
def test_a_block_without_a_class_is_seen(tmp_path, monkeypatch, text, expected):
    monkeypatch.setattr("helpers.documents.ROOT", tmp_path)
    document = tmp_path / "page.md"
    document.write_text(text)
    (block,) = blocks_of(document)
    assert expected in str(problem_of(block))


@pytest.mark.parametrize("block", SHELL_BLOCKS, ids=lambda block: block.place)
def test_shell_lines_parse(block):
    for line in shell_blocks.logical_lines(block.text):
        shell_blocks.check(line)


@pytest.mark.parametrize(
    "line",
    [
        "iisan-fast train DATASET --no-such-option",
        "iisan-fast train DATASET --epochs many",
        "iisan-fast no-such-command",
        "IISAN_FAST_FORM=cpu iisan-fast evaluate",
        "torchrun --nproc-per-node 2 -m iisan_fast extract DATASET --no-such-option",
        "iisan-fast stats DATASET --json | iisan-fast stats DATASET --no-such-option > file",
        "make no-such-target",
        "python -m iisan_fast.no_such_module",
        "python benchmarks/no_such_script.py",
        "pip install '.[no-such-extra]'",
        "no-such-program",
    ],
)
def test_a_line_with_unknown_names_is_refused(line):
    with pytest.raises((ValueError, click.ClickException, InputError)):
        shell_blocks.check(line)


def check_unfinished(code: str) -> None:
    """Check a command within text, which may leave out an argument or the last option's value."""
    try:
        shell_blocks.check(code)
    except (click.MissingParameter, click.exceptions.NoArgsIsHelpError):
        pass
    except click.BadOptionUsage as error:
        if "requires an argument" not in error.message:
            raise


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_commands_and_options_within_text_exist(document):
    known = shell_blocks.all_options() | OTHER_OPTIONS
    for code in inline_code(document):
        program, *arguments = code.split()
        is_template = "iisan_fast.benchmarks.NAME" in arguments
        if program in ("iisan-fast", "make", "pip", "python") and arguments and not is_template:
            check_unfinished(code)
        elif code.startswith("--"):
            options = set(re.findall(r"(?<!\S)--[a-z][\w-]*", code))
            assert options <= known, f"{name_of(document)}: {code}"


@pytest.mark.parametrize("block", [block for block in BLOCKS if block.language == "python"], ids=lambda b: b.place)
def test_python_compiles_and_imports_existing_names(block):
    for node in ast.walk(ast.parse(block.text, name_of(block.document))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("iisan_fast"):
            module = import_module(str(node.module))
            assert [alias.name for alias in node.names if not hasattr(module, alias.name)] == [], block.place
        elif isinstance(node, ast.Import):
            for alias in node.names:
                import_module(alias.name)


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.language in ("json", "yaml")], ids=lambda b: b.place)
def test_json_and_yaml_parse(block):
    assert (json.loads if block.language == "json" else yaml.safe_load)(block.text) is not None


@pytest.mark.slow
@pytest.mark.parametrize("document", with_runs(is_long=False), ids=name_of)
def test_blocks_run(document, working_folder):
    run_blocks([block for block in blocks_of(document) if block.runs and not block.is_long])


@pytest.mark.long
@pytest.mark.parametrize("document", with_runs(is_long=True), ids=name_of)
def test_long_blocks_run(document, working_folder):
    run_blocks([block for block in blocks_of(document) if block.runs])


@pytest.mark.long
def test_the_python_example_as_a_script_with_worker_processes(working_folder):
    """Run it: the workers must not begin the script again."""
    (block,) = [block for block in blocks_of(ROOT / "README.md") if block.language == "python"]
    example = block.text.replace("epochs=20", "epochs=1, workers=1")
    assert example != block.text and ".fit(" in example
    Path("script.py").write_text(example + "\nprint('once')\n")
    result = subprocess.run([sys.executable, "script.py"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("once\n") == 1 and result.stdout.endswith("once\n"), result.stdout + result.stderr


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_links_lead_to_files_and_headings(document):
    broken = []
    for target in link_targets(document):
        if re.match(r"https?://", target):
            continue
        file, _, anchor = target.partition("#")
        path = (document.parent / file).resolve() if file else document
        if not path.exists() or (anchor and path.suffix == ".md" and anchor not in anchors(path)):
            broken.append(target)
    assert broken == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_files_that_text_names_exist(document):
    missing = []
    for code in inline_code(document):
        is_path = re.fullmatch(r"[\w.-]+/[\w./*-]*", code) and code.partition("/")[0] in FOLDERS - {"runs", "build"}
        if is_path and not list(ROOT.glob(code.rstrip("/"))):
            missing.append(code)
    assert missing == []


@pytest.mark.parametrize("figures", FIGURES, ids=lambda figures: f"{name_of(figures.document)}:{figures.line}")
def test_figures_equal_the_results(figures):
    written = quoted_figures.numbers_of(figures.text)
    for figure, source in figures.sources:
        assert figure in written, f"{figure} is not in the text before the comment"
        value = quoted_figures.evaluate(source)
        assert quoted_figures.agrees(value, figure), f"{figure} is quoted, {source} gives {value}"
    assert quoted_figures.decimals_of(figures.text) <= {figure for figure, _ in figures.sources}, "without a source"


def test_a_figure_that_differs_is_seen():
    figures = ("41.1", "41.12", "41.13", "41.14", "41.2", "4.11")
    assert [figure for figure in figures if quoted_figures.agrees(41.125, figure)] == ["41.1", "41.12", "41.13"]
    hit_rate = quoted_figures.evaluate("demo.json [test.masked.hr@10]")
    assert quoted_figures.evaluate("demo.json 100 * [test.masked.hr@10]") == 100 * hit_rate
    assert quoted_figures.agrees(12076.4, "12,076") and not quoted_figures.agrees(12076.6, "12,076")
    assert quoted_figures.decimals_of("12,076 users, `a-1.5.json`, 7.1 and -0.25") == {"7.1", "-0.25"}
    with pytest.raises(KeyError):
        quoted_figures.evaluate("demo.json [test.masked.hr@11]")


def test_the_results_page_names_every_results_file():
    named = {code for code in inline_code(ROOT / "docs" / "results.md") if not code.startswith(".")}
    files = {path.name for path in (ROOT / "benchmarks" / "results").iterdir() if path.is_file()}
    assert {file for file in files if not file.endswith(".config.json")} <= named
    assert {file.replace(".config.json", ".json") for file in files if file.endswith(".config.json")} <= files


def test_lines_of_code_beside_other_libraries_are_counted():
    page = ROOT / "docs" / "compared-with-others.md"
    text = page.read_text(encoding="utf-8")
    rows = re.findall(r"^\| \[[^\]]+\]\(#[\w-]+\) \|(.*)\|$", text, flags=re.MULTILINE)
    written = [number for row in rows for number in map(int, re.findall(r"\d+", row))]
    pieces = [block for block in blocks_of(page) if "pandas.read_csv" not in block.text]  # which is the data
    assert written == [sum(1 for line in block.text.splitlines() if line.strip()) for block in pieces]
    assert max(len(line) for block in pieces for line in block.text.splitlines()) <= 120


@pytest.mark.parametrize("block", [block for block in BLOCKS if block.language == "yaml"], ids=lambda b: b.place)
def test_a_settings_file_that_is_shown_can_be_used(block, tmp_path):
    file = tmp_path / "settings.yaml"
    file.write_text(block.text)
    assert base_settings(file)


@pytest.mark.parametrize("mistake", ["dropot: 0.2", "dropout: 2"])
def test_the_quoted_errors_of_a_settings_file_are_the_real_ones(mistake, tmp_path, monkeypatch):
    page = ROOT / "docs" / "settings.md"
    shown = next(block for block in blocks_of(page) if block.language == "yaml")
    monkeypatch.chdir(tmp_path)
    Path("settings.yaml").write_text(shown.text.replace("dropout: 0.2", mistake))
    with pytest.raises(InputError) as error:
        base_settings("settings.yaml")
    assert f"\n{error.value}\n" in page.read_text(encoding="utf-8")


def test_the_tables_of_settings_equal_the_fields():
    page = (ROOT / "docs" / "settings.md").read_text(encoding="utf-8")
    assert page.partition("### encoders\n")[2] == settings_tables().partition("### encoders\n")[2] + "\n"


def test_the_readme_is_short():
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    paragraphs = "\n".join(lines).split("\n\n")
    prose = [text for text in paragraphs if not text.startswith(("|", "```", "<!--", "-", "#"))]
    assert len(lines) <= 130
    assert max(len(text.splitlines()) for text in prose) <= 4
