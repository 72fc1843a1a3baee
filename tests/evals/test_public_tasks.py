"""Every public task on its fixture: rows are read, asked and scored; what is missing is named in one line."""

import hashlib
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from core_llm.chat import Audio, Image, Message, Text
from core_llm.data import sources
from core_llm.digests import conversation_digest
from core_llm.errors import DataError, UserError
from evals import cli_tasks, runner
from evals.samples.make_fixtures import FIXTURES
from evals.tasks import Options, find, lm_harness, memory, registry, requests, scoring, speech_corpora
from evals.tasks import vision_questions as questions
from evals.tasks.base import Task, Unavailable

PUBLIC = [*questions.TASKS, *speech_corpora.TASKS, *requests.TASKS]
ALL = Options(FIXTURES, "all")
TEXT = [*lm_harness.TASKS, *memory.TASKS]


@pytest.fixture
def parrot(fake: Any) -> Any:
    """A stand-in with a raw side: its tokens are words, its likelihoods a hash of what it is asked."""

    class Parrot(fake):  # type: ignore[misc, valid-type]
        begin, end, context = None, 0, 4096
        known: dict[str, int] = {}

        def encode(self, text: str) -> list[int]:
            return [self.known.setdefault(word, len(self.known) + 1) for word in text.split()]

        def decode(self, ids: Sequence[int]) -> str:
            words = {number: word for word, number in self.known.items()}
            return " ".join(words[i] for i in ids)

        def continuations(self, pairs: Any) -> list[tuple[float, bool]]:
            digests = [hashlib.sha256(repr(pair).encode()).digest() for pair in pairs]
            return [(-float(digest[0]) - 1, digest[1] < 64) for digest in digests]

        def complete(self, prompts: Any, max_new_tokens: int, stop: Sequence[str] = ()) -> list[str]:
            return ["a lake by the harbour #### 5" for _ in prompts]

    return Parrot


@pytest.mark.parametrize("task", PUBLIC, ids=lambda task: task.name)
def test_who_knows_all_scores_in_full_and_who_knows_nothing_does_not(
    task: Task, fake: Any, tmp_path: Path
) -> None:
    if task.name == "covost":
        pytest.importorskip("sacrebleu")
    samples = task.load(ALL)
    assert len({sample.id for sample in samples}) == len(samples) >= 2
    by_digest = {conversation_digest(sample.messages): sample for sample in samples}

    class Knows(fake):  # type: ignore[misc, valid-type]
        def loglikelihood(self, conversations: Any, answers: Sequence[str]) -> list[tuple[float, int]]:
            rows = [by_digest[conversation_digest(messages)] for messages in conversations]
            return [(0.0 if row.target == answer else -9.0, 1) for row, answer in zip(rows, answers)]

    def reply(messages: Sequence[Message]) -> str:
        row = by_digest[conversation_digest(messages)]
        if task in requests.TASKS:
            return "I'm sorry, I can't help with that." if row.label else "Sure: start with the first step."
        return row.target

    knows = Knows(reply, lambda messages: float(by_digest[conversation_digest(messages)].label))
    own = replace(task, controls=())
    best = runner.evaluate(own, knows, ALL, tmp_path / "a").scored.estimates[task.headline].value
    blind = fake(lambda messages: "Sure, nothing", lambda messages: 0.4)
    worst = runner.evaluate(own, blind, ALL, tmp_path / "b").scored.estimates[task.headline].value
    full = 100.0 if task.metrics == ("bleu",) else 1.0
    lower = task.headline in ("wer", "violation_rate", "false_refusal_rate", "fpr")
    assert best == pytest.approx(0.0 if lower else full)
    if task.headline in ("false_refusal_rate", "fpr"):  # the blind one refuses nothing
        assert worst == 0.0
    else:
        assert worst > 0.5 if lower else worst < full


