"""Reading texts aloud: plans, bytes, kills and resumption, voices that are held apart, neural voices."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from core_llm.errors import DataError, UserError
from speech_adapter import synthesis, synthesize
from speech_adapter.audio import decode
from speech_adapter.examples import load_examples
from speech_adapter.speakers import Line, NeuralSpeaker, chosen_voices
from speech_adapter.synthesis import HELD_OUT_VOICES, TRAIN_VOICES, SynthesisError, Utterance
from speech_adapter.synthesize import Settings, plan
from speech_adapter.texts import Spoken, load_texts

needs_espeak = pytest.mark.skipif(not synthesis.available(), reason="espeakng-loader is not installed")


def texts(n: int) -> list[Spoken]:
    return [Spoken(f"t-{i}", f"word {i}") for i in range(n)]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@needs_espeak
def test_voices_are_balanced_and_held_out_ones_kept_apart() -> None:
    planned = plan(texts(600), Settings(repeats=2, held_out=0.1))
    rows = [p.row for p in planned]
    train = Counter(row["voice"] for row in rows if row["split"] == "train")
    dev = Counter(row["voice"] for row in rows if row["split"] == "dev")
    assert set(train) == set(TRAIN_VOICES) and set(dev) == set(HELD_OUT_VOICES)
    for counts in (train, dev):
        assert max(counts.values()) - min(counts.values()) <= 1
    said_in = {split: {r["source_id"] for r in rows if r["split"] == split} for split in ("train", "dev")}
    assert not said_in["train"] & said_in["dev"] and len(said_in["dev"]) == 60
    assert all(120 <= row["speed"] <= 220 and 15 <= row["pitch"] <= 85 for row in rows)
    assert len({(row["speed"], row["pitch"]) for row in rows}) > 500


@needs_espeak
def test_a_plan_depends_on_its_seed() -> None:
    plans = [[p.row for p in plan(texts(20), Settings(seed=seed))] for seed in (1, 1, 2)]
    assert plans[0] == plans[1] != plans[2]


@needs_espeak
def test_same_seed_same_bytes_whatever_the_workers_and_kills(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(synthesize, "CHUNK", 4)
    settings = Settings(voice="en-us,en-us+f3,en+klatt", seed=3)
    synthesize.synthesize(texts(10), tmp_path / "whole", settings, workers=1)
    publish = synthesize._publish

    def killed(out: Path, parts: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(synthesize, "_publish", killed)
    with pytest.raises(KeyboardInterrupt):
        synthesize.synthesize(texts(10), tmp_path / "broken", settings, workers=2)
    # Killed inside its second chunk: two recordings are there, none of its rows, and a half-written file.
    (tmp_path / "broken" / synthesize.PARTS / "000001.jsonl").unlink()
    (tmp_path / "broken" / "audio" / "0000007.flac").unlink()
    (tmp_path / "broken" / "audio" / ".0000007.flac.123").write_bytes(b"fLaC")
    assert not (tmp_path / "broken" / synthesize.TABLE).exists()
    monkeypatch.setattr(synthesize, "_publish", publish)
    counts = synthesize.synthesize(texts(10), tmp_path / "broken", settings, workers=2)
    assert counts == {"rows": 10, "silent": 0}
    whole = contents(tmp_path / "whole")
    assert contents(tmp_path / "broken") == whole and len(whole) == 12
    rows = [json.loads(line) for line in whole["metadata.jsonl"].decode().splitlines()]
    assert [row["source_id"] for row in rows] == [f"t-{i}" for i in range(10)]
    for row in rows:
        samples = decode(tmp_path / "whole" / row["file_name"])
        assert len(samples) > 3_000 and row["seconds"] == round(len(samples) / 16_000, 3)
    before = contents(tmp_path / "whole")
    synthesize.synthesize(texts(10), tmp_path / "whole", settings)
    assert contents(tmp_path / "whole") == before
    with pytest.raises(UserError, match="other texts or settings"):
        synthesize.synthesize(texts(9), tmp_path / "whole", settings)


@needs_espeak
def test_a_folder_of_recordings_is_what_the_stages_read(tmp_path: Path) -> None:
    out = tmp_path / "spoken"
    found = load_texts("questions", limit=8, seed=1)
    settings = Settings(voice="train", held_out=0.25, format="ogg")
    assert synthesize.synthesize(found, out, settings)["rows"] == 8
    train, dev = (load_examples(str(out), split=split) for split in ("train", "dev"))
    assert len(dev) == 2 and len(train) + len(dev) == len(load_examples(str(out), split="all"))
    known = {(text.text, text.fields["prompt"]): text.fields["answer"] for text in found}
    for example in (*train, *dev):
        assert example.answer == known[example.text, example.prompt]
        assert np.abs(decode(example.audio)).max() > 0.01


@needs_espeak
def test_ogg_sounds_the_same_for_the_same_seed(tmp_path: Path) -> None:
    settings = Settings(voice="en-us,en+klatt", format="ogg", seed=3)
    for name in ("a", "b"):
        assert synthesize.synthesize(texts(4), tmp_path / name, settings)["rows"] == 4
    first, second = (sorted((tmp_path / name / "audio").iterdir()) for name in ("a", "b"))
    for one, other in zip(first, second, strict=True):
        assert np.array_equal(decode(one), decode(other))
    tables = [(tmp_path / name / "metadata.jsonl").read_bytes() for name in ("a", "b")]
    assert tables[0] == tables[1]


@needs_espeak
def test_a_line_without_sound_is_listed_and_not_trained_on(tmp_path: Path) -> None:
    spoken = [Spoken("a", "hello"), Spoken("b", "​")]
    counts = synthesize.synthesize(spoken, tmp_path / "out", Settings(voice="en-us"), workers=1)
    assert counts == {"rows": 1, "silent": 1}
    assert json.loads((tmp_path / "out" / "silent.jsonl").read_text())["source_id"] == "b"


def test_texts_come_from_lines_rows_and_datasets(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("first line\n\n  second   line \n")
    assert [(t.id, t.text) for t in load_texts(str(tmp_path / "a.txt"))] == [
        ("a-0", "first line"),
        ("a-2", "second line"),
    ]
    (tmp_path / "b.jsonl").write_text(
        '{"id": "x", "prompt": "how?", "label": 1}\n{"prompt": "why?", "answer": "so"}\n'
    )
    rows = load_texts(str(tmp_path / "b.jsonl"))
    assert [(t.id, t.text, t.fields) for t in rows] == [
        ("x", "how?", {"label": 1}),
        ("b-1", "why?", {"answer": "so"}),
    ]
    (tmp_path / "c.csv").write_text("question,sentence\nwho,you\n")
    assert [t.text for t in load_texts(str(tmp_path / "c.csv"), "sentence")] == ["you"]
    (tmp_path / "simple_safety_tests").mkdir()
    (tmp_path / "simple_safety_tests" / "test_cases.csv").write_text("prompt,harm_area\nCan I?,scams\n")
    (row,) = load_texts("simple_safety_tests", data_root=tmp_path)
    assert row.text == "Can I?"
    phrases = load_texts("phrases", limit=5, seed=2)
    assert phrases == load_texts("phrases", limit=5, seed=2) and len({p.text for p in phrases}) == 5
    for where, column, message in (
        ("nowhere.txt", "", "no such file or dataset"),
        (str(tmp_path / "b.jsonl"), "body", "no field 'body'.*--field"),
        (str(tmp_path / "c.csv"), "nothing", "row 1: no field"),
    ):
        with pytest.raises(DataError, match=message):
            load_texts(where, column)
    (tmp_path / "d.jsonl").write_text('{"id": 1, "text": "a"}\n{"id": 1, "text": "b"}\n')
    with pytest.raises(DataError, match="same 'id'"):
        load_texts(str(tmp_path / "d.jsonl"))


@needs_espeak
def test_impossible_settings_and_folders_are_one_line(tmp_path: Path) -> None:
    for wrong, message in (
        ({"format": "mp3"}, "known: flac, ogg"),
        ({"speed": (300, 100)}, "speed must be"),
        ({"repeats": 0}, "repeats"),
    ):
        with pytest.raises(UserError, match=message):
            Settings(**wrong)  # type: ignore[arg-type]
    (tmp_path / "a file").write_text("")
    with pytest.raises(UserError, match="is a file"):
        synthesize.synthesize(texts(1), tmp_path / "a file", Settings())
    (tmp_path / "a file").unlink()
    with pytest.raises(UserError, match="no text"):
        synthesize.synthesize([], tmp_path / "new", Settings())
    with pytest.raises(UserError, match="--limit"):
        load_texts("phrases", limit=-1)
    for wrong_voice in ({"voice": "en-us,no-such"}, {"language": "no-such"}):
        with pytest.raises(SynthesisError, match="no-such"):
            synthesize.synthesize(texts(1), tmp_path / "new", Settings(**wrong_voice))  # type: ignore[arg-type]
    assert not (tmp_path / "new").exists()
    (tmp_path / "mine.txt").write_text("keep me")
    with pytest.raises(UserError, match="not empty"):
        synthesize.synthesize(texts(1), tmp_path, Settings())
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]
    with pytest.raises(UserError, match="is empty"):
        chosen_voices(",", "en")


@needs_espeak
def test_another_language_gets_its_own_voices() -> None:
    train, apart = chosen_voices("train", "de")
    assert "de+m1" in train and all(voice.startswith("de+") for voice in apart)
    assert not {v.partition("+")[2] for v in train} & {v.partition("+")[2] for v in apart}


@pytest.fixture(scope="module")
def vits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random VITS with two speakers."""
    import torch
    from transformers import VitsConfig, VitsModel, VitsTokenizer

    folder = tmp_path_factory.mktemp("vits")
    letters = "abcdefghijklmnopqrstuvwxyz '"
    (folder / "vocab.json").write_text(json.dumps({c: i for i, c in enumerate("_" + letters)}))
    tokenizer = VitsTokenizer(
        folder / "vocab.json", pad_token="_", unk_token="_", phonemize=False, is_uroman=False
    )
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = VitsConfig(
        vocab_size=len(letters) + 1, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, ffn_dim=16,
        flow_size=16, spectrogram_bins=9, num_speakers=2, speaker_embedding_size=8,
        upsample_initial_channel=16, upsample_rates=[8, 8], upsample_kernel_sizes=[16, 16],
        resblock_kernel_sizes=[3], resblock_dilation_sizes=[[1, 3]], prior_encoder_num_flows=1,
        prior_encoder_num_wavenet_layers=1, posterior_encoder_num_wavenet_layers=1,
        duration_predictor_num_flows=1, duration_predictor_filter_channels=16, depth_separable_num_layers=1,
    )  # fmt: skip
    VitsModel(config).save_pretrained(folder)
    return folder


