"""The example of a service: its answers over HTTP are those of `recommend`, and bad input is refused."""

from __future__ import annotations

import importlib.util
import json
import shutil
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from iisan_fast.serving.histories.user_histories import UserHistories
from iisan_fast.serving.recommendation import recommend
from iisan_fast.serving.trained_model import TrainedModel

httpx = pytest.importorskip("httpx")
TestClient = pytest.importorskip("fastapi.testclient").TestClient

pytestmark = pytest.mark.slow

SERVE = Path(__file__).parents[2] / "examples" / "serve.py"


@pytest.fixture(scope="module")
def serve():
    specification = importlib.util.spec_from_file_location("serve_example", SERVE)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def model(run_with_terms) -> TrainedModel:
    return TrainedModel.load(run_with_terms, torch.device("cpu"))


@pytest.fixture(scope="module")
def client(serve, exported) -> TestClient:
    return TestClient(serve.service(serve.Exported(exported)))


def histories_of_every_length(model: TrainedModel, most: int) -> list[list[int]]:
    generator = np.random.default_rng(5)
    return [generator.integers(1, len(model.catalogue.item_ids) + 1, length).tolist() for length in range(most + 1)]


def expected_answers(model: TrainedModel, histories: list[list[int]], k: int) -> list[dict]:
    offsets = np.cumsum([0, *map(len, histories)])
    flat = np.array([item for history in histories for item in history], dtype=np.int64)
    users = UserHistories([str(user) for user in range(len(histories))], offsets, flat)
    (part,) = recommend(model, users, k)
    answers = []
    for items, scores, popular in zip(part.items, part.scores, part.by_popularity):
        ids = [model.catalogue.item_ids[item - 1] for item in items if item]
        answers.append({"items": ids, "scores": scores[: len(ids)].tolist(), "by_popularity": bool(popular)})
    return answers


def assert_same_answers(users: list[dict], expected: list[dict]) -> None:
    assert [user["items"] for user in users] == [user["items"] for user in expected]
    assert [user["by_popularity"] for user in users] == [user["by_popularity"] for user in expected]
    for user, other in zip(users, expected):
        np.testing.assert_allclose(user["scores"], other["scores"], rtol=1e-4, atol=1e-4)


def ask(client: TestClient, model: TrainedModel, histories: list[list[int]], **body) -> httpx.Response:
    ids = [[model.catalogue.item_ids[item - 1] for item in history] for history in histories]
    return client.post("/recommend", json={"histories": ids, **body})


def test_the_service_is_short_and_needs_neither_torch_nor_the_package():
    text = SERVE.read_text()
    assert len(text.splitlines()) <= 100
    assert not any(
        line.startswith(("import torch", "from torch", "import iisan", "from iisan")) for line in text.splitlines()
    )


@pytest.mark.parametrize("k", [1, 10])
def test_the_answers_are_those_of_the_run_for_histories_of_every_length(client, model, k):
    histories = histories_of_every_length(model, 60)
    answer = ask(client, model, histories, k=k)
    assert answer.status_code == 200
    assert_same_answers(answer.json()["users"], expected_answers(model, histories, k))


def test_without_an_index_all_items_are_compared(serve, model, exported):
    service = serve.Exported(exported)
    service.about["index"] = None
    histories = histories_of_every_length(model, 12)
    ids = [[model.catalogue.item_ids[item - 1] for item in history] for history in histories]
    assert_same_answers([service.recommend(history, 7) for history in ids], expected_answers(model, histories, 7))


def test_unknown_items_are_listed_or_skipped(client, model):
    known = model.catalogue.item_ids[0]
    answer = client.post("/recommend", json={"histories": [["no-1", known], ["no-2", "no-3", "no-4", "no-1"]]})
    assert answer.status_code == 422
    assert answer.json()["detail"] == "histories: 4 unknown ids, such as no-1, no-2, no-3"
    answer = client.post("/recommend", json={"histories": [["no-1", known], ["no-2"]], "unknown": "skip"})
    assert_same_answers(answer.json()["users"], expected_answers(model, [[1], []], 10))


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"histories": []},
        {"histories": "i1"},
        {"histories": [[1]]},
        {"histories": [["i1"] * 1001]},
        {"histories": [["i" * 257]]},
        {"histories": [[]] * 257},
        {"histories": [[]], "k": 0},
        {"histories": [[]], "k": 1001},
        {"histories": [[]], "k": "many"},
        {"histories": [[]], "k": True},
        {"histories": [[]], "k": float("nan")},
        {"histories": [["\ud800"]]},
        {"histories": [[]], "top_k": 3, "\ud800": 0},
        {"histories": [[]], "unknown": "ignore"},
    ],
    ids=lambda body: json.dumps(body)[:40],
)
def test_bad_input_is_refused_in_few_words(client, body):
    answer = client.post("/recommend", content=json.dumps(body))
    assert answer.status_code == 422
    assert all(": " in line for line in answer.json()["detail"]) and len(answer.content) < 1000


