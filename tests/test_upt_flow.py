"""UPT-Flow: its map, its layers as bijections, its encoder, and every mode through the CLI."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch
import torch.nn.functional as F
from cli_tools import assert_one_line_error, differing, make_data, tiny_config
from conftest import ROOT, randomise
from PIL import Image
from torch import Tensor, nn

import model_script as ms
from baselines import upt_flow as upt
from support import simulated
from support.checkpoints import load_checkpoint
from support.settings import build, read_all

SMALL = {
    "encoder_width": 4,
    "encoder_blocks": 1,
    "refinement_blocks": 1,
    "flow_steps": 1,
    "flow_channels": 8,
}
Case = tuple[nn.Module, Tensor, object]


def small_config(**settings: Any) -> upt.UPTFlowConfig:
    return upt.UPTFlowConfig(**{**SMALL, **settings})


def small_model(
    dtype: torch.dtype = torch.float32, scale: float = 0.03, **settings: Any
) -> upt.UPTFlow:
    """A model with nothing left at zero, which counts as initialised; in training mode."""
    torch.manual_seed(3)
    model = randomise(upt.UPTFlow(small_config(**settings)), scale).to(dtype)
    for module in model.modules():
        if isinstance(module, upt.ActNorm):
            module.initialised.fill_(True)
    return model


def pixels(*shape: int, seed: int = 0) -> Tensor:
    """Uniform in [0, 1], float64."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def normals(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# what is read off the dark picture ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("rgb", "balanced"),
    [
        ((0.2, 0.2, 0.2), 1),
        ((0.5, 0.3, 0.2), 1),
        ((0.02, 0.01, 0.01), 1),  # dark is not unbalanced
        ((0.0, 0.0, 0.0), 0),
        ((0.5, 0.5, 0.0), 0),
        ((0.0, 0.4, 0.4), 0),
        ((0.80, 0.11, 0.09), 0),
        ((0.78, 0.11, 0.11), 1),
        ((0.8, 0.1, 0.1), 0),
        ((1e-5, 1e-5, 1e-5), 0),  # 1e-4 in the denominator: next to nothing is nothing
        ((4e-5, 4e-5, 4e-5), 1),  # and no more than 1e-4: a share of 0.18
    ],
)
def test_balance_map_of_single_pixels(rgb: tuple[float, float, float], balanced: int) -> None:
    low = torch.full((1, 3, 2, 2), 0.3, dtype=torch.float64)
    low[0, :, 1, 0] = torch.tensor(rgb, dtype=torch.float64)
    assert upt.balance_map(low)[0, 0].tolist() == [[1, 1], [balanced, 1]]


def test_share_at_the_threshold_counts_as_zero() -> None:
    low = torch.tensor([0.4, 0.4, 0.0]).reshape(1, 3, 1, 1)
    assert upt.balance_map(low, threshold=0.0).item() == 0
    assert upt.balance_map(low + 0.01, threshold=0.0).item() == 1


def test_equalised_levels_by_hand() -> None:
    """Levels 10, 10, 20, 40 of four pixels: with the lowest level's two pixels at 0, the others lie
    at 1/2 and 1."""
    low = torch.tensor([[[10, 40], [20, 10]], [[7, 7], [7, 7]]])[None] / 255
    expected = torch.tensor([[[0, 1], [0.5, 0]], [[0, 0], [0, 0]]])[None]
    torch.testing.assert_close(upt.equalise(low), expected)


def test_equalised_histogram_is_flat_for_each_picture_and_channel() -> None:
    low = (0.3 + 0.08 * normals(2, 3, 64, 64)).clamp(0, 1)
    flat = upt.equalise(low)
    for channel in flat.flatten(0, 1):
        assert scipy.stats.kstest(channel.flatten().numpy(), "uniform").statistic < 0.05
        assert (channel.min(), channel.max()) == (0, 1)
    assert torch.equal(upt.equalise(low[1:]), flat[1:])


@pytest.mark.parametrize("key", ["log_input", "histogram_input"])
def test_inputs_are_what_the_config_says(key: str) -> None:
    low, seen = pixels(1, 3, 16, 16).float(), []
    for value in (False, True):
        model = small_model(**{"log_input": False, "histogram_input": False, key: value})
        model.encoder.register_forward_pre_hook(lambda module, inputs: seen.append(inputs))
        model.condition(low)
    (plain, balance), (other, _) = seen
    assert torch.equal(plain, low) and torch.equal(balance, upt.balance_map(low))
    expected = (low + 1e-3).log() if key == "log_input" else torch.cat([low, upt.equalise(low)], 1)
    assert torch.equal(other, expected)


# the flow -----------------------------------------------------------------------------------------


