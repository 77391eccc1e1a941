"""From a dataset to recommendations: encode titles, train, recommend, add items, export, and look at the run.

    python examples/scientific.py data/amazon-scientific sentence-transformers/all-MiniLM-L6-v2 runs/scientific

The dataset is a folder with items.tsv and users.tsv; docs/datasets.md tells how to import one. The encoder is a name on
the Hugging Face Hub or a folder. What is encoded is kept in a cache, so that a second run trains at once.
"""

from __future__ import annotations

import argparse
import html
import textwrap
from pathlib import Path

import iisan_fast
from iisan_fast import IISAN, Dataset

RECIPE = Path(__file__).parents[1] / "recipes" / "strong.yaml"
SHOWN_USERS = 5
NEW_ITEMS = 3


def main() -> None:
    """Run all steps."""
    arguments = parse_arguments()
    data = iisan_fast.load_dataset(arguments.dataset)
    print(f"{len(data.sequences.user_ids):,} users, {len(data.titles):,} items\n")

    encoder = {"text": arguments.encoder, "text_pooling": "mean", "max_tokens": arguments.max_tokens}
    model = IISAN(**encoder, cache=arguments.cache, config=RECIPE)
    model.fit(data, out=arguments.out / "run", epochs=arguments.epochs, on_epoch=print_epoch)
    print_figures(model)
    recommend_for_some_users(model, data)
    add_new_items(model, data)
    report = model.export(arguments.out / "exported")
    print(f"\nexported to {report.folder}: {', '.join(report.files)}")
    print(f"a page about the run: {model.show(arguments.out / 'report.html')}")


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", type=Path, help="folder with items.tsv and users.tsv")
    parser.add_argument("encoder", help="text encoder: a name on the hub, or a folder")
    parser.add_argument("out", type=Path, help="new folder for the run, the exported model and the page")
    parser.add_argument("--epochs", type=int, default=16)
    parser.add_argument("--max-tokens", type=int, default=64, help="tokens of a title that are read")
    parser.add_argument("--cache", type=Path, help="folder of the encoded items; by default in the user's cache folder")
    return parser.parse_args()


def print_epoch(line: dict) -> None:
    """Print an epoch's loss and validation accuracy."""
    hit_rate = line["validation"]["masked"]["hr@10"]
    print(f"epoch {line['epoch']:2}: loss {line['loss']:.3f}, validation HR@10 {hit_rate:.2%}", flush=True)


def print_figures(model: IISAN) -> None:
    """Print the accuracy on the test set beside the two baselines, for which nothing is trained."""
    print("\ntest, full catalogue, history masked   HR@10  NDCG@10")
    for name, key in (("this model", "test"), ("popularity", "popularity"), ("neighbours", "neighbours")):
        masked = model.figures[key]["masked"]
        print(f"  {name:36} {masked['hr@10']:6.2%}  {masked['ndcg@10']:6.2%}")


def recommend_for_some_users(model: IISAN, data: Dataset) -> None:
    """Print the last items of a few users, and what the model recommends after their whole history."""
    sequences = data.sequences
    step = max(1, len(sequences.user_ids) // SHOWN_USERS)
    histories = {}
    for user in range(0, step * SHOWN_USERS, step):
        items = sequences.items[sequences.offsets[user] : sequences.offsets[user + 1]]
        histories[sequences.user_ids[user]] = [sequences.item_ids[item - 1] for item in items]
    title_of = dict(zip(sequences.item_ids, data.titles))
    for user_id, items in model.recommend(histories, k=5).items():
        print(f"\nuser {user_id} took, newest last")
        for item_id in histories[user_id][-4:]:
            print(f"      {shortened(title_of[item_id])}")
        print("   and may like")
        for item in items:
            print(f"      {shortened(item.title)}  ({item.score:.1f})")


def add_new_items(model: IISAN, data: Dataset) -> None:
    """Add items that no user of the dataset has taken, and print the items that are most similar to them."""
    known = set(data.sequences.item_ids)
    lines = (Path(data.root) / "items.tsv").read_text(encoding="utf-8").splitlines()
    pairs = [html.unescape(line).split("\t") for line in lines]
    new_items = [{"item_id": item_id, "title": title} for item_id, title in pairs if item_id not in known][:NEW_ITEMS]
    model.add_items(new_items)
    for item in new_items:
        print(f"\nnew: {shortened(item['title'])}\n   like it are")
        for similar in model.similar(item["item_id"], k=3, by="content"):
            print(f"      {shortened(similar.title)}  ({similar.score:.2f})")


def shortened(title: str) -> str:
    """Return a title that fits a line."""
    return textwrap.shorten(title, 84, placeholder=" …")


if __name__ == "__main__":
    main()
