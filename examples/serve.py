"""Serve an exported run over HTTP, without PyTorch: OMP_NUM_THREADS=1 python examples/serve.py EXPORTED --port 8000."""

import argparse
import json
from hashlib import sha256
from importlib import import_module
from pathlib import Path

import numpy as np
import onnxruntime
import uvicorn
from fastapi import FastAPI, HTTPException
from pydantic import BaseModel, Field, conlist, constr
from scipy.sparse import load_npz


class Query(BaseModel):
    """Histories of item ids, oldest first, and how many items each of them gets."""

    histories: list[conlist(constr(max_length=256), max_length=1000)] = Field(min_length=1, max_length=256)
    k: int = Field(10, ge=1, le=1000)
    unknown: constr(pattern="^(error|skip)$") = "error"


class Exported:
    """An exported folder in memory. Row r of a table is the item on line r of items.jsonl."""

    def __init__(self, folder):
        """Load a folder. Raises ValueError or OSError, naming the file, if one is not as it was exported."""
        self.about = about = json.loads((folder / "export.json").read_text("utf-8"))
        bad = [name for name, was in about["sha256"].items() if sha256((folder / name).read_bytes()).hexdigest() != was]
        if about["format"] != 1 or bad:
            raise ValueError(f"{folder}: expected an unchanged export of format 1, changed: {bad}; export again")
        items = [json.loads(line) for line in (folder / "items.jsonl").open(encoding="utf-8")]
        self.row_of = {item["item_id"]: row for row, item in enumerate(items)}
        self.ids = np.array(list(self.row_of), dtype=object)
        self.removed, self.popularity = (np.array([item[key] for item in items]) for key in ("removed", "popularity"))
        self.vectors = np.load(folder / "item_vectors.npy")
        self.cooccurrence = load_npz(folder / "cooccurrence.npz")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1  # requests run in parallel already
        self.encoder = onnxruntime.InferenceSession(folder / "sequence_encoder.onnx", options)
        self.search = None  # a function (query, count) -> rows
        if index := about["index"]:
            if not index["built_from"].items() <= about["sha256"].items():
                raise ValueError(f"{folder / index['file']}: not an index of these item vectors; export again")
            if index["kind"] == "faiss":
                graph = import_module("faiss").read_index(str(folder / index["file"]))
                self.search = lambda query, count: graph.search(query[None], count)[1][0]
            else:
                graph = import_module("usearch.index").Index.restore(folder / index["file"])
                self.search = lambda query, count: graph.search(query, count).keys.astype(int)

    def recommend(self, history, k):
        """Return the k best items after the known items of a history, or popular ones if it has none."""
        rows = [self.row_of[item_id] for item_id in history if item_id in self.row_of]
        candidates, scores = self.scored(rows, k) if rows else (np.arange(len(self.ids)), self.popularity)
        scores = np.where(self.removed[candidates] | np.isin(candidates, rows), -np.inf, scores)
        best = np.argsort(-scores, kind="stable")[: min(k, np.isfinite(scores).sum())]  # equal scores stay in order
        return dict(items=self.ids[candidates[best]].tolist(), scores=scores[best].tolist(), by_popularity=not rows)

    def scored(self, rows, k):
        """Return candidates, ascending, and their exact scores: those of the index and the co-occurring, or all."""
        width, constants = self.about["history_width"], self.about["constants"]
        inputs = np.pad(self.vectors[rows[-width:]], ((max(0, width - len(rows)), 0), (0, 0)))
        (query,) = self.encoder.run(["queries"], {"inputs": inputs[None], "lengths": [min(width, len(rows))]})[0]
        sums = constants["decay"] ** np.arange(len(rows)) @ self.cooccurrence[rows[::-1]]
        added = self.about["weights"]["cooccurrence"] * np.log1p(constants["sums_factor"] * sums)
        if self.search is None:
            return np.arange(len(added)), self.vectors @ query + added
        found = self.search(query, 10 * k + len(rows))
        candidates = np.union1d(found[found >= 0], np.flatnonzero(added))
        return candidates, self.vectors[candidates] @ query + added[candidates]


def service(exported):
    """Return the HTTP service of an exported folder."""
    app = FastAPI(title="iisan-fast")
    app.add_api_route("/health", lambda: {"status": "ok", "items": int((~exported.removed).sum())})

    @app.post("/recommend")
    def recommend(query: Query):
        unknown = list({i: 0 for history in query.histories for i in history if i not in exported.row_of})
        if unknown and query.unknown == "error":
            raise HTTPException(422, f"histories: {len(unknown)} unknown item ids, such as {', '.join(unknown[:3])}")
        return {"users": [exported.recommend(history, query.k) for history in query.histories]}

    return app


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="written by iisan-fast export")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    arguments = parser.parse_args()
    try:
        uvicorn.run(service(Exported(arguments.folder)), host=arguments.host, port=arguments.port, log_level="warning")
    except (OSError, ValueError, KeyError, ImportError) as error:
        parser.exit(2, f"error: {error}\n")