def affine_case() -> Case:
    torch.manual_seed(1)
    return (
        randomise(upt.ConditionalAffine(6, 5, 8), 0.2),
        normals(2, 6, 4, 4),
        normals(2, 5, 4, 4, seed=1),
    )


def coupling_case() -> Case:
    torch.manual_seed(1)
    return (
        randomise(upt.CrossCoupling(12, 5, 8), 0.2),
        normals(2, 12, 3, 4),
        normals(2, 5, 3, 4, seed=1),
    )


def norm_case() -> Case:
    return randomise(upt.ActNorm(6), 0.5).eval(), normals(2, 6, 3, 4), None


def flow_case() -> Case:
    torch.manual_seed(2)
    condition = tuple(normals(2, 6, side, 2 * side, seed=side) for side in (4, 2, 1))
    return randomise(upt.CrossFlow(2, 8, 6), 0.05).eval(), pixels(2, 3, 8, 16), condition


CASES = {"affine": affine_case, "coupling": coupling_case, "norm": norm_case, "flow": flow_case}


def one(condition: Any, item: int) -> Any:
    """A batch's condition cut down to one item."""
    if isinstance(condition, tuple):
        return tuple(part[item : item + 1] for part in condition)
    return condition if condition is None else condition[item : item + 1]


@pytest.mark.parametrize("name", CASES)
def test_layer_and_inverse_undo_each_other(name: str) -> None:
    layer, x, condition = CASES[name]()
    layer.double()
    with torch.no_grad():
        y, log_det = layer(x, condition)
        back = layer.inverse(y, condition)
    assert log_det.shape == (2,)
    # which changes the halves' places in any case; what it moves has a test below
    if name != "coupling":
        assert (y.flatten() - x.flatten()).abs().mean() > 0.02
    torch.testing.assert_close(back, x, atol=1e-9, rtol=0)


@pytest.mark.parametrize("name", CASES)
def test_log_det_is_that_of_the_jacobian_for_each_item(name: str) -> None:
    layer, x, condition = CASES[name]()
    layer.double()
    log_dets = layer(x, condition)[1].tolist()
    for item, log_det in enumerate(log_dets if name != "flow" else log_dets[:1]):
        own, start = one(condition, item), x[item : item + 1]
        matrix = torch.autograd.functional.jacobian(
            lambda v, own=own, start=start: layer(v.reshape(start.shape), own)[0].flatten(),
            start.flatten(),
        )
        assert log_det == pytest.approx(float(torch.linalg.slogdet(matrix).logabsdet), abs=1e-8)
    if name != "norm":
        assert abs(log_dets[0] - log_dets[1]) > 1e-3  # it depends on the data


def test_inverse_in_single_precision() -> None:
    layer, x, condition = flow_case()
    with torch.no_grad():
        features = [part.float() for part in condition]
        back = layer.inverse(layer(x.float(), features)[0], features)
    assert (back - x).abs().max() < 1e-4


def test_coupling_network_is_the_published_one() -> None:
    net = upt.ConditionalAffine(6, 5, 8).net
    kinds = (nn.Conv2d, nn.ReLU, nn.Conv2d, nn.ReLU, upt.CBAM, nn.Conv2d)
    assert len(net) == len(kinds) and all(map(isinstance, net, kinds))
    convolutions = [layer for layer in net if isinstance(layer, nn.Conv2d)]
    assert [layer.kernel_size for layer in convolutions] == [(1, 1), (3, 3), (1, 1)]
    assert not convolutions[-1].weight.any() and not convolutions[-1].bias.any()


def test_scale_is_between_its_floor_and_one() -> None:
    layer, x, condition = affine_case()
    layer = randomise(layer, 1e3).double()
    scale, _ = layer.scale_and_shift(x, condition)
    assert float(scale.detach().min()) == pytest.approx(3e-4, rel=1e-6)
    assert float(scale.detach().max()) == pytest.approx(1 + 3e-4, rel=1e-6)
    fresh, _ = upt.ConditionalAffine(6, 5, 8).double().scale_and_shift(x, condition)
    torch.testing.assert_close(fresh, torch.full_like(fresh, 1 / (1 + math.exp(-2)) + 3e-4))


def test_one_coupling_moves_one_half_and_changes_their_places() -> None:
    layer, x, condition = coupling_case()
    y = layer.double()(x, condition)[0]
    assert (
        torch.equal(y[:, 6:], x[:, :6]) and (y[:, :6] - x[:, 6:]).abs().mean((0, 2, 3)).min() > 1e-3
    )