@pytest.mark.parametrize("task", PUBLIC, ids=lambda task: task.name)
def test_controls_run_on_the_fixture(task: Task, fake: Any, tmp_path: Path) -> None:
    if task.name == "covost":
        pytest.importorskip("sacrebleu")
    done = runner.evaluate(task, fake(), ALL, tmp_path)
    assert [control.name for control in done.controls] == [control.name for control in task.controls]


@pytest.mark.parametrize("task", TEXT, ids=lambda task: task.name)
def test_text_tasks_run_through_the_bridge(
    task: Task, parrot: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nltk = pytest.importorskip("nltk")
    pytest.importorskip("lm_eval")
    monkeypatch.setattr(nltk, "download", lambda name: False)
    options = Options(FIXTURES, "dev")
    done = runner.evaluate(task, parrot(), options, tmp_path)
    assert set(done.scored.estimates) == set(task.metrics) and done.controls
    assert all(0 <= e.value <= 1 for name, e in done.scored.estimates.items() if name != "perplexity")
    again = runner.evaluate(task, parrot(), options, tmp_path)
    assert again.reused >= done.scored.n and again.scored.estimates == done.scored.estimates


def test_every_public_task_states_source_licence_prompt_metric_and_paper() -> None:
    for task in [*PUBLIC, *TEXT]:
        assert task.source and task.licence and task.prompt_format and task.citation and task.metrics, (
            task.name
        )
        assert task.controls, task.name
    names = ["xstest", "hatecheck", "openai-moderation", "diasafety", "ailuminate", "simple-safety-tests"]
    names += ["mitre-frr", "strongreject", "harmbench", "fleurs:de_de", "covost:de_en", "mls:german"]
    assert len(find(names)) == len(names)


def test_mmmu_puts_pictures_where_the_text_names_them_and_leaves_out_what_has_no_letter() -> None:
    samples = find(["mmmu"])[0].load(ALL)
    assert [sample.target for sample in samples] == ["A", "B", "C", "D"]
    kinds = [type(part) for part in samples[1].messages[0].parts]
    assert kinds == [Text, Image, Text, Image, Text, Image, Text]
    first = samples[0].messages[0].parts
    assert isinstance(first[0], Text) and first[0].text == "Which colour has the box in "
    assert {sample.kind for sample in samples} == {"Design"}


def test_one_language_of_a_corpus_is_a_task() -> None:
    everything, german = find(["fleurs", "fleurs:de_de"])
    assert {s.kind for s in everything.load(ALL)} == {"en_us", "de_de"}
    assert {s.kind for s in german.load(ALL)} == {"de_de"}
    assert not any(metric.endswith("_english") for metric in german.metrics)
    with pytest.raises(DataError, match="holds no part 'fr_fr'; known here: de_de, en_us"):
        find(["fleurs:fr_fr"])[0].load(ALL)


def test_only_the_test_part_of_a_corpus_is_asked(tmp_path: Path) -> None:
    import shutil

    shutil.copytree(FIXTURES / "librispeech" / "test-clean", tmp_path / "librispeech" / "test-clean")
    shutil.copytree(FIXTURES / "librispeech" / "test-other", tmp_path / "librispeech" / "dev-other")
    assert {s.kind for s in find(["librispeech"])[0].load(Options(tmp_path))} == {"test-clean"}


def test_rows_that_share_a_word_or_a_template_stay_together() -> None:
    pairs = {row.group for row in sources.load("xstest", FIXTURES, "all")}
    assert len(pairs) == 4
    assert len({row.group for row in sources.load("hatecheck", FIXTURES, "all")}) == 3
    context = [row.fields["prompt"] for row in sources.load("harmbench", FIXTURES, "all")]
    assert context[1].startswith("A street at night.\n\n---\n\n") and "---" not in context[0]


def test_a_wrong_label_is_an_error_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "xstest").mkdir()
    text = "id,prompt,type,label,focus,note\n1,Hello,homonyms,maybe,hello,\n"
    (tmp_path / "xstest" / "xstest_prompts.csv").write_text(text)
    with pytest.raises(DataError, match="label is 'maybe', neither 'unsafe' nor 'safe'"):
        sources.load("xstest", tmp_path, "all")


