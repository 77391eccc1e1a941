"""Settings as dataclass fields: conversion, refused values, and the options that the command line makes of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pytest

from iisan_fast.errors import InputError
from iisan_fast.setting_fields import check_settings, setting, settings_of


@dataclass(frozen=True)
class Oven:
    name: str
    degrees: int = setting(180, help="Heat of the oven, in degrees.", minimum=50, maximum=300)
    share: float = setting(0.5, help="Share of the heat from above.", minimum=0, below=1)
    mode: str = setting("auto", help="How the heat moves.", choices=("auto", "fan"), automatic="by the dish")
    racks: tuple[int, ...] = setting((2,), help="Racks in use.", minimum=1)
    times: Mapping[str, int] = setting({"rest": 5}, help="Minutes of a phase.", minimum=1)
    timer: int | None = setting(None, help="Minutes to the bell.", minimum=1, automatic="no bell")

    def __post_init__(self) -> None:
        check_settings(self)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"degrees": 49}, "degrees: expected 50 to 300, found 49"),
        ({"degrees": 301}, "degrees: expected 50 to 300, found 301"),
        ({"degrees": True}, "degrees: expected int, found true"),
        ({"share": 1}, "share: expected 0 to below 1, found 1.0"),
        ({"share": float("nan")}, "share: expected 0 to below 1, found nan"),
        ({"mode": "steam"}, "mode: expected one of auto, fan, found 'steam'"),
        ({"racks": [1, 0]}, "racks: expected at least 1, found 0"),
        ({"times": {"rise": 0}}, "times.rise: expected at least 1, found 0"),
        ({"timer": 0}, "timer: expected at least 1, found 0"),
    ],
)
def test_a_value_that_breaks_a_rule_is_refused(change: dict[str, Any], message: str):
    with pytest.raises(InputError) as error:
        Oven("o", **change)
    assert str(error.value) == message


def test_values_at_the_ends_of_a_range_are_accepted():
    oven = Oven("o", 300, 0, "fan", [1, 7], {"rise": 1}, 1)
    assert oven.racks == (1, 7) and oven.share == 0.0 and oven.timer == 1


def test_the_command_line_reads_types_defaults_and_rules():
    settings = settings_of(Oven)
    assert list(settings) == ["degrees", "share", "mode", "racks", "times", "timer"]
    assert settings["racks"].type == tuple[int, ...] and settings["timer"].type == int | None
    texts = {name: one.default_text for name, one in settings.items()}
    assert texts["degrees"] == "180" and texts["mode"] == "auto: by the dish" and texts["timer"] == "no bell"
    assert settings["mode"].rules.choices == ("auto", "fan") and settings["times"].default == {"rest": 5}


def test_instances_do_not_share_a_default_mapping():
    first, second = Oven("a"), Oven("b")
    assert first.times == {"rest": 5} and first.times is not second.times


def test_a_setting_without_a_default_is_required():
    @dataclass(frozen=True)
    class Pan:
        width: int = setting(help="Width in cm.")

    assert settings_of(Pan)["width"].default is dataclasses.MISSING
    with pytest.raises(TypeError, match="width"):
        Pan()