def test_in_a_step_each_half_is_moved_by_the_other_and_all_by_the_features() -> None:
    _, x, condition = coupling_case()
    kinds = (upt.ConditionalAffine, upt.CrossCoupling) * 2
    step = [randomise(kind(12, 5, 8), 0.2, seed).double() for seed, kind in enumerate(kinds)]

    def run(x: Tensor, condition: Tensor) -> Tensor:
        for layer in step:
            x = layer(x, condition)[0]
        return x

    jacobian = torch.autograd.functional.jacobian(
        lambda v: run(v, condition[:1]).sum((0, 2, 3)), x[:1]
    )
    influence = jacobian.abs().sum((1, 3, 4))  # (12 outputs, 12 inputs)
    assert influence[:6, 6:].min() > 1e-6 and influence[6:, :6].min() > 1e-6
    moved = (run(x, condition + 1) - run(x, condition)).abs().mean((0, 2, 3))
    assert moved.min() > 1e-3


def test_condition_reaches_every_level() -> None:
    flow, y, condition = flow_case()
    flow.double()
    plain = flow(y, condition)[0]
    for level in range(3):
        changed = tuple(part + (place == level) for place, part in enumerate(condition))
        assert (flow(y, changed)[0] - plain).abs().max() > 1e-3


def test_steps_per_level() -> None:
    kinds = [type(layer) for layer in upt.CrossFlow(3, 8, 6).layers]
    plain = [upt.ActNorm, ms.InvertibleConv]
    assert (
        kinds
        == [
            ms.Squeeze,
            *plain * 2,
            *[*plain, *(upt.ConditionalAffine, upt.CrossCoupling) * 2] * 3,
        ]
        * 3
    )


def test_actnorm_takes_mean_and_variance_of_the_first_training_batch_only() -> None:
    x = 5 + 3 * normals(4, 6, 8, 8).float() * torch.arange(1, 7)[:, None, None]
    layer = upt.ActNorm(6).eval()
    assert torch.equal(layer(x)[0], x)  # evaluation sets nothing
    y, _ = layer.train()(x)
    torch.testing.assert_close(y.mean((0, 2, 3)), torch.zeros(6), atol=1e-5, rtol=0)
    torch.testing.assert_close(y.std((0, 2, 3), correction=0), torch.ones(6), atol=1e-5, rtol=0)
    copy = upt.ActNorm(6).train()
    copy.load_state_dict(layer.state_dict())
    for again in (layer, copy):
        slope = again(torch.ones_like(x))[0] - again(torch.zeros_like(x))[0]
        # another batch, same map
        torch.testing.assert_close(again(2 * x + 1)[0], y + slope * (x + 1), atol=1e-4, rtol=1e-4)


def test_first_loss_initialises_every_actnorm_and_standardises_the_latent() -> None:
    torch.manual_seed(0)
    model = upt.UPTFlow(small_config())
    low, high = pixels(4, 3, 32, 32, seed=1).float() * 0.1, pixels(4, 3, 32, 32, seed=2).float()
    model.losses(ms.Sample(low, high, low, torch.tensor([ms.WHOLE_BOX] * 4)))
    norms = [layer for layer in model.flow.layers if isinstance(layer, upt.ActNorm)]
    assert len(norms) == 9 and all(norm.initialised for norm in norms)
    torch.manual_seed(5)
    latent = model.bits_per_dim(high, low)[1]
    assert float(latent.detach().mean()) == pytest.approx(0, abs=0.05)
    # the last step's fresh couplings only scale what its actnorm has made standard: each half by
    # two affines and one coupling
    assert float(latent.detach().std()) == pytest.approx(
        (1 / (1 + math.exp(-2)) + 3e-4) ** 3, rel=0.02
    )


# the encoder --------------------------------------------------------------------------------------


def test_cbam_keeps_the_shape_and_gates_as_its_equations_say() -> None:
    torch.manual_seed(0)
    layer, x = upt.CBAM(8).double(), normals(2, 8, 5, 7)
    channel = torch.sigmoid(
        layer.channel(x.mean((2, 3))) + layer.channel(x.flatten(2).max(2).values)
    )
    gated = x * channel[:, :, None, None]
    ends = torch.stack([gated.max(1).values, gated.mean(1)], 1)
    expected = x + gated * torch.sigmoid(
        nn.functional.conv2d(ends, layer.position.weight, padding=3)
    )
    torch.testing.assert_close(layer(x), expected)


def test_transposed_attention_is_restormers() -> None:
    """Rows of the attention are channels; queries and keys have length 1 over the pixels; each head
    has its temperature."""
    torch.manual_seed(0)
    layer, x = randomise(upt.TransposedAttention(8, 2), 0.5).double(), normals(2, 8, 5, 7)
    with torch.no_grad():
        qkv, weights = layer.to_qkv(x).numpy().reshape(2, 3, 2, 4, 35), layer.temperature.numpy()
        mixed = np.zeros((2, 2, 4, 35))
        for item in range(2):
            for head in range(2):
                query, key, value = qkv[item, :, head]
                query, key = (
                    part / np.linalg.norm(part, axis=1, keepdims=True) for part in (query, key)
                )
                logits = weights[head, 0, 0] * query @ key.T
                mixed[item, head] = np.exp(logits) / np.exp(logits).sum(1, keepdims=True) @ value
        expected = layer.out(torch.from_numpy(mixed.reshape(2, 8, 5, 7)))
        torch.testing.assert_close(layer(x), expected)


