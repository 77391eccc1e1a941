"""The tables of every benchmark's result."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import groupby
from typing import Any

from .harness import Result
from .tables import (
    NOT_MEASURED,
    Column,
    ResultTable,
    Row,
    label,
    mean_with_deviation,
    mebibytes,
    millions,
    percent,
    quantile_column,
    quantile_keys,
)

WITHOUT_SIMILARITY = "neighbours without similarity, because no run has cached states"
NOT_TRAINED: Row = {"epoch_s": None, "trainable_parameters": None, "peak_bytes": None}  # cost of a baseline
PEAK = Column("peak MiB", "peak_pss_bytes", mebibytes)
CUDA_PEAK = Column("CUDA MiB", "peak_cuda_bytes", mebibytes)


def train_tables(result: Result) -> Iterator[ResultTable]:
    """Yield a row for each form of the training step."""
    settings, run, forms = result["settings"], result["run"], result["forms"]
    on_cuda = not isinstance(forms[0]["launches"], str)
    caption = f"{result['steps_an_epoch']} steps an epoch"
    if not isinstance(run, str):
        caption += f"; a whole run takes {mebibytes(run['peak_pss_bytes'])} MiB at its peak"
    if not on_cuda:
        caption += "; launches and CUDA memory: not measured"
    caption += "".join(f"; {row['form']}: {row['remark']}" for row in forms if "remark" in row)
    columns = [
        label("", "form"),
        quantile_column("step, ", "ms", 1),
        Column("dense / this", "ratio", "{:.2f}"),
        Column("loss differs by", "largest_loss_difference", "{:.1e}"),
        Column("epoch s", "epoch_s", "{:.1f}"),
        PEAK,
    ]
    if on_cuda:
        columns += [Column("launches", "launches"), CUDA_PEAK, Column("captures s", "capture_s", "{:.1f}")]
    unmeasured = {"peak_pss_bytes": NOT_MEASURED, "peak_cuda_bytes": NOT_MEASURED}  # without whole epochs
    shape = f"{settings['layers']} layers of {settings['width']}"
    title = f"{result['dataset']}, {settings['users']} users a batch, {shape}"
    yield ResultTable(title, columns, [[unmeasured | row for row in forms]], caption)


def evaluate_tables(result: Result) -> Iterator[ResultTable]:
    """Yield a section for the ranking and one for the whole evaluation, a row a form."""
    ratios, agreement = result["ratios"], result["agreement"]
    sections = []
    for part in ("ranking", "evaluation"):
        memory = {} if part == "evaluation" else {"peak_pss_bytes": None, "peak_cuda_bytes": None}
        sections.append([{**row, **row[part], "part": part, **memory} for row in result["forms"]])
    columns = [
        label("", "part"),
        label("", "form"),
        quantile_column("", "s", 3),
        Column("users ranked", "measured_users", "{:,}"),
        Column("all users, s", _seconds_of_all_users),
        Column("users a second", "users_per_second", "{:,.0f}"),
        PEAK,
        CUDA_PEAK,
    ]
    scaled = " (scaled)" if result["ratios_scaled"] else ""
    caption = (
        f"dense / fast{scaled}: {ratios['ranking']:.1f} in ranking, {ratios['evaluation']:.1f} in the evaluation; "
        f"ranks of {agreement['users']:,} users agree within {agreement['largest_rank_difference']:.0f}"
    )
    if "terms_ratios" in result:  # results of before the terms have none
        caption += f"; terms / fast: {result['terms_ratios']['ranking']:.1f} in ranking"
    title = f"{result['users']:,} users of {result['dataset']}, {result['catalogue']:,} items"
    yield ResultTable(title, columns, sections, caption)


def extract_tables(result: Result) -> Iterator[ResultTable]:
    """Yield a row for each form of extraction."""
    settings = result["settings"]
    columns = [
        label("", "form"),
        quantile_column("", "s", 2),
        Column("items a second", "items_per_second", "{:,.0f}"),
        PEAK,
        CUDA_PEAK,
    ]
    title = f"{result['items']:,} {settings['source']}s of {result['dataset']}, {settings['workers']} workers"
    agreement = f"states agree within {result['largest_difference']:.1e} of the largest"
    caption = f"plain / fast: {result['ratio']:.2f} in time; {agreement}"
    yield ResultTable(title, columns, [result["forms"]], caption)


def uncached_tables(result: Result) -> Iterator[ResultTable]:
    """Yield a row for each attention of uncached training, and one for cached training."""
    settings, notes = result["settings"], result["notes"]
    phases = tuple(result["forms"][-1]["phases_ms"])
    epoch = "epoch s\n(scaled)" if result["scaled"] else "epoch s"
    columns = [
        label("", "form"),
        Column(f"{' / '.join(phases)}, ms", "phases", right=False),
        Column("opening s", "opening_s", "{:.1f}"),
        Column(epoch, "epoch_s", "{:,.2f}"),
        PEAK,
        CUDA_PEAK,
    ]
    rows = [_uncached_row(row) for row in result["forms"]]
    steps = f"{result['steps_an_epoch']:,} steps an epoch"
    if result["scaled"]:
        steps += f", scaled from {result['steps_timed']:,}"
    title = f"{result['dataset']}, {settings['users']} users a batch, {settings['encoder_size']} encoders"
    yield ResultTable(title, columns, [rows], f"{steps}\nthe paper: {notes['paper']}\nthe aim: {notes['aim']}")


def serving_tables(result: Result) -> Iterator[ResultTable]:
    """Yield a row for each part of serving that was measured, then one for each that was not, with the reason."""
    run, catalogue, forms, latency = result["run"], result["made"], result["forms"], result["latency"]
    rows: list[Row] = [{"part": "load the run", **result["loading"]}]
    rows += [{"part": f"recommend, {row['form']}", **row} for row in result["recommending"]]
    rows += [{"part": f"top_items, {row['form']}", "users": forms["users"], **row} for row in forms["rows"]]
    rows.append({"part": f"{catalogue['items']:,} made items", **catalogue})
    rows += [{"part": f"add {row['items']:,} items", **row} for row in result["added"].get("rows", ())]
    rows += [{"part": name, **result[name]} for name in ("export", "page") if "cpu_s" in result[name]]
    columns = [
        label("", "part"),
        Column("users", lambda row: row.get("users"), "{:,}"),
        quantile_column("", "s", 3),
        Column("CPU s", "cpu_s", "{:.2f}"),
        Column("users a second", lambda row: row.get("users_per_second"), "{:,.0f}"),
        Column("peak MiB", lambda row: row.get("peak_pss_bytes"), mebibytes),
    ]
    caption = f"one user at a time: p50 {latency['p50_ms']:.1f} ms, p99 {latency['p99_ms']:.1f} ms"
    for name in ("added", "export", "page"):
        caption += f"; {name}: {result[name]['not_measured']}" if "not_measured" in result[name] else ""
    title = f"{result['dataset']}, {run['method']}, {run['users']:,} users, {run['items']:,} items"
    yield ResultTable(title, columns, [rows], caption)


def growth_tables(result: Result) -> Iterator[ResultTable]:
    """Yield a row for each catalogue and number of users a batch."""
    settings = result["settings"]
    columns = [
        Column("items", "items", "{:,}"),
        Column("users a batch", "batch_users", "{:,}"),
        Column("epoch s", "epoch_s", "{:.2f}"),
        Column("evaluation s", "evaluation_s", "{:.2f}"),
    ]
    shape = f"2 views of {settings['layers']} layers of {settings['width']}"
    yield ResultTable(f"{settings['users']:,} users, {shape}", columns, [result["rows"]])


def scale_tables(result: Result) -> Iterator[ResultTable]:
    """Yield a section for each catalogue, a row a table."""
    settings = result["settings"]
    columns = [
        Column("items", "items", "{:,}"),
        label("table", "table"),
        Column("ranks", "ranks"),
        Column("p20 / p50 / p80 ms", _step_times, right=False),
        Column("waited\nms", _if_measured("waited_ms"), "{:.1f}"),
        Column("gather\nms", _if_measured("gather_ms"), "{:.1f}"),
        Column("private\nMiB", _if_measured("private_bytes"), mebibytes),
        Column(
            "rows\nMiB", lambda row: row.get("received_bytes", {}).get("rows"), lambda bytes: f"{bytes / 2**20:.1f}"
        ),
        Column("loss\ndiffers", _if_measured("loss_difference"), "{:.0e}"),
    ]
    shape = f"2 views of {settings['layers']} layers of {settings['width']}"
    sections = [list(rows) for _, rows in groupby(result["rows"], key=lambda row: row["items"])]
    caption = "private: of the rank that has most; rows: of the table, that a step received from other ranks"
    yield ResultTable(f"steps of {settings['users']} users, {shape}", columns, sections, caption)


def histories_tables(result: Result) -> Iterator[ResultTable]:
    """Yield a row for each command."""
    columns = [
        label("command", "what"),
        Column("seconds", "seconds", "{:.1f}"),
        Column("private\nMiB", "private_bytes", mebibytes),
        Column("files\nMiB", "file_bytes", mebibytes),
        Column("steps", lambda row: row.get("steps"), "{:,}"),
        Column("ms a step", lambda row: row.get("step_ms"), "{:.1f}"),
    ]
    counts = result["counts"]
    title = f"{counts['interactions']:,} interactions of {counts['users']:,} users with {counts['items']:,} items"
    yield ResultTable(title, columns, [result["rows"]], "files: pages of mapped files, which the system takes back")


def kernel_tables(result: Result) -> Iterator[ResultTable | str]:
    """Yield a table for each op and batch, then lines that say how forms were timed and what was not measured.

    For the result of --tune, yield the entries that tuning found, as lines.
    """
    if "entries" in result:
        yield from tuned_lines(result["entries"])
        return
    for (op, users), rows in groupby(result["rows"], key=lambda row: (row["op"], row["users"])):
        yield _op_table(op, users, list(rows), result["notes"].get(op, ""))
    for timed in dict.fromkeys(row["timed"] for row in result["rows"] if row["timed"]):
        forms = dict.fromkeys(row["form"] for row in result["rows"] if row["timed"] == timed)
        yield f"{', '.join(forms)}: {timed}"
    for batch, reason in result["not_measured"].items():
        yield f"{batch} a batch: not measured ({reason})"


def tuned_lines(entries: list[dict[str, Any]]) -> Iterator[str]:
    """Yield the entries that tuning found, as the table of configurations writes them."""
    for kernel, of_kernel in groupby(entries, key=lambda entry: entry["kernel"]):
        yield f'    "{kernel}": {{'
        for entry in of_kernel:
            trials = f"{entry['tried']} tried, {entry['skipped']} skipped"
            yield f"        # {entry['ms']:.4f} ms, shipped {entry['shipped_ms']:.4f} ms; {trials}"
            yield f'        ("{entry["architecture"]}", "{entry["size"]}"): {entry["entry"]},'
        yield "    },"


def methods_tables(result: Result) -> Iterator[ResultTable]:
    """Yield a section for each set of encoders, a row a method."""
    columns = [
        label("encoders", "encoders"),
        label("method", "method"),
        Column("HR@10", mean_with_deviation("hr")),
        Column("NDCG@10", mean_with_deviation("ndcg")),
        Column("p", lambda row: "-" if row["p_value"] is None else row["p_value"], "{:.4f}"),
        Column("s / epoch", "epoch_s", "{:.2f}"),
        Column("trained M", "trainable_parameters", millions),
        Column("peak MiB", "peak_bytes", mebibytes),
        Column("TPME %", lambda row: row.get("tpme", None if row["epoch_s"] is None else "-"), percent),
    ]
    sections = []
    for name, compared in result["encoders"].items():
        baselines = {baseline: NOT_TRAINED | row for baseline, row in compared.get("baselines", {}).items()}
        rows = {**compared["methods"], **baselines}  # older results lack baselines
        sections.append([{"encoders": name, "method": method, **row} for method, row in rows.items()])
    seeds = len(result["settings"]["seeds"])
    mean = f"mean over {f'{seeds} seeds' if seeds > 1 else 'one seed'}"
    captions = [_methods_caption(name, compared) for name, compared in result["encoders"].items()]
    title = f"{result['dataset']}: test set, history masked, {mean}"
    yield ResultTable(title, columns, sections, "\n".join(captions))


def encoders_tables(result: Result) -> Iterator[ResultTable]:
    """Yield a row for each set of encoders, the smallest first."""
    columns = [
        label("encoders", "encoders"),
        Column("their M", lambda row: row["encoder_parameters"] / 1e6, "{:.1f}"),
        Column("HR@10", mean_with_deviation("hr")),
        Column("NDCG@10", mean_with_deviation("ndcg")),
        Column("neighbours\nHR / NDCG", lambda row: _baseline(row, "neighbours"), right=False),
        Column("encoding s", "encoding_s", "{:.0f}"),
        Column("s / epoch", "epoch_s", "{:.2f}"),
        Column("trained M", "trainable_parameters", millions),
        Column("peak MiB", "peak_bytes", mebibytes),
    ]
    title = f"{result['dataset']}, {result['settings']['methods'][0]}: test set, history masked"
    captions = []
    if popularity := _baseline(result["rows"][0], "popularity"):  # the same for all sets
        captions.append(f"popularity: HR@10 / NDCG@10 {popularity}")
    if any(_lacks_similarity(row) for row in result["rows"]):
        captions.append(WITHOUT_SIMILARITY)
    yield ResultTable(title, columns, [result["rows"]], "; ".join(captions))


def static_tables(result: Result) -> Iterator[ResultTable | str]:
    """Yield the counts of the steps, the bounds of the ops, and the figures of the kernels."""
    steps = result["steps"]
    columns = [label("", "name")]
    for number, step in enumerate(steps):
        columns.append(Column(f"{step['users']:,} users", f"step {number}"))
    title = f"{result['dataset']}: a training step, counted; nothing ran on a GPU"
    yield ResultTable(title, columns, [_launch_rows(steps), _step_rows(steps)])
    if result["settings"]["kernels"]:
        yield _bounds_table(steps)
        for (users, name), rows in groupby(result["kernels"], lambda row: (row["users"], row["architecture"])):
            yield ResultTable(f"{users:,} users, {name}", KERNEL_COLUMNS, [list(rows)])
    for name, note in result["notes"].items():
        yield f"{name}: {note}"


def _baseline(row: Row, name: str) -> str | None:
    """Return a baseline's HR@10 and NDCG@10 as text; None for an older result, which has none."""
    figures = row.get("baselines", {}).get(name)
    return None if figures is None else f"{percent(figures['hr'])} / {percent(figures['ndcg'])}"


