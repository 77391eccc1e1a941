"""Check captioning: captions of images and frames are written into captions.tsv once, and no line is ever lost."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BertTokenizer,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipProcessor,
    CLIPVisionConfig,
    Gemma2Config,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PretrainedConfig,
    PreTrainedModel,
    TokenizersBackend,
)
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from helpers.command_line import iisan_fast, refused
from helpers.datasets import make_sequences, write_dataset_folder
from iisan_fast import demo
from iisan_fast.captioning import captions as captioning
from iisan_fast.captioning.caption_images import Covers, Frames, natural, problems, spread
from iisan_fast.captioning.caption_settings import CaptionSettings
from iisan_fast.captioning.captions import LOCK_FILE, Captioned, caption
from iisan_fast.config import ProtocolConfig, ViewConfig
from iisan_fast.data.images.dataset_images import open_images
from iisan_fast.data.sequences import load_dataset
from iisan_fast.encoders.captioner import Captioner
from iisan_fast.errors import InputError
from iisan_fast.files import locked
from iisan_fast.runtime import CUBLAS_VARIABLE
from iisan_fast.states.extraction import extract

CPU = torch.device("cpu")
ITEMS = 7
WORDS = [f"word{number}" for number in range(40)]
SHAPE = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
PIXELS = {"height": 16, "width": 16}
TEMPLATE = (
    "{% for message in messages %}user {% for part in message.content %}"
    "{% if part.type == 'image' %}<image> {% else %}{{ part.text }} {% endif %}{% endfor %}{% endfor %}assistant "
)


@pytest.fixture(scope="session")
def chat_model(tmp_path_factory) -> str:
    """Write a random LLaVA, which chats about any number of pictures."""
    return write_llava(tmp_path_factory.mktemp("chat"), LlamaConfig)


def write_llava(folder: Path, language: type[PretrainedConfig], **settings) -> str:
    """Write a random LLaVA around a language model of this configuration class."""
    words = ["<pad>", "<unk>", "<s>", "</s>", "<image>", "user", "assistant", *WORDS]
    backend = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    tokenizer = TokenizersBackend(tokenizer_object=backend, additional_special_tokens=["<image>"], **special)
    processor = LlavaProcessor(
        CLIPImageProcessorPil(size=PIXELS, crop_size=PIXELS),
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**SHAPE, image_size=16, patch_size=8),
        text_config=language(
            **SHAPE, **settings, vocab_size=len(words), pad_token_id=0, bos_token_id=2, eos_token_id=3
        ),
        image_token_index=4,
        image_seq_length=4,
    )
    return write_model(folder, LlavaForConditionalGeneration, config, processor)


@pytest.fixture(scope="session")
def plain_model(tmp_path_factory) -> str:
    """Write a random BLIP, which has no chat template and continues a prompt."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    tokenizer = BertTokenizer(vocab={word: number for number, word in enumerate(words)})
    processor = BlipProcessor(BlipImageProcessorPil(size=PIXELS), tokenizer)
    tokens = {"bos_token_id": 2, "sep_token_id": 3, "eos_token_id": 3, "pad_token_id": 0}
    config = BlipConfig(
        text_config={**SHAPE, **tokens, "vocab_size": len(words), "encoder_hidden_size": 16, "projection_dim": 16},
        vision_config={**SHAPE, "image_size": 16, "patch_size": 8, "projection_dim": 16},
        image_text_hidden_size=16,
    )
    return write_model(tmp_path_factory.mktemp("plain"), BlipForConditionalGeneration, config, processor)


def write_model(folder: Path, kind: type[PreTrainedModel], config, processor) -> str:
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = kind(config)
        for parameter in model.parameters():
            if parameter.dim() > 1:  # large enough for a random model to give each picture another caption
                parameter.normal_().mul_(2 * parameter[0].numel() ** -0.5)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def root(tmp_path) -> Path:
    """Write a dataset of seven items with images of noise; an eighth item is not in the catalogue."""
    root = write_dataset_folder(tmp_path / "d", make_sequences([list(range(1, ITEMS + 1))]))
    with (root / "items.tsv").open("a") as file:
        file.write("nobodys\tbought by nobody\n")
    (root / "images").mkdir()
    for number in range(1, ITEMS + 1):
        draw(number).save(root / "images" / f"i{number}.png")
    return root