def test_feed_forwards_and_channel_gate_are_their_equations() -> None:
    torch.manual_seed(0)
    x = normals(2, 8, 5, 7)
    gated = upt.GatedFeedForward(8).double()
    assert gated.out.in_channels == int(8 * 2.66)
    first, second = gated.expand(x).chunk(2, 1)
    erf = torch.from_numpy(scipy.special.erf((first / math.sqrt(2)).detach().numpy()))
    torch.testing.assert_close(gated(x), gated.out(0.5 * first * (1 + erf) * second))

    gate = upt.ChannelGate().double()
    means = nn.functional.pad(x.mean((2, 3)), (1, 1))
    taps = gate.mix.weight.flatten()
    mixed = sum(taps[k] * means[:, k : k + 8] for k in range(3))
    torch.testing.assert_close(gate(x), x / (1 + torch.exp(-mixed))[:, :, None, None])


def test_blocks_of_both_branches_add_their_parts_to_what_they_are_given() -> None:
    x, embedding = pixels(2, 8, 8, 8).float(), pixels(2, 8, 8, 8, seed=1).float()

    def normal(norm: upt.ChannelNorm, x: Tensor) -> Tensor:
        mean, variance = x.mean(1, keepdim=True), x.var(1, correction=0, keepdim=True)
        return (x - mean) / (variance + 1e-5).sqrt() * norm.weight[:, None, None] + norm.bias[
            :, None, None
        ]

    block = randomise(upt.LocalBlock(8, 2, 4, 2), 0.3)
    attended = x + block.attention(normal(block.norm, x), embedding)
    norm, enter, conv, _, leave, gate = block.feed
    fed = leave(F.gelu(conv(enter(normal(norm, attended)))))
    around = F.pad(fed.mean((2, 3)), (1, 1))
    mixed = sum(
        weight * around[:, place : place + 8]
        for place, weight in enumerate(gate.mix.weight.flatten())
    )
    torch.testing.assert_close(
        block(x, embedding), attended + fed * mixed.sigmoid()[..., None, None]
    )

    whole = randomise(upt.GlobalBlock(8, 2), 0.3)
    attended = x + whole.attend[1](normal(whole.attend[0], x))
    torch.testing.assert_close(whole(x), attended + whole.feed[1](normal(whole.feed[0], attended)))


def test_a_stage_adds_its_branches_to_one_another() -> None:
    torch.manual_seed(0)
    stage = randomise(upt.Stage(8, 2, 2, small_config(encoder_blocks=2)), 0.3).double()
    x, embedding = normals(1, 8, 6, 6), normals(1, 8, 6, 6, seed=1)
    local = stage.locals[1](stage.locals[0](x, embedding), embedding)
    torch.testing.assert_close(stage(x, embedding), stage.globals(x) + local)


def test_the_published_encoder_has_the_papers_heads_blocks_and_windows() -> None:
    with torch.device("meta"):
        config = upt.UPTFlowConfig()
        encoder = upt.MSFormer(6, config)
    stages = [*encoder.encoders, encoder.bottom]
    assert [stage.globals[0].attend[1].to_qkv[0].in_channels for stage in stages] == [
        48,
        96,
        192,
        384,
    ]
    heads = [[len(block.attend[1].temperature) for block in stage.globals] for stage in stages]
    assert heads == [[count] * 2 for count in (2, 2, 4, 8)]
    assert [[block.attention.heads for block in stage.locals] for stage in stages] == [
        [count] * 2 for count in (1, 2, 4, 8)
    ]
    assert {block.attention.window for stage in stages for block in stage.locals} == {5}
    assert len(encoder.refine) == 2
    assert (config.crop_size, config.batch_size, config.learning_rate, config.weight_decay) == (
        160,
        8,
        2e-4,
        0.0,
    )
    assert (config.flow_steps, upt.PLAIN_STEPS, config.log_input, config.histogram_input) == (
        8,
        2,
        False,
        True,
    )


def test_each_level_gives_its_own_features_and_the_refined_ones_at_its_size() -> None:
    torch.manual_seed(0)
    encoder, seen = randomise(upt.MSFormer(3, small_config()), 0.05), {}
    for name in ("eighth", "refine"):
        getattr(encoder, name).register_forward_hook(
            lambda module, inputs, output, name=name: seen.update({name: output})
        )
    for place, stage in enumerate(encoder.decoders):
        stage.register_forward_hook(
            lambda module, inputs, output, place=place: seen.update({place: output})
        )
    found = encoder(pixels(1, 3, 16, 24).float(), torch.ones(1, 1, 16, 24))
    for features, own in zip(found, (seen[1], seen[0], seen["eighth"]), strict=True):
        resized = nn.functional.interpolate(seen["refine"], own.shape[-2:], mode="bilinear")
        torch.testing.assert_close(features, torch.cat([own, resized], 1))


