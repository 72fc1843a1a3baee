"""Writes drawn scenes as a folder of pictures with a table: data for any trainer and for people to see."""

import json
import os
import random
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from core_llm.data.levels import LEVELS, ask
from core_llm.errors import UserError
from vision_adapter.samples import ordered_description
from vision_adapter.scenes import draw

TABLE = "metadata.jsonl"


def write_scenes(
    out: Path, n: int, level: int = 2, skills: Sequence[str] = (), seed: int = 0, size: int = 64
) -> None:
    """n pictures with three questions each under `out`; the same arguments give the same bytes.

    out/images/000000.png, ... and out/metadata.jsonl, whose rows hold pairs of question and answer ("turns"),
    the skill of each, a description, and the symbols ("scene"). The skills take turns (default: all of the
    level). Nothing is left under `out` when it fails.
    Raises `UserError` for a level, skill, number or size that cannot be, and where `out` holds files already.
    """
    chosen, out = _checked(n, level, skills, size), out.absolute()  # "." has no name to make another from
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: is there already and not empty; give another --out, or remove it")
    from tqdm import tqdm

    unfinished = out.with_name(f"{out.name}.{os.getpid()}.tmp")
    try:
        (unfinished / "images").mkdir(parents=True)
        with open(unfinished / TABLE, "w", encoding="utf-8") as table:
            for i in tqdm(range(n), desc="scenes", unit="picture"):
                row = _scene(unfinished, i, level, chosen[i % len(chosen)], chosen, seed, size)
                table.write(json.dumps(row) + "\n")
        if out.exists():
            out.rmdir()
        os.replace(unfinished, out)
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error})") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _checked(n: int, level: int, skills: Sequence[str], size: int) -> list[str]:
    if level not in LEVELS:
        raise UserError(f"unknown level {level}; known: {', '.join(map(str, LEVELS))}")
    known = LEVELS[level].skills
    unknown = [skill for skill in skills if skill not in known]
    if unknown:
        raise UserError(f"level {level} has no skill {', '.join(unknown)}; it has {', '.join(known)}")
    if n < 1 or not 32 <= size <= 4096:
        raise UserError("--n must be at least 1 and --size between 32 and 4096 pixels")
    return list(skills or known)


def _scene(
    folder: Path, i: int, level: int, skill: str, chosen: Sequence[str], seed: int, size: int
) -> dict[str, Any]:
    rng = random.Random(f"scenes {seed} {level} {i}")  # so that a longer run begins with a shorter one's rows
    scene, asked = ask(rng, level, skill, 3, chosen)
    name = f"images/{i:06}.png"
    draw(scene, rng, size).save(folder / name)
    return {
        "id": f"scene-{level}-{seed}-{i}",
        "file_name": name,
        "turns": [(question.text, question.answer) for question in asked],
        "skills": [question.skill for question in asked],
        "description": ordered_description(scene),
        "level": level,
        "scene": asdict(scene),
    }
