"""Check the reference of the training step against sums by hand, PyTorch's modules and published model sizes."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from torch import Tensor, nn

from helpers.reference_step import (
    Dropout,
    Parameters,
    ReferenceSettings,
    attention,
    hashed,
    inter_tower,
    item_vectors,
    padded_slots,
    reference_loss,
    sequence_states,
)

Shape = tuple[int, int]


def step_shapes(
    settings: ReferenceSettings, first: Shape, second: Shape | None, bottleneck: int
) -> dict[str, tuple[int, ...]]:
    """Return the name and shape of every parameter of a model on views of shape (K, D)."""
    shapes = {}
    towers = {"first": first} if settings.intra else {}
    if second is not None and settings.intra:
        towers["second"] = second
    if second is not None and settings.inter:
        towers["inter"] = (min(first[0], second[0]), min(first[1], second[1]))
        if first[1] != second[1]:
            layers, width = towers["inter"]
            shapes["side_network.align_weight"] = (layers, width, max(first[1], second[1]))
            shapes["side_network.align_bias"] = (layers, width)
    for name, tower in towers.items():
        shapes |= tower_shapes(settings, name, *tower, bottleneck)
    shapes |= linear_shapes("heads.fusion", settings.embedding_dim, len(towers) * settings.embedding_dim)
    return shapes | sequence_encoder_shapes(settings)


def tower_shapes(
    settings: ReferenceSettings, name: str, layers: int, width: int, bottleneck: int
) -> dict[str, tuple[int, ...]]:
    tower = f"side_network.{name}"
    shapes = {
        f"{tower}.down_weight": (layers, bottleneck, width),
        f"{tower}.down_bias": (layers, bottleneck),
        f"{tower}.up_weight": (layers, width, bottleneck),
        f"{tower}.up_bias": (layers, width),
    }
    if settings.gates:
        shapes[f"{tower}.gate"] = (layers,)
    inner = settings.embedding_dim if settings.method == "iisan-versa" and name != "inter" else width
    shapes |= linear_shapes(f"heads.{name}.0", inner, width)
    return shapes | linear_shapes(f"heads.{name}.1", settings.embedding_dim, inner)


def sequence_encoder_shapes(settings: ReferenceSettings) -> dict[str, tuple[int, ...]]:
    dim = settings.embedding_dim
    shapes = {"sequence_encoder.position": (settings.max_inputs, dim)} | norm_shapes("sequence_encoder.norm", dim)
    for block in range(settings.blocks):
        name = f"sequence_encoder.blocks.{block}"
        shapes |= {f"{name}.{part}.weight": (dim, dim) for part in ("query", "key", "value", "output")}
        shapes |= linear_shapes(f"{name}.feed_in", 4 * dim, dim) | linear_shapes(f"{name}.feed_out", dim, 4 * dim)
        shapes |= norm_shapes(f"{name}.attention_norm", dim) | norm_shapes(f"{name}.feed_norm", dim)
    return shapes


def linear_shapes(name: str, rows: int, columns: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}


def norm_shapes(name: str, width: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def random_parameters(shapes: dict[str, tuple[int, ...]]) -> Parameters:
    generator = torch.Generator().manual_seed(0)
    return {
        name: (torch.randn(shape, generator=generator, dtype=torch.float64) / 3).requires_grad_()
        for name, shape in shapes.items()
    }


def random_view(items: int, layers: int, width: int, seed: int) -> Tensor:
    """Return hidden states of a catalogue, [items + 1, layers, width], with zeros in row 0."""
    generator = torch.Generator().manual_seed(seed)
    view = torch.randn(items + 1, layers, width, generator=generator, dtype=torch.float64)
    view[0] = 0
    return view


def tensors(**values: list) -> Parameters:
    """Return parameters by name; `__` stands for a dot."""
    return {name.replace("__", "."): torch.tensor(value, dtype=torch.float64) for name, value in values.items()}


SEQUENCES, USERS = [[1, 2], [3, 2, 3, 5], [4, 6, 1, 7]], [17, 0, 12075]
POPULARITY = torch.tensor([0, 0.2, 0.2, 0.2, 0.1, 0.1, 0.1, 0.1], dtype=torch.float64)


# ---- the whole step ----------------------------------------------------------------------------------------


def test_published_parameter_counts():
    """The names and shapes in these tests are those of models of the published sizes."""

    def count(method: str, view: Shape) -> int:
        settings = ReferenceSettings(embedding_dim=64, method=method)
        return sum(math.prod(shape) for shape in step_shapes(settings, view, view, bottleneck=64).values())

    assert count("iisan", (7, 768)) == 4_113_877
    assert count("iisan-versa", (4, 384)) == 937_868


def test_loss_of_two_users_by_hand():
    """Towers that pass an item's state on, no blocks: q is the normalised input, 1 or -1 in each coordinate.

    Of [1, 2] the one row keeps its target and both slots of item 3. Of [3, 2, 3] each row keeps its target
    and item 1: item 2 of the other user and the other slot of item 3 are masked.
    """
    settings = ReferenceSettings(embedding_dim=2, max_inputs=3, blocks=0, dropout=0.0)
    items = torch.tensor([[0, 0], [1, 3], [2, 0], [0, 1]], dtype=torch.float64)
    identity = [[1.0, 0.0], [0.0, 1.0]]
    parameters = tensors(
        side_network__first__gate=[0.0],
        side_network__first__down_weight=[[[0.0, 0.0]]],
        side_network__first__down_bias=[[0.0]],
        side_network__first__up_weight=[[[0.0], [0.0]]],
        side_network__first__up_bias=[[0.0, 0.0]],
        sequence_encoder__position=[[0.0, 0.0]] * 3,
        sequence_encoder__norm__weight=[1.0, 1.0],
        sequence_encoder__norm__bias=[0.0, 0.0],
    )
    for head in ("heads.first.0", "heads.first.1", "heads.fusion"):
        parameters |= {
            f"{head}.weight": torch.tensor(identity).double(),
            f"{head}.bias": torch.zeros(2).double(),
        }
    halved_by_the_gate = 2 * items.unsqueeze(1)
    popularity = torch.tensor([0, 0.2, 0.6, 0.2], dtype=torch.float64)
    batch = [[1, 2], [3, 2, 3]], [0, 1]

    loss = reference_loss(parameters, settings, halved_by_the_gate, None, *batch, popularity, step=0)

    def cross_entropy(target: float, *negatives: float) -> float:
        return math.log(sum(map(math.exp, (target, *negatives)))) - target

    log_p1 = log_p3 = math.log(0.2)
    log_p2 = math.log(0.6)
    rows = [
        cross_entropy(-2 - log_p2, 1 - log_p3, 1 - log_p3),  # after item 1, q = (-1, 1): item 2, against 3 and 3
        cross_entropy(-2 - log_p2, 2 - log_p1),  # after item 3, q = (-1, 1): item 2, against 1
        cross_entropy(-1 - log_p3, -2 - log_p1),  # after item 2, q = (1, -1): item 3, against 1
    ]
    assert loss.item() == pytest.approx(sum(rows) / 3, abs=1e-5)


@pytest.mark.parametrize(
    "first, second, options",
    [
        ((3, 6), (3, 6), {}),
        ((3, 6), None, {}),
        ((3, 6), None, {"method": "iisan-versa", "gates": False}),
        ((2, 6), (4, 5), {"method": "iisan-versa", "activation": "gelu"}),
        ((4, 5), (2, 6), {"method": "iisan-versa"}),
        ((3, 6), (3, 6), {"intra": False}),
        ((3, 6), (3, 6), {"inter": False}),
        ((3, 6), (3, 6), {"gates": False}),
    ],
)
def test_gradients_of_every_parameter_agree_with_differences(first: Shape, second: Shape | None, options: dict):
    settings = ReferenceSettings(embedding_dim=8, max_inputs=4, **options)
    parameters = random_parameters(step_shapes(settings, first, second, bottleneck=3))
    views = [None if shape is None else random_view(7, *shape, seed) for seed, shape in enumerate((first, second))]

    def loss() -> Tensor:
        return reference_loss(parameters, settings, *views, SEQUENCES, USERS, POPULARITY, step=5)

    loss().backward()
    assert all(parameter.grad.count_nonzero() for parameter in parameters.values())
    for parameter in parameters.values():
        direction = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        sides = []
        for sign in (1, -1):
            with torch.no_grad():
                parameter += sign * 1e-6 * direction
                sides.append(loss().item())
                parameter -= sign * 1e-6 * direction
        expected = (sides[0] - sides[1]) / 2e-6
        assert (parameter.grad * direction).sum().item() == pytest.approx(expected, rel=1e-5, abs=1e-8)


def test_padding_has_no_influence():
    """Neither the loss nor any gradient depends on the content of row 0."""
    settings = ReferenceSettings(embedding_dim=8, max_inputs=6)
    parameters = random_parameters(step_shapes(settings, (3, 6), (3, 6), bottleneck=3))
    views = [random_view(7, 3, 6, seed) for seed in (0, 1)]
    results = []
    for padding in (0.0, 100.0):
        for view in views:
            view[0] = padding
        loss = reference_loss(parameters, settings, *views, SEQUENCES, USERS, POPULARITY, step=5)
        results.append((loss, *torch.autograd.grad(loss, list(parameters.values()))))
    assert all(torch.allclose(first, second, rtol=1e-13, atol=1e-15) for first, second in zip(*results))


def test_the_order_of_users_has_no_influence_with_dropout_on():
    settings = ReferenceSettings(embedding_dim=8, max_inputs=4, dropout=0.5)
    parameters = random_parameters(step_shapes(settings, (3, 6), None, bottleneck=3))
    view = random_view(7, 3, 6, seed=0)

    def loss(order: list[int], step: int = 5) -> float:
        batch = [SEQUENCES[i] for i in order], [USERS[i] for i in order]
        return reference_loss(parameters, settings, view, None, *batch, POPULARITY, step).item()

    assert loss([2, 0, 1]) == pytest.approx(loss([0, 1, 2]), rel=1e-14)
    assert loss([0, 1, 2], step=6) != pytest.approx(loss([0, 1, 2]), rel=1e-4)


def test_sequences_stand_at_the_right_end_and_must_fit():
    assert padded_slots([7, 9], max_inputs=3) == [0, 0, 7, 9]
    for sequence in ([7], [1, 2, 3, 4, 5]):
        with pytest.raises(ValueError, match="2 to 4 items"):
            padded_slots(sequence, max_inputs=3)


# ---- side network ------------------------------------------------------------------------------------------


def test_towers_by_hand():
    """The first view has width 2 and one layer; the second has width 1 and two layers, of which the last is paired."""
    settings = ReferenceSettings(embedding_dim=1, method="iisan-versa")
    three_quarters = 0.1 * math.log(3)
    parameters = tensors(
        side_network__first__gate=[0.0],
        side_network__first__down_weight=[[[1.0, 1.0]]],
        side_network__first__down_bias=[[0.0]],
        side_network__first__up_weight=[[[1.0], [2.0]]],
        side_network__first__up_bias=[[0.0, 1.0]],
        side_network__second__gate=[0.0, three_quarters],
        side_network__second__down_weight=[[[1.0]], [[-1.0]]],
        side_network__second__down_bias=[[-0.5], [1.0]],
        side_network__second__up_weight=[[[2.0]], [[5.0]]],
        side_network__second__up_bias=[[0.25], [0.0]],
        side_network__inter__gate=[three_quarters],
        side_network__inter__down_weight=[[[1.0]]],
        side_network__inter__down_bias=[[0.0]],
        side_network__inter__up_weight=[[[1.0]]],
        side_network__inter__up_bias=[[0.0]],
        side_network__align_weight=[[[1.0, -1.0]]],
        side_network__align_bias=[[4.0]],
        heads__first__0__weight=[[1.0, 10.0]],
        heads__first__0__bias=[0.0],
        heads__fusion__weight=[[1.0, 100.0, 10000.0]],
        heads__fusion__bias=[0.5],
    )
    for name in ("first.1", "second.0", "second.1", "inter.0", "inter.1"):
        parameters |= tensors(**{f"heads__{name}__weight": [[2.0]], f"heads__{name}__bias": [1.0]})
    first = torch.tensor([[[2.0, 4.0]]], dtype=torch.float64)
    second = torch.tensor([[[2.0], [4.0]]], dtype=torch.float64)

    first_tower = (1 + 3, 2 + 2 * 3 + 1)  # x = (1, 2), down 3
    bottom = 1 + 2 * 0.5 + 0.25  # x = 1, down 0.5
    second_tower = 0.75 * 4 + 0.25 * bottom  # down 1 - 3.5625, cut off by the activation
    inter = 2 * (0.75 * (2 - 4 + 4) + 0.25 * 4)  # doubled by its block
    heads = [2 * (first_tower[0] + 10 * first_tower[1]) + 1, 4 * second_tower + 3, 4 * inter + 3]
    expected = heads[0] + 100 * heads[1] + 10000 * heads[2] + 0.5
    assert item_vectors(parameters, settings, [first, second]).item() == pytest.approx(expected, rel=1e-12)


def test_inter_tower_carries_its_state_by_hand():
    """Two layers of width 1 with GELU: gelu(1) = 0.841345, gelu(-1) = -0.158655."""
    settings = ReferenceSettings(embedding_dim=1, activation="gelu")
    parameters = tensors(
        side_network__inter__gate=[0.0, 0.1 * math.log(3)],
        side_network__inter__down_weight=[[[1.0]], [[0.0]]],
        side_network__inter__down_bias=[[-2.0], [-1.0]],
        side_network__inter__up_weight=[[[1.0]], [[2.0]]],
        side_network__inter__up_bias=[[0.0], [0.0]],
    )
    first = torch.tensor([[[2.0], [1.0]]], dtype=torch.float64)
    second = torch.tensor([[[4.0], [5.0]]], dtype=torch.float64)
    after_one = (0.5 * 2 + 0.5 * 4) + 0.841345
    after_two = after_one + (0.75 * 1 + 0.25 * 5) + 2 * -0.158655
    assert inter_tower(parameters, settings, first, second).item() == pytest.approx(after_two, abs=1e-5)


def test_towers_without_gates_are_plain_sums():
    settings = ReferenceSettings(embedding_dim=4, gates=False, intra=False)
    parameters = random_parameters(step_shapes(settings, (1, 4), (1, 4), bottleneck=3))
    first, second = random_view(2, 1, 4, seed=0), random_view(2, 1, 4, seed=1)
    swapped = item_vectors(parameters, settings, [second, first])
    in_one = item_vectors(parameters, settings, [first + second, torch.zeros_like(second)])
    assert torch.allclose(item_vectors(parameters, settings, [first, second]), swapped, rtol=1e-12)
    assert torch.allclose(in_one, swapped, rtol=1e-12)


def test_heads_of_the_other_method_are_refused():
    settings = ReferenceSettings(embedding_dim=4, method="iisan-versa")
    parameters = random_parameters(step_shapes(settings, (1, 6), None, bottleneck=3))
    with pytest.raises(ValueError, match=r"heads\.first\.0 of iisan must give 6 coordinates, not 4"):
        item_vectors(parameters, ReferenceSettings(embedding_dim=4), [random_view(2, 1, 6, seed=0)])


# ---- sequence encoder --------------------------------------------------------------------------------------


def test_sequence_encoder_is_torchs_without_dropout_and_padding():
    settings = ReferenceSettings(embedding_dim=8, max_inputs=5, dropout=0.0)
    parameters = random_parameters(sequence_encoder_shapes(settings))
    vectors = random_view(4, 1, 8, seed=0)[:, 0]
    name = "sequence_encoder"
    norm = [parameters[f"{name}.norm.{part}"] for part in ("weight", "bias")]
    causal = nn.Transformer.generate_square_subsequent_mask(5).double()
    x = nn.functional.layer_norm(vectors + parameters[f"{name}.position"], (8,), *norm, eps=1e-6).unsqueeze(0)
    for block in range(settings.blocks):
        x = torch_block(parameters, f"{name}.blocks.{block}")(x, causal)
    states = sequence_states(parameters, settings, vectors, [3, 1, 4, 1, 5], Dropout(settings, 0, 0))
    assert torch.allclose(states, x[0], rtol=1e-10)


def torch_block(parameters: Parameters, name: str) -> nn.TransformerEncoderLayer:
    layer = nn.TransformerEncoderLayer(
        8,
        nhead=2,
        dim_feedforward=32,
        dropout=0.0,
        layer_norm_eps=1e-6,
        batch_first=True,
        dtype=torch.float64,
    )
    names = {
        "self_attn.out_proj.weight": "output.weight",
        **{f"{theirs}.{part}": f"{ours}.{part}" for theirs, ours in TORCH_NAMES.items() for part in ("weight", "bias")},
    }
    state = {theirs: parameters[f"{name}.{ours}"].detach() for theirs, ours in names.items()}
    projections = [parameters[f"{name}.{part}.weight"].detach() for part in ("query", "key", "value")]
    state["self_attn.in_proj_weight"] = torch.cat(projections)
    state["self_attn.in_proj_bias"], state["self_attn.out_proj.bias"] = torch.zeros(24), torch.zeros(8)
    layer.load_state_dict(state)
    return layer


TORCH_NAMES = {"linear1": "feed_in", "linear2": "feed_out", "norm1": "attention_norm", "norm2": "feed_norm"}


def test_a_prefix_ignores_what_follows_and_what_pads_it():
    settings = ReferenceSettings(embedding_dim=8, max_inputs=5, dropout=0.3)
    parameters = random_parameters(sequence_encoder_shapes(settings))
    vectors = random_view(4, 1, 8, seed=0)[:, 0]
    dropout = Dropout(settings, 3, 8)
    states = sequence_states(parameters, settings, vectors, [0, 0, 4, 1, 5], dropout)
    vectors[[0, 1, 4]] *= -1
    changed = sequence_states(parameters, settings, vectors, [0, 0, 4, 1, 5], dropout)
    assert torch.equal(states[2:4], changed[2:4])
    assert not torch.allclose(states[4], changed[4])


def test_dropout_falls_on_the_attention_weights_after_the_softmax():
    """Equal scores and one-hot values make the weights visible: 1 / visible slots, dropped or scaled."""
    settings = ReferenceSettings(embedding_dim=6, max_inputs=3, dropout=0.5, seed=1)
    zero = torch.zeros(6, 6)
    identity = torch.eye(6)
    parameters = {f"block.{part}.weight": zero for part in ("query", "key")}
    parameters |= {f"block.{part}.weight": identity for part in ("value", "output")}
    dropout = Dropout(settings, step=2, user=4)
    weights = attention(parameters, settings, "block", torch.eye(3).repeat(1, 2), [0, 8, 9], dropout, site=4)
    for query, head, key in product((1, 2), (0, 1), (0, 1, 2)):
        is_kept = hashed(1, 2, 4, 4, query, head * 3 + key) >= 2**31
        expected = 2 / query if is_kept and 1 <= key <= query else 0
        assert weights[query, head * 3 + key].item() == pytest.approx(expected)


def test_dropout_falls_on_the_input_and_on_both_residual_branches():
    """At a rate of one half, a branch of ones becomes 0 or 2, by the hash of its site."""
    settings = ReferenceSettings(embedding_dim=4, max_inputs=2, blocks=2, dropout=0.5, seed=9)
    drawn = []

    class Recorded(Dropout):
        def __call__(self, x: Tensor, site: int) -> Tensor:
            dropped = super().__call__(torch.ones_like(x), site)
            drawn.append((site, dropped))
            return x * dropped

    parameters = random_parameters(sequence_encoder_shapes(settings))
    sequence_states(parameters, settings, torch.ones(2, 4).double(), [1, 2], Recorded(settings, step=7, user=3))
    assert [site for site, _ in drawn] == [0, 2, 3, 5, 6]
    for site, dropped in drawn:
        for slot, channel in product(range(2), range(4)):
            is_kept = hashed(9, 7, site, 3, slot, channel) >= 2**31
            assert dropped[slot, channel].item() == (2.0 if is_kept else 0.0)


# ---- stateless dropout -------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed, value", [(0, 0x92ACC3D8), (1, 0xCE5A5007), (123456789, 0xA1A41300)])
def test_hash_is_that_of_unsigned_32_bit_arithmetic(seed: int, value: int):
    """A C program with uint32_t has computed the values."""
    assert hashed(seed, 3, 4, 12075, 9, 63) == value
    assert hashed(seed + 2**32, 3 + 2**32, 4, 12075, 9, 63) == value


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.5])
def test_dropout_keeps_its_share_and_the_mean(rate: float):
    factors = Dropout(ReferenceSettings(64, dropout=rate, seed=5), step=3, user=11).factors(2, 4, range(100_000))
    assert set(factors) <= {0.0, 1 / (1 - rate)}
    kept_share = sum(factor > 0 for factor in factors) / len(factors)
    assert abs(kept_share - (1 - rate)) <= 4 * math.sqrt(rate * (1 - rate) / len(factors))


def test_every_field_draws_another_mask():
    base = {"seed": 1, "step": 2, "user": 3, "site": 4, "position": 5}

    def mask(**fields: int) -> tuple[float, ...]:
        settings = ReferenceSettings(64, dropout=0.5, seed=fields["seed"])
        drawn = Dropout(settings, fields["step"], fields["user"])
        return tuple(drawn.factors(fields["site"], fields["position"], range(64)))

    masks = {mask(**base)} | {mask(**{**base, field: value + 1}) for field, value in base.items()}
    assert len(masks) == 1 + len(base)
