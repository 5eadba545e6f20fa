"""benchmarks/peer_speed.py: exported networks are counted and timed, anything else is refused."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import model_script as ms
from support.checkpoints import save_checkpoint

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import peer_speed


class Shared(nn.Module):
    """One convolution, used twice under two names: 3 x 3 x 9 + 3 = 84 weights."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 3, 3, padding=1)
        self.again = self.first

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.again(self.first(x))


def export(path: Path, *size: int) -> Path:
    torch.export.save(torch.export.export(Shared().eval(), (torch.rand(1, 3, *size),)), path)
    return path


def test_peers_are_counted_and_timed_beside_ours(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = ms.Config(flow_channels=8, num_flow_blocks=1, thumbnail_size=32)
    model = ms.ConditionalFlow(config)
    content = {"model": model.state_dict(), "config": vars(config), "system": "ConditionalFlow"}
    save_checkpoint(tmp_path / "ours.pth", content)
    line = ["--checkpoint", str(tmp_path / "ours.pth"), "--rounds", "1"]
    line += ["--peer", f"Twice={export(tmp_path / 'peer.pt2', 400, 600)}"]
    assert peer_speed.main(line) == 0
    table = capsys.readouterr().out
    assert "| Twice | 84 | " in table
    ours = sum(p.numel() for p in model.parameters())
    assert f"| ours, float32 | {ours:,} | " in table


@pytest.mark.parametrize("what", ["nothing", "no name", "no program", "another size"])
def test_what_is_no_peer_is_refused_in_one_line(
    what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.pt2").write_text("no program")
    given = {
        "nothing": f"A={tmp_path / 'none.pt2'}",
        "no name": str(tmp_path / "text.pt2"),
        "no program": f"A={tmp_path / 'text.pt2'}",
    }
    text = given.get(what) or f"A={export(tmp_path / 'small.pt2', 40, 60)}"
    assert peer_speed.main(["--peer", text]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: --peer") and "\n" not in error