@pytest.fixture
def frames(tmp_path) -> Path:
    """Write twelve frames for each item, but two for the third item."""
    for number in range(1, ITEMS + 1):
        folder = tmp_path / "frames" / f"i{number}"
        folder.mkdir(parents=True)
        for frame in range(2 if number == 3 else 12):
            draw(100 * number + frame).save(folder / f"frame{frame}.jpg")
    return tmp_path / "frames"


def draw(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (20, 24, 3), dtype=np.uint8))


class FakeCaptioner:
    """Caption an item by the first pixel of its pictures, which is fast."""

    said = 0
    fails_after = 1000

    def __init__(self, name: str, device, prompt, max_tokens: int, pictures: int, dtype: str, trusted: bool) -> None:
        self.settings = {"weights": f"of {name}", "prompt": prompt or "?", "max_tokens": max_tokens, "dtype": dtype}

    def captions(self, items: list[list[Image.Image]]) -> list[str]:
        FakeCaptioner.said += len(items)
        if FakeCaptioner.said > self.fails_after:
            raise KeyboardInterrupt
        return [f"it is {pictures[0].getpixel((0, 0))}" for pictures in items]

    def describe(self) -> dict:
        return self.settings


@pytest.fixture
def fake(monkeypatch) -> type[FakeCaptioner]:
    monkeypatch.setattr(captioning, "Captioner", FakeCaptioner)
    monkeypatch.setattr(FakeCaptioner, "said", 0)
    return FakeCaptioner


def run(root: Path, model: str = "a model", **options) -> Captioned:
    protocol, frames = options.pop("protocol", ProtocolConfig(max_inputs=10)), options.pop("frames", None)
    return caption(root, model, CPU, CaptionSettings(**{"batch_size": 3} | options), frames, protocol)


def lines(root: Path) -> dict[str, str]:
    return dict(line.split("\t") for line in (root / "captions.tsv").read_text().splitlines())


def test_the_workspace_of_cublas_is_set_before_the_model_is_loaded(root, fake, monkeypatch):
    monkeypatch.setenv(CUBLAS_VARIABLE, "")
    del os.environ[CUBLAS_VARIABLE]
    settings = []
    load = FakeCaptioner.__init__

    def noting(self, *arguments) -> None:
        settings.append(os.environ.get(CUBLAS_VARIABLE))
        load(self, *arguments)

    monkeypatch.setattr(FakeCaptioner, "__init__", noting)
    run(root)
    assert settings == [":4096:8"]


def test_every_item_of_the_catalogue_gets_a_line(root, chat_model):
    assert run(root, chat_model, max_tokens=12) == Captioned(ITEMS, present=0, captioned=ITEMS, skipped=0, empty=0)
    captions = lines(root)
    assert list(captions) == [f"i{number}" for number in range(1, ITEMS + 1)]
    assert len(set(captions.values())) == ITEMS
    assert all(1 <= len(text.split(" ")) <= 12 and not text.startswith("user assistant") for text in captions.values())
    record = json.loads((root / "captions.json").read_text())
    assert record["model"] == chat_model and record["settings"]["prompt"].startswith("Describe")
    assert record["settings"]["max_tokens"] == 12 and record["settings"]["dtype"] == "float32"
    assert run(root, chat_model, max_tokens=12) == Captioned(ITEMS, present=ITEMS, captioned=0, skipped=0, empty=0)


@pytest.mark.parametrize("source", ["images", "frames"])
def test_a_caption_does_not_depend_on_its_batch(root, frames, chat_model, source):
    """The third item has two frames, so it is padded in a batch with items of four."""
    options = {"frames": frames} if source == "frames" else {}
    captions_by_batch_size = []
    for batch_size in (1, 3, ITEMS):
        (root / "captions.tsv").unlink(missing_ok=True)
        run(root, chat_model, batch_size=batch_size, **options)
        captions_by_batch_size.append(lines(root))
    assert captions_by_batch_size[0] == captions_by_batch_size[1] == captions_by_batch_size[2]