def _lacks_similarity(compared: Row) -> bool:
    """Return True if the baseline `neighbours` of a set of encoders has no similarity."""
    return not compared.get("baselines", {}).get("neighbours", {}).get("similarity", True)


def _seconds_of_all_users(row: Row) -> str:
    """Return the median seconds for all users, with a note if they were scaled from fewer users."""
    whole = row["all_users"]
    return f"{whole['p50_s']:.3f}{' (scaled)' if whole['scaled'] else ''}"


def _uncached_row(row: Row) -> Row:
    """Return a row with its phases as text; a form that cannot run says why in their place."""
    if "why" in row:
        return {**row, "phases": row["why"], **dict.fromkeys(("opening_s", "peak_pss_bytes", "peak_cuda_bytes"))}
    return {**row, "phases": " / ".join(f"{figure:,.1f}" for figure in row["phases_ms"].values())}


def _op_table(op: str, users: int, rows: list[dict[str, Any]], note: str) -> ResultTable:
    """Return an op's table: a section for each form; passes that were not measured for one reason share a row."""
    sections = []
    for _, passes in groupby(rows, key=lambda row: row["form"]):
        section = []
        for _, group in groupby(passes, key=lambda row: row["status"] if row["p50_ms"] is None else row["pass"]):
            alike = list(group)
            section.append({**alike[0], "pass": alike[0]["pass"] if len(alike) == 1 else "all"})
        sections.append(section)
    columns = [
        label("", "form"),
        label("pass", "pass"),
        Column("p20 / p50 / p80 ms", _kernel_times, right=False),
        Column("launches", "launches", "{:,}"),
        Column("peak MiB", "peak_bytes", lambda figure: f"{figure / 2**20:,.1f}"),
        Column("gradient\nerror", "gradient_error", "{:.1e}"),
        Column("floor ms", "floor_ms", "{:.3f}"),
        Column("of floor", "floor_share", lambda share: f"{percent(share)} %"),
    ]
    sizes = ", ".join(f"{rows[0][name]:,} {name}" for name in ("rows", "items") if name in rows[0])
    return ResultTable(f"{op}, {users:,} users: {sizes}, {rows[0]['dtype']}", columns, sections, note)


