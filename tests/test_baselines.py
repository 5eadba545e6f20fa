"""What the baselines share: the script's keys, of which each says which it has no use for."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

import model_script as ms
from baselines import SYSTEMS, classes

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
    config_class = classes(name)[1]
    with pytest.raises(SystemExit):
        ms.parse_command_line(["--help"], config_class)
    shown, _, last = capsys.readouterr().out.partition(
        "of the shared keys these change nothing here: "
    )
    assert last.strip().split(", ") == list(config_class.unused)
    for key in dataclasses.fields(config_class):
        assert (f"  {key.name} = " in shown) == (key.name not in config_class.unused)


@pytest.mark.parametrize("name", BASELINES)
def test_unused_keys_change_nothing(name: str) -> None:
    model_class, config_class = classes(name)
    plain = ms.apply_settings(config_class(), SMALL[name], "test")
    fields = {key.name: key for key in dataclasses.fields(plain)}
    others = {key: another(fields[key], getattr(plain, key)) for key in plain.unused}
    changed = ms.apply_settings(plain, others, "test")
    assert all(getattr(changed, key) != getattr(plain, key) for key in others)
    found = []
    for config in (plain, changed):
        torch.manual_seed(0)
        model = model_class(config)
        torch.manual_seed(1)
        losses = {term: float(value) for term, value in model.losses(batch()).items()}
        torch.manual_seed(2)
        found.append((losses, model.learning_rate_at(0.5, 20), model.eval().enhance(batch().low)))
    assert found[0][:2] == found[1][:2] and torch.equal(found[0][2], found[1][2])