def test_frames_are_read_in_place_of_images(root, frames, chat_model):
    run(root, chat_model)
    of_images = lines(root)
    (root / "captions.tsv").unlink()
    shutil.rmtree(root / "images")
    run(root, chat_model, frames=frames)
    assert all(lines(root)[item_id] != text for item_id, text in of_images.items())


def test_a_model_without_a_chat_template_continues_the_prompt(root, frames, plain_model):
    run(root, plain_model, max_tokens=8)
    unprompted = lines(root)
    assert len(set(unprompted.values())) > 1
    (root / "captions.tsv").unlink()
    run(root, plain_model, max_tokens=8, prompt="word1 word2")
    assert lines(root) != unprompted and not any(text.startswith("word1 word2") for text in lines(root).values())
    with pytest.raises(InputError, match="no chat template, so it reads one picture; choose frames_per_item: 1"):
        run(root, plain_model, frames=frames)


def test_captions_become_the_text_of_a_view(root, chat_model, tmp_path):
    run(root, chat_model)
    dataset = load_dataset(root)
    assert dataset.captions == list(lines(root).values())
    demo.write_text_encoder(tmp_path / "encoder", 0)
    view = ViewConfig("caption", "caption", str(tmp_path / "encoder"))
    (result,) = extract(dataset, [view], tmp_path / "cache", CPU)
    assert result.encoded == ITEMS


def test_two_runs_do_not_write_at_once(root, fake):
    with (
        locked(root / LOCK_FILE, "busy"),
        pytest.raises(InputError, match="another process is captioning this dataset"),
    ):
        run(root)
    assert not (root / "captions.tsv").exists()
    assert run(root).captioned == ITEMS


def test_nothing_is_left_in_a_folder_that_is_no_dataset(tmp_path, fake):
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(InputError, match="no such dataset; expected a folder with items.tsv and users.tsv"):
            run(folder)
    assert not list(tmp_path.iterdir())


def test_a_stopped_run_keeps_its_batches_and_goes_on(root, fake, monkeypatch):
    monkeypatch.setattr(fake, "fails_after", 3)
    with pytest.raises(KeyboardInterrupt):
        run(root)
    assert list(lines(root)) == ["i1", "i2", "i3"]
    monkeypatch.setattr(fake, "fails_after", 1000)
    assert run(root) == Captioned(ITEMS, present=3, captioned=4, skipped=0, empty=0)
    assert len(lines(root)) == ITEMS


@pytest.mark.parametrize("left", range(0, 60, 7))
def test_a_line_torn_at_any_byte_is_made_again(root, fake, left):
    run(root)
    whole = (root / "captions.tsv").read_bytes()
    (root / "captions.tsv").write_bytes(whole[:left])
    whole_lines = whole[:left].count(b"\n")
    assert run(root) == Captioned(ITEMS, present=whole_lines, captioned=ITEMS - whole_lines, skipped=0, empty=0)
    assert (root / "captions.tsv").read_bytes() == whole


@pytest.mark.parametrize("record", ["{}", '{"settings": []}', '{"settings": null}', "[", '{"settings": {"a": NaN}}'])
def test_a_record_of_another_kind_is_refused(root, fake, record):
    run(root)
    (root / "captions.json").write_text(record)
    with pytest.raises(InputError, match=r"captions.json: not (a record of captions|valid JSON)"):
        run(root)


@pytest.mark.parametrize("name", ["captions.tsv", "captions.json"])
def test_a_link_that_leads_nowhere_does_not_stand_for_no_captions(root, fake, name):
    run(root)
    (root / name).unlink()
    (root / name).symlink_to("gone")
    with pytest.raises(InputError, match=name):
        run(root)
    assert (root / name).is_symlink()


