"""Learning rates, fields of a view, spellings of options and the parameter count in the documents are the code's."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest

from helpers.documents import DOCUMENTS
from helpers.recommenders import side_recommender
from iisan_fast.cli.setting_options import SPELLINGS
from iisan_fast.config import LEARNING_RATES, ModelConfig, ViewConfig
from iisan_fast.setting_fields import settings_of
from iisan_fast.setting_sources import SECTIONS

ROOT = Path(__file__).parents[1]


def rows(page: str, heading: str) -> list[list[str]]:
    """Return the cells of the first table below a heading, without its two first lines."""
    text = (ROOT / page).read_text(encoding="utf-8").partition(f"\n{heading}\n")[2]
    lines = re.search(r"(?:^\|.*\n)+", text, flags=re.MULTILINE)[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_learning_rates_are_those_of_the_methods():
    documented = {}
    for methods, text in rows("docs/methods.md", "## Learning rates"):
        rates = {}
        for part in text.split(";"):
            *groups, rate = part.replace(",", "").split()
            rates.update(dict.fromkeys(groups, float(rate)))
        for method in re.findall(r"`([\w-]+)`", methods):
            documented[method] = rates
    assert documented == LEARNING_RATES


def test_the_fields_of_a_view_are_those_of_the_setting():
    documented = {name.strip("`"): default for name, _, default in rows("docs/extraction.md", "## Views")}
    names = {field.name for field in fields(ViewConfig)} - {"options"} | {"option.NAME"}
    assert documented.keys() == names
    assert documented["max_tokens"] == str(ViewConfig.max_tokens)


def test_options_that_are_not_the_name_of_their_setting_are_listed():
    page = (ROOT / "docs" / "settings.md").read_text(encoding="utf-8")
    sentence = page.partition("setting's name with dashes, except")[2].partition(". Encoders")[0]
    pairs = re.findall(r"`(--[\w-]+)` \(((?:`\w+`(?:, )?)+)\)", sentence)
    documented = {setting: option for option, settings in pairs for setting in re.findall(r"\w+", settings)}
    for name, spelling in SPELLINGS.items():
        assert documented[name] in spelling.flags.split("/")
    assert documented.keys() == SPELLINGS.keys() | {spelling.bare for spelling in SPELLINGS.values() if spelling.bare}


@pytest.mark.parametrize("page", ["README.md", "docs/methods.md", "docs/performance-and-memory.md"])
def test_the_number_of_parameters_is_that_of_the_model(page):
    model = side_recommender([(7, 768), (7, 768)], ModelConfig(), 10, np.array([0, 0.5, 0.5]), seed=0)
    count = sum(parameter.numel() for parameter in model.parameters())
    text = (ROOT / page).read_text(encoding="utf-8")
    assert re.findall(r"\b4[,_]\d{3}[,_]\d{3}\b", text.replace("_", ",")) == [f"{count:,}"]


def test_settings_that_documents_change_by_their_dotted_name_exist():
    changed = []
    for document in DOCUMENTS:
        changed += re.findall(r"--set ([\w.-]+)=", document.read_text(encoding="utf-8"))
    assert len(changed) >= 6
    for name in changed:
        section, *path = name.split(".")
        known = settings_of(ViewConfig) if section == "encoders" else settings_of(SECTIONS[section])
        assert path[section == "encoders"] in known, name
