"""Serve an exported run (pip install 'iisan-fast[serve]'): OMP_NUM_THREADS=1 python examples/serve.py EXPORTED."""

import argparse
import json
from hashlib import sha256
from importlib import import_module
from pathlib import Path

import numpy as np
import onnxruntime
import uvicorn
from fastapi import FastAPI, HTTPException, exceptions, responses
from pydantic import BaseModel, Field, conlist, constr
from scipy.sparse import load_npz


class Query(BaseModel, extra="forbid"):
    """Histories of item ids, oldest first, and how many items each of them gets."""

    histories: list[conlist(constr(max_length=256), max_length=1000)] = Field(min_length=1, max_length=256)
    k: int = Field(10, ge=1, le=1000, strict=True)
    unknown: constr(pattern="^(error|skip)$") = "error"


class Exported:
    """An exported folder in memory. Row r of a table is the item on line r of items.jsonl."""

    def __init__(self, folder):
        """Load a folder. Raises ValueError or OSError, naming the file, if one is not as it was exported."""
        self.about = about = dict(json.loads((folder / "export.json").read_text("utf-8")))
        digests = about["sha256"] if about.get("format") == 1 else {"export.json": "of another format"}
        if bad := [name for name, was in digests.items() if sha256((folder / name).read_bytes()).hexdigest() != was]:
            raise ValueError(f"expected an unchanged export of format 1, changed: {bad}; export again")
        items = [json.loads(line) for line in (folder / "items.jsonl").open(encoding="utf-8")]
        self.row_of = {item["item_id"]: row for row, item in enumerate(items)}
        self.ids = np.array(list(self.row_of), dtype=object)
        self.removed, self.popularity = (np.array([item[key] for item in items]) for key in ("removed", "popularity"))
        self.vectors, self.cooccurrence = np.load(folder / "item_vectors.npy"), load_npz(folder / "cooccurrence.npz")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1  # requests run in parallel already
        self.encoder = onnxruntime.InferenceSession(folder / "sequence_encoder.onnx", options)
        if index := about["index"]:
            if index["kind"] == "faiss":
                graph = import_module("faiss").read_index(str(folder / index["file"]))
                self.search, items = lambda query, count: graph.search(query[None], count)[1][0], graph.ntotal
            else:
                graph = import_module("usearch.index").Index.restore(folder / index["file"], expansion_search=512)
                self.search, items = lambda query, count: graph.search(query, count).keys.astype(int), len(graph)
            if items != (~self.removed).sum() or not index["built_from"].items() <= digests.items():
                raise ValueError(f"{index['file']}: not an index of these item vectors; export again")

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
        if self.about["index"] is None:
            return np.arange(len(added)), self.vectors @ query + added
        candidates = np.setdiff1d(np.union1d(self.search(query, 10 * k + len(rows)), np.flatnonzero(added)), [-1])
        return candidates, self.vectors[candidates] @ query + added[candidates]


def service(exported):
    """Return the HTTP service of an exported folder."""

    def recommend(query: Query):
        if query.unknown == "error" and (unknown := {i for h in query.histories for i in h} - exported.row_of.keys()):
            raise HTTPException(422, f"histories: {len(unknown)} unknown ids, such as {', '.join(sorted(unknown)[:3])}")
        return responses.JSONResponse({"users": [exported.recommend(history, query.k) for history in query.histories]})

    def refuse(_request, error):  # FastAPI would answer with the input, which may be large, or no JSON
        return responses.JSONResponse({"detail": [f"{e['loc'][1:]}: {e['msg']}" for e in error.errors()[:3]]}, 422)

    app = FastAPI(title="iisan-fast", exception_handlers={exceptions.RequestValidationError: refuse})
    app.add_api_route("/health", lambda: {"status": "ok", "items": int((~exported.removed).sum())})
    app.add_api_route("/recommend", recommend, methods=["POST"])
    return app


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="written by iisan-fast export")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    arguments = parser.parse_args()
    try:
        uvicorn.run(service(Exported(arguments.folder)), host=arguments.host, port=arguments.port, log_level="warning")
    except (OSError, ValueError, TypeError, LookupError, OverflowError, ImportError) as error:
        remedy = f"; pip install 'iisan-fast[{error.name}]'" if isinstance(error, ImportError) else ""
        parser.exit(2, f"error: {arguments.folder}: {error}{remedy}\n")
