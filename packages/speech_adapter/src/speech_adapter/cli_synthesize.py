"""The command `speech-adapter synthesize`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import tyro


def synthesize(
    source: Annotated[str, tyro.conf.Positional],
    out: Path,
    field: str = "",
    voice: str = "train",
    language: str = "en",
    speed: tuple[int, int] = (120, 220),
    pitch: tuple[int, int] = (15, 85),
    repeats: int = 1,
    held_out: float = 0.05,
    format: str = "flac",
    split: str = "all",
    limit: int = 0,
    data_root: Path | None = None,
    workers: int = 2,
    seed: int = 0,
) -> None:
    """Read texts aloud into a folder that `stage` trains on; the same command continues an interrupted run.

    The same seed gives the same texts in the same voices, and with FLAC the same bytes.

    Args:
        source: A .txt (a text per line), .jsonl or .csv file, a registered dataset, or the project's own
            phrases or questions.
        out: Folder for audio/ and metadata.jsonl.
        field: Which field of a row is read aloud (empty: text, prompt, question, sentence or context).
        voice: train (espeak's training voices), held-out (voices that none of those is), espeak voices with
            commas such as en-us+f3,en-gb, or hf: with a text-to-speech model: a hub id or a folder.
        language: Language code of the texts, such as de.
        speed: Slowest and fastest, words per minute.
        pitch: Lowest and highest, 0 to 99.
        repeats: Recordings of each text, in different voices.
        held_out: With train: part of the texts that held-out voices say, as the split dev.
        format: flac or ogg.
        split: Of a registered dataset: train, dev or all.
        limit: Only so many texts (0: all; of the project's own, 1000).
        data_root: Folder with local copies of the public datasets.
        workers: Processes that speak at the same time.
        seed: Of voices, speeds, pitches, and of the project's own texts.
    """
    from speech_adapter.synthesize import Settings
    from speech_adapter.synthesize import synthesize as run
    from speech_adapter.texts import load_texts

    settings = Settings(
        voice, language, speed, pitch, repeats=repeats, held_out=held_out, format=format, seed=seed
    )
    texts = load_texts(source, field, data_root, split, limit, seed)
    counts = run(texts, out, settings, workers)
    print(f"{counts['rows']} recordings of {len(texts)} texts in {out}")
    if counts["silent"]:
        print(f"{counts['silent']} lines gave no sound: {out / 'silent.jsonl'}")
