"""What the baselines share: the script's keys, of which each says which it has no use for; and
that every recipe is one."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT

import model_script as ms
from baselines import SYSTEMS, system_class
from support import settings
from support.runtime import choose_runtime

BASELINES = [name for name in SYSTEMS if name != "ConditionalFlow"]
SMALL: dict[str, dict[str, Any]] = {
    "RetinexNet": {"channels": 4},
    "UPTFlow": {
        "encoder_width": 4,
        "encoder_blocks": 1,
        "refinement_blocks": 1,
        "flow_steps": 1,
        "flow_channels": 8,
    },
    "AnlightenDiff": {"width": 8, "multipliers": [1, 2], "timesteps": 4},
}


def batch() -> ms.Sample:
    """Two pictures of 32x32."""
    high = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    return ms.Sample(0.1 * high, high, high, torch.tensor([ms.WHOLE_BOX] * 2))


def kinds_of(system: type[ms.System]) -> tuple[type, type]:
    """The dataclasses whose keys the system's command line takes."""
    return system.config_class, ms.Use


def keys_of(chosen: Any) -> tuple[dataclasses.Field, ...]:
    """The keys of a config, or of a use."""
    return dataclasses.fields(chosen)


def another(key: dataclasses.Field, value: Any) -> Any:
    """An allowed value that differs."""
    if key.metadata["choices"]:
        return next(choice for choice in key.metadata["choices"] if choice != value)
    if isinstance(value, bool):
        return not value
    if key.name == "thumbnail_size":
        return 64
    if key.name == "flow_channels":
        return 8
    highest = key.metadata["high"]  # above 0, so that some loss stays
    return type(value)(key.metadata["low"] if value == highest else highest)


@pytest.mark.parametrize("name", BASELINES)
def test_help_lists_every_key_that_does_something(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    system = system_class(name)
    with pytest.raises(SystemExit):
        ms.parse_command_line(["--help"], system)
    shown = capsys.readouterr().out
    known = [key.name for kind in kinds_of(system) for key in dataclasses.fields(kind)]
    assert set(system.unused) < set(known)
    for key in known:
        assert (f"  --{key} VALUE" in shown) == (key not in system.unused), key


@pytest.mark.parametrize("name", BASELINES)
def test_unused_keys_change_nothing(name: str) -> None:
    system = system_class(name)
    plain = [settings.build(kind, SMALL[name], "test") for kind in kinds_of(system)]
    fields = {key.name: (key, getattr(one, key.name)) for one in plain for key in keys_of(one)}
    others = {key: another(*fields[key]) for key in system.unused}
    given = SMALL[name] | settings.read_settings(kinds_of(system), others, "test")
    changed = [settings.build(kind, given, "test") for kind in kinds_of(system)]
    assert all(given[key] == others[key] != fields[key][1] for key in others)
    assert plain[0] != changed[0] and plain[1] != changed[1]
    runtime = choose_runtime("cpu", mixed=False)
    dark = np.random.default_rng(0).integers(0, 40, (24, 32, 3), dtype=np.uint8)
    found = []
    for config, use in (plain, changed):
        torch.manual_seed(0)
        model = system(config)
        torch.manual_seed(1)
        losses = {term: float(value) for term, value in model.losses(batch()).items()}
        torch.manual_seed(2)
        enhanced = model.eval().enhance(batch().low)
        best = ms.enhance_pixels(model, dark, use, runtime).best
        found.append((losses, model.learning_rate_at(0.5, 20), enhanced, best))
    assert found[0][:2] == found[1][:2] and torch.equal(found[0][2], found[1][2])
    assert np.array_equal(found[0][3], found[1][3])


# recipes ------------------------------------------------------------------------------------------

RECIPES = {recipe: name for name, (*_, recipe) in SYSTEMS.items()}
RECIPES |= {f"configs/{path.name}": "ConditionalFlow" for path in (ROOT / "configs").iterdir()}


def recipe_of(path: str) -> dict[str, Any]:
    """What a recipe says, read as its system reads it."""
    system = system_class(RECIPES[path])
    return settings.read_all(kinds_of(system), str(ROOT / path), [], system.unused)


@pytest.mark.parametrize("path", RECIPES)
def test_a_recipe_names_only_keys_of_its_system_that_do_something(path: str) -> None:
    assert recipe_of(path).keys() == settings.read_config_file(str(ROOT / path)).keys()


def test_every_json_file_is_the_recipe_of_a_system() -> None:
    there = {path.name for path in (ROOT / "baselines").glob("*.json")}
    assert {f"baselines/{name}" for name in there} < RECIPES.keys()
    stages = {f"configs/november_stage{number}.json" for number in (1, 2, 3, 4)}
    assert stages | {"configs/comparison_ours.json", "cpu_train_config.json"} < RECIPES.keys()


def test_each_stage_of_november_starts_from_the_one_before() -> None:
    stages = [recipe_of(f"configs/november_stage{number}.json") for number in (1, 2, 3, 4)]
    for before, after in itertools.pairwise(stages):
        assert after["init_from"] == f"{before['checkpoint_dir']}/best_model.pth"
    places = ("checkpoint_dir", "log_dir")
    assert len({stage[key] for stage in stages for key in places}) == 8
    first = {key: value for key, value in stages[0].items() if key not in places}
    assert first == recipe_of("cpu_train_config.json")
