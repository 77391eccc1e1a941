"""Packaging: the files of the wheel and of the editable install; an installed copy works outside the checkout."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from collections.abc import Iterator
from email import message_from_bytes
from email.message import Message
from pathlib import Path

import pytest
import yaml

from helpers.run_folders import hit_rates

ROOT = Path(__file__).parents[1]
INSTALLED_AS = {"iisan_fast": "iisan_fast"} | {name: f"iisan_fast/{name}" for name in ("kernels", "cli", "benchmarks")}
SOURCES = (*INSTALLED_AS, "setup.py", "pyproject.toml", "README.md", "LICENSE")


def run(command: list[str | Path], folder: Path, **environment: str) -> str:
    """Run a command in a folder, without this process's PYTHONPATH, and return its standard output."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    result = subprocess.run(command, cwd=folder, env={**inherited, **environment}, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def build(hook: str, home: Path) -> Path:
    """Build a wheel from a copy of the sources by setuptools' `build_wheel` or `build_editable`."""
    copy = home / "sources"
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, copy / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
        else:
            shutil.copy(source, copy / name)
    script = f"import sys; from setuptools import build_meta; build_meta.{hook}(sys.argv[1])"
    run([sys.executable, "-c", script, home / "dist"], copy)
    (wheel,) = (home / "dist").glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("build_wheel", tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the programs of a fresh environment: the wheel, and the packages of the surrounding environment."""
    home = tmp_path_factory.mktemp("installed")
    venv.create(home, symlinks=True)
    python = home / "bin" / "python"
    install = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", python, "install", "-q"]
    run([*install, "--no-index", "--no-deps", wheel], home)
    (packages,) = (home / "lib").glob("python*/site-packages")
    surrounding = [path for path in sys.path if Path(path).name == "site-packages"]
    # A path added by a .pth file brings its packages, but not its own .pth files: no editable install of the checkout.
    (packages / "surrounding.pth").write_text("\n".join(surrounding) + "\n")
    return home / "bin"


@pytest.fixture(scope="module")
def metadata(wheel: Path) -> Message:
    """Return the wheel's METADATA: its fields, and the README as the package index shows it."""
    with zipfile.ZipFile(wheel) as content:
        (name,) = (name for name in content.namelist() if name.endswith(".dist-info/METADATA"))
        return message_from_bytes(content.read(name))


def files_of_the_package() -> Iterator[str]:
    """Yield the paths in the wheel of all modules, C++ sources, templates and py.typed of the checkout."""
    for folder, place in INSTALLED_AS.items():
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in (".py", ".cpp", ".h", ".html", ".css") or path.name == "py.typed":
                yield str(place / path.relative_to(ROOT / folder))


def test_the_wheel_holds_every_module_and_nothing_beside_the_package(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name for name in names if ".dist-info/" not in name} == set(files_of_the_package())
    assert {name.split("/")[0].split("-")[0] for name in names} == {"iisan_fast"}


def test_the_metadata_names_the_versions_that_ci_tests(metadata):
    classifiers = metadata.get_all("Classifier")
    prefix = "Programming Language :: Python :: 3."
    named = [line.rpartition(" ")[2] for line in classifiers if line.startswith(prefix)]
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    assert named == workflow["jobs"]["tests"]["strategy"]["matrix"]["python"]
    assert metadata["Requires-Python"] == f">={named[0]}" and "Typing :: Typed" in classifiers


def test_the_metadata_asks_for_each_package_once(metadata):
    always = [line for line in metadata.get_all("Requires-Dist") if "extra ==" not in line]
    names = [re.split(r"[<>=!~; ]", line)[0].lower() for line in always]
    assert len(names) == len(set(names)) > 5


def test_the_index_page_links_to_no_file_of_the_checkout(metadata):
    page = metadata.get_payload(decode=True).decode()
    assert metadata["Description-Content-Type"] == "text/markdown" and page.startswith("# iisan-fast")
    targets = re.findall(r"\]\(([^)]*)\)", page)
    assert targets and all(target.startswith(("https://", "#")) for target in targets), targets


def test_the_citation_is_of_this_version_and_names_both_papers(metadata):
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()  # the wheel format requires them
    assert str(citation["version"]) == metadata["Version"] and citation["license"] == "Apache-2.0"
    papers = {reference["url"] for reference in citation["references"]}
    assert papers == {url.partition(", ")[2] for url in metadata.get_all("Project-URL")}
    for reference in citation["references"]:
        assert {"type", "title", "authors"} <= reference.keys()
        assert all({"family-names", "given-names"} == author.keys() for author in reference["authors"])


def test_the_editable_install_adds_no_other_package(tmp_path):
    with zipfile.ZipFile(build("build_editable", tmp_path)) as wheel:
        (finder,) = (name for name in wheel.namelist() if name.endswith("_finder.py"))
        tree = ast.parse(wheel.read(finder))
        added = {name.split("/")[0] for name in wheel.namelist() if ".dist-info/" not in name}
        (path_file,) = added - {finder}
        assert "sources" not in wheel.read(path_file).decode()  # the checkout's root is on no path
    values = {line.target.id: line.value for line in tree.body if isinstance(line, ast.AnnAssign)}
    assert set(ast.literal_eval(values["MAPPING"])) == {place.replace("/", ".") for place in INSTALLED_AS.values()}
    assert not ast.literal_eval(values["NAMESPACES"])


def test_no_folder_on_the_path_of_the_tests_is_called_kernels(pytestconfig):
    for folder in pytestconfig.getini("pythonpath"):
        assert folder.name != "kernels" and not (folder / "kernels").exists(), folder


@pytest.mark.slow
def test_an_installed_copy_runs_the_demo_and_is_used_from_python(installed, tmp_path):
    """`iisan-fast train` alone beats popularity fivefold."""
    out = json.loads(run([installed / "iisan-fast", "train", "--out", "runs/demo", "--json"], tmp_path))
    model, popularity = hit_rates(out)
    assert model >= 5 * popularity > 0
    script = """
import iisan_fast, iisan_fast.kernels, iisan_fast.cli
best, figures = iisan_fast.load("runs/demo"), iisan_fast.evaluate("runs/demo", ks=(10,))
assert figures["best_epoch"] == best.epoch and len(best.item_ids) == len(best.item_vectors)
print(iisan_fast.kernels.__file__, *iisan_fast.__path__, *iisan_fast.cli.__path__, sep="\\n")
"""
    files = run([installed / "python", "-c", script], tmp_path).splitlines()
    assert len(files) == 3 and all(Path(file).is_relative_to(installed.parent) for file in files), files


def test_an_installed_copy_is_a_module_that_runs(installed, tmp_path):
    assert run([installed / "python", "-m", "iisan_fast", "--version"], tmp_path).startswith("iisan-fast ")
    script = "from importlib.util import find_spec; print(find_spec('kernels'), find_spec('cli'))"
    assert run([installed / "python", "-c", script], tmp_path) == "None None\n"


def test_the_commit_hooks_need_no_network():
    (hooks,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert hooks["repo"] == "local" and all(hook["language"] == "system" for hook in hooks["hooks"])