@pytest.mark.parametrize("size", [(10, 10), (8, 12), (2, 3)])
@pytest.mark.parametrize("shift", [0, 2])
def test_window_attention_is_attention_within_each_window(
    size: tuple[int, int], shift: int
) -> None:
    """Against a mask over all pairs of pixels: the same window, in a lattice of which a window
    starts at pixel `shift`."""
    torch.manual_seed(0)
    (height, width), heads = size, 2
    layer = randomise(upt.WindowAttention(8, heads, 5, shift), 0.3).double()
    features, embedding = normals(2, 8, height, width), normals(2, 8, height, width, seed=1)
    query, key, value = (
        part.reshape(2, heads, 4, -1).mT
        for part in (layer.to_query(embedding), layer.to_key(embedding), layer.to_value(features))
    )
    y, x = (
        p.flatten()
        for p in torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    )
    lattice = (y - shift).div(5, rounding_mode="floor") * 100 + (x - shift).div(
        5, rounding_mode="floor"
    )
    apart = lattice[:, None] != lattice
    offset = ((y[:, None] - y + 4) * 9 + (x[:, None] - x + 4)).masked_fill(apart, 0)
    logits = query @ key.mT / 2 + layer.position[:, offset]
    mixed = logits.masked_fill(apart, -torch.inf).softmax(-1) @ value
    expected = layer.out(mixed.mT.reshape(2, 8, height, width))
    torch.testing.assert_close(layer(features, embedding), expected)


def test_queries_and_keys_are_the_maps_and_values_the_features() -> None:
    torch.manual_seed(0)
    layer = upt.WindowAttention(4, 1, 5, 0).double()
    features, embedding = normals(1, 4, 5, 5), normals(1, 4, 5, 5, seed=1)
    plain = layer(features, embedding)
    origin = layer(torch.zeros_like(features), embedding)
    # linear: they weigh nothing
    torch.testing.assert_close(layer(3 * features, embedding) - origin, 3 * (plain - origin))
    assert (layer(features, embedding + normals(1, 4, 5, 5, seed=2)) - plain).abs().max() > 1e-3
    # equal values everywhere: the weights sum to 1 and the map drops out
    nn.init.zeros_(layer.to_value.weight)
    torch.testing.assert_close(layer(features, embedding), layer(features, -embedding))


def test_global_branch_looks_at_all_of_the_picture_and_the_local_one_near_by() -> None:
    torch.manual_seed(0)
    x, far = normals(1, 8, 24, 24), normals(1, 8, 24, 24)
    far[..., 20:, 20:] = normals(1, 8, 4, 4, seed=1)
    whole, local = upt.GlobalBlock(8, 2).double(), upt.WindowAttention(8, 2, 5, 2).double()
    assert (whole(far) - whole(x))[..., :8, :8].abs().max() > 1e-6
    assert torch.equal(local(far, x)[..., :8, :8], local(x, x)[..., :8, :8])
    assert not torch.equal(local(far, x), local(x, x))


def test_encoder_gives_three_levels_and_the_map_matters() -> None:
    torch.manual_seed(0)
    encoder = randomise(upt.MSFormer(3, small_config(encoder_blocks=2)), 0.05)
    low = pixels(2, 3, 24, 40).float()
    features = encoder(low, torch.ones(2, 1, 24, 40))
    assert [tuple(part.shape) for part in features] == [
        (2, 24, 12, 20),
        (2, 24, 6, 10),
        (2, 24, 3, 5),
    ]
    balance = torch.ones(2, 1, 24, 40)
    balance[..., :12, :20] = 0
    for changed, plain in zip(encoder(low, balance), features, strict=True):
        assert (changed - plain).abs().max() > 1e-4


def test_map_alone_guides_every_stage() -> None:
    """Down to 1/8 and up again, what the windows are asked with follows from the map and never from
    the pixels."""
    torch.manual_seed(0)
    encoder, balance, seen = (
        upt.MSFormer(3, small_config()),
        (pixels(1, 1, 16, 16) > 0.5).float(),
        [],
    )
    for stage in encoder.modules():
        if isinstance(stage, upt.Stage):
            stage.register_forward_pre_hook(lambda module, inputs: seen.append(inputs))
    for seed in (1, 2):
        encoder(pixels(1, 3, 16, 16, seed=seed).float(), balance)
    assert len(seen) == 14
    for (features, embedding), (others, same) in zip(seen[:7], seen[7:], strict=True):
        assert torch.equal(embedding, same) and not torch.equal(features, others)
        assert embedding.shape == features.shape and embedding.std() > 0


