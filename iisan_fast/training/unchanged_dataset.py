"""Read the dataset of a resumed run, and refuse a dataset that has changed since the run, or the cache, was made."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from ..config import RunConfig
from ..data import Dataset, Sequences, load_dataset
from ..errors import InputError, first_few
from ..states import Store, content_digest


def dataset_again(config: RunConfig, sequences: Sequences) -> Dataset:
    """Return the dataset of a resumed run, with the histories of its run folder.

    Titles and captions are read only if encoders run. Raises InputError if the dataset's items are not those of the
    run.
    """
    if config.uncached is None:
        return Dataset(Path(config.dataset), [], [], config.protocol, sequences)
    dataset = load_dataset(Path(config.dataset), config.protocol)
    if dataset.sequences.item_ids != sequences.item_ids:
        raise InputError(f"{config.dataset}: its items are not those that the run was trained on; restore them")
    return replace(dataset, sequences=sequences)


def same_dataset(config: RunConfig, sequences: Sequences) -> Dataset:
    """Return the dataset in the configured folder, to which the dataset of a run has moved.

    sequences: of the run folder. Raises InputError, with the first difference, for another dataset.
    """
    dataset = load_dataset(Path(config.dataset), config.protocol)
    if difference := _difference(sequences, dataset.sequences):
        raise InputError(f"{config.dataset}: not the dataset that the run was trained on: {difference}")
    return dataset


def refuse_changed_texts(config: RunConfig, dataset: Dataset) -> None:
    """Raise InputError if titles or captions have changed since the cache's states were made from them.

    Runs without a cache are not checked, nor are images.
    """
    if config.cache is None:
        return
    with Store(Path(config.cache)) as store:
        for name in config.cache_views:
            view = store.view(name)
            if view["source"] == "image":
                continue  # reading all images would take the time that the cache saves
            protocol = replace(
                config.protocol,
                unescape_titles=view["unescaped"],
                missing_captions=view.get("missing_captions", "error"),
            )
            if protocol != dataset.protocol:
                dataset = load_dataset(dataset.root, protocol)
            texts = [text or "" for text in dataset.texts(view["source"])]
            item_ids = dataset.sequences.item_ids
            changed = [
                item_id
                for item_id, text, digest in zip(item_ids, texts, store.digests(name, item_ids))
                if digest is not None and digest != content_digest(text.encode())
            ]
            if changed:
                raise InputError(
                    f"{config.cache}: view {name!r}: the {view['source']}s of {len(changed)} items are not those "
                    f"that were encoded ({first_few(changed, len(changed))}); run iisan-fast extract again"
                )


def _difference(recorded: Sequences, current: Sequences) -> str:
    """Return a phrase for the first difference between two datasets; empty if they are the same."""
    for kind, before, now in (
        ("items", recorded.item_ids, current.item_ids),
        ("users", recorded.user_ids, current.user_ids),
    ):
        if len(before) != len(now):
            return f"{len(before)} {kind} there, {len(now)} now"
        for number, (id_before, id_now) in enumerate(zip(before, now), start=1):
            if id_before != id_now:
                return f"{kind} {number} {id_before!r} there, {id_now!r} now"
    if not (np.array_equal(recorded.offsets, current.offsets) and np.array_equal(recorded.items, current.items)):
        return f"the history of user {_first_changed_user(recorded, current)!r} has changed"
    pairs = [("training", recorded.training_ends, current.training_ends)]
    for name in recorded.targets:
        pairs.append((name, recorded.targets[name], current.targets[name]))
        pairs.append((name, recorded.target_counts[name], current.target_counts[name]))
    differing = dict.fromkeys(name for name, before, now in pairs if not np.array_equal(before, now))
    return f"another split ({', '.join(differing)})" if differing else ""


def _first_changed_user(recorded: Sequences, current: Sequences) -> str:
    """Return the id of the first user whose histories in two datasets of the same users differ.

    Raises ValueError if there is none.
    """
    for user, user_id in enumerate(recorded.user_ids):
        before, now = (
            sequences.items[sequences.offsets[user] : sequences.offsets[user + 1]] for sequences in (recorded, current)
        )
        if not np.array_equal(before, now):
            return user_id
    raise ValueError("expected two datasets with different histories")