def _if_measured(name: str) -> Callable[[Row], Any]:
    """Return a function that gives a row's figure, and None for a row that was not measured."""
    return lambda row: row.get(name)


def _step_times(row: Row) -> str:
    """Return the p20 / p50 / p80 of a step in ms, or why it was not measured."""
    return row.get("why") or " / ".join(f"{row[name]:.0f}" for name in quantile_keys("ms"))


def _kernel_times(row: Row) -> str:
    """Return a kernel's p20 / p50 / p80 in ms, or why it was not measured."""
    if row["p50_ms"] is None:
        return row["status"]
    return " / ".join(f"{row[name]:.3f}" for name in quantile_keys("ms"))


def _methods_caption(encoders: str, compared: Row) -> str:
    """Return the caption of a table of methods: encoding time, and the verdict on the order of costs."""
    order = compared["cost_order"]
    caption = f"{encoders}: p against {compared['against']}"
    if _lacks_similarity(compared):
        caption += f"; {WITHOUT_SIMILARITY}"
    if isinstance(compared.get("encoding_s"), float):  # older results lack it
        caption += f"; its states took {compared['encoding_s']:.0f} s to encode, once"
    if ">" in order["expected"]:
        verdict = "yes" if order["holds"] else "no: " + "; ".join(order["violations"])
        caption += f"; time an epoch as expected, {order['expected']}: {verdict}"
    return caption


