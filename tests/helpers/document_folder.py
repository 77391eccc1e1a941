"""The working folder where documents' commands run: a small dataset, small encoders, files to import, the recipes."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np

from iisan_fast import demo
from iisan_fast.encoders.random_encoders import write_bert, write_vit

from .datasets import histories_at_random, write_catalogue
from .documents import ROOT

USERS, ITEMS = 160, 70
WORDS = ["for", "title", "of", *demo.BRANDS, *demo.MATERIALS]
SIZES = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16}
IMAGE_SIZES = {**SIZES, "image_size": 16, "patch_size": 8}
TEXT_ENCODERS = {"bert-base-uncased": 12, "sentence-transformers/all-MiniLM-L6-v2": 6}  # hub name: blocks
IMAGE_ENCODERS = {"google/vit-base-patch16-224": 12, "WinKawaks/vit-tiny-patch16-224": 12}


def fill_folder(folder: Path) -> None:
    """Write DATASET, the encoders under their hub names, what is imported from, and recipes/ into an empty folder."""
    dataset = write_catalogue(folder / "DATASET", histories_at_random(USERS, ITEMS), ITEMS)
    _write_captions_times_and_splits(dataset)
    _write_sources(folder, dataset)
    _write_for_a_run(folder)
    _write_features(folder, list(_titles(dataset)))
    for seed, (name, blocks) in enumerate(TEXT_ENCODERS.items()):
        sizes = {**SIZES, "num_hidden_layers": blocks, "max_position_embeddings": 128}
        write_bert(folder / name, sizes, WORDS, seed)
    for seed, (name, blocks) in enumerate(IMAGE_ENCODERS.items()):
        write_vit(folder / name, {**IMAGE_SIZES, "num_hidden_layers": blocks}, seed)
    shutil.copytree(ROOT / "recipes", folder / "recipes")


def _histories(dataset: Path) -> dict[str, list[str]]:
    lines = (dataset / "users.tsv").read_text().splitlines()
    pairs = (line.split("\t") for line in lines)
    return {user: items.split() for user, items in pairs}


def _titles(dataset: Path) -> dict[str, str]:
    return dict(line.split("\t") for line in (dataset / "items.tsv").read_text().splitlines())


def _write_captions_times_and_splits(dataset: Path) -> None:
    captions = "".join(f"{item}\ta picture of {title}\n" for item, title in _titles(dataset).items())
    (dataset / "captions.tsv").write_text(captions)
    generator = np.random.default_rng(0)
    lines = []
    for user, history in _histories(dataset).items():
        times = np.sort(generator.integers(1_500_000_000, 1_600_000_000, len(history)))
        lines.append(f"{user}\t{' '.join(map(str, times))}\n")
    (dataset / "times.tsv").write_text("".join(lines))
    parts = (f"{user}\t{len(history) - 3} 1 2\n" for user, history in _histories(dataset).items())
    (dataset / "splits.tsv").write_text("".join(parts))


def _write_sources(folder: Path, dataset: Path) -> None:
    """Write the same interactions as each import reads them: shop.csv, shop.parquet, MicroLens-50k/ and others."""
    titles = _titles(dataset)
    rows = []
    for user, history in _histories(dataset).items():
        rows += [(user, item, str(time)) for time, item in enumerate(history)]
    _write_rows(folder / "shop.csv", ("user", "item", "timestamp"), rows, ",")
    _write_rows(folder / "damaged.csv", ("user", "item", "timestamp"), [*rows, ('u"1', "x", "1")], ",")
    rated = [(user, item, "5.0", time) for user, item, time in rows]
    _write_rows(folder / "headerless.csv", rated[0], rated[1:], ",")
    _write_rows(folder / "titles.csv", ("item", "title"), titles.items(), ",")
    shutil.copytree(dataset / "images", folder / "covers")
    microlens = folder / "MicroLens-50k"
    microlens.mkdir()
    _write_rows(microlens / "MicroLens-50k_pairs.csv", ("user", "item", "timestamp"), rows, ",")
    _write_rows(microlens / "MicroLens-50k_titles.csv", ("item", "title"), titles.items(), ",")
    shutil.copytree(dataset / "images", microlens / "MicroLens-50k_covers")
    recbole = folder / "ml-shop"
    recbole.mkdir()
    header = ("user_id:token", "item_id:token", "timestamp:float")
    _write_rows(recbole / "ml-shop.inter", header, rows, "\t")
    _write_rows(recbole / "ml-shop.item", ("item_id:token", "title:token_seq"), titles.items(), "\t")
    _write_parquet(folder / "shop.parquet", rows)


def _write_for_a_run(folder: Path) -> None:
    """Write what commands on a trained run read: NEW.tsv of two new items, visitors.csv of two users, in-stock.txt."""
    (folder / "NEW.tsv").write_text("i71\ttitle of a brush\ni72\ttitle of a drum\n")
    _write_rows(folder / "visitors.csv", ("user_id", "history"), [("ann", "i3 i7 i12"), ("bob", "")], ",")
    (folder / "in-stock.txt").write_text("".join(f"i{number}\n" for number in range(1, 41)))


def _write_features(folder: Path, item_ids: list[str]) -> None:
    """Write features of the items in each form: image_feat.npy with ids.txt, text.safetensors and emb.parquet.

    MMRec/ has a dataset whose ids are whole numbers from 0, with features that have no ids.
    """
    import polars
    from safetensors.numpy import save_file

    generator = np.random.default_rng(0)
    values = generator.normal(size=(len(item_ids), 8)).astype(np.float32)
    np.save(folder / "image_feat.npy", values)
    (folder / "ids.txt").write_text("".join(f"{item_id}\n" for item_id in item_ids))
    save_file({"features": values[:, :6].copy()}, folder / "text.safetensors", {"ids": json.dumps(item_ids)})
    lists = [row.tolist() for row in values]
    polars.DataFrame({"item_id": item_ids, "image": lists, "text": lists}).write_parquet(folder / "emb.parquet")
    new = {"item_id": ["i71", "i72"], "feature": [row.tolist() for row in values[:2]]}
    polars.DataFrame(new).write_parquet(folder / "new_image.parquet")
    polars.DataFrame({**new, "feature": [row.tolist() for row in values[:2, :6]]}).write_parquet(
        folder / "new_text.parquet"
    )
    numbered = folder / "MMRec"
    numbered.mkdir()
    for name in ("items.tsv", "users.tsv"):
        text = (folder / "DATASET" / name).read_text()
        (numbered / name).write_text(re.sub(r"\bi(\d+)\b", lambda match: str(int(match[1]) - 1), text))
    np.save(folder / "baby_image.npy", values)
    np.save(folder / "baby_text.npy", values[:, :6])


def _write_rows(path: Path, header: tuple[str, ...], rows, separator: str) -> None:
    path.write_text("".join(separator.join(row) + "\n" for row in (header, *rows)))


def _write_parquet(path: Path, rows: list[tuple[str, str, str]]) -> None:
    import polars

    users, items, times = zip(*rows)
    columns = {"user": users, "item": items, "timestamp": [int(time) for time in times]}
    polars.DataFrame(columns).write_parquet(path)
