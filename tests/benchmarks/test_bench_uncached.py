"""The uncached benchmark: what it reports, what it says it did not measure, and that its stand-ins are usable."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest
import torch
from click.testing import CliRunner
from transformers import AutoTokenizer, BertConfig, ViTConfig

from iisan_fast.benchmarks import stand_ins, uncached
from iisan_fast.benchmarks.harness import Setup
from iisan_fast.benchmarks.phase_profile import PHASES
from iisan_fast.benchmarks.settings import UncachedSettings
from iisan_fast.benchmarks.tables import NOT_MEASURED
from iisan_fast.cli import cli
from iisan_fast.data.images.dataset_images import open_images
from iisan_fast.data.sequences import load_dataset
from iisan_fast.encoders.loading import load_backbone
from iisan_fast.encoders.random_encoders import common_words
from iisan_fast.errors import InputError

pytestmark = pytest.mark.usefixtures("in_this_process")

CPU = torch.device("cpu")
SETTINGS = UncachedSettings(users=40, encoder_size="demo", steps=2)


def test_every_form_says_what_an_epoch_costs(catalogue, monkeypatch):
    class Watch(uncached.Stopwatch):
        def lap(self, stage: str) -> None:
            self.seconds[stage] = 3.0

    monkeypatch.setattr(uncached, "Stopwatch", Watch)
    result = uncached.compare_uncached(Setup(catalogue, CPU), SETTINGS)
    assert (result["steps_an_epoch"], result["steps_timed"], result["scaled"]) == (4, 2, True)
    assert result["catalogue"] == 70 and "179 s" in result["notes"]["paper"]
    absent, *rows = result["forms"]
    assert absent == {
        "form": "uncached, xformers",
        "epoch_s": NOT_MEASURED,
        "why": "it needs CUDA, found cpu",
    }
    assert [row["form"] for row in rows] == ["uncached, sdpa", "uncached, eager", "cached"]
    for row in rows:
        assert row["opening_s"] == 3 and row["epoch_s"] == 6  # twice the steps that were timed
        assert set(row["phases_ms"]) == set(PHASES) and row["peak_pss_bytes"] > 0
        assert row["peak_cuda_bytes"] == NOT_MEASURED
        assert (row["memory_bytes"]["frozen_weights"] > 100_000) == row["form"].startswith("uncached")
    sdpa, eager, cached = rows
    assert sdpa["loss"] == pytest.approx(eager["loss"], rel=1e-3)
    assert sdpa["parameters"]["trainable"] == cached["parameters"]["trainable"]  # states of the same shape


def test_the_command_times_whole_epochs_unless_told_otherwise(catalogue, tmp_path):
    out = tmp_path / "result.json"
    arguments = ["bench", "uncached", str(catalogue), "--users", "80", "--encoder-size", "demo", "--out", str(out)]
    answer = CliRunner().invoke(cli, [*arguments, "--device", "cpu"], catch_exceptions=False)
    assert answer.exit_code == 0 and "2 steps an epoch" in answer.output and "scaled" not in answer.output
    assert "uncached, sdpa" in answer.output and NOT_MEASURED in answer.output
    result = json.loads(out.read_text())
    assert (result["steps_an_epoch"], result["steps_timed"], result["scaled"]) == (2, 2, False)
    assert result["command"] == "iisan-fast bench uncached DATASET --users=80 --encoder-size=demo --seed=0"


def test_what_is_kept_is_a_dataset_and_two_encoders(catalogue, tmp_path):
    keep = tmp_path / "kept"
    data, views = stand_ins.stand_ins(catalogue, keep, "demo", seed=0)
    stand_in, original = load_dataset(data), load_dataset(catalogue)
    assert data == keep / "dataset" and stand_in.titles == original.titles
    assert stand_in.sequences.item_ids == original.sequences.item_ids
    with open_images(data) as images:
        first, second = (images.decode(images.content(item_id)) for item_id in stand_in.sequences.item_ids[:2])
        assert first.size == (32, 32) and first.tobytes() != second.tobytes()
        for view, content in zip(views, (first, stand_in.titles[0])):
            backbone = load_backbone(view)
            states = backbone.encode(backbone.prepare([content]))
            assert states.shape == (1, *stand_ins.state_shape("demo")) and states.isfinite().all()
    tokenizer = AutoTokenizer.from_pretrained(keep / "encoders" / "text")
    assert len(tokenizer(stand_in.titles[0]).input_ids) == len(stand_in.titles[0].split()) + 2
    assert tokenizer.unk_token_id not in tokenizer(stand_in.titles[0]).input_ids

    before = (keep / "made.json").stat().st_mtime_ns
    assert stand_ins.stand_ins(catalogue, keep, "demo", seed=0) == (data, views)
    assert (keep / "made.json").stat().st_mtime_ns == before
    with pytest.raises(InputError, match="'seed': 1}, found .*choose another folder"):
        stand_ins.stand_ins(catalogue, keep, "demo", seed=1)


def test_the_embedded_demo_stands_in_for_a_dataset(tmp_path):
    data, _ = stand_ins.stand_ins(None, tmp_path / "kept", "demo", seed=0)
    assert len(load_dataset(data).sequences.user_ids) == 1600


def test_base_is_the_published_encoders():
    """transformers' defaults are ViT-B/16 at 224 pixels and BERT-base."""
    for config, sizes in zip((ViTConfig(), BertConfig()), stand_ins.SHAPES["base"]):
        assert {name: getattr(config, name) for name in sizes} == sizes
    assert BertConfig().vocab_size == stand_ins.VOCABULARY
    assert stand_ins.state_shape("base") == (7, 768)


def test_the_most_frequent_words_come_first():
    assert common_words(["Oak, oak bench", "the Bench's oak"], 5 + 3) == ["oak", "bench", ","]


def test_what_cannot_be_measured_is_refused(catalogue, tmp_path):
    with pytest.raises(InputError, match="--users 161: expected at most 160"):
        uncached.compare_uncached(Setup(catalogue, CPU), replace(SETTINGS, users=161))
    for table in ("items.tsv", "users.tsv"):
        text = (catalogue / table).read_text()
        (catalogue / table).write_text(re.sub(r"\bi1\b", "../i1", text))
    with pytest.raises(InputError, match="cannot be a file's name"):
        stand_ins.stand_ins(catalogue, tmp_path / "kept", "demo", seed=0)
    assert not list(tmp_path.glob("*kept*"))
