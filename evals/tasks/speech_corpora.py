"""Recorded speech of the public corpora: transcripts and translations, one language or all that are there.

A task's name takes a part after a colon, as the dataset registry names it: "fleurs:de_de", "covost:de_en".
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from core_llm.chat import Audio, Message, Text
from evals.tasks import data, scoring
from evals.tasks.base import Options, Sample, Task
from evals.tasks.controls import MAJORITY
from evals.tasks.speech import SHUFFLED_AUDIO, TRANSCRIPT_METRICS, transcripts

# What a language is called in a prompt; others by their code.
_LANGUAGES = {
    **{"ar": "Arabic", "ca": "Catalan", "cy": "Welsh", "de": "German", "en": "English", "es": "Spanish"},
    **{"et": "Estonian", "fa": "Persian", "fr": "French", "id": "Indonesian", "it": "Italian"},
    **{"ja": "Japanese", "lv": "Latvian", "mn": "Mongolian", "nl": "Dutch", "pt": "Portuguese"},
    **{"ru": "Russian", "sl": "Slovenian", "sv": "Swedish", "ta": "Tamil", "tr": "Turkish", "zh": "Chinese"},
}
# The spelling of openai-whisper's English normaliser says nothing about other languages.
_ANY_LANGUAGE = tuple(metric for metric in TRANSCRIPT_METRICS if not metric.endswith("_english"))

Kind = Callable[[dict[str, Any]], str]


def _test_rows(name: str, options: Options) -> list[Any]:
    """Rows of the corpus's test part, which published scores are of; of what is there where it is missing."""
    rows = data.rows(name, replace(options, limit=None))
    tested = [row for row in rows if str(row.fields.get("part", "")).startswith("test")]
    return data.subset(tested or rows, options)


def translation_prompt(language: str) -> str:
    """The request before a recording that is to be translated into a language (a code such as "zh-CN")."""
    code = language.partition("-")[0].partition("_")[0]
    return f"Translate what is said into {_LANGUAGES.get(code, language)}:"


def _translations(dataset: str) -> Callable[[Options], list[Sample]]:
    def load(options: Options) -> list[Sample]:
        scoring.require_bleu()
        samples = []
        for row in _test_rows(dataset, options):
            target = row.fields["target_language"]
            content = (Text(translation_prompt(target)), Audio(row.fields["audio"]))
            samples.append(
                Sample(
                    row.id,
                    row.group,
                    (Message("user", content),),
                    row.fields["translation"],
                    row.fields["subset"],
                    note=row.fields["text"],
                    extra=scoring.bleu_words(target),
                )
            )
        return samples

    return load


def _corpus(
    name: str, title: str, source: str, citation: str, metrics: tuple[str, ...], dataset: str, kind: Kind
) -> Task:
    return Task(
        name=name,
        title=title,
        section="speech",
        needs=("core", "audio"),
        source=source,
        licence="CC BY 4.0",
        metrics=metrics,
        ask="generate",
        load=transcripts(partial(_test_rows, dataset), kind),
        judge=scoring.transcript,
        controls=(SHUFFLED_AUDIO, MAJORITY),
        max_new_tokens=192,
        batch_size=16,
        citation=citation,
        prompt_format="Repeat after me in English: [sound]",
    )


def _librispeech(dataset: str) -> Task:
    return _corpus(
        "librispeech",
        "Transcripts of read English books",
        "LibriSpeech (openslr/librispeech_asr), test-clean and test-other",
        "Panayotov et al. 2015, LibriSpeech",
        TRANSCRIPT_METRICS,
        dataset,
        lambda fields: str(fields["part"]).replace(".", "-"),
    )


def _fleurs(dataset: str) -> Task:
    return _corpus(
        "fleurs",
        "Transcripts of read sentences, 102 languages",
        "FLEURS (google/fleurs), test part; fleurs:de_de for one language",
        "Conneau et al. 2022, FLEURS",
        TRANSCRIPT_METRICS if dataset.endswith(":en_us") else _ANY_LANGUAGE,
        dataset,
        lambda fields: str(fields["language"]),
    )


def _mls(dataset: str) -> Task:
    return _corpus(
        "mls",
        "Transcripts of read books, 8 languages",
        "MLS (facebook/multilingual_librispeech), test part; mls:german for one language",
        "Pratap et al. 2020, MLS",
        _ANY_LANGUAGE,
        dataset,
        lambda fields: str(fields["language"]),
    )


def _covost(dataset: str) -> Task:
    return Task(
        name="covost",
        title="Translations of speech",
        section="speech",
        needs=("core", "audio"),
        source="CoVoST 2 (fixie-ai/covost2), test part; covost:de_en for one pair",
        licence="CC BY-NC 4.0 (translations)",
        metrics=("bleu",),
        ask="generate",
        load=_translations(dataset),
        judge=scoring.translation,
        controls=(SHUFFLED_AUDIO, MAJORITY),
        max_new_tokens=192,
        batch_size=16,
        citation="Wang et al. 2020, CoVoST 2",
        prompt_format=f"{translation_prompt('{language}')} [sound]",
        extra="bleu",
    )


_PARTED: dict[str, tuple[str, Callable[[str], Task]]] = {
    "fleurs": ("fleurs", _fleurs),
    "mls": ("mls", _mls),
    "covost": ("covost2", _covost),
}

TASKS = [
    _librispeech("librispeech"),
    *(make(dataset) for dataset, make in _PARTED.values()),
]


def part(name: str) -> Task | None:
    """The task "fleurs:de_de", "mls:german" or "covost:de_en"; None for any other name."""
    base, _, subset = name.partition(":")
    if not subset or base not in _PARTED:
        return None
    dataset, make = _PARTED[base]
    return replace(make(f"{dataset}:{subset}"), name=name)
