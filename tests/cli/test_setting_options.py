"""Options made from a dataclass: each type of setting, its help, and one clear error for a value that it refuses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import click
import pytest

from iisan_fast.cli.help_pages import GroupedHelp
from iisan_fast.cli.setting_options import Spelling, given_settings, setting_options
from iisan_fast.errors import InputError
from iisan_fast.setting_fields import check_settings, setting

SPELLINGS = {
    "cuts": Spelling("--k"),
    "titles": Spelling("--titles/--raw"),
    "widths": Spelling("--width", "WIDTH|TOWER=WIDTH", bare="width"),
}


@dataclass(frozen=True)
class Oven:
    """Settings of every type."""

    name: str = setting(help="A name.")
    colour: str = setting("red", help="A colour.", choices=("red", "blue"))
    heat: float = setting(0.5, help="A share.", minimum=0, below=1)
    trays: int | None = setting(None, help="A number of trays.", minimum=1, automatic="as many as fit")
    titles: bool = setting(True, help="A switch.")
    door: bool | None = setting(None, help="Another switch.")
    cuts: tuple[int, ...] = setting((10,), help="Numbers.", minimum=1)
    tastes: tuple[str, ...] = setting((), help="Words.", choices=("sweet", "salty"))
    width: int = setting(64, help="A width.", minimum=1)
    widths: Mapping[str, int] = setting({}, help="Widths.", minimum=1)
    rates: Mapping[str, float] = setting({}, help="Rates.", minimum=0, below=1)
    extras: Mapping[str, Any] = setting({}, help="Anything.")

    def __post_init__(self) -> None:
        check_settings(self)


def settings_given(*arguments: str, **changes: Any) -> dict[str, Any]:
    """Return the settings that a command gets from its arguments."""
    settings = {}

    @click.command()
    @setting_options(Oven, "Data", spellings=SPELLINGS, **changes)
    def command(**options: Any) -> None:
        settings.update(given_settings(options, Oven, spellings=SPELLINGS, **changes))
        assert not options

    command.main(list(arguments), standalone_mode=False)
    return settings


def test_an_option_that_is_not_given_is_no_setting():
    assert settings_given() == {}


@pytest.mark.parametrize(
    ("arguments", "settings"),
    [
        (["--name", "a", "--colour", "blue"], {"name": "a", "colour": "blue"}),
        (["--heat", "0.25", "--trays", "3"], {"heat": 0.25, "trays": 3}),
        (["--raw", "--no-door"], {"titles": False, "door": False}),
        (["--titles", "--door"], {"titles": True, "door": True}),
        (["--k", "5,10", "--k", "20"], {"cuts": (5, 10, 20)}),
        (["--tastes", "sweet, salty"], {"tastes": ("sweet", "salty")}),
        (["--width", "8"], {"width": 8}),
        (["--width", "first=4", "--width", "8"], {"width": 8, "widths": {"first": 4}}),
        (["--rates", "a=0.1", "--rates", "b=1e-3"], {"rates": {"a": 0.1, "b": 1e-3}}),
        (["--extras", "a=b=c", "--extras", 'd={"e": 1}'], {"extras": {"a": "b=c", "d": {"e": 1}}}),
    ],
)
def test_values_have_the_types_of_their_fields(arguments, settings):
    values = settings_given(*arguments)
    assert values == settings
    oven = Oven(**{"name": "x", **values})
    assert all(getattr(oven, name) == value for name, value in settings.items())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--trays", "many"], "--trays: expected a whole number, found 'many'"),
        (["--trays", "0"], "--trays: expected at least 1, found 0"),
        (["--heat", "1"], "--heat: expected 0 to below 1, found 1.0"),
        (["--heat", "nan"], "--heat: expected 0 to below 1, found nan"),
        (["--k", "5,"], "--k: expected a whole number, found ''"),
        (["--k", "0"], "--k: expected at least 1, found 0"),
        (["--width", "wide"], "--width: expected WIDTH or TOWER=WIDTH, found 'wide'"),
        (["--width", "=3"], "--width: expected WIDTH or TOWER=WIDTH, found '=3'"),
        (["--rates", "a"], "--rates: expected KEY=VALUE, found 'a'"),
        (["--rates", "a=2"], "--rates: expected 0 to below 1, found 2.0"),
        (["--extras", "a"], "--extras: expected KEY=VALUE, found 'a'"),
        (["--extras", "=2"], "--extras: expected KEY=VALUE, found '=2'"),
    ],
)
def test_a_refused_value_names_its_option(arguments, message):
    with pytest.raises(InputError) as refusal:
        settings_given(*arguments)
    assert str(refusal.value) == message


@pytest.mark.parametrize("arguments", [["--colour", "green"], ["--tastes", "sweet,sour"]])
def test_a_word_that_is_no_choice_is_refused_with_the_choices(arguments):
    with pytest.raises(click.BadParameter, match=r"'(green|sour)' is not one of '(red', 'blue|sweet', 'salty)'"):
        settings_given(*arguments)


def test_a_setting_that_is_left_out_has_no_option():
    with pytest.raises(click.NoSuchOption):
        settings_given("--heat", "0.1", without=("heat",))


def test_help_tells_meaning_choices_and_default_under_its_headings():
    @click.command(cls=GroupedHelp, examples=("oven --name a \\\n  --heat 0.5",))
    @setting_options(
        Oven, {name: "Model" if name == "heat" else "Data" for name in Oven.__annotations__}, spellings=SPELLINGS
    )
    def oven(**options: Any) -> None:
        """Heat things."""

    lines = click.Context(oven, info_name="oven", terminal_width=78).get_help().splitlines()
    page = " ".join(" ".join(lines).split())
    assert "--colour [red|blue] A colour. [default: red]" in page
    assert "--titles / --raw A switch. [default: on]" in page
    assert "A number of trays. [default: as many as fit]" in page
    assert "--width WIDTH|TOWER=WIDTH A width. TOWER=WIDTH: widths. [default: 64]" in page
    assert "--name TEXT A name. --colour" in page  # a value that is required has no default
    assert "Words. One of sweet, salty." in page
    assert lines.index("Data:") < lines.index("Model:") < lines.index("Examples:")
    assert lines[lines.index("Model:") + 1].split() == ["--heat", "NUMBER", "A", "share.", "[default:", "0.5]"]
    assert lines[-2:] == ["  oven --name a \\", "    --heat 0.5"]


def test_help_says_the_default_of_a_command_where_it_is_another_than_the_settings():
    @click.command()
    @setting_options(Oven, "Data", defaults={"heat": "the oven's", "titles": "the cook's"})
    def oven(**options: Any) -> None:
        """Heat things."""

    page = " ".join(click.Context(oven).get_help().split())
    assert "A share. [default: the oven's]" in page and "A switch. [default: the cook's]" in page
    assert "A colour. [default: red]" in page