@pytest.mark.parametrize("end", ["\n", ""])
def test_captions_made_by_hand_stay_as_they_are(root, fake, caplog, end):
    written = f"i5\tR&amp;D,  by  hand\ni2\tthe second{end}"
    (root / "captions.tsv").write_text(written)
    with caplog.at_level("INFO"):
        assert run(root) == Captioned(ITEMS, present=2, captioned=5, skipped=0, empty=0)
    assert (root / "captions.tsv").read_text().startswith(written.removesuffix("\n") + "\ni1\t")
    assert caplog.text.count("not made by this command: its 2 captions stay") == 1
    assert json.loads((root / "captions.json").read_text())["captions_before"] == 2
    with pytest.raises(InputError, match="made with other settings, by a model"):
        run(root, "another")


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"model": "another"}, 'weights "of a model" there, "of another" now'),
        ({"prompt": "what?"}, r'prompt "\?" there, "what\?" now'),
        ({"max_tokens": 5}, "max_tokens 64 there, 5 now"),
        ({"frames_per_item": 2}, "frames_per_item null there, 2 now"),
    ],
)
def test_other_settings_are_refused_and_named(root, frames, fake, changed, said):
    run(root)
    before = (root / "captions.tsv").read_bytes()
    options = {"frames": frames} if "frames_per_item" in changed else {}
    with pytest.raises(InputError, match=f"made with other settings, by a model: {said}; restore"):
        run(root, **changed, **options)
    assert (root / "captions.tsv").read_bytes() == before
    (root / "captions.tsv").unlink()
    assert run(root, **changed, **options).captioned == ITEMS


def test_a_model_may_lie_elsewhere(root, chat_model, tmp_path):
    run(root, chat_model)
    shutil.copytree(chat_model, tmp_path / "copy")
    assert run(root, str(tmp_path / "copy")).captioned == 0


def test_bad_images_are_named_before_a_caption_is_made_or_skipped(root, fake, caplog):
    (root / "images" / "i2.png").unlink()
    (root / "images" / "i6.png").write_bytes(b"no image at all")
    with pytest.raises(InputError) as error:
        run(root)
    assert "2 of 7 items to caption: i2 (no image), i6 (not an image" in str(error.value)
    assert "missing_images: skip" in str(error.value) and not (root / "captions.tsv").exists() and not fake.said
    assert run(root, missing_images="skip") == Captioned(ITEMS, present=0, captioned=5, skipped=2, empty=0)
    assert "i2 (no image)" in caplog.text and "i2" not in lines(root)
    draw(2).save(root / "images" / "i2.png")
    assert run(root, missing_images="skip") == Captioned(ITEMS, present=5, captioned=1, skipped=1, empty=0)


def test_bad_frames_are_named(root, frames, fake):
    shutil.rmtree(frames / "i1")
    for file in (frames / "i3").iterdir():
        file.unlink()
    (frames / "i4" / "frame1.jpg").write_bytes(b"")
    with pytest.raises(InputError) as error:
        run(root, frames=frames)
    for said in ("i1 (no folder of frames)", "i3 (no frames in its folder)", "i4 (frame1.jpg: not an image"):
        assert said in str(error.value)
    with pytest.raises(InputError, match="nowhere: no such folder"):
        run(root, frames=frames / "nowhere")


def test_empty_captions_are_left_out_and_counted(root, fake, monkeypatch, caplog):
    monkeypatch.setattr(fake, "captions", lambda self, items: ["" for _ in items])
    assert run(root) == Captioned(ITEMS, present=0, captioned=0, skipped=0, empty=ITEMS)
    assert "an empty caption, left out, for 7 items: i1, i2, i3 and 4 more" in caplog.text
    assert load_dataset(root).captions == [None] * ITEMS


def test_memory_that_does_not_suffice_says_what_to_lower(root, fake, monkeypatch):
    def fail(*_):
        raise torch.OutOfMemoryError("too much")

    monkeypatch.setattr(fake, "captions", fail)
    with pytest.raises(InputError, match="not enough GPU memory for 3 items at a time; lower batch_size"):
        run(root)


def test_a_caption_is_one_line(chat_model, monkeypatch):
    captioner = Captioner(chat_model, CPU, None, 5, 1, "auto")
    monkeypatch.setattr(captioner.processor, "batch_decode", lambda *_, **__: [" a\tcup \n of\r\n\ttea "])
    monkeypatch.setattr(captioner, "_inputs", lambda items: {})
    monkeypatch.setattr(captioner.model, "generate", lambda **_: None)
    assert captioner.captions([[draw(1)]]) == ["a cup of tea"]