def test_features_and_map_go_down_and_up_through_the_same_convolutions() -> None:
    encoder, balance = (
        randomise(upt.MSFormer(3, small_config()), 0.1),
        (pixels(1, 1, 16, 16) > 0.5).float(),
    )
    stages = [*encoder.encoders, encoder.bottom, *encoder.decoders]
    given: dict[torch.nn.Module, tuple[Tensor, ...]] = {}
    made: dict[torch.nn.Module, Tensor] = {}
    for module in (*stages, *encoder.merges):
        module.register_forward_pre_hook(lambda module, inputs: given.update({module: inputs}))
        module.register_forward_hook(lambda module, inputs, output: made.update({module: output}))
    encoder(pixels(1, 3, 16, 16).float(), balance)
    assert torch.equal(given[stages[0]][1], balance.expand_as(given[stages[0]][0]))
    for above, shrink, below in zip(stages[:3], encoder.downs, stages[1:4], strict=True):
        torch.testing.assert_close(given[below][0], shrink(made[above]))
        torch.testing.assert_close(given[below][1], shrink(given[above][1]))
    for number, (grow, merge) in enumerate(zip(encoder.ups, encoder.merges, strict=True)):
        below, skip, decode = (
            stages[3 + number],
            encoder.encoders[2 - number],
            encoder.decoders[number],
        )
        torch.testing.assert_close(given[merge][0], torch.cat([grow(made[below]), made[skip]], 1))
        torch.testing.assert_close(given[decode][0], made[merge])
        grown = grow(given[below][1])
        copies = given[decode][0].shape[1] // grown.shape[1]
        torch.testing.assert_close(given[decode][1], torch.cat([grown] * copies, 1))


def test_windows_are_shifted_in_every_other_block() -> None:
    stage = upt.Stage(8, 2, 2, small_config(encoder_blocks=3, window_size=5))
    assert [block.attention.lead for block in stage.locals] == [0, 3, 0]


# the model ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(16, 16), (17, 33)])
def test_enhance_keeps_size_and_range(size: tuple[int, int]) -> None:
    model = small_model()
    with torch.no_grad():
        enhanced = model.enhance(pixels(2, 3, *size).float(), 0.5)
    assert enhanced.shape == (2, 3, *size)
    assert enhanced.min() >= 0 and enhanced.max() <= 1 and enhanced.std() > 0.01


def test_temperature_zero_is_deterministic_and_above_zero_is_not() -> None:
    model, low, pictures = small_model(), pixels(1, 3, 16, 16).float(), []
    with torch.no_grad():
        for temperature, seed in ((0.0, 1), (0.0, 2), (0.7, 1), (0.7, 1), (0.7, 2)):
            torch.manual_seed(seed)
            pictures.append(model.enhance(low, temperature))
    assert torch.equal(pictures[0], pictures[1]) and torch.equal(pictures[2], pictures[3])
    assert (pictures[2] - pictures[0]).abs().max() > 0.01 and (
        pictures[2] - pictures[4]
    ).abs().max() > 0.01
    assert float(model.latent(low.new_zeros(4, 3, 64, 64), 0.7).std()) == pytest.approx(
        0.7, rel=0.03
    )


def test_decoding_the_encoded_picture_gives_it_back() -> None:
    model = small_model()
    low, high = (pixels(1, 3, 24, 16, seed=s).float().mul(255).round() / 255 for s in (1, 2))
    with torch.no_grad():
        features = model.condition(low)
        back = ms.requantise(model.flow.inverse(model.bits(high, features)[1], features))
    assert (back - high).abs().max() * 255 <= 0.5 + 1e-2


def test_bits_per_dim_is_the_change_of_variables_and_ignores_odd_rims() -> None:
    model = small_model(torch.float64)
    low, high = pixels(2, 3, 21, 18, seed=1), pixels(2, 3, 21, 18, seed=2)
    other = high.clone()
    other[..., 16:, :], other[..., 16:] = 0, 0
    with torch.no_grad():
        torch.manual_seed(5)
        bits, latent = model.bits_per_dim(high, low)
        torch.manual_seed(5)
        assert torch.equal(model.bits_per_dim(other, low)[0], bits)
        torch.manual_seed(5)
        y = (high[..., :16, :16] * 255 + torch.rand_like(high[:1, :, :16, :16])) / 256
        z, log_det = model.flow(y, model.condition(low[..., :16, :16]))
    log_density = scipy.stats.norm.logpdf(z.numpy()).reshape(2, -1).sum(1) + log_det.numpy()
    np.testing.assert_allclose(bits.numpy(), -log_density / (768 * math.log(2)) + 8, rtol=1e-9)
    torch.testing.assert_close(latent, z)