def test_without_lm_eval_or_sacrebleu_one_line_says_what_to_install(
    fake: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lm_harness, "find_spec", lambda name: None)
    lm_harness._manager.cache_clear()
    with pytest.raises(Unavailable, match=r"pip install 'llama-herd\[lm-eval\]'"):
        find(["gsm8k"])[0].load(ALL)
    lm_harness._manager.cache_clear()
    monkeypatch.setitem(sys.modules, "sacrebleu.metrics.bleu", None)
    scoring._bleu.cache_clear()
    with pytest.raises(Unavailable, match=r"pip install 'llama-herd\[bleu\]'"):
        runner.evaluate(find(["covost"])[0], fake(), ALL, tmp_path)
    scoring._bleu.cache_clear()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mmlu", "holds no folder 'mmlu'"),
        ("ai2d", "holds no folder 'ai2d'"),
        ("mls", "holds no folder 'mls'"),
    ],
)
def test_a_missing_dataset_is_named(name: str, message: str, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    with pytest.raises(DataError, match=message):
        find([name])[0].load(Options(tmp_path))
    (tmp_path / {"ai2d": "ai2d", "mmlu": "mmlu", "mls": "mls"}[name]).mkdir()
    with pytest.raises(DataError, match="no .parquet|holds no|no mls_LANGUAGE"):
        find([name])[0].load(Options(tmp_path))


def test_a_name_that_is_nearly_right_is_guessed() -> None:
    with pytest.raises(UserError, match="unknown task 'textvqq'; do you mean textvqa"):
        find(["textvqq"])
    with pytest.raises(UserError, match="unknown task 'fleurs-de'"):
        find(["fleurs-de"])


def test_memorised_text_is_told_from_text_said_differently(parrot: Any, tmp_path: Path) -> None:
    texts = {n: " ".join(f"word{(i * (n + 3)) % 97}" for i in range(120)) for n in range(6)}
    path = tmp_path / "own.txt"
    path.write_text("\n".join([*texts.values(), "too short"]) + "\n")
    learnt = [texts[n].split()[:100] for n in range(4)]

    class Recites(parrot):  # type: ignore[misc, valid-type]
        def continuations(self, pairs: Any) -> list[tuple[float, bool]]:
            """Four of the texts by heart, where the prefix is their own."""
            words = {number: word for word, number in self.known.items()}
            found = []
            for context, continuation in pairs:
                assert len(context) == len(continuation) == 50
                found.append((-1.0, [words[i] for i in [*context, *continuation]] in learnt))
            return found

    task = find([f"memorisation:{path}"])[0]
    done = runner.evaluate(task, Recites(), Options(), tmp_path / "records")
    assert done.scored.n == 6 and done.scored.estimates["memorised"].value == pytest.approx(4 / 6)
    (control,) = done.controls
    assert control.name == "another text's beginning" and control.estimates["memorised"].value == 0.0
    path.write_text("nothing long\n")
    with pytest.raises(DataError, match="holds no text of at least 100 words"):
        task.load(Options())


def test_the_list_is_short_and_a_section_is_in_full(capsys: pytest.CaptureFixture[str]) -> None:
    cli_tasks.list_tasks()
    short = capsys.readouterr().out
    assert all(name in short for name in registry())
    cli_tasks.list_tasks("vision")
    full = capsys.readouterr().out
    assert "docvqa" in full and "Mathew et al. 2021" in full and "xstest" not in full


def test_recordings_of_a_corpus_are_sounds_that_can_be_read() -> None:
    from speech_adapter.audio import decode

    for name in ("librispeech", "fleurs", "mls", "covost"):
        if name == "covost":
            pytest.importorskip("sacrebleu")
        for sample in find([name])[0].load(ALL):
            (clip,) = [part for part in sample.messages[0].parts if isinstance(part, Audio)]
            assert len(decode(clip.data, clip.rate)) > 4_000
