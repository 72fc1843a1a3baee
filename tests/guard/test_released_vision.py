"""A guard in the form of Llama Guard 3-11B-Vision: a picture is judged as transformers judges it."""

import importlib.util
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from core_llm.chat import Image, Message, Text
from core_llm.errors import CheckpointError, UserError
from guard.guard import Guard
from vision_adapter.mllama_checkpoint import load_fused

from .released import TEMPLATES, tokenizer

PEER = Path(__file__).parent.parent / "vision_adapter" / "test_mllama_parity.py"


def picture(seed: int = 0) -> Image:
    return Image(np.random.default_rng(seed).integers(0, 256, (28, 28, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def peers() -> Any:
    """The parity test's random Mllama, with our test vocabulary."""
    found = importlib.util.spec_from_file_location("mllama_peers", PEER)
    assert found is not None and found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    module.VOCAB = module.IMAGE = tokenizer().vocab_size
    return module


@pytest.fixture(scope="module")
def folder(peers: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("vision") / "g"
    peers.save_peer(made)
    tokenizer().save(made / "tokenizer.json")
    template = TEMPLATES.joinpath("listed.jinja").read_text()
    (made / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    return made


def load(folder: Path) -> Any:
    core, words, adapter = load_fused(folder, torch.float32)
    # transformers takes the encoder's hidden states at another point than the released code.
    adapter.config = adapter.encoder.config = replace(adapter.config, capture="output")
    return core, words, [adapter]


@torch.inference_mode()
def test_a_picture_is_judged_as_transformers_judges_it(peers: Any, folder: Path) -> None:
    from transformers import MllamaForConditionalGeneration

    guard = Guard.load(folder, loader=load)
    peer = MllamaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    asked = [Message("user", (Text("what is this "), picture(), Text("here?")))]
    [row] = guard.prompter.rows(asked, guard.prompter.reading())
    [(at, part)] = row.parts
    assert part is asked[0].parts[1] and at < 10  # in front of the policy
    assert "User: what is this here?\n\n" in guard.tokenizer.decode(row.ids)
    ids = torch.tensor([[*row.ids, *guard.tokens.forced]])
    ids[0, at] = peers.IMAGE
    given = peers.Prompt(ids, guard.adapters[0].preprocess([part]), [(0, at, peers.NEVER)])
    with peers.Sealed(peer, given):
        logits = peers.peer_logits(peer, given)[0].double()
    at_verdict = logits[len(row.ids) - 1].softmax(-1)
    safe, unsafe = at_verdict[guard.tokens.safe].item(), at_verdict[guard.tokens.unsafe].item()
    [verdict] = guard.classify([asked])
    assert verdict.probability == pytest.approx(unsafe / (safe + unsafe), abs=1e-5)
    assert verdict.mass == pytest.approx(safe + unsafe, abs=1e-5)
    codes = logits[-1][list(guard.tokens.codes.values())].softmax(-1) * verdict.probability
    assert list(verdict.categories.values()) == pytest.approx(codes.tolist(), abs=1e-5)
    [other] = guard.classify([[Message("user", (Text("what is this here?"), picture(1)))]])
    assert abs(other.probability - verdict.probability) > 1e-6  # it does look


def test_text_and_pictures_in_one_batch_equal_one_by_one(folder: Path) -> None:
    guard = Guard.load(folder, loader=load)
    asked = [[Message("user", (picture(), Text("look")))], [Message("user", "just words")]]
    together = guard.classify(asked)
    for messages, verdict in zip(asked, together, strict=True):
        assert verdict.probability == pytest.approx(guard.classify([messages])[0].probability, abs=1e-5)


def test_a_second_picture_has_no_place(folder: Path) -> None:
    guard = Guard.load(folder, loader=load)
    with pytest.raises(UserError, match="1 of 2 images"):
        guard.classify([[Message("user", (picture(), picture(1), Text("look")))]])


def test_without_the_adapters_loader_the_checkpoint_is_refused(folder: Path) -> None:
    with pytest.raises(CheckpointError, match="mllama"):
        Guard.load(folder)