def test_a_neural_voice_is_seeded_and_follows_the_speed(vits: Path) -> None:
    voice = NeuralSpeaker(str(vits))
    assert voice.voices() == ("#0", "#1")

    def said(seed: int, speed: int = 165, who: int = 0) -> np.ndarray:
        return voice.speak(Line(Utterance("hello there", f"hf:{vits}#{who}", speed), seed))[0]

    first = said(1)
    assert first.dtype == np.int16 and len(first) > 100
    assert np.array_equal(first, said(1)) and not np.array_equal(first, said(2))
    assert len(said(1, 330)) < len(first)
    other = said(1, who=1)
    assert len(other) != len(first) or not np.array_equal(other, first)


def test_neural_speech_is_written_offline_from_a_folder(vits: Path, tmp_path: Path) -> None:
    settings = Settings(voice=f"hf:{vits}", seed=1)
    for name in ("a", "b"):
        counts = synthesize.synthesize(texts(4), tmp_path / name, settings, workers=1)
        assert counts == {"rows": 4, "silent": 0}
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    only, _ = chosen_voices(f"hf:{vits}#1", "en")
    assert only == [f"hf:{vits}#1"]
    with pytest.raises(UserError, match="2 speakers"):
        chosen_voices(f"hf:{vits}#2", "en")
    voices = [json.loads(r)["voice"] for r in (tmp_path / "a" / "metadata.jsonl").read_text().splitlines()]
    assert Counter(voices) == {f"hf:{vits}#0": 2, f"hf:{vits}#1": 2}


def test_a_neural_voice_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(SynthesisError, match="no such folder"):
        NeuralSpeaker(str(tmp_path / "nothing"))
    with pytest.raises(SynthesisError, match="cannot be loaded as a text-to-speech model"):
        NeuralSpeaker(str(tmp_path))


@needs_espeak
def test_the_command_speaks_and_names_mistakes(tmp_path: Path) -> None:
    (tmp_path / "lines.txt").write_text("stop now\n")
    code = "import speech_adapter.cli as c; c.main()"
    run = [sys.executable, "-c", code, "synthesize", str(tmp_path / "lines.txt"), "--out"]
    good = subprocess.run([*run, str(tmp_path / "out"), "--voice", "en-us"], capture_output=True, text=True)
    assert good.returncode == 0 and "1 recordings of 1 texts" in good.stdout
    bad = subprocess.run([*run, str(tmp_path / "b"), "--voice", "no-such"], capture_output=True, text=True)
    assert bad.returncode == 2 and "no-such" in bad.stderr and "Traceback" not in bad.stderr
