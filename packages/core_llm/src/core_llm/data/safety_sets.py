"""Safety datasets of the registry: conversations and posts with labels, and requests.

Rows of XSTest, HateCheck, StrongREJECT and HarmBench have "prompt", "kind" (the dataset's own category) and
"label" (1: a good answer refuses, or the text is hateful; 0: a refusal is wrong).
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from core_llm.data.rows import Row, Source, declared_split, from_csv, from_hub, jsonl, numbered


def _xstest(row: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    # A safe prompt and its unsafe contrast turn on the same word.
    fields = {"prompt": row["prompt"], "kind": row["type"], "label": _label(row, "unsafe", "safe")}
    return f"{row['type'].removeprefix('contrast_')}-{row['focus']}", fields


def _hatecheck(row: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    label = _label(row, "hateful", "non-hateful", column="label_gold")
    fields = {"prompt": row["test_case"], "kind": row["functionality"], "label": label}
    # Cases made of one template differ in the group that is named.
    template = str(row.get("templ_id") or "")
    return template or str(row["case_id"]), fields


def _label(row: dict[str, Any], unsafe: str, safe: str, column: str = "label") -> int:
    value = str(row[column]).strip().lower()
    if value not in (unsafe, safe):
        raise ValueError(f"{column} is '{row[column]}', neither '{unsafe}' nor '{safe}'")
    return int(value == unsafe)


def _strongreject(row: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    prompt = row.get("forbidden_prompt") or row["prompt"]
    return prompt, {"prompt": prompt, "kind": row["category"], "label": 1}


def _harmbench(row: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    behaviour = row.get("Behavior") or row["prompt"]
    context = row.get("ContextString") or row.get("context") or ""
    kind = row.get("SemanticCategory") or row.get("category") or ""
    # HarmBench itself puts the context before the request, with a line between.
    prompt = f"{context}\n\n---\n\n{behaviour}" if context else behaviour
    return behaviour, {"prompt": prompt, "kind": kind, "label": 1}


def _diasafety_fields(row: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    unsafe = str(row["label"]).lower() in ("unsafe", "1")
    fields = {
        "context": row["context"],
        "response": row["response"],
        "category": row["category"],
        "label": int(unsafe),
    }
    return row["context"], fields


def _diasafety_local(folder: Path) -> Iterator[Row]:
    files = sorted(folder.glob("*.jsonl"))
    if not files:
        raise FileNotFoundError("no .jsonl file")
    for path in files:
        rows = map(_diasafety_fields, jsonl(path))
        yield from numbered(f"diasafety-{path.stem}", rows, declared_split(path.stem))


def _diasafety_hub(rows: Iterable[dict[str, Any]], split: str) -> Iterator[Row]:
    # The official split repeats contexts across its parts: the hash of the context decides instead.
    yield from numbered(f"diasafety-{split}", map(_diasafety_fields, rows))


MODERATION_LABELS = ("S", "H", "V", "HR", "SH", "S3", "H2", "V2")


def _moderation_fields(row: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    labels = {key: row.get(key) for key in MODERATION_LABELS}
    unsafe = any(value == 1 for value in labels.values())
    return row["prompt"], {"prompt": row["prompt"], "labels": labels, "label": int(unsafe)}


def _moderation_local(folder: Path) -> Iterator[Row]:
    files = sorted(folder.glob("*.jsonl"))
    if not files:
        raise FileNotFoundError("no .jsonl file")
    for path in files:
        yield from numbered(f"openai_moderation-{path.stem}", map(_moderation_fields, jsonl(path)))


def _moderation_hub(rows: Iterable[dict[str, Any]], split: str) -> Iterator[Row]:
    yield from numbered(f"openai_moderation-{split}", map(_moderation_fields, rows))


def _hate_speech_fields(row: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    return row["tweet"], {"text": row["tweet"], "label": int(row["class"])}


def _ailuminate_fields(row: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    return row["prompt_text"], {"prompt": row["prompt_text"], "hazard": row["hazard"]}


def _simple_safety_fields(row: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    prompt = row.get("prompts_final") or row["prompt"]
    return prompt, {"prompt": prompt, "harm_area": row["harm_area"]}


def _frr_fields(row: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    return row["mutated_prompt"], {"prompt": row["mutated_prompt"]}


def _frr_local(folder: Path) -> Iterator[Row]:
    yield from numbered("mitre_frr", map(_frr_fields, json.loads((folder / "mitre_frr.json").read_text())))


SAFETY = (
    Source(
        name="diasafety",
        title="DiaSafety",
        licence="Apache-2.0",
        homepage="https://github.com/thu-coai/DiaSafety",
        hub=("thu-coai/diasafety", None),
        dev_fraction=0.1,
        read_local=_diasafety_local,
        read_hub=_diasafety_hub,
    ),
    Source(
        name="openai_moderation",
        title="OpenAI moderation evaluation set",
        licence="MIT",
        homepage="https://github.com/openai/moderation-api-release",
        hub=("mmathys/openai-moderation-api-evaluation", None),
        dev_fraction=0.5,
        read_local=_moderation_local,
        read_hub=_moderation_hub,
    ),
    Source(
        name="hate_speech",
        title="Hate speech and offensive language (Davidson et al. 2017)",
        licence="MIT",
        homepage="https://github.com/t-davidson/hate-speech-and-offensive-language",
        hub=("tdavidson/hate_speech_offensive", None),
        dev_fraction=0.1,
        read_local=from_csv("hate_speech", "labeled_data.csv", _hate_speech_fields),
        read_hub=from_hub("hate_speech", _hate_speech_fields),
    ),
    Source(
        name="ailuminate",
        title="MLCommons AILuminate demo prompts",
        licence="CC BY 4.0",
        homepage="https://github.com/mlcommons/ailuminate",
        hub=None,
        dev_fraction=0.2,
        read_local=from_csv("ailuminate", "dev.csv", _ailuminate_fields),
        read_hub=from_hub("ailuminate", _ailuminate_fields),
    ),
    Source(
        name="simple_safety_tests",
        title="SimpleSafetyTests",
        licence="CC BY",
        homepage="https://github.com/bertiev/SimpleSafetyTests",
        hub=("Bertievidgen/SimpleSafetyTests", None),
        dev_fraction=0.2,
        read_local=from_csv("simple_safety_tests", "test_cases.csv", _simple_safety_fields),
        read_hub=from_hub("simple_safety_tests", _simple_safety_fields),
    ),
    Source(
        name="mitre_frr",
        title="CyberSecEval false-refusal prompts",
        licence="MIT",
        homepage="https://github.com/meta-llama/PurpleLlama",
        hub=None,
        dev_fraction=0.2,
        read_local=_frr_local,
        read_hub=from_hub("mitre_frr", _frr_fields),
    ),
    Source(
        name="xstest",
        title="XSTest",
        licence="CC BY 4.0",
        homepage="https://github.com/paul-rottger/xstest",
        hub=("Paul/XSTest", None),
        dev_fraction=1.0,
        read_local=from_csv("xstest", "xstest_prompts.csv", _xstest),
        read_hub=from_hub("xstest", _xstest, one_part=True),
    ),
    Source(
        name="hatecheck",
        title="HateCheck",
        licence="CC BY 4.0",
        homepage="https://github.com/paul-rottger/hatecheck-data",
        hub=("Paul/hatecheck", None),
        dev_fraction=1.0,
        read_local=from_csv("hatecheck", "test_suite_cases.csv", _hatecheck),
        read_hub=from_hub("hatecheck", _hatecheck, one_part=True),
    ),
    Source(
        name="strongreject",
        title="StrongREJECT",
        licence="MIT",
        homepage="https://github.com/alexandrasouly/strongreject",
        hub=("walledai/StrongREJECT", None),
        dev_fraction=1.0,
        read_local=from_csv("strongreject", "strongreject_dataset.csv", _strongreject),
        read_hub=from_hub("strongreject", _strongreject, one_part=True),
    ),
    Source(
        name="harmbench",
        title="HarmBench, text behaviours",
        licence="MIT",
        homepage="https://github.com/centerforaisafety/HarmBench",
        hub=("walledai/HarmBench", "standard"),  # asks for an agreement; no contextual behaviours
        dev_fraction=1.0,
        read_local=from_csv("harmbench", "harmbench_behaviors_text_all.csv", _harmbench),
        read_hub=from_hub("harmbench", _harmbench, one_part=True),
    ),
)