def _across(name: str, texts: Iterable[str]) -> Row:
    """Return a row of one figure, with a text for each step."""
    return {"name": name, **{f"step {number}": text for number, text in enumerate(texts)}}


def _launch_rows(steps: list[dict[str, Any]]) -> list[Row]:
    """Return a row for each part of a step, with its launches in each counted step."""
    rows = []
    for part in dict.fromkeys(part for step in steps for part in step["launches_by_part"]):
        counts = (str(step["launches_by_part"].get(part, 0)) for step in steps)
        rows.append(_across(f"launches of {part}", counts))
    return rows


def _step_rows(steps: list[dict[str, Any]]) -> list[Row]:
    """Return the rows of counted figures: launches, host reads, bytes, memory, host time and sizes."""
    rows = [
        _across("launches", (str(step["launches"]) for step in steps)),
        _across("reads by the host", (str(len(step["host_reads"])) for step in steps)),
        _across("padded shapes in ten epochs", (str(step["padded_shapes"]) for step in steps)),
        _across("MiB moved", (_mebibytes_or_text(step["bytes"]) for step in steps)),
        _across("peak of allocations, MiB", (mebibytes(step["peak_bytes"]) for step in steps)),
        _across("of it hidden states, MiB", (mebibytes(step["table_bytes"]) for step in steps)),
        _across("host, us a batch", (f"{step['host_us']:.0f}" for step in steps)),
    ]
    for name in ("distinct", "rows", "tiles"):
        counts = (f"{step['true_counts'][name]:,} of {_bound(step['bounds'], name):,}" for step in steps)
        rows.append(_across(f"{name} of the first batch", counts))
    return rows


