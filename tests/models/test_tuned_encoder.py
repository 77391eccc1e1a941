"""Check pretrained encoders in training: gradients of split batches against whole ones, and memory plans."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from helpers.encoders import IMAGE, TEXT, TITLES, pictures, save, view
from iisan_fast.encoders.base import Backbone
from iisan_fast.encoders.loading import load_backbone
from iisan_fast.errors import InputError
from iisan_fast.models.tuned_encoder import TunedItemEncoder
from iisan_fast.states.item_source import Chunks

pytestmark = pytest.mark.slow

METHODS = ("full", "adapter", "lora", "bitfit", "frozen")
ITEMS, D = 5, 8


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def encoder(tmp_path):
    """Load a family's tiny encoder, which no other test has changed."""

    def load(kind: str, family: str, **settings) -> Backbone:
        folder = tmp_path / f"{kind}-{family}"
        if not folder.exists():
            build, second = (TEXT if kind == "title" else IMAGE)[family][:2]
            save(build(), folder, *((None, second) if kind == "title" else (second, None)))
        return load_backbone(view(folder, kind, max_tokens=12, **settings))

    return load


FAMILIES = [("title", family) for family in TEXT] + [("image", family) for family in IMAGE]


@pytest.mark.parametrize(("kind", "family"), FAMILIES)
def test_the_final_state_is_the_last_hidden_state_pooled_and_has_gradients(encoder, kind, family):
    backbone = encoder(kind, family, layers=(4,))
    inputs = backbone.prepare(TITLES if kind == "title" else pictures())
    final = backbone.final(inputs)
    if backbone.final_state == "normalised" or family in ("clip", "clip vision tower") and kind == "image":
        torch.testing.assert_close(final, backbone.encode(inputs)[:, -1])
    state = backbone.model(**backbone._taken(inputs)).last_hidden_state
    assert torch.equal(final, backbone._pool(state, inputs))
    embeddings = [p for name, p in backbone.model.named_parameters() if "embeddings" in name or "embed_tokens" in name]
    for parameter in embeddings:
        parameter.requires_grad_(True)
    backbone.final(inputs).sum().backward()
    assert any(parameter.grad is not None and parameter.grad.any() for parameter in embeddings)


def doubled(backbone: Backbone) -> Backbone:
    backbone.model.double()
    backbone.dtype = torch.float64
    return backbone


def whole(encoders: list[Backbone]) -> list[Chunks]:
    """Return the inputs of five items with a picture and a title."""
    images = [pictures()[i % 3] for i in range(ITEMS)]
    return [Chunks([encoders[0].prepare(images)]), Chunks([encoders[1].prepare(TITLES)])]


def split(encoders: list[Backbone]) -> list[Chunks]:
    """Return the inputs of the same items in parts: pictures in order, two at a time; titles by falling length."""
    images = [pictures()[i % 3] for i in range(ITEMS)]
    parts = [encoders[0].prepare(images[start : start + 2]) for start in range(0, ITEMS, 2)]
    longest_first = sorted(range(ITEMS), key=lambda item: -len(TITLES[item].split()))
    titles = [
        encoders[1].prepare([TITLES[item] for item in longest_first[start : start + 2]]) for start in range(0, ITEMS, 2)
    ]
    return [Chunks(parts), Chunks(titles, torch.tensor(longest_first).argsort())]


def in_batch_loss(vectors: Tensor) -> Tensor:
    """Compute a loss in which every item is a negative of every other, so that each part's gradient needs all parts."""
    scores = vectors @ vectors.flip(0).T
    return (scores.logsumexp(dim=1) - scores.diagonal()).mean()


def gradients(encoder: TunedItemEncoder, contents: list[Chunks]) -> tuple[Tensor, list[Tensor]]:
    parameters = [p for group in encoder.parameter_groups().values() for p in group]
    loss = in_batch_loss(encoder(contents))
    return loss, torch.autograd.grad(loss, parameters)


@pytest.mark.parametrize("method", METHODS)
def test_a_split_batch_has_the_gradients_of_the_whole_one(encoder, method):
    encoders = [doubled(encoder("image", "vit")), doubled(encoder("title", "bert", pooling="mean"))]
    tuned = TunedItemEncoder(encoders, method, D, bottleneck=5).double().train()
    loss, expected = gradients(tuned, whole(encoders))
    assert method == "frozen" or all(gradient.isfinite().all() for gradient in expected)
    for recompute in (False, True):
        tuned.recompute = recompute
        split_loss, parts = gradients(tuned, split(encoders))
        torch.testing.assert_close(split_loss, loss, rtol=1e-12, atol=1e-12)
        for gradient, exact in zip(parts, expected):
            torch.testing.assert_close(gradient, exact, rtol=1e-10, atol=1e-12)


