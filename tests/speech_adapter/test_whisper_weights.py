from pathlib import Path
from urllib.error import URLError

import pytest

from core_llm.errors import CheckpointError, UserError
from speech_adapter.whisper_weights import load_whisper


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(UserError, match=r"nowhere\.pt.*tiny\.en"):
        load_whisper("nowhere.pt")


def test_without_a_network_one_line_says_where_to_put_the_weights(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def unreachable(*args: object, **kwargs: object) -> None:
        raise URLError("no route")

    monkeypatch.setattr("urllib.request.urlopen", unreachable)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(CheckpointError) as caught:
        load_whisper("tiny.en")
    line = str(caught.value)
    assert "\n" not in line and "no route" in line and f"put tiny.en.pt into {tmp_path / 'whisper'}" in line
    assert not list(tmp_path.rglob("*.pt"))


@pytest.mark.parametrize("content", [b"", b"junk" * 100])
def test_a_damaged_file_is_one_line(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "broken.pt"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"broken\.pt: damaged") as caught:
        load_whisper(str(path))
    assert "\n" not in str(caught.value)