def _mebibytes_or_text(figure: int | str) -> str:
    """Return bytes as MiB; text, such as "not measured", stays as it is."""
    return figure if isinstance(figure, str) else mebibytes(figure)


def _bound(bounds: dict[str, int], name: str) -> int:
    """Return how many of a thing a step has memory for; rows are tiles times rows a tile."""
    return bounds["tiles"] * bounds["tile_rows"] if name == "rows" else bounds[name]


def _bounds_table(steps: list[dict[str, Any]]) -> ResultTable:
    """Return the bounds beside the floors, a row for each op and number of users."""
    columns = [label("", "name"), Column("launches", "launches")]
    for head, key in (("issue", "issue_ms"), ("bytes", "bytes_ms"), ("larger", "bound_ms"), ("floor", "floor_ms")):
        columns.append(Column(head, key, "{:.4f}"))
    sections = []
    for step in steps:
        sections.append([{**row, "name": f"{row['op']}, {step['users']:,} users"} for row in step["ops"]])
    return ResultTable("bounds of an H200, in ms", columns, sections)


def _kernel_name(row: Row) -> str:
    """Return a kernel's name, its variant if it has several, and its launches if there are several."""
    variant = row.get("variant")  # older results lack it
    name = f"{row['kernel']} ({variant})" if variant else row["kernel"]
    return f"{name} x {row['launches']}" if row["launches"] > 1 else name


def _in_loops(key: str) -> Column:
    """Return the column of a count within loops that multiply matrices; nothing for a kernel without such a loop."""
    head = {"loop_instructions": "in\nloops", "asynchronous": "copies\nahead"}[key]
    return Column(head, lambda row: row[key] if row["loop_instructions"] else None, "{:,}")


KERNEL_COLUMNS = (
    Column("", _kernel_name, right=False),
    Column("regis-\nters", "registers"),
    Column("spilled\nbytes", "spilled"),
    Column("shared\nKiB", lambda row: row["shared"] / 1024, "{:.0f}"),
    Column("instruc-\ntions", "instructions", "{:,}"),
    _in_loops("loop_instructions"),
    Column("by\nelement", "per_element", "{:.1f}"),
    _in_loops("asynchronous"),
    Column("issue\nms", "issue_ms", "{:.4f}"),
    Column("bytes\nms", "bytes_ms", "{:.4f}"),
)
