"""Training on several sources: their keys, their shares of the batches, what is made of a pair, the
losses for it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from cli_tools import main_with, make_data, parsed, tiny_config
from conftest import smooth_scene, write_pairs

import model_script as ms
from support.metrics import validation_means
from support.pairs import training_data
from support.pictures import srgb_to_linear
from support.settings import UserError, build, read_settings, typed_sources
from support.simulated import as_jpeg, by_lamplight, darkened, mix_light, paste_bright, with_night

pytestmark = pytest.mark.usefixtures("one_thread")


def two_sources(folder: Path, counts: tuple[int, int] = (3, 5)) -> list[dict[str, object]]:
    """Two sources below `folder`, whose stems are the same, each validated on its own pairs."""
    found = []
    for name, count in zip(("near", "far"), counts, strict=True):
        low, high = write_pairs(folder / name, count, size=(64, 64))
        dirs = dict(
            low_dir=str(low), high_dir=str(high), val_low_dir=str(low), val_high_dir=str(high)
        )
        found.append(dict(name=name, share=1.0, **dirs))
    return found


def config_of(folder: Path, **settings: object) -> ms.Config:
    small = dict(sources=two_sources(folder), thumbnail_size=32, image_size=[32, 32])
    return build(ms.Config, read_settings([ms.Config], {**small, **settings}, "test"), "test")


def samples_of(config: ms.Config) -> ms.TrainingSamples:
    store, training, _, _ = training_data(config, ms.Use())
    return ms.TrainingSamples(store, training, config)


# the key ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"shape": 1}, 'unknown key "shape" in "a"'),
        ({"share": -1}, "share of"),
        ({"share": True}, "share of"),
        ({"darken": 1.5}, "darken of"),
        ({"low_dir": ""}, "low_dir of"),
        ({"name": "a/b"}, "name of"),
        ({"val_high_dir": ""}, "must be given together"),
        ({"share": 0}, "one share must be above 0"),
    ],
)
def test_sources_say_what_is_wrong(change: dict[str, object], complaint: str) -> None:
    good = dict(name="a", low_dir="l", high_dir="h", val_low_dir="v", val_high_dir="w")
    assert typed_sources([good], "config")[0]["share"] == 1.0
    with pytest.raises(UserError, match=complaint):
        typed_sources([good | change], "config: sources")


def test_sources_must_be_a_list_of_objects_with_names_of_their_own() -> None:
    good = dict(name="a", low_dir="l", high_dir="h", val_low_dir="v", val_high_dir="w")
    for bad, complaint in (
        ("a", "list of objects"),
        ([1], "list of objects"),
        ([good, good], "one name"),
    ):
        with pytest.raises(UserError, match=complaint):
            typed_sources(bad, "config: sources")


# the plan -----------------------------------------------------------------------------------------


def test_source_plan_draws_by_share_and_repeats_none_before_all_were_seen() -> None:
    config = ms.Config(sources=[{}], batch_size=4, epoch_samples=200, seed=3)
    plan = ms.source_plan([range(10), range(10, 30)], [3.0, 1.0], config, 5)
    drawn = [draw for batch in plan for draw in batch]
    assert plan == ms.source_plan([range(10), range(10, 30)], [3.0, 1.0], config, 5)
    assert plan != ms.source_plan([range(10), range(10, 30)], [3.0, 1.0], config, 6)
    assert len(plan) == 50 == ms.epoch_steps(30, config) and len(drawn) == 200
    counts = np.bincount([draw.pair for draw in drawn], minlength=30)
    assert (counts[:10] == 15).all() and counts[10:].sum() == 50 and set(counts[10:]) == {2, 3}
    assert len({(draw.pair, draw.turn) for draw in drawn}) == 200  # so that each is augmented anew


def test_source_plan_puts_more_whole_pictures_in_a_batch() -> None:
    config = ms.Config(
        sources=[{}], batch_size=2, whole_batch=8, whole_share=0.4, epoch_samples=2000
    )
    plan = ms.source_plan([range(10), range(10, 30)], [1.0, 0.0], config, 0)
    sizes = {(len(batch), batch[0].whole) for batch in plan}
    assert sizes == {(2, False), (8, True)} and len(plan) == 1000
    assert np.mean([batch[0].whole for batch in plan]) == pytest.approx(0.4, abs=0.05)
    assert all(draw.pair < 10 for batch in plan for draw in batch)


# what is made of a pair ---------------------------------------------------------------------------


def test_identity_samples_show_high_as_it_is(tmp_path: Path) -> None:
    samples = samples_of(
        config_of(tmp_path, identity_share=1.0, exposure_gain=2.0, channel_gain=0.5)
    )
    for index in range(8):
        sample = samples[ms.Draw(0, index)]
        assert torch.equal(sample.low, sample.high)
    plain = samples_of(config_of(tmp_path, exposure_gain=0.0))[ms.Draw(0, 1)]
    assert float((plain.low - plain.high).abs().mean()) > 0.1


def test_a_share_of_zero_changes_nothing_of_a_sample(tmp_path: Path) -> None:
    one, other = (samples_of(config_of(tmp_path, paste_share=share)) for share in (0.0, 0.5))
    same = [all(map(torch.equal, one[ms.Draw(0, i)], other[ms.Draw(0, i)])) for i in range(8)]
    assert any(same) and not all(same)
    again = one[ms.Draw(0, 2, turn=1)]
    assert not all(
        a.shape == b.shape and torch.equal(a, b)
        for a, b in zip(one[ms.Draw(0, 2)], again, strict=True)
    )


def test_paste_bright_takes_parts_of_high_and_leaves_the_rest() -> None:
    high = np.full((64, 96, 3), 40, np.uint8)
    high[:32] = 230
    low = (high // 10).astype(np.uint8)
    found = [paste_bright(low, high, np.random.default_rng(seed)) for seed in range(20)]
    assert all(picture.shape == low.shape and picture.dtype == np.uint8 for picture in found)
    bright = [
        picture for picture in found if (picture[4:20] == 230).all() and (picture[44:] == 4).all()
    ]
    assert len(bright) > 5  # the rest are rectangles
    assert all(
        (np.minimum(low, high) <= picture).all() and (picture <= high).all() for picture in found
    )


def test_darkened_is_dark_noisy_and_in_order() -> None:
    scene = smooth_scene(1, 64, 64)
    found = [darkened(scene, np.random.default_rng(seed)) for seed in range(60)]
    ratios = [
        srgb_to_linear(low / 255).mean() / srgb_to_linear(high / 255).mean() for low, high in found
    ]
    assert 0 < min(ratios) < 1 / 24 and 0.2 < max(ratios) < 0.8
    assert all(np.corrcoef(low.ravel(), high.ravel())[0, 1] > 0.5 for low, high in found)
    kept = sum(np.array_equal(high, scene) for _, high in found)
    assert 12 < kept < 36  # the others are under a lamp, or partly black


def test_lamps_take_blue_first_and_night_is_black() -> None:
    light = np.full((64, 64, 3), 0.5, np.float32)
    for seed in range(20):
        red, green, blue = by_lamplight(light, np.random.default_rng(seed))[0, 0]
        assert max(red, blue) == 0.5 and (
            blue <= green <= red or blue > green > red or green < red < blue
        )
        dark = with_night(light, np.random.default_rng(seed))
        assert (
            0.05 < (dark < 0.01).mean() < 0.85
            and (dark <= 0.5).all()
            and (dark > 0.45).mean() > 0.05
        )


def test_mix_light_is_a_double_exposure() -> None:
    black, white = np.zeros((4, 4, 3), np.uint8), np.full((4, 4, 3), 255, np.uint8)
    assert (mix_light(black, white, 1.0) == 0).all() and (mix_light(black, white, 0.0) == 255).all()
    assert (mix_light(black, white, 0.5) == 188).all()  # half the light, not half the level
    assert (mix_light(white, white, 0.3) == 255).all()


def test_darkening_and_mixup_stay_within_their_source(tmp_path: Path) -> None:
    sources, still = (
        two_sources(tmp_path),
        dict(window_min=1.0, flips=False, exposure_gain=0.0, channel_gain=0.0),
    )
    plain = samples_of(config_of(tmp_path, **still))
    dark = samples_of(
        config_of(tmp_path, sources=[sources[0], sources[1] | {"darken": 1.0}], **still)
    )
    mixed = samples_of(config_of(tmp_path, mixup_share=1.0, **still))
    assert plain.members == {"near": [0, 1, 2], "far": [3, 4, 5, 6, 7]}
    for index in range(8):
        one, other, third = (samples[ms.Draw(0, index)] for samples in (plain, dark, mixed))
        assert torch.equal(one.low, other.low) == (index < 3)
        levels = [
            float(sample.high.mean())
            for sample in (plain[ms.Draw(0, i)] for i in plain.members["near"])
        ]
        if index < 3:
            assert min(levels) - 0.02 <= float(third.high.mean()) <= max(levels) + 0.02


def test_a_jpeg_file_leaves_blocks_in_low_alone(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(90, 110, (64, 64, 3), dtype=np.uint8)
    coded = as_jpeg(noise, np.random.default_rng(1)).astype(int)
    assert coded.shape == noise.shape and 1 < np.abs(coded - noise).mean() < 10
    steps = np.abs(np.diff(coded.sum(2), axis=1)).mean(0)  # between neighbouring columns
    assert steps[7::8].mean() > 1.05 * np.delete(steps, np.s_[7::8]).mean()
    still = dict(window_min=1.0, flips=False, exposure_gain=0.0, channel_gain=0.0)
    plain = samples_of(config_of(tmp_path, **still))
    coded_samples = samples_of(config_of(tmp_path, jpeg_share=1.0, **still))
    half = samples_of(config_of(tmp_path, jpeg_share=0.5, **still))
    changed = 0
    for index in range(8):
        one, other, third = (s[ms.Draw(0, index)] for s in (plain, coded_samples, half))
        assert torch.equal(one.high, other.high) and not torch.equal(one.low, other.low)
        assert not torch.equal(one.thumbnail, other.thumbnail)
        assert float((one.low - other.low).abs().mean()) < 0.05
        changed += not torch.equal(one.low, third.low)
    assert 0 < changed < 8


# losses -------------------------------------------------------------------------------------------


def test_gt_mean_weight_is_0_for_equal_and_1_for_distant_means() -> None:
    high = torch.rand(1, 3, 16, 16) * 0.5 + 0.2
    weights = [float(ms.gt_mean_weight(high * gain, high, 0.1)) for gain in (1.0, 1.1, 1.2, 2.0)]
    assert weights[0] == pytest.approx(0, abs=1e-6) and weights[-1] == 1.0
    assert 0.05 < weights[1] < weights[2] < 1


def test_gt_mean_frees_the_brightness_and_keeps_the_rest() -> None:
    high = torch.rand(2, 3, 16, 16) * 0.5 + 0.2
    config = dataclasses.replace(ms.Config(), gt_mean_spread=0.1)
    off = high * 1.05
    plain, free = (float(ms.picture_losses(off, high, c)["l1"]) for c in (ms.Config(), config))
    assert free < 0.1 * plain
    noisy = high + 0.1 * torch.randn_like(high)
    plain, free = (float(ms.picture_losses(noisy, high, c)["l1"]) for c in (ms.Config(), config))
    assert free > 0.8 * plain


def test_the_likelihood_is_left_out_of_most_steps() -> None:
    model = ms.ConditionalFlow(ms.Config(flow_channels=8, thumbnail_size=32, nll_every=3))
    low, high, thumbnail = torch.rand(3, 1, 3, 32, 32)
    batch = ms.Sample(low, high, thumbnail, torch.tensor([ms.WHOLE_BOX]))
    with_it = []
    for step in range(6):
        model.begin_step(0.0, step)
        with_it.append("nll" in model.losses(batch))
    assert with_it == [True, False, False] * 2


def test_the_global_branch_has_a_rate_of_its_own() -> None:
    model = ms.ConditionalFlow(ms.Config(flow_channels=8, thumbnail_size=32, global_rate=0.1))
    groups = model.make_optimizer().param_groups
    slow = [group for group in groups if group.get("lr_scale", 1.0) == 0.1]
    assert [len(group["params"]) for group in slow] == [len(list(model.global_branch.parameters()))]
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))


# the run ------------------------------------------------------------------------------------------


def test_validation_means_weigh_sources_alike() -> None:
    def score(value: float) -> dict[str, float]:
        return {"psnr": value, "psnr_gt_mean": value + 2, "ssim": 0.5}

    means, chosen = validation_means([("a", score(20)), ("a", score(22)), ("b", score(30))])
    assert means["a/psnr"] == 21 and means["b/psnr_gt_mean"] == 32
    assert chosen == pytest.approx(((21 + 1 + 10) + (30 + 1 + 10)) / 2)
    alone = {"psnr": 7.0, "ssim": 0.1, "psnr_gt_mean": 9.0}
    assert validation_means([("", alone)]) == (alone, 7.0)


def test_trains_and_resumes_on_two_sources(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = make_data(tmp_path / "data", train=4)
    extra = dict(
        sources=two_sources(tmp_path / "s"),
        crop_size=32,
        whole_share=0.5,
        whole_batch=2,
        val_pairs=2,
    )
    more = dict(
        epoch_samples=6,
        identity_share=0.2,
        paste_share=0.3,
        global_rate=0.5,
        nll_every=2,
        gt_mean_spread=0.1,
    )
    settings = (
        tiny_config(data) | extra | more | dict(num_epochs=2, checkpoint_dir=str(tmp_path / "c"))
    )
    settings |= dict(
        log_dir=str(tmp_path / "l"), results_dir=str(tmp_path / "r"), keep_checkpoints=9
    )
    assert main_with("train", settings) == 0
    shown = capsys.readouterr()
    assert "near/psnr" in shown.err + shown.out and "far/bits_per_dim" in shown.err + shown.out
    whole = torch.load(tmp_path / "c" / "checkpoint_epoch_2.pth", weights_only=True)
    first = tmp_path / "c" / "checkpoint_epoch_1.pth"
    place = ["--set", f"checkpoint_dir={tmp_path / 'd'}", "--set", f"log_dir={tmp_path / 'm'}"]
    assert ms.main(["--mode", "train", "--resume", str(first), *place]) == 0
    again = torch.load(tmp_path / "d" / "checkpoint_epoch_2.pth", weights_only=True)
    assert all(torch.equal(whole["model"][name], again["model"][name]) for name in whole["model"])
    assert json.dumps(whole["config"]["sources"]) == json.dumps(again["config"]["sources"])


def test_sources_can_be_an_option_and_need_no_split(tmp_path: Path) -> None:
    sources = two_sources(tmp_path)
    given = parsed(["--mode", "train", "--sources", json.dumps(sources), "--val_fraction", "0"])
    assert [item["name"] for item in given.settings["sources"]] == ["near", "far"]
    with pytest.raises(UserError, match="list of objects"):
        parsed(["--mode", "train", "--sources", "5"])


def test_a_missing_folder_names_its_source(tmp_path: Path) -> None:
    sources = two_sources(tmp_path)
    sources[1]["low_dir"] = "nowhere"
    with pytest.raises(UserError, match=r"sources: far: .*nowhere"):
        samples_of(config_of(tmp_path, sources=sources))


def test_the_likelihood_alone_must_be_computed_every_step() -> None:
    alone = dict(l1_weight=0.0, ssim_weight=0.0, colour_weight=0.0)
    ms.Config(**alone)
    with pytest.raises(UserError, match="nll_weight with nll_every=1"):
        ms.Config(**alone, nll_every=2)