def test_checkpointed_blocks_within_recomputed_parts(encoder):
    encoders = [doubled(encoder("image", "dinov2")), doubled(encoder("title", "mistral"))]
    plain = TunedItemEncoder(encoders, "full", D).double()
    loss, expected = gradients(plain, whole(encoders))
    both = TunedItemEncoder(encoders, "full", D, checkpointing=True).double()
    both.load_state_dict(plain.state_dict())
    both.recompute = True
    split_loss, parts = gradients(both, split(encoders))
    torch.testing.assert_close(split_loss, loss, rtol=1e-12, atol=1e-12)
    for gradient, exact in zip(parts, expected):
        torch.testing.assert_close(gradient, exact, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("method", ["full", "lora"])
def test_bfloat16_products_with_weights_in_float32(encoder, method, checkpointing):
    """The parts share the bfloat16 copies of the weights; a part that is computed again makes new ones."""
    encoders = [encoder("image", "vit"), encoder("title", "bert")]
    settings = {"checkpointing": checkpointing, "products": torch.bfloat16}
    tuned = TunedItemEncoder(encoders, method, D, **settings)
    products = []
    encoders[0].model.get_submodule("layers.0.mlp.fc1").register_forward_hook(
        lambda _module, _inputs, output: products.append(output.dtype)
    )
    vectors = tuned(whole(encoders))
    assert vectors.dtype == torch.float32 and set(products) == {torch.bfloat16}
    tuned.products = torch.float32
    exact, expected = gradients(tuned, whole(encoders))
    tuned.products = torch.bfloat16
    loss, first = gradients(tuned, split(encoders))
    tuned.recompute = True
    again, second = gradients(tuned, split(encoders))
    assert torch.equal(loss, again) and loss != exact
    torch.testing.assert_close(loss, exact, rtol=0.05, atol=0.05)
    assert all(torch.equal(a, b) and a.dtype == torch.float32 for a, b in zip(first, second))
    result = torch.cat([gradient.flatten() for gradient in first])
    reference = torch.cat([gradient.flatten() for gradient in expected])
    assert (result - reference).norm() <= 0.1 * reference.norm()


def test_encoders_have_no_dropout_in_training(encoder):
    encoders = [encoder("title", "bert")]
    assert encoders[0].model.config.hidden_dropout_prob > 0
    tuned = TunedItemEncoder(encoders, "full", D).train()
    contents = [Chunks([encoders[0].prepare(TITLES)])]
    assert tuned.training and torch.equal(tuned(contents), tuned(contents))


def test_groups_cover_what_is_trained_once(encoder):
    for method, names in {"full": ["encoders", "heads"], "lora": ["adapters", "heads"], "frozen": ["heads"]}.items():
        tuned = TunedItemEncoder([encoder("image", "vit"), encoder("title", "bert")], method, D)
        groups = tuned.parameter_groups()
        assert list(groups) == names
        grouped = [id(parameter) for group in groups.values() for parameter in group]
        assert sorted(grouped) == sorted(id(p) for p in tuned.parameters() if p.requires_grad)


def test_frozen_encoders_keep_no_activations(encoder):
    encoders = [encoder("title", "bert")]
    tuned = TunedItemEncoder(encoders, "frozen", D)
    plan = tuned.plan(lambda n: [encoders[0].prepare(["w1 w2 w3"] * n)], items=100, free=1_000_000)
    assert (plan.items_at_once, plan.recompute, plan.estimate) == (100, False, 0)


@pytest.mark.parametrize("products", [torch.float32, torch.bfloat16])
def test_a_plan_keeps_to_the_memory(encoder, products):
    encoders = [encoder("image", "vit"), encoder("title", "bert")]
    tuned = TunedItemEncoder(encoders, "full", D, products=products)
    trained = 3 * sum(p.nbytes for p in tuned.parameters() if p.requires_grad)

    def largest(items: int) -> list[dict[str, Tensor]]:
        return [encoders[0].prepare(pictures()[:1] * items), encoders[1].prepare(["w1 " * 40] * items)]

    whole = tuned.plan(largest, items=64, free=2**40)
    assert (whole.items_at_once, whole.recompute) == (64, False)
    assert tuned.plan(largest, items=64, free=whole.estimate + trained) == whole
    parts = tuned.plan(largest, items=64, free=whole.estimate // 10 + trained)
    assert parts.recompute and 1 <= parts.items_at_once < 64 and parts.estimate <= whole.estimate // 10
    with pytest.raises(InputError, match="one item's activations take"):
        tuned.plan(largest, items=64, free=trained + 1000)
    smaller = TunedItemEncoder(encoders, "full", D, checkpointing=True, products=products)
    assert smaller.plan(largest, items=64, free=2**40).estimate < 0.8 * whole.estimate
