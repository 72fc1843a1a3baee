"""Makes the bundled clips once: spoken digits, and spoken questions about the bundled scenes.

    python -m evals.samples.make        # needs the optional extra "espeak"

Writes Ogg Opus files (16 kHz, mono) and clips.json beside this file. Voices are those that no
trainer uses. The result is deterministic up to the versions of espeak-ng and libopus.
"""

import json
import random
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
RATE = 16_000  # Hz
DIGIT_CLIPS = 48
QUESTION_CLIPS = 60


def main() -> None:
    """Write all clips; at the end print their total size."""
    for old in FOLDER.glob("*.ogg"):
        old.unlink()
    clips = {"digits": _digits(), "questions": _questions()}
    (FOLDER / "clips.json").write_text(json.dumps(clips, indent=1) + "\n")
    total = sum(path.stat().st_size for path in FOLDER.glob("*.ogg"))
    print(
        f"{len(clips['digits'])} clips of digits, {len(clips['questions'])} questions, {total / 1000:.0f} kB"
    )


def _digits() -> list[dict[str, Any]]:
    from core_llm.data.phrases import digits_phrase

    rows = []
    for i in range(DIGIT_CLIPS):
        rng = random.Random(f"evals spoken-digits {i}")
        rows.append(_clip(f"digits-{i:02d}.ogg", digits_phrase(rng), rng))
    return rows


def _questions() -> list[dict[str, Any]]:
    from core_llm.data.scenes import questions
    from evals.tasks.vision import bundled_scene

    rows = []
    for i in range(QUESTION_CLIPS):
        rng = random.Random(f"evals spoken-scenes {i}")
        question = questions(bundled_scene(i)[0], rng, 1)[0]
        row = _clip(f"question-{i:02d}.ogg", question.text, rng)
        rows.append(row | {"scene": i, "answer": question.answer, "skill": question.skill})
    return rows


def _clip(name: str, text: str, rng: random.Random) -> dict[str, Any]:
    """Speak `text` in a held-out voice and write it."""
    import soundfile
    import soxr

    from speech_adapter.synthesis import HELD_OUT_VOICES, speak

    voice = rng.choice(HELD_OUT_VOICES)
    speed, pitch = rng.randint(140, 190), rng.randint(35, 65)
    samples, rate = speak(text, voice, speed, pitch)
    samples = soxr.resample(samples, rate, RATE)
    # Compression level 0.92 is about 28 kbit/s here: small, and no word becomes unclear.
    with soundfile.SoundFile(
        FOLDER / name, "w", RATE, 1, format="OGG", subtype="OPUS", compression_level=0.92
    ) as file:
        file.write(samples)
    return {"file": name, "text": text, "voice": voice, "speed": speed, "pitch": pitch}


if __name__ == "__main__":
    main()
