"""Config keys, files, --set and the flags: everything is typed, checked, answered in one line."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from cli_tools import parsed
from conftest import ROOT

import model_script as ms
from support.checkpoints import RETIRED
from support.settings import UserError, allowed, build, read_all, read_settings, shown

PUBLISHED = {
    "device": "cpu",
    "use_amp": False,
    "num_workers": 0,
    "pin_memory": False,
    "batch_size": 1,
    "image_size": [128, 128],
    "flow_channels": 96,
    "num_flow_blocks": 2,
    "learning_rate": 2e-4,
    "val_freq": 1,
    "save_freq": 1,
    "num_epochs": 30,
}
KINDS = (ms.Config, ms.Use)
FIELDS = {key.name: key for kind in KINDS for key in dataclasses.fields(kind)}
DEFAULTS = {name: value for kind in KINDS for name, value in dataclasses.asdict(kind()).items()}


def apply(**settings: object) -> SimpleNamespace:
    """Every key of both kinds, under the settings."""
    typed = read_settings(KINDS, settings, "here")
    parts = [dataclasses.asdict(build(kind, typed, "here")) for kind in KINDS]
    return SimpleNamespace(**parts[0], **parts[1])


def refusal(**settings: object) -> str:
    """The one line with which the settings are refused."""
    with pytest.raises(UserError) as caught:
        apply(**settings)
    return str(caught.value)


def parse(*argv: str) -> dict[str, object]:
    """The checked settings of a command line in train mode."""
    return parsed(["--mode", "train", *argv]).settings


def parse_refusal(*argv: str) -> str:
    with pytest.raises(UserError) as caught:
        parsed(list(argv))
    assert caught.value.status == 2
    return str(caught.value)


# keys ---------------------------------------------------------------------------------------------


def test_the_published_recipe_has_its_twelve_keys() -> None:
    content = json.loads((ROOT / "cpu_train_config.json").read_text())
    assert content == PUBLISHED
    assert {name: type(value) for name, value in content.items()} == {
        n: type(v) for n, v in PUBLISHED.items()
    }
    config = apply(**content)
    assert {name: getattr(config, name) for name in PUBLISHED} == PUBLISHED


def test_defaults_pass_their_own_checks() -> None:
    assert read_settings(KINDS, DEFAULTS, "default") == DEFAULTS
    assert vars(apply(**DEFAULTS)) == vars(apply()) == DEFAULTS


def test_no_key_both_shapes_a_model_and_says_how_it_is_used() -> None:
    assert len(FIELDS) == sum(len(dataclasses.fields(kind)) for kind in KINDS)
    assert not RETIRED & {key.name for key in dataclasses.fields(ms.Config)}


@pytest.mark.parametrize("name", FIELDS)
def test_every_key_is_documented_and_bounded(name: str) -> None:
    key = FIELDS[name]
    assert len(key.metadata["meaning"]) > 10
    assert key.type in ("int", "float", "bool", "str", "list[int]", "list[float]", "list[dict]")
    low, high = key.metadata["low"], key.metadata["high"]
    if key.type in ("bool", "str", "list[dict]"):
        assert low is high is None
    else:
        assert low < high
        assert f"[{low:g}, {high:g}]" in allowed(key)


def test_defaults_are_not_shared() -> None:
    ms.Config().image_size.append(1)
    assert ms.Config().image_size == [128, 128]


def test_help_shows_every_key_with_default_meaning_and_range(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as caught:
        parsed(["--help"])
    assert caught.value.code == 0
    shown = capsys.readouterr().out
    solid = "".join(shown.split())  # lines are broken anywhere
    for name, key in FIELDS.items():
        told = f"{allowed(key)}; default {json.dumps(DEFAULTS[name])}"
        entry = f"--{name} VALUE {key.metadata['meaning']} ({told})"
        assert "".join(entry.split()) in solid
    for flag in ("--mode", "--config", "--set", "--checkpoint", "--resume", "--input", "--output"):
        assert flag in shown


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("bach_size", "batch_size"),
        ("learning_rat", "learning_rate"),
        ("imagesize", "image_size"),
        ("EPOCHS", None),
        ("", None),
    ],
)
def test_an_unknown_key_names_its_nearest_and_the_range(name: str, nearest: str | None) -> None:
    line = refusal(**{name: 2})
    assert line.startswith(f"here: unknown key {name}")
    named = line.split("nearest is ")[1].split(" ")[0]
    assert named == nearest if nearest else named in FIELDS
    assert f"({allowed(FIELDS[named])})" in line


SOURCE = {"name": "a", "low_dir": "l", "high_dir": "h", "val_low_dir": "l", "val_high_dir": "h"}
WRONG = {
    "batch_size": [
        *("one", "", 1.5, True, None, [1], {}, 0, 4097, -1, float("nan"), float("inf")),
        10**400,
        10**6000,  # from a checkpoint; JSON has none so long
    ],
    "learning_rate": [
        "fast",
        True,
        None,
        [0.1],
        0,
        1.01,
        -1e-3,
        float("nan"),
        float("-inf"),
        10**400,
    ],
    "flips": [0, 1, "yes", None, [True]],
    "device": ["gpu", "CPU", 0, None, True, ["cpu"]],
    "train_low_dir": [None, {}, ["a"]],
    "image_size": [
        128,
        "128;128",
        [],
        [128],
        [128, 128, 3],
        [128, 15],
        [8193, 128],
        [128, 64.5],
        [128, "wide"],
        [128, [64]],
        [True, 128],
        None,
        {},
    ],
    "crop_scales": [2.0, [], [1.1], [-0.1], [float("nan")], ["half"], None],
    "seed": [-1, 2**31],
    "sources": [
        "a",
        3,
        {},
        [1],
        [{}],
        [SOURCE | {"share": -1}],
        [SOURCE | {"hue": 1}],
        [SOURCE] * 2,
    ],
}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        pytest.param(name, value, id=f"{name}-{shown(value)[:20]}")
        for name, values in WRONG.items()
        for value in values
    ],
)
def test_wrong_values_are_refused_with_what_is_allowed(name: str, value: object) -> None:
    line = refusal(**{name: value})
    assert line.startswith("here: ")
    assert name in line
    key = FIELDS[name]
    told = [
        *(key.metadata["choices"] or ()),
        *([f"{key.metadata['high']:g}"] if key.metadata["high"] else ()),
    ]
    assert all(word in line for word in told)


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("batch_size", 4.0, 4),
        ("batch_size", 4096, 4096),
        ("learning_rate", 1, 1.0),
        ("learning_rate", 1e-8, 1e-8),
        ("image_size", [16, 8192.0], [16, 8192]),
        ("crop_scales", [0, 1], [0.0, 1.0]),
        ("train_low_dir", "a b/c=d", "a b/c=d"),
        # one parser reads the file and --set
        ("batch_size", "4", 4),
        ("learning_rate", "0.1", 0.1),
        ("flips", "false", False),
        ("image_size", "128,64", [128, 64]),
        ("image_size", [128, "64"], [128, 64]),
        ("crop_scales", 0.5, [0.5]),
        ("sources", [SOURCE], [{**SOURCE, "share": 1.0, "darken": 0.0}]),
        ("sources", json.dumps([SOURCE]), [{**SOURCE, "share": 1.0, "darken": 0.0}]),
    ],
)
def test_right_values_are_typed(name: str, value: object, expected: object) -> None:
    got = getattr(apply(**{name: value}), name)
    assert got == expected
    assert type(got) is type(expected)
    if isinstance(expected, list):
        assert [type(item) for item in got] == [type(item) for item in expected]


@pytest.mark.parametrize(
    "name", [name for name, key in FIELDS.items() if key.metadata["low"] is not None]
)
def test_both_ends_of_every_range(name: str) -> None:
    key = FIELDS[name]
    low, high = key.metadata["low"], key.metadata["high"]
    is_list = key.type.startswith("list")
    for inside, beyond in ((low, low - 1), (high, high + 1)):
        given = {name: [inside] if is_list else inside}
        assert read_settings(KINDS, given, "here") == given
        with pytest.raises(UserError, match=f"here: {name} must be "):
            read_settings(KINDS, {name: [beyond] if is_list else beyond}, "here")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (dict(image_size=[64]), "image_size"),
        (dict(image_size=[64, 64, 3]), "image_size"),
        (dict(crop_size=60), "crop_size"),
        (dict(crop_size=24), "crop_size"),
        (dict(thumbnail_size=40), "thumbnail_size"),
        (dict(flow_channels=20), "flow_channels"),
        (dict(global_channels=20), "global_channels"),
        (dict(val_low_dir="a"), "val_high_dir"),
        (dict(val_high_dir="a"), "val_low_dir"),
        (dict(val_fraction=0), "val_fraction"),
        (dict(nll_weight=0, l1_weight=0, ssim_weight=0, colour_weight=0), "colour_weight"),
        (dict(eval_size="small"), "eval_size"),
    ],
)
def test_keys_that_do_not_go_together(settings: dict[str, object], words: str) -> None:
    line = refusal(**settings)
    assert line.startswith("here: ") and words in line


@pytest.mark.parametrize(
    "settings",
    [
        dict(crop_size=32),
        dict(crop_size=0),
        dict(thumbnail_size=48),
        dict(flow_channels=8),
        dict(val_low_dir="a", val_high_dir="b", val_fraction=0),
        dict(nll_weight=0, l1_weight=0, ssim_weight=0),
        dict(l1_weight=0, ssim_weight=0, colour_weight=0),
    ],
)
def test_keys_that_go_together(settings: dict[str, object]) -> None:
    config = apply(**settings)
    assert all(getattr(config, name) == value for name, value in settings.items())


@pytest.mark.parametrize("widths", [(8, 0), (16, 8), (24, 40), (40, 24)])
def test_every_allowed_width_makes_a_model(widths: tuple[int, int]) -> None:
    config = ms.Config(flow_channels=widths[0], global_channels=widths[1], thumbnail_size=32)
    model = ms.ConditionalFlow(config).eval()
    with torch.no_grad():
        assert model.enhance(torch.rand(1, 3, 16, 16)).shape == (1, 3, 16, 16)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("auto", None),
        ("native", None),
        ("128,64", (128, 64)),
        ("[128, 64]", (128, 64)),
        ("16,8192", (16, 8192)),
    ],
)
def test_eval_size(text: str, expected: tuple[int, int] | None) -> None:
    assert ms.Use(eval_size=text).size_to_score(None) == expected


@pytest.mark.parametrize(
    "text",
    [
        "",
        "128",
        "128,64,3",
        "15,64",
        "64,8193",
        "64,",
        "a,b",
        "64.5,64",
        "-64,64",
        "²²,64",
        pytest.param("64," + 5000 * "9", id="endless"),
        "Auto",
    ],
)
def test_eval_size_refuses(text: str) -> None:
    with pytest.raises(UserError, match="eval_size must be auto, native or height,width"):
        ms.Use(eval_size=text)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (dict(), (128, 128)),
        (dict(image_size=[64, 96]), (64, 96)),
        (dict(crop_size=64), None),
        (dict(eval_size="native"), None),
        (dict(eval_size="48,80", crop_size=64), (48, 80)),
    ],
)
def test_size_to_score(settings: dict[str, object], expected: tuple[int, int] | None) -> None:
    config, use = (build(kind, settings, "here") for kind in KINDS)
    assert use.size_to_score(config) == expected


# config files -------------------------------------------------------------------------------------


def test_a_config_file_is_read_and_overridden_by_set(tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    path.write_text('{"batch_size": 4, "num_epochs": 3}')
    assert parse("--config", str(path)) == {"batch_size": 4, "num_epochs": 3}
    assert parse("--config", str(path), "--set", "batch_size=8", "--set", "seed=2") == {
        "batch_size": 8,
        "num_epochs": 3,
        "seed": 2,
    }


BAD_FILES = {
    "duplicate": (b'{"batch_size": 1, "seed": 2, "batch_size": 3}', "batch_size is given twice"),
    "not json": (b"batch_size = 1", "not valid JSON"),
    "empty": (b"", "not valid JSON"),
    "trailing comma": (b'{"batch_size": 1,}', "not valid JSON"),
    "list": (b'[{"batch_size": 1}]', "one JSON object"),
    "number": (b"3", "one JSON object"),
    "null": (b"null", "one JSON object"),
    "binary": (b"\xff\xfe\x00\x89PNG", "not a text file"),
    "unknown key": (b'{"bach_size": 1}', "the nearest is batch_size (an integer in [1, 4096])"),
    "wrong type": (b'{"batch_size": "one"}', "batch_size must be an integer in [1, 4096]"),
    "object": (b'{"batch_size": {}}', "batch_size must be an integer in [1, 4096], got a dict"),
    "null value": (b'{"device": null}', "device must be one of auto, cpu, cuda, mps, got null"),
    "NaN": (b'{"learning_rate": NaN}', "learning_rate must be a number"),
    "Infinity": (b'{"l1_weight": Infinity}', "l1_weight must be a number"),
    "overflow": (b'{"l1_weight": 1e999}', "l1_weight must be a number"),
    "long integer": (b'{"batch_size": 1' + b"0" * 400 + b"}", "batch_size must be an integer"),
    "endless integer": (b'{"batch_size": 1' + b"0" * 6000 + b"}", ""),
    "deep": (b"[" * 200_000, "not valid JSON"),
    "cross-key of use": (b'{"tile_size": 33}', "tile_size must be 0 or a multiple of 8"),
    "cross-key": (b'{"crop_size": 33}', "crop_size must be 0 or a multiple of 8"),
}


@pytest.mark.parametrize("kind", BAD_FILES)
def test_bad_config_files_are_named(tmp_path: Path, kind: str) -> None:
    content, words = BAD_FILES[kind]
    path = tmp_path / "c.json"
    path.write_bytes(content)
    line = parse_refusal("--mode", "train", "--config", str(path))
    assert line.startswith(f"{path}: ")
    assert words in line


def test_missing_config_files_are_named(tmp_path: Path) -> None:
    for path in (tmp_path / "none.json", tmp_path):
        assert str(path) in parse_refusal("--mode", "train", "--config", str(path))


# --set --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("batch_size=4", 4),
        ("batch_size=+4", 4),
        ("flips=true", True),
        ("flips=False", False),
        ("flips=TRUE", True),
        ("image_size=128,64", [128, 64]),
        ("image_size=[128, 64]", [128, 64]),
        ("crop_scales=1,0.5", [1, 0.5]),
        ("crop_scales=0.5", [0.5]),
        ("exposure_gain=+0.5", 0.5),
        ("learning_rate=2e-4", 2e-4),
        ("learning_rate=1", 1.0),
        ("checkpoint_dir=runs/a=b c", "runs/a=b c"),
        ("checkpoint_dir=123", "123"),
        ("checkpoint_dir=true", "true"),
        ("val_low_dir=", ""),
        ("eval_size=128,64", "128,64"),
        ("device=cpu", "cpu"),
    ],
)
def test_set_is_read_by_the_type_of_the_field(text: str, expected: object) -> None:
    name = text.partition("=")[0]
    value = parse("--set", text)[name]
    assert value == expected
    assert type(value) is type(expected)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("batch_size", "write KEY=VALUE"),
        ("batch_size=", "batch_size must be an integer in [1, 4096]"),
        ("batch_size=four", "batch_size must be an integer in [1, 4096]"),
        ("batch_size=true", "batch_size must be an integer"),
        pytest.param(
            "batch_size=1" + 400 * "0", "batch_size must be an integer", id="long integer"
        ),
        pytest.param(
            "batch_size=1" + 6000 * "0", "batch_size must be an integer", id="endless integer"
        ),
        pytest.param(
            "image_size=" + 50_000 * "[", "image_size must be a list of integers", id="deep"
        ),
        ("flips=yes", "flips must be true or false"),
        ("flips=1", "flips must be true or false"),
        ("learning_rate=nan", "learning_rate must be a number"),
        ("learning_rate=NaN", "learning_rate must be a number"),
        ("learning_rate=Infinity", "learning_rate must be a number"),
        ("image_size=128", "image_size must be height,width"),
        ("image_size=128x128", "image_size must be a list of integers"),
        ("image_size=", "image_size must be a list of integers"),
        ("device=gpu", "device must be one of auto, cpu, cuda, mps"),
        ("on_bad_file=ignore", "on_bad_file must be one of error, skip"),
        (
            "bach_size=2",
            "unknown key bach_size; the nearest is batch_size (an integer in [1, 4096])",
        ),
        ("=2", "unknown key"),
        ("crop_size=12", "crop_size must be 0 or a multiple of 8"),
    ],
)
def test_set_refuses_with_its_source(text: str, words: str) -> None:
    line = parse_refusal("--mode", "train", "--set", text)
    assert line.startswith("--set") and words in line


def test_the_last_set_wins() -> None:
    assert parse("--set", "seed=1", "--set", "seed=2") == {"seed": 2}


def test_set_may_mend_what_two_keys_need_together() -> None:
    assert parse("--set", "val_low_dir=a", "--set", "val_high_dir=b") == {
        "val_low_dir": "a",
        "val_high_dir": "b",
    }


def test_keys_that_do_nothing_here_are_taken_from_a_file_alone(tmp_path: Path) -> None:
    """A config file may be for several systems; what is typed is meant for this one."""
    path = tmp_path / "c.json"
    path.write_text('{"batch_size": 4, "nll_weight": 2}')
    assert read_all(KINDS, str(path), [], ["nll_weight"]) == {"batch_size": 4}
    with pytest.raises(UserError, match="--set nll_weight: changes nothing in this system"):
        read_all(KINDS, str(path), ["nll_weight=2"], ["nll_weight"])


# flags --------------------------------------------------------------------------------------------

NEEDED = {
    "train": [],
    "demo": [],
    "evaluate": [],
    "enhance": ["input", "output"],
}
TAKEN = {
    mode: [*names, *(["checkpoint"] if mode in ("evaluate", "enhance") else [])]
    for mode, names in NEEDED.items()
}
TAKEN["train"] = ["resume"]
FLAGS = ("checkpoint", "resume", "input", "output")


def flags(*names: str) -> list[str]:
    return [word for name in names for word in (f"--{name}", f"{name}.file")]


@pytest.mark.parametrize("mode", NEEDED)
def test_modes_take_what_they_need(mode: str) -> None:
    arguments = parsed(["--mode", mode, *flags(*TAKEN[mode])])
    assert {name: getattr(arguments, name) for name in FLAGS} == {
        name: f"{name}.file" if name in TAKEN[mode] else None for name in FLAGS
    }
    assert arguments.settings == {}


@pytest.mark.parametrize("mode", ["evaluate", "enhance"])
def test_the_released_weights_are_the_default(mode: str) -> None:
    arguments = parsed(["--mode", mode, *flags(*NEEDED[mode])])
    assert Path(arguments.checkpoint) == ROOT / "checkpoints" / "released.pth"
    assert Path(arguments.checkpoint).exists()


def test_another_systems_default_is_its_last_training() -> None:
    class Other(ms.System):
        pass

    argv = ["--mode", "evaluate", "--set", "checkpoint_dir=runs/other"]
    assert parsed(argv, Other).checkpoint == "runs/other/best_model.pth"


@pytest.mark.parametrize(
    ("mode", "name"), [(mode, name) for mode in NEEDED for name in FLAGS if name not in TAKEN[mode]]
)
def test_flags_that_do_nothing_are_refused(mode: str, name: str) -> None:
    line = parse_refusal("--mode", mode, *flags(*NEEDED[mode], name))
    assert f"--{name} does nothing in --mode {mode}" in line


@pytest.mark.parametrize(
    ("mode", "wish"),
    [
        ("train", "quality=90"),
        ("train", "scenes=4"),
        ("evaluate", "compile=true"),
        ("evaluate", "image_size=128,128"),
        ("enhance", "extra_metrics=niqe"),
        ("enhance", "crop_size=64"),
    ],
)
def test_keys_that_do_nothing_are_refused(mode: str, wish: str) -> None:
    line = parse_refusal("--mode", mode, *flags(*NEEDED[mode]), "--set", wish)
    assert f"{wish.partition('=')[0]} does nothing in --mode {mode}" in line


def test_a_config_file_and_the_demo_may_have_any_key(tmp_path: Path) -> None:
    config = tmp_path / "all.json"
    config.write_text('{"scenes": "4", "samples": 2, "compile": true, "crop_size": 64}')
    for mode in NEEDED:
        given = parsed(["--mode", mode, *flags(*NEEDED[mode]), "--config", str(config)]).settings
        assert given["samples"] == 2
    assert parsed(["--mode", "demo", "--set", "crop_size=64"]).settings == {"crop_size": 64}


@pytest.mark.parametrize(
    ("mode", "name"), [(mode, name) for mode in NEEDED for name in NEEDED[mode]]
)
def test_missing_flags_are_named(mode: str, name: str) -> None:
    line = parse_refusal(
        "--mode", mode, *flags(*(other for other in NEEDED[mode] if other != name))
    )
    assert f"--mode {mode} needs --{name}" in line


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "--mode"),
        (["--mode", "fly"], "fly"),
        (["--mode", "train", "--bogus"], "--bogus"),
        (["--mode", "train", "--res", "x"], "--res"),  # no abbreviations
        (["--mode", "train", "--config"], "--config"),
        (["--mode", "train", "extra"], "extra"),
    ],
)
def test_bad_command_lines(argv: list[str], words: str) -> None:
    line = parse_refusal(*argv)
    assert words in line and "--help" in line


def test_a_key_can_be_an_option_of_its_own() -> None:
    direct = parsed(
        ["--mode", "train", "--batch_size", "3", "--image_size", "64,48", "--flips=false"]
    )
    sets = ("batch_size=3", "image_size=64,48", "flips=false")
    given = parsed(["--mode", "train", *(word for text in sets for word in ("--set", text))])
    assert direct.settings == given.settings
    assert direct.settings == {"batch_size": 3, "image_size": [64, 48], "flips": False}
    with pytest.raises(UserError, match="batch_size"):
        parsed(["--mode", "train", "--batch_size", "0"])
