"""Figures that documents quote, read again from the results they come from.

A comment after a table or a paragraph lists them, a line a figure:

    <!-- figures
    44.9 = train-long.json [forms.form=float32.p50_ms]
    7.54 = scientific-titles-64-tokens.json 100 * mean([runs.*.test.hr@10])
    9.4 = train-long.json [forms.form=dense.p50_ms] / [forms.form=float32.p50_ms]
    -->

A path goes through a file of benchmarks/results: a key, a place in a list, `key=value` for the one element of a list
that has this value, or `*` for all elements.
"""

from __future__ import annotations

import json
import re
import statistics
from functools import cache
from typing import Any

from .documents import ROOT

FUNCTIONS = {"mean": statistics.mean, "median": statistics.median, "max": max, "min": min, "len": len}
FUNCTIONS |= {"stdev": statistics.stdev, "pstdev": statistics.pstdev, "sum": sum}
NUMBER = re.compile(r"(?<![\w.-])-?\d[\d,]*(?:\.\d+)?(?![\w]*\.json)")


@cache
def _results(name: str) -> Any:
    return json.loads((ROOT / "benchmarks" / "results" / name).read_text(encoding="utf-8"))


def look_up(values: Any, path: str) -> Any:
    """Return the value at a path; a path with `*` gives a list. Raise KeyError if nothing stands there."""
    step, _, rest = path.partition(".")
    if not path:
        return values
    if step == "*":
        elements = values.values() if isinstance(values, dict) else values
        return [look_up(element, rest) for element in elements]
    if isinstance(values, dict):
        return look_up(values[step], rest)
    if "=" in step:
        key, _, expected = step.partition("=")
        matching = [element for element in values if str(element.get(key)) == expected]
        if len(matching) != 1:
            raise KeyError(f"{step}: {len(matching)} elements")
        return look_up(matching[0], rest)
    return look_up(values[int(step)], rest)


def evaluate(source: str) -> float:
    """Return the value of `FILE EXPRESSION`, as a line of a figures comment has it."""
    name, _, expression = source.partition(" ")
    paths: dict[str, Any] = {}

    def variable(match: re.Match[str]) -> str:
        paths[f"value_{len(paths)}"] = look_up(_results(name), match[1])
        return f"value_{len(paths) - 1}"

    # The expressions stand in this project's own documents; without builtins they can name these functions alone.
    return eval(re.sub(r"\[([^\]]+)\]", variable, expression), {"__builtins__": {}, **FUNCTIONS}, paths)


def agrees(value: float, figure: str) -> bool:
    """Return True if a figure is the value, rounded to the figure's decimals; a half may go either way."""
    decimals = len(figure.partition(".")[2])
    return abs(value - float(figure.replace(",", ""))) <= 0.5 * 10**-decimals + 1e-9


def numbers_of(text: str) -> list[str]:
    """Return the numbers that a text writes."""
    return NUMBER.findall(text)


def decimals_of(text: str) -> set[str]:
    """Return the numbers of a text that have a decimal point; code and links do not count."""
    prose = re.sub(r"`[^`]*`|\]\([^)]*\)", "", text)
    return {number for number in numbers_of(prose) if "." in number}
