import json
import sys
from pathlib import Path

import pytest

from speech_adapter import cli

CLIP = Path(__file__).parents[2] / "evals" / "samples" / "digits-00.ogg"


def call(monkeypatch: pytest.MonkeyPatch, *args: str) -> None:
    monkeypatch.setattr(sys, "argv", ["speech-adapter", "transcribe", *args])
    cli.main()


def test_timestamps_json_and_subtitles(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    call(monkeypatch, str(CLIP), "--timestamps")
    plain = capsys.readouterr().out.splitlines()
    assert [line.split()[-1] for line in plain] == ["three", "two", "seven"]
    call(monkeypatch, str(CLIP), "--json")
    row = json.loads(capsys.readouterr().out)
    assert row["text"] == "three two seven" and [word["text"] for word in row["words"]] == row["text"].split()
    assert 0 <= row["words"][0]["start"] < row["words"][-1]["end"] <= 1.1
    call(monkeypatch, str(CLIP), "--subtitles", "srt")
    assert capsys.readouterr().out.startswith("1\n00:00:00,")


def test_stream_prints_final_words_and_how_late(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    call(monkeypatch, str(CLIP), "--stream")
    out, err = capsys.readouterr()
    assert out == "three two seven\n" and "real-time factor" in err
    call(monkeypatch, str(CLIP), "--stream", "--json")
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert rows[-1]["type"] == "report" and rows[-1]["seconds"] == pytest.approx(1.08, abs=0.05)
    assert " ".join(row["final"] for row in rows[:-1]).split() == ["three", "two", "seven"]


@pytest.mark.parametrize(
    "args, word",
    [
        (("a.wav", "b.wav", "--stream"), "one file"),
        (("a.wav", "--realtime"), "--stream"),
        (("microphone",), "--stream"),
        (("a.wav", "b.wav", "--subtitles", "srt"), "one file"),
        (("a.wav", "--stream"), "no such audio file"),
        (("a.wav", "--window-seconds", "0"), "--window-seconds"),
    ],
)
def test_mistakes_are_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], args: tuple[str, ...], word: str
) -> None:
    with pytest.raises(SystemExit) as exit:
        call(monkeypatch, *args)
    err = capsys.readouterr().err
    assert exit.value.code == 2 and word in err and len(err.strip().splitlines()) == 1
