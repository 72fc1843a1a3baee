"""Hub ids: downloaded once, and one clear line when that is not possible."""

from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from httpx2 import ConnectError, Request, Response
from huggingface_hub import errors

from core_llm.checkpoint import load_core, save_core
from core_llm.cli import convert
from core_llm.cli_tools import run
from core_llm.convert import convert_checkpoint
from core_llm.errors import CheckpointError
from core_llm.hub import find_model
from core_llm.testing import tiny_core

NAME = "some-org/Some.Model-1B"


def answer(kind: type[Exception], status: int = 401) -> Exception:
    return kind("refused", response=Response(status, request=Request("GET", "https://hub.invalid/x")))  # type: ignore[call-arg]


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder such as the hub's cache holds: safetensors, and the original layout below."""
    folder = tmp_path_factory.mktemp("hub") / "snapshot"
    save_core(folder, *tiny_core())
    convert_checkpoint(folder, folder / "original", "original", progress=False)
    return folder


def hub(monkeypatch: pytest.MonkeyPatch, outcome: Path | Exception) -> list[dict[str, Any]]:
    calls: list[dict[str, Any]] = []

    def snapshot_download(name: str, **options: Any) -> str:
        assert name == NAME
        calls.append(options)
        if isinstance(outcome, Exception):
            raise outcome
        return str(outcome)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return calls


def test_hub_id_loads_its_safetensors_and_nothing_else(
    monkeypatch: pytest.MonkeyPatch, repository: Path
) -> None:
    calls = hub(monkeypatch, repository)
    core, tokenizer = load_core(NAME)
    assert tokenizer.encode("red") and core.config == tiny_core()[0].config
    assert len(calls) == 1 and calls[0]["ignore_patterns"] == ["*/*"]
    assert {"*.safetensors", "*.json", "tokenizer.model"} <= set(calls[0]["allow_patterns"])
    assert load_core(Path(NAME))[0].config == core.config  # command lines hand over a Path


def test_original_files_are_fetched_only_where_there_are_no_safetensors(
    monkeypatch: pytest.MonkeyPatch, repository: Path, tmp_path: Path
) -> None:
    expected, _ = load_core(repository)
    (tmp_path / "original").symlink_to(repository / "original")
    calls = hub(monkeypatch, tmp_path)
    core, _ = load_core(NAME)
    assert [call["allow_patterns"] for call in calls][1:] == [["original/*"]]
    assert all(torch.equal(a, b) for a, b in zip(core.parameters(), expected.parameters(), strict=True))


@pytest.mark.parametrize(
    ("outcome", "told"),
    [
        (errors.LocalEntryNotFoundError("no\nconnection"), "cannot be reached (offline?)"),
        (errors.OfflineModeIsEnabled("offline"), "cannot be reached (offline?)"),
        (ConnectError("no route"), "cannot be reached (offline?)"),
        (answer(errors.HfHubHTTPError, 503), "it answered with status 503"),
        (
            answer(errors.GatedRepoError, 403),
            "accept its licence on its page of the hub, then run `hf auth login`",
        ),
        (answer(errors.RepositoryNotFoundError, 404), "check the spelling"),
        (errors.HFValidationError("bad name"), "check the spelling"),
    ],
)
def test_failures_say_in_one_line_what_to_do(
    monkeypatch: pytest.MonkeyPatch, outcome: Exception, told: str
) -> None:
    hub(monkeypatch, outcome)
    with pytest.raises(CheckpointError) as raised:
        find_model(NAME, Path())
    assert told in str(raised.value) and NAME in str(raised.value) and "\n" not in str(raised.value)


def test_full_disk_is_not_taken_for_a_missing_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    hub(monkeypatch, OSError(28, "No space left on device"))
    with pytest.raises(OSError, match="No space"):
        find_model(NAME, Path())


@pytest.mark.parametrize("name", ["no-such-model", "/no/such/folder", "a/b/c", "../models/core", "org/"])
def test_what_cannot_be_a_hub_id_is_not_asked_for(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    calls = hub(monkeypatch, Path())
    with pytest.raises(CheckpointError, match="known: nano, a folder with a checkpoint, or a hub id"):
        load_core(name)
    assert calls == []


def test_existing_folder_goes_before_a_hub_id(
    monkeypatch: pytest.MonkeyPatch, repository: Path, tmp_path: Path
) -> None:
    calls = hub(monkeypatch, repository)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "some-org").mkdir()
    (tmp_path / NAME).symlink_to(repository)
    assert find_model(NAME, Path()) == Path(NAME) and calls == []


def test_command_without_a_network_ends_with_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # The hub's own client, told to stay offline and with an empty cache.
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    with pytest.raises(SystemExit) as stopped:
        run("core-llm", "t", {"convert": convert, "o": convert}, ["convert", NAME, str(tmp_path / "out")])
    err = capsys.readouterr().err
    assert stopped.value.code == 2 and not (tmp_path / "out").exists()
    assert (
        err.startswith(f"error: {NAME}: no such folder, and the hub cannot be reached")
        and err.count("\n") == 1
    )
