"""A folder of drawn scenes: same bytes from one seed, readable by the trainers, nothing left on failure."""

import hashlib
import json
import random
from pathlib import Path

import numpy as np
import pytest
from PIL import Image as Pillow

from core_llm.data.levels import LEVELS, ask
from core_llm.data.scenes import Bar
from core_llm.errors import UserError
from vision_adapter import scene_folder
from vision_adapter.examples import load_examples
from vision_adapter.scene_folder import write_scenes
from vision_adapter.scenes import RGB, draw_layout, layout


def digest(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


@pytest.mark.parametrize("level", LEVELS)
def test_same_seed_same_bytes_and_a_longer_run_begins_with_a_shorter(tmp_path: Path, level: int) -> None:
    for name, n, seed in (("a", 9, 0), ("b", 9, 0), ("more", 12, 0), ("other", 9, 1)):
        write_scenes(tmp_path / name, n, level, seed=seed)
    first, again, more, other = (digest(tmp_path / name) for name in ("a", "b", "more", "other"))
    assert first == again and first != other
    pictures = {name: value for name, value in first.items() if name.endswith(".png")}
    assert len(set(pictures.values())) == 9 and pictures.items() <= more.items()


def test_trainers_read_the_folder(tmp_path: Path) -> None:
    write_scenes(tmp_path / "scenes", 8, 2, ("count", "relation"), size=96)
    examples = load_examples(str(tmp_path / "scenes"), split="all")
    assert len(examples) == 8 and all(len(example.turns) == 3 for example in examples)
    rows = [json.loads(line) for line in (tmp_path / "scenes" / "metadata.jsonl").read_text().splitlines()]
    assert [row["skills"][0] for row in rows] == ["count", "relation"] * 4
    assert Pillow.open(tmp_path / "scenes" / rows[0]["file_name"]).size == (96, 96)


def test_bad_arguments_say_what_there_is(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="known: 1, 2, 3"):
        write_scenes(tmp_path / "x", 1, 7)
    with pytest.raises(UserError, match="level 1 has no skill chart; it has color"):
        write_scenes(tmp_path / "x", 1, 1, ("chart",))
    with pytest.raises(UserError, match="--n must be at least 1"):
        write_scenes(tmp_path / "x", 0)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "keep.txt").write_text("mine")
    with pytest.raises(UserError, match="not empty"):
        write_scenes(tmp_path / "full", 1)
    assert (tmp_path / "full" / "keep.txt").read_text() == "mine"


def test_the_current_folder_may_be_the_target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    write_scenes(Path("."), 2, 1)
    assert len(load_examples(str(tmp_path / "here"), split="all")) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["here"]


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(scene_folder, "_scene", full)
    with pytest.raises(UserError, match="No space left"):
        write_scenes(tmp_path / "scenes", 3)
    assert not list(tmp_path.iterdir())


def test_bars_are_as_tall_as_their_heights_say() -> None:
    for seed in range(40):
        rng = random.Random(seed)
        scene, _ = ask(rng, 3 if seed % 2 else 2, "chart")
        plan = layout(scene, rng)
        assert all(box.left >= 0 and box.left + box.width <= 64 and box.top > 0 for box in plan.boxes)
        pixels = np.asarray(draw_layout(plan, rng, 256)).astype(int)
        unit = plan.grid[0] - plan.grid[1]
        for box in plan.boxes:
            assert isinstance(box.item, Bar)
            middle = pixels[:, int((box.left + box.width / 2) * 4)]
            inside = (np.abs(middle - np.array(RGB[box.item.color])).max(axis=-1) <= 24).sum() / 4
            assert inside / unit == pytest.approx(box.item.height, abs=0.2)
