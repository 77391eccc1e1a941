"""Print what --dry-run finds: the work that a command would do, its memory and its files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rich.table import Table

from .output import cell, print_counts, print_table

if TYPE_CHECKING:
    from ..states import Extracted


def print_run(plan: Mapping[str, Any]) -> None:
    """Print the plan of a training run, as `describe_new_run` returns it."""
    files = plan["files"]
    views = {f"view {name}": _view_text(view) for name, view in plan["views"].items()}
    groups = {f"  {name}": f"{count:,}" for name, count in plan["parameters"]["groups"].items()}
    memory = plan["memory"]
    table = Table(
        title=cell(f"would train {plan['method']} in {files['folder']}; nothing is written"), show_header=False
    )
    rows = {
        "device": plan["device"],
        **views,
        "begins with": _beginning_text(plan["init"]),
        "users": f"{plan['users']:,}",
        "items": f"{plan['items']:,}",
        "epochs at most": f"{plan['max_epochs']:,}",
        "steps an epoch": f"{plan['steps_per_epoch']:,}",
        "parameters": f"{plan['parameters']['total']:,}",
        "trained parameters": f"{plan['parameters']['trainable']:,}",
        **groups,
        "memory of states or images": f"{_size_text(memory['table'])} ({memory['table_place']})",
        **{f"memory of {name}": _size_text(memory[name]) for name in ("parameters", "gradients", "optimizer")},
        "memory of the largest batch, by estimate": _size_text(memory["batch"]),
        "reads": ", ".join(files["read"]),
        "writes": ", ".join(files["written"]),
    }
    for name, value in rows.items():
        table.add_row(cell(name), cell(value))
    print_table(table)


def print_extraction(results: list[Extracted], cache: str) -> None:
    """Print how many items each view would encode, and the size of their states."""
    rows = {
        f"{result.view}: {result.items:,} items": f"{result.encoded:,} to encode, {_size_text(result.entry_bytes)}"
        for result in results
    }
    print_counts(f"would write hidden states into {cache}; nothing is written", rows)


def _size_text(size: int | str) -> str:
    """Return a number of bytes as text; a text that stands for an unknown number stays."""
    from ..states import size_text  # imports torch, which takes seconds

    return size if isinstance(size, str) else size_text(size)


def _beginning_text(init: Mapping[str, Any] | None) -> str:
    """Return the weights that a run begins with."""
    return "random weights" if init is None else f"the weights of {init['run']}, epoch {init['best_epoch']}"


def _view_text(view: Mapping[str, Any]) -> str:
    """Return a view's source and its encoder or file, and the layers and the width that are known."""
    place = f"in {view['path']}" if "path" in view else f"by {view['encoder']}"
    text = f"{view['source']} {place}"
    if view["layers"] is not None:
        text += f", layers {', '.join(map(str, view['layers']))}"
    return text if view["width"] is None else f"{text}, width {view['width']}"