def test_terms_of_weight_zero_are_absent_and_the_others_weighted() -> None:
    model = small_model()
    picture = pixels(1, 3, 20, 16).float()
    batch = ms.Sample(picture * 0.1, picture, picture, torch.tensor([ms.WHOLE_BOX]))
    names = ("nll", "l1", "ssim", "colour")
    assert set(model.losses(batch)) == {"nll"}

    def losses(**weights: float) -> dict[str, float]:
        vars(model.config).update({f"{name}_weight": weights.get(name, 0.0) for name in names})
        torch.manual_seed(0)
        return {name: float(term.detach()) for name, term in model.losses(batch).items()}

    once, twice = losses(**dict.fromkeys(names, 1.0)), losses(**dict.fromkeys(names, 2.0))
    assert twice == pytest.approx({name: 2 * value for name, value in once.items()})
    for name in names:
        assert losses(**{name: 1.0}) == pytest.approx({name: once[name]})
    cut = picture[..., :16, :16]
    y = model.flow.inverse(torch.zeros(1, 192, 2, 2), model.condition(cut * 0.1))
    assert once["l1"] == pytest.approx(
        float((y - (cut * 255 + 0.5) / 256).detach().abs().mean()), rel=1e-5
    )


@pytest.mark.parametrize(("nll_weight", "l1_weight"), [(1.0, 0.0), (0.0, 1.0)])
def test_gradients_reach_every_parameter(nll_weight: float, l1_weight: float) -> None:
    model = small_model(
        nll_weight=nll_weight, l1_weight=l1_weight, encoder_blocks=2, flow_channels=64
    )
    picture = pixels(2, 3, 32, 32).float()
    batch = ms.Sample(picture**2, picture, picture, torch.tensor([ms.WHOLE_BOX] * 2))
    sum(model.losses(batch).values()).backward()
    silent = [
        name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().max() > 0
    ]
    assert not silent


@pytest.mark.parametrize(
    ("progress", "step", "share"),
    [
        (0.0, 0, 0.1),
        (0.0, 4, 0.5),
        (0.39, 50, 1),
        (0.4, 50, 0.5),
        (0.6, 50, 0.25),
        (0.8, 50, 0.125),
        (1.0, 50, 0.0625),
    ],
)
def test_learning_rate_warms_up_and_halves_at_the_milestones(
    progress: float, step: int, share: float
) -> None:
    config = small_config(learning_rate=1e-3, warmup_steps=10)
    assert upt.UPTFlow.learning_rate_at(
        SimpleNamespace(config=config), progress, step
    ) == pytest.approx(1e-3 * share)


def test_published_size_has_the_papers_number_of_parameters() -> None:
    model = upt.UPTFlow(upt.UPTFlowConfig())
    count = sum(p.numel() for p in model.parameters())
    assert count / 1e6 == pytest.approx(23.81, abs=0.005)
    idle = sum(
        layer.lower.numel() for layer in model.flow.layers if isinstance(layer, ms.InvertibleConv)
    )
    # with one matrix for each 1x1 convolution
    assert (count - idle) / 1e6 == pytest.approx(23.45, abs=0.05)


def test_published_size_runs_forward_backward_and_inverse() -> None:
    torch.manual_seed(0)
    model = upt.UPTFlow(upt.UPTFlowConfig(l1_weight=1.0))
    high = pixels(1, 3, 32, 32).float()
    batch = ms.Sample(high * 0.1, high, high, torch.tensor([ms.WHOLE_BOX]))
    terms = model.losses(batch)
    sum(terms.values()).backward()
    assert set(terms) == {"nll", "l1"} and all(
        p.grad.isfinite().all() for p in model.parameters() if p.grad is not None
    )
    with torch.no_grad():
        features = model.condition(batch.low)
        back = ms.requantise(model.flow.inverse(model.bits(high, features)[1], features))
    assert (back - high).abs().max() < 0.02


# through the command line -------------------------------------------------------------------------


def settings_in(folder: Path, **changes: Any) -> dict[str, Any]:
    return tiny_config(folder, **{**SMALL, "crop_size": 0, "l1_weight": 1.0, **changes})


def run(mode: str, folder: Path, settings: dict[str, Any], *arguments: str) -> int:
    """Run a mode in this process; returns its exit status."""
    path = folder / "settings.json"
    path.write_text(json.dumps(settings))
    return ms.main(["--mode", mode, "--config", str(path), *arguments], upt.UPTFlow)