def test_a_language_model_with_capped_scores_keeps_its_cap(tmp_path):
    """With transformers 5.17 PyTorch's attention would drop the cap."""
    settings = {"num_key_value_heads": 2, "head_dim": 8, "query_pre_attn_scalar": 8, "attn_logit_softcapping": 0.5}
    folder = write_llava(tmp_path / "capped", Gemma2Config, **settings)
    captioner = Captioner(folder, CPU, None, 8, 1, "float32")
    assert captioner.model.model.language_model.config._attn_implementation == "eager"
    pictures = [[draw(seed)] for seed in range(4)]
    captions = captioner.captions(pictures)
    captioner.model.set_attn_implementation("eager")
    assert captioner.captions(pictures) == captions


def test_frames_are_spread_evenly_in_natural_order(frames):
    assert spread("abcdefghijkl", 4) == list("behk") and spread("abc", 4) == list("abc") and spread("abc", 1) == ["b"]
    assert sorted(["f10.jpg", "f9.jpg", "f1.jpg", "a.jpg", "7.jpg"], key=natural) == [
        "7.jpg",
        "a.jpg",
        "f1.jpg",
        "f9.jpg",
        "f10.jpg",
    ]
    shown = Frames(frames, 1).read("i2")
    assert [picture.tobytes() for picture in shown] == [Image.open(frames / "i2" / "frame6.jpg").tobytes()]


def test_models_that_cannot_caption_are_refused_in_a_line(root, chat_model, tmp_path, monkeypatch):
    demo.write_text_encoder(tmp_path / "bert", 0)
    assert "bert reads no images and a prompt" in refused("caption", root, "--model", tmp_path / "bert")
    assert "no such folder; expected an image-text-to-text" in refused("caption", root, "--model", tmp_path / "no")
    assert "cannot be used as an image-text-to-text model" in refused("caption", root, "--model", "owner/unheard-of")
    broken = shutil.copytree(chat_model, tmp_path / "broken")
    weights = load_file(broken / "model.safetensors")
    weights.pop(next(name for name in weights if "q_proj" in name))
    save_file(weights, broken / "model.safetensors", {"format": "pt"})
    assert "lacks 1 weights" in refused("caption", root, "--model", broken)
    assert not (root / "captions.tsv").exists()


@pytest.mark.parametrize("source", ["images", "frames"])
def test_pictures_may_be_looked_through_in_another_process(root, frames, source):
    pictures = Frames(frames, 4) if source == "frames" else Covers(open_images(root))
    look = pickle.loads(pickle.dumps(partial(problems, pictures)))
    assert look(["i1", "nobodys"]) == ["", "no folder of frames" if source == "frames" else "no image"]


def test_the_command_prints_counts(root, frames, chat_model):
    arguments = ("--model", chat_model, "--frames", frames, "--frames-per-item", 2, "--max-tokens", 4)
    assert "[default: 64" in iisan_fast("caption", "--help").stdout
    result = iisan_fast("caption", root, *arguments, "--json", "--device", "cpu")
    assert json.loads(result.stdout) == {"items": 7, "present": 0, "captioned": 7, "skipped": 0, "empty": 0}
    assert "present" in iisan_fast("caption", root, *arguments, "--device", "cpu").stdout
    assert "another" in refused("caption", root, *arguments, "--prompt", "another", "--device", "cpu")


def test_own_code_of_a_captioner_is_refused_unless_it_is_asked_for(plain_model, tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    code = "from transformers import BlipForConditionalGeneration\nclass Own(BlipForConditionalGeneration):\n    pass\n"
    folder = shutil.copytree(plain_model, tmp_path / "own")
    (folder / "own_blip.py").write_text(code)
    config = json.loads((folder / "config.json").read_text())
    auto_map = {"AutoModelForImageTextToText": "own_blip.Own"}
    (folder / "config.json").write_text(json.dumps(config | {"auto_map": auto_map}))
    with pytest.raises(InputError, match="auto_map names own_blip.Own for AutoModelForImageTextToText"):
        Captioner(str(folder), CPU, None, 5, 1, "float32")
    captioner = Captioner(str(folder), CPU, None, 5, 1, "float32", trusted=True)
    plain = Captioner(plain_model, CPU, None, 5, 1, "float32")
    assert type(captioner.model).__name__ == "Own"
    described = captioner.describe()
    assert described["trust_remote_code"] is True
    assert {name for name in described if described[name] != plain.describe().get(name)} == {
        *("weights", "trust_remote_code", "code")
    }
