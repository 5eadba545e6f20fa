"""RetinexNet: its networks and losses against formulas written out, its training modes, the CLI."""

from __future__ import annotations

import copy
import dataclasses
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cli_tools import assert_one_line_error, differing, environment, make_data, tiny_config
from conftest import ROOT, randomise
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

import model_script as ms
from baselines import retinexnet as rn
from support import commands, settings, simulated
from support.pictures import resize, to_tensor, to_uint8
from support.tiles import pad_to_multiple

EPOCHS = 4  # of 5 steps each, so that epoch 2 ends with the first stage of split
RECIPE = ROOT / "baselines" / "retinexnet.json"


pytestmark = pytest.mark.usefixtures("one_thread")


def picture(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def tiny_model(**settings: Any) -> rn.RetinexNet:
    torch.manual_seed(0)
    return rn.RetinexNet(rn.RetinexConfig(**{"channels": 4, **settings}))


def pair_batch(size: int = 24) -> ms.Sample:
    high = 0.2 + 0.7 * F.interpolate(picture(2, 3, 4, 4), (size, size), mode="bilinear")
    return ms.Sample(0.1 * high, high, high, high)


# losses, pixel by pixel ---------------------------------------------------------------------------


def difference_at(image: np.ndarray, y: int, x: int, axis: str) -> float:
    """|forward difference| of an (H, W) map at (y, x); 0 at the end."""
    ahead = (y, x + 1) if axis == "horizontal" else (y + 1, x)
    inside = ahead[0] < image.shape[0] and ahead[1] < image.shape[1]
    return abs(image[ahead] - image[y, x]) if inside else 0.0


def smoothness_by_loops(illumination: np.ndarray, reflectance: np.ndarray) -> float:
    """For (B, 1, H, W) and (B, 3, H, W)."""
    batch, _, height, width = illumination.shape
    total = 0.0
    for b in range(batch):
        red, green, blue = reflectance[b]
        grey = 0.299 * red + 0.587 * green + 0.114 * blue
        for y in range(height):
            for x in range(width):
                around = [
                    (j, i)
                    for j in (y - 1, y, y + 1)
                    for i in (x - 1, x, x + 1)
                    if 0 <= j < height and 0 <= i < width
                ]
                for axis in ("horizontal", "vertical"):
                    edges = sum(difference_at(grey, j, i, axis) for j, i in around) / len(around)
                    total += difference_at(illumination[b, 0], y, x, axis) * np.exp(-10 * edges)
    return total / (batch * height * width)


def l1_by_loops(reflectance: np.ndarray, illumination: np.ndarray, target: np.ndarray) -> float:
    """mean |R I - S|."""
    total = 0.0
    for place in np.ndindex(*target.shape):
        b, _, y, x = place
        total += abs(reflectance[place] * illumination[b, 0, y, x] - target[place])
    return total / target.size


def maps(seed: int) -> rn.Decomposition:
    return rn.Decomposition(
        picture(2, 3, 5, 6, seed=seed).double(), picture(2, 1, 5, 6, seed=seed + 1).double()
    )


def test_smoothness_by_loops() -> None:
    reflectance, illumination = maps(0)
    expected = smoothness_by_loops(illumination.numpy(), reflectance.numpy())
    assert float(rn.smoothness(illumination, reflectance)) == pytest.approx(expected, rel=1e-10)
    assert float(rn.smoothness(torch.ones_like(illumination), reflectance)) == 0


def test_an_edge_of_the_illumination_is_cheap_where_the_reflectance_has_one() -> None:
    step = (torch.arange(12) >= 6).double().expand(1, 1, 12, 12)
    same, elsewhere = step.expand(1, 3, 12, 12), step.mT.expand(1, 3, 12, 12)
    assert float(rn.smoothness(step, same)) < 0.1 * float(rn.smoothness(step, elsewhere))


def test_decom_losses_by_loops() -> None:
    of_low, of_high = maps(0), maps(2)
    low, high = picture(2, 3, 5, 6, seed=5).double(), picture(2, 3, 5, 6, seed=6).double()
    terms = {
        name: float(term) for name, term in rn.decom_losses(low, high, of_low, of_high).items()
    }
    (r_l, i_l), (r_h, i_h) = ([part.numpy() for part in parts] for parts in (of_low, of_high))
    s_l, s_h = low.numpy(), high.numpy()
    assert terms == pytest.approx(
        {
            "reconstruction": l1_by_loops(r_l, i_l, s_l) + l1_by_loops(r_h, i_h, s_h),
            "exchanged": 0.001 * l1_by_loops(r_h, i_l, s_l) + 0.001 * l1_by_loops(r_l, i_h, s_h),
            "reflectance": 0.01 * l1_by_loops(r_l, np.ones_like(i_l), r_h),
            "smoothness": 0.1 * smoothness_by_loops(i_l, r_l) + 0.1 * smoothness_by_loops(i_h, r_h),
        },
        rel=1e-10,
    )


def test_relight_losses_by_loops() -> None:
    reflectance, relit = maps(0)
    high = picture(2, 3, 5, 6, seed=6).double()
    terms = {
        name: float(term) for name, term in rn.relight_losses(high, reflectance, relit).items()
    }
    expected = {
        "relight": l1_by_loops(reflectance.numpy(), relit.numpy(), high.numpy()),
        "relight_smoothness": 3 * smoothness_by_loops(relit.numpy(), reflectance.numpy()),
    }
    assert terms == pytest.approx(expected, rel=1e-10)


# networks -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("transposed", [False, True])
def test_the_published_width_has_the_published_number_of_weights(transposed: bool) -> None:
    model = rn.RetinexNet(rn.RetinexConfig(transposed=transposed))
    wide = 64 * 64 * 9 + 64
    decom = (4 * 64 * 81 + 64) + 5 * wide + (64 * 4 * 9 + 4)
    relight = (4 * 64 * 9 + 64) + 6 * wide + (3 * 64 * 64 + 64) + (64 * 9 + 1)
    counts = [
        sum(p.numel() for p in network.parameters()) for network in (model.decom, model.relight)
    ]
    assert counts == [decom, relight]


def test_decom_net_by_hand() -> None:
    """The channel maximum first, no activation after the 9x9 layer, five rectified layers,
    sigmoids."""
    net = rn.DecomNet(4)
    low = picture(2, 3, 9, 7)
    weights = list(net.parameters())
    x = torch.cat([torch.from_numpy(low.numpy().max(axis=1))[:, None], low], 1)
    x = F.conv2d(x, weights[0], weights[1], padding=4)
    for place in range(2, 12, 2):
        x = F.conv2d(x, weights[place], weights[place + 1], padding=1).clamp(min=0)
    x = 1 / (1 + (-F.conv2d(x, weights[12], weights[13], padding=1)).exp())
    found = net(low)
    torch.testing.assert_close(torch.cat(found, 1), x)
    assert found.reflectance.shape == (2, 3, 9, 7) and found.illumination.shape == (2, 1, 9, 7)


def larger(image: Tensor, times: int) -> Tensor:
    return image.repeat_interleave(times, -1).repeat_interleave(times, -2)


@pytest.mark.parametrize("transposed", [False, True])
def test_enhance_net_by_hand(transposed: bool) -> None:
    """Three halvings, three doublings to which the encoder's maps are added, and all three scales
    gathered."""
    net = rn.EnhanceNet(4, transposed)
    seen = rn.Decomposition(picture(1, 3, 16, 24), picture(1, 1, 16, 24, seed=1))
    weights = list(net.parameters())
    pairs = list(zip(weights[::2], weights[1::2], strict=True))
    encoded = [F.conv2d(torch.cat(seen, 1), *pairs[0], padding=1)]
    for weight, bias in pairs[1:4]:
        encoded.append(F.conv2d(encoded[-1], weight, bias, stride=2, padding=1).relu())
    x, decoded = encoded[3], []
    for (weight, bias), skip in zip(pairs[4:7], encoded[2::-1], strict=True):
        if transposed:
            x = F.conv_transpose2d(x, weight, bias, stride=2, padding=1, output_padding=1)
        else:
            x = F.conv2d(larger(x, 2), weight, bias, padding=1)
        x = x.relu() + skip
        decoded.append(x)
    gathered = torch.cat([larger(decoded[0], 4), larger(decoded[1], 2), decoded[2]], 1)
    expected = F.conv2d(F.conv2d(gathered, *pairs[7]), *pairs[8], padding=1)
    torch.testing.assert_close(net(seen), expected)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("size", [(17, 23), (64, 48), (16, 16), (297, 297), (35, 130)], ids=str)
@torch.no_grad()
def test_any_size_gives_pictures_in_range(size: tuple[int, int], transposed: bool) -> None:
    model = randomise(tiny_model(transposed=transposed), 0.3).eval()
    low = picture(1, 3, *size)
    enhanced, between = model.enhance(low), model.pictures(low)
    assert list(between) == ["reflectance", "illumination", "relit"]
    for image in (enhanced, *between.values()):
        assert image.shape == low.shape
        assert image.min() >= 0 and image.max() <= 1
    seen = model.decom(low)
    # so that the clamp had something to do
    assert model.relit(seen).max() > 1 and enhanced.std() > 0.01
    padded = rn.Decomposition(*(pad_to_multiple(part) for part in seen))
    torch.testing.assert_close(
        model.relight(seen), model.relight(padded)[..., : size[0], : size[1]]
    )
    assert torch.equal(enhanced, (seen.reflectance * model.relit(seen)).clamp(0, 1))
    assert torch.equal(between["illumination"][:, 2:], seen.illumination)


# stages and modes of training ---------------------------------------------------------------------


def test_rates_fall_in_steps_and_start_anew_with_each_stage() -> None:
    settings: dict[str, Any] = dict(
        decom_lr=0.008, relight_lr=0.002, decay_every=0.25, decay_factor=0.5
    )
    at = (0.0, 0.12, 0.13, 0.49, 0.5, 0.62, 0.63, 0.99, 1.0)
    model = tiny_model(**settings)
    rates = [model.learning_rate_at(progress, 0) for progress in at]
    assert rates == [0.008, 0.008, 0.004, 0.001, 0.008, 0.008, 0.004, 0.001, 0.0005]
    joint = tiny_model(**settings, training="join")
    assert [joint.learning_rate_at(p, 0) for p in at] == [0.008] * 3 + [
        0.004,
        0.002,
        0.002,
        0.002,
        0.001,
        0.0005,
    ]
    groups = model.make_optimizer().param_groups
    assert [0.008 * group.get("lr_scale", 1.0) for group in groups] == [0.008, 0.002]
    sizes = [[p.shape for p in net.parameters()] for net in (model.decom, model.relight)]
    assert [[p.shape for p in group["params"]] for group in groups] == sizes


@pytest.mark.parametrize(
    ("training", "progress", "learning"),
    [
        ("split", 0.0, ("decom",)),
        ("split", 0.49, ("decom",)),
        ("split", 0.5, ("relight",)),
        ("join", 0.0, ("decom", "relight")),
        ("join", 0.9, ("decom", "relight")),
        ("ignore_ienhance", 0.9, ("decom",)),
    ],
)
def test_each_mode_lowers_its_loss(
    training: str, progress: float, learning: tuple[str, ...]
) -> None:
    """Only the networks of the stage move, even under weight decay, and their loss falls."""
    model, batch = tiny_model(training=training, weight_decay=0.1), pair_batch()
    before = copy.deepcopy(model.state_dict())
    model.begin_step(1 - progress)  # whatever stage it was in before
    optimizer = model.make_optimizer()
    totals = []
    for _ in range(30):
        model.begin_step(progress)
        for group in optimizer.param_groups:
            group["lr"] = 0.01
        optimizer.zero_grad()
        terms = model.losses(batch)
        total = torch.stack(list(terms.values())).sum()
        total.backward()
        optimizer.step()
        totals.append(float(total.detach()))
    assert totals[-1] < 0.7 * totals[0]
    changed = {place.split("/")[1].split(".")[0] for place in differing(before, model.state_dict())}
    assert changed == set(learning)
    parts = {
        "decom": {"reconstruction", "exchanged", "reflectance", "smoothness"},
        "relight": {"relight", "relight_smoothness"},
    }
    expected = set().union(*(parts[name] for name in learning))
    assert set(terms) == (
        parts["decom"] | parts["relight"] if training == "ignore_ienhance" else expected
    )


def test_the_first_step_of_joint_training_moves_decom_net_by_the_relit_picture() -> None:
    model, batch = tiny_model(training="join"), pair_batch()
    model.losses(batch)["relight"].backward()
    assert any(parameter.grad.abs().max() > 0 for parameter in model.decom.parameters())


def test_ignoring_the_enhance_net_gives_the_reflectance() -> None:
    model, batch = randomise(tiny_model(training="ignore_ienhance"), 0.3), pair_batch()
    reflectance = model.decom(batch.low).reflectance
    assert torch.equal(model.enhance(batch.low), reflectance)
    terms = model.losses(batch)
    torch.testing.assert_close(terms["relight"], (reflectance - batch.high).abs().mean())
    assert not terms["relight_smoothness"].any()
    assert not torch.equal(
        tiny_model().enhance(batch.low), tiny_model().decom(batch.low).reflectance
    )


# the real trainer ---------------------------------------------------------------------------------


def run(folder: Path, *arguments: str | Path, **changes: Any) -> int:
    """A mode of the command line, in this process, with tiny settings below `folder`."""
    settings = (
        tiny_config(
            folder, channels=4, num_epochs=EPOCHS, save_freq=1, keep_checkpoints=9, ema_decay=0.0
        )
        | changes
    )
    path = folder / "settings.json"
    path.write_text(json.dumps(settings), encoding="utf-8")
    return ms.main([*map(str, arguments), "--config", str(path)], rn.RetinexNet)


def weights_after(folder: Path, epoch: int) -> dict[str, Any]:
    """What equal runs share of checkpoint_epoch_N.pth."""
    found = torch.load(folder / "ckpt" / f"checkpoint_epoch_{epoch}.pth", weights_only=True)
    return {
        "model": found["model"],
        **{key: found["training"][key] for key in ("model", "averaged", "optimizer", "step")},
    }


def part(weights: dict[str, Any], name: str) -> dict[str, Tensor]:
    return {key: value for key, value in weights["model"].items() if key.startswith(name)}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a split run with weight decay that nobody interrupts."""
    folder = make_data(tmp_path_factory.mktemp("split"))
    assert run(folder, "--mode", "train", weight_decay=0.1) == 0
    return folder


def test_split_training_freezes_decom_net_bit_for_bit(trained: Path) -> None:
    torch.manual_seed(0)
    start = {"model": rn.RetinexNet(rn.RetinexConfig(channels=4)).state_dict()}
    first, half, later, end = (weights_after(trained, epoch) for epoch in (1, 2, 3, 4))
    assert differing(part(start, "decom"), part(first, "decom")) and differing(
        part(first, "decom"), part(half, "decom")
    )
    assert not differing(part(start, "relight"), part(half, "relight"))
    assert not differing(part(half, "decom"), part(end, "decom"))
    assert differing(part(half, "relight"), part(later, "relight")) and differing(
        part(later, "relight"), part(end, "relight")
    )
    deployed = torch.load(trained / "ckpt" / "best_model.pth", weights_only=True)
    assert deployed["system"] == "RetinexNet"


@pytest.mark.parametrize("epoch", [1, 2, 3])
def test_a_resumed_run_equals_an_uninterrupted_one(
    trained: Path, tmp_path: Path, epoch: int
) -> None:
    """From within the first stage, from the border and from within the second."""
    outputs = [
        f"--set={kind}_dir={tmp_path / name}"
        for kind, name in (("checkpoint", "ckpt"), ("log", "logs"))
    ]
    resumed = [
        "--mode",
        "train",
        "--resume",
        str(trained / "ckpt" / f"checkpoint_epoch_{epoch}.pth"),
        *outputs,
    ]
    assert ms.main(resumed, rn.RetinexNet) == 0
    assert not differing(weights_after(trained, EPOCHS), weights_after(tmp_path, EPOCHS))


def test_averaged_weights_follow_the_frozen_ones(tmp_path: Path) -> None:
    make_data(tmp_path)
    assert run(tmp_path, "--mode", "train", ema_decay=0.5, num_epochs=8) == 0
    ahead = []
    for epoch in (4, 8):
        found = torch.load(tmp_path / "ckpt" / f"checkpoint_epoch_{epoch}.pth", weights_only=True)
        deployed, frozen = found["model"], found["training"]["model"]
        ahead.append(
            max(
                float((deployed[key] - frozen[key]).abs().max())
                for key in frozen
                if key.startswith("decom")
            )
        )
    assert ahead[0] > 1e-4 and ahead[1] < 1e-6


# every mode of the command line -------------------------------------------------------------------


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


def test_evaluation_shows_reflectance_and_illumination(trained: Path) -> None:
    assert run(trained, "--mode", "evaluate") == 0
    (folder,) = (trained / "results").glob("eval_*")
    weights = str(trained / "ckpt" / "best_model.pth")
    model = ms.load_model(weights, {"device": "cpu"}, rn.RetinexNet).model
    low = to_tensor(pixels(trained / "data" / "eval" / "low" / "0.png"))[None]
    low = resize(low, model.config.image_size, quantise=True)
    with torch.no_grad():
        expected = {
            "": model.enhance(low),
            **{f"_{name}": image for name, image in model.pictures(low).items()},
        }
    assert set(expected) == {"", "_reflectance", "_illumination", "_relit"}
    for suffix, image in expected.items():
        found = pixels(folder / "images" / f"0{suffix}.png")
        assert np.abs(found.astype(int) - to_uint8(image[0])).max() <= 1, suffix
    summary = json.loads((folder / "summary.json").read_text())
    assert "bits_per_dim" not in summary["metrics"]


def test_tensorboard_shows_the_maps_beside_low_enhanced_and_high(trained: Path) -> None:
    (folder,) = (trained / "logs").iterdir()
    events = EventAccumulator(str(folder), size_guidance={"images": 0})
    events.Reload()
    shown = events.Images("validation/low_enhanced_high_0")[-1]
    strip = np.asarray(Image.open(io.BytesIO(shown.encoded_image_string)))
    assert strip.shape[1] == 6 * strip.shape[0]
    reflectance, illumination, relit = np.split(strip.astype(int), 6, axis=1)[3:]
    assert np.ptp(reflectance, axis=2).max() > 0  # colours
    assert not np.ptp(illumination, axis=2).any() and not np.ptp(relit, axis=2).any()  # grey


@pytest.mark.parametrize(
    "settings", [{"training": "join", "transposed": True}, {"training": "ignore_ienhance"}], ids=str
)
def test_the_other_modes_train_and_enhance(tmp_path: Path, settings: dict[str, Any]) -> None:
    make_data(tmp_path)
    assert run(tmp_path, "--mode", "train", num_epochs=1, **settings) == 0
    source, target = tmp_path / "data" / "eval" / "low" / "0.png", tmp_path / "enhanced.png"
    assert run(tmp_path, "--mode", "enhance", "--input", source, "--output", target) == 0
    assert pixels(target).shape == pixels(source).shape
    if settings["training"] == "ignore_ienhance":
        weights = str(tmp_path / "ckpt" / "best_model.pth")
        model = ms.load_model(weights, {}, rn.RetinexNet).model.cpu()
        with torch.no_grad():
            reflectance = to_uint8(model.decom(to_tensor(pixels(source))[None]).reflectance[0])
        assert np.abs(pixels(target).astype(int) - reflectance).max() <= 1


def test_the_demo_compares_it_with_gamma(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(simulated, "DEMO_TRAIN", ("coffee", "chelsea"))
    monkeypatch.setattr(simulated, "DEMO_TEST", ("rocket",))
    small = ["--set=image_size=32,32", "--set=num_epochs=1"]
    assert run(tmp_path, "--mode", "demo", *small) == 0
    (table,) = (tmp_path / "results").glob("demo_*/demo.csv")
    assert "ours" in table.read_text()
    assert list((tmp_path / "results").glob("demo_*/eval_*/images/rocket_0_reflectance.png"))


def test_a_misspelt_key_is_one_line(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "baselines.retinexnet",
        "--mode",
        "train",
        "--set",
        "transpose=true",
    ]
    done = subprocess.run(
        command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=120
    )
    assert_one_line_error(done.returncode, done.stderr, "transpose", "transposed")


def test_wrong_values_and_other_weights_are_one_line(
    trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for wrong, word in (
        ("training=both", "ignore_ienhance"),
        ("relight_lr=0", "relight_lr"),
        ("channels=1.5", "channels"),
    ):
        assert_one_line_error(
            run(trained, "--mode", "train", "--set", wrong), capsys.readouterr().err, word
        )
    assert_one_line_error(
        run(trained, "--mode", "evaluate", training="join"),
        capsys.readouterr().err,
        "training",
        "split",
    )
    assert_one_line_error(
        run(trained, "--mode", "evaluate", transposed=True), capsys.readouterr().err, "transposed"
    )


def test_the_recipe_names_only_known_keys() -> None:
    given = settings.read_all((rn.RetinexConfig, ms.Use), str(RECIPE), [], ())
    config = settings.build(rn.RetinexConfig, given, str(RECIPE))
    assert (config.image_size, config.crop_size, config.batch_size) == ([128, 128], 0, 4)
    assert (config.checkpoint_dir, config.log_dir) == ("checkpoints/retinexnet", "logs")
    published = {
        key.name: getattr(config, key.name) for key in dataclasses.fields(rn.RetinexConfig)
    }
    assert (
        published | {"training": "join", "channels": 64, "decom_lr": 0.001, "relight_lr": 0.001}
        == published
    )


def test_the_defaults_are_the_published_ones() -> None:
    config = rn.RetinexConfig()
    assert (config.training, config.channels, config.decom_lr, config.relight_lr) == (
        "split",
        64,
        1e-3,
        1e-3,
    )
    assert (config.num_epochs, config.save_freq) == (20, 10)
    assert (config.weight_decay, config.ema_decay) == (0, 0)  # Adam, and its own weights


@pytest.mark.parametrize(
    "wish", ["samples=4", "uncertainty=true", "temperature=1", "learning_rate=0.1"]
)
def test_a_key_that_changes_nothing_is_refused(
    wish: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert_one_line_error(
        run(tmp_path, "--mode", "train", "--set", wish),
        capsys.readouterr().err,
        wish.split("=")[0],
        "nothing",
    )


def test_such_a_key_in_a_shared_config_file_is_let_pass(tmp_path: Path) -> None:
    shared = tmp_path / "shared.json"
    shared.write_text('{"samples": 4, "uncertainty": true, "batch_size": 3}', encoding="utf-8")
    given = ["--mode", "train", "--config", str(shared)]
    kinds = (rn.RetinexConfig, ms.Use)
    read = commands.parse(given, ms.MODES, kinds, rn.RetinexNet, None)
    assert read.settings == {"batch_size": 3}


def test_help_names_its_own_commands(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        ms.main(["--help"], rn.RetinexNet)
    shown = capsys.readouterr().out
    assert (
        "with RetinexNet." in shown
        and "model_script.py" not in shown
        and "normalizing flow" not in shown
    )
    assert (
        "python -m baselines.retinexnet --mode train    --config baselines/retinexnet.json" in shown
    )
    assert "default: best_model.pth in checkpoint_dir" in " ".join(shown.split())
