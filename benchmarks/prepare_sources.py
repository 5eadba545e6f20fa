"""Folders of links to train on several sources, split by scene, and the lists of stems.

    python benchmarks/prepare_sources.py --out OUT \\
        --pairs eliei=LOW:HIGH --pairs lol=LOW:HIGH --pairs sice=LOW:HIGH \\
        --well_exposed bsds=FOLDER --keep eliei=benchmarks/validation_scenes.txt

Makes {train,val}/NAME/{low,high} under OUT. Nothing is copied or downloaded. Pairs stay on one side
whose targets look alike (correlation of 16x16 thumbnails, as `scene_similarity`) or whose stems
agree before `_`. A well-exposed picture is its own `low`.

--keep names a file of stems, separated by commas, to hold out: those that earlier weights never
saw. The scenes they belong to are not split further.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from support.pairs import Pair, find_pairs, natural_key  # noqa: E402
from support.scenes import find_scenes  # noqa: E402
from support.settings import UserError, complain  # noqa: E402


def held_out(
    names: list[str],
    thumbnails: np.ndarray,
    wanted: int,
    seed: int,
    similarity: float,
    keep: set[str],
) -> list[str]:
    """Stems to validate on: `keep`, then whole scenes, small ones first of those drawn by the seed,
    until `wanted` are held.

    A scene with a member in `keep` is never split further: what is kept was split by whoever made
    the list.
    """
    scenes = find_scenes(thumbnails, similarity)
    merged: dict[str, set[int]] = {}
    for scene in scenes:  # stems such as SCENE_FRAME: a scene's frames share the part before `_`
        group = set(scene)
        for key in {names[i].rpartition("_")[0] for i in scene} - {""}:
            group |= merged.get(key, set()) | {
                i for i, name in enumerate(names) if name.rpartition("_")[0] == key
            }
        for key in {names[i].rpartition("_")[0] for i in group} - {""}:
            merged[key] = group
        if not any(names[i].rpartition("_")[0] for i in scene):
            merged[f"#{min(scene)}"] = group
    groups = sorted({tuple(sorted(group)) for group in merged.values()})
    held = set(keep)
    for place in np.random.default_rng(seed).permutation(len(groups)):
        stems = {names[i] for i in groups[place]}
        if len(held) < wanted and not stems & held and len(stems) <= max(4, wanted // 8):
            held |= stems
    return sorted(held, key=natural_key)


def link(folder: Path, stem: str, target: Path) -> None:
    """A link folder/stem.suffix to `target`."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{stem}{target.suffix}"
    path.unlink(missing_ok=True)
    path.symlink_to(target.resolve())


def read_stems(name: str, file: str, sources: dict[str, list[Pair]]) -> list[str]:
    """The stems in `file`, which must all be of the source `name`. Raises UserError."""
    if name not in sources or not Path(file).is_file():
        raise UserError(f"--keep {name}={file}: needs the name of a source, and a file of stems")
    found = Path(file).read_text(encoding="utf-8").strip().split(",")
    unknown = sorted(set(found) - {pair.name for pair in sources[name]}, key=natural_key)
    if unknown:
        raise UserError(f"--keep {name}={file}: {unknown[0]} is no pair of it; see the stems there")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", required=True)
    parser.add_argument("--pairs", action="append", default=[], metavar="NAME=LOW:HIGH")
    parser.add_argument("--well_exposed", action="append", default=[], metavar="NAME=FOLDER")
    parser.add_argument("--keep", action="append", default=[], metavar="NAME=FILE")
    parser.add_argument(
        "--held", type=int, default=44, help="pairs held out of each source, at least"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--similarity", type=float, default=0.85)
    arguments = parser.parse_args()
    out = Path(arguments.out)
    keep = {name: file for name, _, file in (text.partition("=") for text in arguments.keep)}
    try:
        sources = []
        for text in arguments.pairs:
            name, _, folders = text.partition("=")
            low, _, high = folders.partition(":")
            sources.append((name, find_pairs(low, high, "train")))
        for text in arguments.well_exposed:
            name, _, folder = text.partition("=")
            sources.append((name, find_pairs(folder, folder, "train")))
        kept = {name: read_stems(name, file, dict(sources)) for name, file in keep.items()}
    except UserError as error:
        return complain(error)
    for name, pairs in sources:
        thumbnails = np.stack(
            [
                np.asarray(Image.open(p.high).convert("RGB").resize((16, 16), Image.Resampling.BOX))
                for p in pairs
            ]
        )
        stems = [pair.name for pair in pairs]
        wanted, seed, similarity = arguments.held, arguments.seed, arguments.similarity
        mine = set(kept.get(name, ()))
        held = set(held_out(stems, thumbnails, wanted, seed, similarity, mine))
        for pair in pairs:
            part, other = ("val", "train") if pair.name in held else ("train", "val")
            for kind, path in (("low", pair.low), ("high", pair.high)):
                link(out / part / name / kind, pair.name, path)
                # of an earlier split
                (out / other / name / kind / f"{pair.name}{path.suffix}").unlink(missing_ok=True)
        (out / "splits").mkdir(exist_ok=True)
        for part in ("train", "val"):
            lines = [stem for stem in stems if (stem in held) == (part == "val")]
            (out / "splits" / f"{name}_{part}.txt").write_text("\n".join(lines) + "\n")
        targets = {thumbnails[stems.index(stem)].tobytes() for stem in held}
        print(
            f"{name}: {len(stems) - len(held)} to train on, {len(held)} held out ({len(targets)}"
            " different targets)"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
