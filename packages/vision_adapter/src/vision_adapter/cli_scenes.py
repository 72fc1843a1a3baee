"""The `vision-adapter scenes` command."""

from pathlib import Path


def scenes(
    out: Path,
    n: int = 1000,
    level: int = 2,
    skills: tuple[str, ...] = (),
    seed: int = 0,
    size: int = 64,
) -> None:
    """Draw scenes with questions whose answers are known; the same arguments give the same bytes.

    The folder can be given to `vision-adapter stage` and `curate` as data.

    Args:
        out: Folder to write: images/ and metadata.jsonl.
        n: Number of pictures.
        level: 1: one shape; 2: two to five shapes, a word, or a chart; 3: up to nine shapes, two words, or a
            chart whose heights are asked for.
        skills: What is asked for (default: everything that the level has): color, shape, presence, position,
            count, relation, word, chart.
        seed: Seed of scenes, questions and drawing.
        size: Side of the pictures in pixels.
    """
    from vision_adapter.scene_folder import write_scenes

    write_scenes(out, n, level, skills, seed, size)
    print(f"{n} scenes of level {level} in {out}")
