from pathlib import Path

from core_llm.model import Llama
from core_llm.tokenizer import Tokenizer
from speech_adapter import SpeechAdapter, load
from speech_adapter.card import model_card


def test_the_card_names_size_licences_command_and_scores(adapter: SpeechAdapter) -> None:
    card = model_card(adapter, {"digits_wer": 0.125}, "speech-adapter train --steps 7", seed=3)
    for wanted in (
        "CC BY-SA 4.0",
        "GPL-3",
        "`speech-adapter train --steps 7` (seed 3)",
        "| digits_wer | 0.1250 |",
    ):
        assert wanted in card
    assert "{" not in card


def test_the_card_is_saved_beside_the_weights_and_leaves_other_files_alone(
    adapter: SpeechAdapter, core_and_tokenizer: tuple[Llama, Tokenizer], tmp_path: Path
) -> None:
    (tmp_path / "speech.state.pt").write_bytes(b"training state")
    card = model_card(adapter, {}, "speech-adapter train", seed=0)
    adapter.save(tmp_path, core_and_tokenizer[0], card)
    assert (tmp_path / "README.md").read_text() == card
    assert (tmp_path / "speech.state.pt").read_bytes() == b"training state"
    assert load(tmp_path, core_and_tokenizer[0]).config == adapter.config
