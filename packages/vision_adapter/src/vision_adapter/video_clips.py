"""Short clips of the project's own shapes in motion, with a question whose answer is in their order."""

import random
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image as Pillow

from core_llm.data.scenes import sample_scene
from core_llm.errors import UserError
from vision_adapter.scenes import draw_layout, layout

QUESTION = "which way does the shape move?"
DIRECTIONS = ("left", "right")
RATE = 8  # frames per second of a written clip


@dataclass(frozen=True, eq=False)
class MovingShape:
    """Frames in order, and the direction in which the one shape moves.

    Played backwards it is a clip of the other direction, so no single frame tells anything about it.
    """

    frames: list[Pillow.Image]
    direction: str


def moving_shape(rng: random.Random, n_frames: int = 4, size: int = 64) -> MovingShape:
    """A shape that crosses 24 to 40 64ths of the picture's side, evenly, in either direction."""
    plan = layout(sample_scene(rng, "single"), rng)
    box = plan.boxes[0]
    room = 64 - box.width
    way = min(rng.uniform(24, 40), room)
    first = rng.uniform(0, room - way)
    places = [first + way * i / max(1, n_frames - 1) for i in range(n_frames)]
    direction = rng.choice(DIRECTIONS)
    look = rng.random()  # one colour and background for all frames
    drawn = [
        draw_layout(replace(plan, boxes=(replace(box, left=left),)), random.Random(look), size)
        for left in (places if direction == "right" else places[::-1])
    ]
    return MovingShape(drawn, direction)


def write_video(frames: list[Pillow.Image], path: Path) -> None:
    """Frames of one size as an MPEG-4 file of `RATE` frames per second; needs PyAV."""
    try:
        import av
    except ImportError as error:
        raise UserError("writing videos needs PyAV: install it (`uv pip install av`)") from error
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=RATE)
        stream.width, stream.height = frames[0].size
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_image(frame)))
        container.mux(stream.encode(None))