def test_a_k_above_the_catalogue_gives_all_items(client, model):
    (user,) = ask(client, model, [[]], k=1000).json()["users"]
    assert len(user["items"]) == model.catalogue.available


def test_health(client, model):
    assert client.get("/health").json() == {"status": "ok", "items": model.catalogue.available}


def changed(exported: Path, tmp_path: Path, name: str, change) -> Path:
    folder = shutil.copytree(exported, tmp_path / "changed")
    content = change((folder / name).read_bytes())
    (folder / name).write_bytes(content)
    return folder


def flipped(content: bytes) -> bytes:
    return content[:-1] + bytes([content[-1] ^ 1])


def other_index(content: bytes) -> bytes:
    about = json.loads(content)
    about["index"]["built_from"]["item_vectors.npy"] = "0" * 64
    return json.dumps(about).encode()


def other_format(_content: bytes) -> bytes:
    return b'{"format": 2}'


def fewer_available(content: bytes) -> bytes:
    about = json.loads(content)
    about["sha256"].pop("items.jsonl")
    about["index"]["built_from"].pop("items.jsonl")
    return json.dumps(about).encode()


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("item_vectors.npy", flipped, r"changed: \['item_vectors.npy'\]"),
        ("sequence_encoder.onnx", flipped, r"changed: \['sequence_encoder.onnx'\]"),
        ("export.json", other_index, "not an index of these item vectors"),
        ("export.json", other_format, "expected an unchanged export of format 1"),
    ],
)
def test_files_that_do_not_fit_are_refused(serve, exported, tmp_path, name, change, message):
    with pytest.raises(ValueError, match=message):
        serve.Exported(changed(exported, tmp_path, name, change))


def test_an_index_of_other_items_is_refused(serve, exported, tmp_path):
    folder = changed(exported, tmp_path, "export.json", fewer_available)
    lines = (folder / "items.jsonl").read_text()
    (folder / "items.jsonl").write_text(lines.replace('"removed": false', '"removed": true', 1))
    with pytest.raises(ValueError, match="index.faiss: not an index of these item vectors"):
        serve.Exported(folder)


def test_requests_at_the_same_time_get_the_answers_of_single_ones(serve, exported):
    service = serve.Exported(exported)
    histories = [service.ids[start : start + 5].tolist() for start in range(60)]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda history: service.recommend(history, 10), histories))
    assert together == [service.recommend(history, 10) for history in histories]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def test_the_program_serves_on_loopback(exported, model):
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, SERVE, exported, "--port", str(port)], stderr=subprocess.PIPE, text=True
    )
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                httpx.get(f"http://127.0.0.1:{port}/health").raise_for_status()
                break
            except httpx.TransportError:
                assert process.poll() is None and time.monotonic() < deadline, "the service does not start"
                time.sleep(0.1)
        with httpx.Client(base_url=f"http://127.0.0.1:{port}") as client:
            answer = ask(client, model, [[3, 1, 2]], k=5)
        assert_same_answers(answer.json()["users"], expected_answers(model, [[3, 1, 2]], 5))
    finally:
        process.terminate()
        process.communicate(timeout=30)


def test_the_program_ends_with_one_line_for_a_folder_without_export(tmp_path):
    result = subprocess.run([sys.executable, SERVE, tmp_path], capture_output=True, text=True)
    assert result.returncode == 2
    assert (
        result.stderr.startswith(f"error: {tmp_path}: ")
        and "export.json" in result.stderr
        and result.stderr.count("\n") == 1
    )