def test_training_lowers_both_terms() -> None:
    torch.manual_seed(0)
    model = upt.UPTFlow(small_config(l1_weight=5.0, learning_rate=1e-3))
    high = torch.nn.functional.interpolate(
        pixels(2, 3, 4, 4).float(), size=(32, 32), mode="bicubic"
    ).clamp(0, 1)
    batch = ms.Sample(high * 0.1, high, high, torch.tensor([ms.WHOLE_BOX] * 2))
    optimizer, history = ms.adamw(model.parameters(), model.config), []
    for _ in range(60):
        optimizer.zero_grad()
        terms = model.losses(batch)
        sum(terms.values()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        history.append({name: float(term.detach()) for name, term in terms.items()})
    assert history[-1]["nll"] < history[0]["nll"] - 0.5
    assert history[-1]["l1"] < 0.8 * history[0]["l1"]


def test_resumed_run_equals_the_uninterrupted_one(tmp_path: Path) -> None:
    for name in ("straight", "resumed"):
        make_data(tmp_path / name, train=3)
    straight, resumed = (tmp_path / name for name in ("straight", "resumed"))
    assert run("train", straight, settings_in(straight, num_epochs=2)) == 0
    settings = settings_in(resumed, num_epochs=2)
    config, use = build(upt.UPTFlowConfig, settings, "test"), build(ms.Use, settings, "test")
    trainer = ms.Trainer(config, use, upt.UPTFlow)
    trainer.model.train()
    batches = list(trainer._loader(ms.batch_plan(len(trainer.training), trainer.config, 0)))
    for batch in batches[:2]:  # a signal within the first epoch
        trainer._train_step([(batch, 1.0)])
    averaged = trainer.ema.module
    assert all(layer.initialised for layer in averaged.modules() if isinstance(layer, upt.ActNorm))
    # averaged from the initialised values, not from zero
    assert averaged.flow.layers[1].log_scale.abs().min() > 0.5
    path = trainer.save("checkpoint_interrupted.pth")
    assert run("train", resumed, settings, "--resume", str(path)) == 0
    expected, got = (
        load_checkpoint(str(folder / "ckpt" / "checkpoint_epoch_2.pth"))
        for folder in (straight, resumed)
    )
    for state in (expected, got):
        state["training"] = {
            k: v
            for k, v in state["training"].items()
            if k in ("model", "averaged", "optimizer", "step")
        }
    for part in ("model", "training"):
        assert not differing(expected[part], got[part])


def test_every_mode(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    make_data(tmp_path, train=2)
    settings = settings_in(tmp_path, num_epochs=1)
    assert run("train", tmp_path, settings) == 0
    assert "bits_per_dim" in capsys.readouterr().out
    assert run("evaluate", tmp_path, settings) == 0  # its own best_model.pth is the default
    (results,) = (tmp_path / "results").glob("eval_*")
    assert (results / "images" / "0_balance.png").exists()
    assert "bits_per_dim" in (results / "metrics.csv").read_text()
    low, output = tmp_path / "data/eval/low/0.png", tmp_path / "out" / "0.png"
    assert run("enhance", tmp_path, settings, "--input", str(low), "--output", str(output)) == 0
    with Image.open(output) as enhanced, Image.open(low) as dark:
        assert enhanced.size == dark.size == (48, 40)
    weights = str(tmp_path / "ckpt" / "best_model.pth")
    assert ms.main(["--mode", "evaluate", "--checkpoint", weights]) == 2
    assert "weights of UPTFlow, not of ConditionalFlow" in capsys.readouterr().err
    monkeypatch.setattr(simulated, "DEMO_TRAIN", simulated.DEMO_TRAIN[:1])
    monkeypatch.setattr(simulated, "DEMO_TEST", simulated.DEMO_TEST[:1])
    quick = ["flow_channels=8", "image_size=32,32", "num_epochs=1"]
    assert (
        run("demo", tmp_path, settings, *(word for text in quick for word in ("--set", text))) == 0
    )


def test_mistakes_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_data(tmp_path, train=2)
    for changes, words in (
        ({"flow_step": 3}, ("unknown key flow_step", "flow_steps")),
        ({"flow_steps": 0}, ("flow_steps", "[1, 64]")),
        ({"log_input": 1}, ("log_input", "true or false")),
    ):
        status = run("train", tmp_path, settings_in(tmp_path, **changes))
        assert_one_line_error(status, capsys.readouterr().err, *words)
    assert run("train", tmp_path, settings_in(tmp_path, encoder_width=5)) == 2
    assert_one_line_error(2, capsys.readouterr().err, "encoder_width must be even, got 5")


def test_recipe_is_valid_and_small() -> None:
    recipe = str(ROOT / "baselines" / "upt_flow.json")
    given = read_all((upt.UPTFlowConfig, ms.Use), recipe, [], ())
    config = build(upt.UPTFlowConfig, given, recipe)
    assert (config.image_size, config.crop_size) == ([128, 128], 0)
    assert (config.checkpoint_dir, config.log_dir) == ("checkpoints/upt_flow", "logs")
    assert sum(p.numel() for p in upt.UPTFlow(config).parameters()) < 3e6
