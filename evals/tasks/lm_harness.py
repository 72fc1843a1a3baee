"""Tasks that lm_eval has: its prompts, few-shot examples, filters and metrics; our models and intervals.

Any other of its tasks runs as "lm:NAME". Rows come from the task's public hub dataset, or from a folder of
the data root: files called after their split (test.jsonl, test-00000-of-00001.parquet), in a folder per
configuration where there are several.
"""

import copy
import hashlib
import json
import logging
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core_llm.chat import Message
from core_llm.errors import DataError, UserError
from evals.models import PLAIN_TEXT
from evals.tasks import data
from evals.tasks.base import Control, Options, Output, Sample, Task, Unavailable

if TYPE_CHECKING:
    from evals.models import Model

INSTALL_HINT = "lm_eval is not installed; get it with pip install 'llama-herd[lm-eval]'"
SENTENCES_HINT = "nltk's sentence model is missing; get it with python -m nltk.downloader punkt_tab punkt"
PREFIX = "lm:"
# lm_eval's (metric, filter) -> our columns: one number per row; two for a list, its sum and its length.
_COLUMNS = {
    ("acc", "none"): ("correct",),
    ("acc_norm", "none"): ("correct_norm",),
    ("exact_match", "none"): ("correct",),
    ("exact_match", "strict-match"): ("correct",),
    ("exact_match", "flexible-extract"): ("correct_flexible",),
    ("prompt_level_strict_acc", "none"): ("correct",),
    ("prompt_level_loose_acc", "none"): ("correct_loose",),
    ("inst_level_strict_acc", "none"): ("followed", "instructions"),
    ("inst_level_loose_acc", "none"): ("followed_loose", "instructions"),
}
# The names of lm_eval's metrics among ours, for tasks that are not listed here.
_NAMES = {"acc": "accuracy", "acc_norm": "accuracy_norm", "exact_match": "exact_match"}
_SPLITS = ("training_split", "validation_split", "test_split", "fewshot_split")


@dataclass(frozen=True)
class _Request:
    """One document of an lm_eval task and the requests made of it."""

    task: Any
    doc: Any
    instances: tuple[Any, ...]


@dataclass(frozen=True)
class _Harness:
    """A task of lm_eval. where: its folder among lm_eval's tasks, "" to look through all of them.

    folder: in the data root. fewshot None: as the task has it.
    """

    task: str
    folder: str
    where: str = ""
    fewshot: int | None = None


@cache
def _manager(where: str) -> Any:
    if find_spec("lm_eval") is None:
        raise Unavailable(INSTALL_HINT)
    import lm_eval.tasks

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    folder = Path(lm_eval.tasks.__file__).parent / where
    return lm_eval.tasks.TaskManager(include_path=folder, include_defaults=False)


def _leaves(index: Mapping[str, Any], name: str) -> list[str]:
    """The tasks that a group (mmlu: 57) or a tag stands for, or the task itself."""
    entry = index[name]
    if entry.kind.name == "TAG":
        return sorted(entry.tags)
    if entry.kind.name != "GROUP":
        return [name]
    children = [child if isinstance(child, str) else child["task"] for child in entry.cfg["task"]]
    return sorted({leaf for child in children for leaf in _leaves(index, child)})


def _local_files(folder: Path, config: Mapping[str, Any]) -> dict[str, Any] | None:
    """Changes of a task's configuration that make it read this folder; None where its part is not there."""
    name = config.get("dataset_name")
    parted = any(path.is_dir() for path in folder.iterdir())
    where = folder / name if name and (folder / name).is_dir() else folder
    if name and parted and where == folder and not any(path.is_file() for path in folder.iterdir()):
        return None
    files = sorted(p for p in where.rglob("*") if p.suffix in (".jsonl", ".json", ".parquet"))
    wanted = {key: config[key] for key in _SPLITS if config.get(key)}
    found = {s: [str(p) for p in files if re.match(rf"{s}\b", p.stem)] for s in set(wanted.values())}
    if len(found) == 1 and not any(found.values()):  # one part alone need not be called after it
        found = {split: [str(p) for p in files] for split in found}
    present = {split: paths for split, paths in found.items() if paths}
    if not present:
        raise DataError(f"{where}: holds no file of {' or '.join(sorted(found))} (.jsonl or .parquet)")
    kind = "parquet" if next(iter(present.values()))[0].endswith(".parquet") else "json"
    missing = {key: None for key, split in wanted.items() if split not in present}
    source = {"dataset_path": kind, "dataset_name": None, "dataset_kwargs": {"data_files": present}}
    return {**source, **missing}


def _open(harness: _Harness, data_root: Path | None) -> list[Any]:
    """lm_eval's task objects with their documents. Raises `DataError` where these cannot be read."""
    manager = _manager(harness.where)
    if harness.task not in manager.task_index:
        raise UserError(f"lm_eval has no task '{harness.task}'; `lm-eval ls tasks` lists them")
    leaves = _leaves(manager.task_index, harness.task)
    specs: list[dict[str, Any]] = [{"task": leaf} for leaf in leaves]
    if data_root is not None:
        specs = _local_specs(harness, data_root, manager, leaves)
    try:
        tasks = list(manager.load([{"group": "selected", "task": specs}])["tasks"].values())
    except ModuleNotFoundError as error:
        raise Unavailable(f"{INSTALL_HINT} (its part {error.name} is missing)") from error
    except Exception as error:  # `datasets` raises many kinds; all mean that the rows are out of reach
        where = data_root / harness.folder if data_root else "the hub"
        raise DataError(
            f"{harness.task}: its rows cannot be read from {where} ({type(error).__name__}); "
            "check the network, or pass --data-root with a local copy"
        ) from error
    for task in tasks:
        shots = harness.fewshot if harness.fewshot is not None else task.get_config("num_fewshot") or 0
        task.set_config(key="num_fewshot", value=shots)
        task.set_fewshot_seed(seed=1234)  # lm_eval's own
    return tasks


def _local_specs(
    harness: _Harness, data_root: Path, manager: Any, leaves: Sequence[str]
) -> list[dict[str, Any]]:
    folder = data_root / harness.folder
    if not folder.is_dir():
        raise DataError(
            f"{data_root}: holds no folder '{harness.folder}' for task '{harness.task}'; put its dataset "
            "there, or leave --data-root out to read the hub"
        )
    specs = []
    for leaf in leaves:
        changed = _local_files(folder, manager.task_index[leaf].cfg)
        if changed is not None:
            specs.append({"task": leaf, **changed})
    if not specs:
        raise DataError(f"{folder}: holds no part of '{harness.task}'")
    if len(specs) < len(leaves):
        print(f"{harness.task}: {len(specs)} of its {len(leaves)} parts are in {folder}", file=sys.stderr)
    return specs


def _load(harness: _Harness) -> Callable[[Options], list[Sample]]:
    def load(options: Options) -> list[Sample]:
        if options.split == "train":
            raise UserError(f"task '{harness.task}' is scored on its own test part; leave --split train out")
        samples = [
            sample for task in _open(harness, options.data_root) for sample in _samples(task, harness.task)
        ]
        return data.subset(samples, options)

    return load


def _samples(task: Any, name: str) -> list[Sample]:
    try:
        task.build_all_requests(rank=0, world_size=1)
    except ValueError as error:  # fewer solved examples than the prompt wants
        raise DataError(f"{task.task_name}: its prompts cannot be made ({error})") from error
    by_document: dict[int, list[Any]] = defaultdict(list)
    for instance in task.instances:
        by_document[instance.doc_id].append(instance)
    samples = []
    for number, instances in by_document.items():
        instances.sort(key=lambda instance: instance.idx)
        doc, target = instances[0].doc, task.doc_to_target(instances[0].doc)
        asked = json.dumps([instance.args for instance in instances], sort_keys=True, default=str)
        digest = hashlib.sha256(asked.encode()).hexdigest()[:16]
        choices: tuple[str, ...] = ()
        if task.OUTPUT_TYPE == "multiple_choice":
            choices = tuple(instance.args[1] for instance in instances)
        row = f"{task.task_name}-{number}"
        samples.append(
            Sample(
                f"{row}-{digest}",
                row,
                (Message("user", instances[0].args[0]),),
                str(target),
                task.task_name.removeprefix(f"{name}_") if task.task_name != name else "",
                choices=choices,
                extra=_Request(task, doc, tuple(instances)),
            )
        )
    return samples


def _asks(model: "Model", samples: Sequence[Sample]) -> list[Output]:
    """All requests of these documents through `evals.lm_bridge`."""
    lm = _bridge(model)
    answers: dict[int, Any] = {}
    by_type: dict[str, list[Any]] = defaultdict(list)
    for sample in samples:
        for instance in sample.extra.instances:
            by_type[instance.request_type].append(instance)
    for kind, instances in by_type.items():
        for instance, answer in zip(instances, getattr(lm, kind)(instances), strict=True):
            answers[id(instance)] = answer
    return [_output(sample, [answers[id(i)] for i in sample.extra.instances]) for sample in samples]


def _bridge(model: "Model") -> Any:
    if find_spec("lm_eval") is None:
        raise Unavailable(INSTALL_HINT)
    from evals.lm_bridge import BridgeLM

    return _quiet(BridgeLM(model))


def _quiet(lm: Any) -> Any:
    """The bridge without lm_eval's own progress bar per batch."""
    plain = lm.loglikelihood
    lm.loglikelihood = lambda requests: plain(requests, disable_tqdm=True)
    return lm


def _output(sample: Sample, answers: list[Any]) -> Output:
    responses = [list(answer) if isinstance(answer, tuple) else answer for answer in answers]
    text = responses[0] if isinstance(responses[0], str) else ""
    if sample.choices:
        scores = [response[0] for response in responses[: len(sample.choices)]]
        text = sample.choices[scores.index(max(scores))].strip()
    return {"resps": responses, "text": text}


def _judge(sample: Sample, output: Output) -> Mapping[str, float]:
    """lm_eval's own filters and metrics over the answers to one document."""
    request: _Request = sample.extra
    instances = [copy.copy(instance) for instance in request.instances]
    for instance, response in zip(instances, output["resps"], strict=True):
        instance.resps = [tuple(response) if isinstance(response, list) else response]
        instance.filtered_resps = {}
    for chosen in request.task._filters:
        chosen.apply(instances)
    sums: dict[str, float] = {}
    for name in instances[0].filtered_resps:
        filtered = [instance.filtered_resps[name] for instance in instances]
        try:
            results = request.task.process_results(request.doc, filtered)
        except LookupError as error:
            if "nltk" not in str(error).lower():
                raise
            raise Unavailable(SENTENCES_HINT) from error
        for metric, value in results.items():
            columns = _COLUMNS.get((metric, name), ())
            if len(columns) == 1:
                sums[columns[0]] = float(value)
            elif columns:
                sums |= {columns[0]: float(sum(value)), columns[1]: float(len(value))}
    return sums


def _majority_choice(samples: Sequence[Sample], options: Options) -> list[Output] | None:
    """The position that is right most often, whatever stands there."""
    if not all(sample.choices and sample.target.isdigit() for sample in samples):
        return None
    likeliest = int(Counter(sample.target for sample in samples).most_common(1)[0][0])
    outputs = []
    for sample in samples:
        answers = [(0.0 if i == likeliest else -1e6, False) for i in range(len(sample.choices))]
        outputs.append(_output(sample, answers))
    return outputs


def _majority_number(samples: Sequence[Sample], options: Options) -> list[Output]:
    """The most frequent result, written as the rows write theirs."""
    number = Counter(sample.target.rpartition("####")[2].strip() for sample in samples).most_common(1)[0][0]
    return [_output(sample, [f"#### {number}"]) for sample in samples]


def _silence(samples: Sequence[Sample], options: Options) -> list[Output]:
    return [_output(sample, [""]) for sample in samples]


MAJORITY_CHOICE = Control("majority answer", "control", answer=_majority_choice)
MAJORITY_NUMBER = Control("majority answer", "control", answer=_majority_number)
SILENCE = Control("says nothing", "control", answer=_silence)


def _task(
    name: str,
    harness: _Harness,
    title: str,
    source: tuple[str, str, str],
    prompt: str,
    metrics: tuple[str, ...],
    control: Control,
    shots: int = 0,
) -> Task:
    dataset, licence, citation = source
    return Task(
        name=name,
        title=title,
        section="text",
        needs=("core", PLAIN_TEXT),
        source=f"{dataset}, asked and scored by lm_eval",
        licence=licence,
        metrics=metrics,
        ask="own",
        load=_load(harness),
        judge=_judge,
        controls=(control,),
        batch_size=64,
        citation=citation,
        prompt_format=prompt,
        fewshot=shots,
        asks=_asks,
        extra="lm-eval",
    )


_QUESTION = "Question: {question}\nAnswer:"
_ARC = ("ARC (allenai/ai2_arc), test part", "CC BY-SA 4.0", "Clark et al. 2018, ARC")

TASKS = [
    _task(
        "mmlu",
        _Harness("mmlu", "mmlu", "mmlu/default", 5),
        "Multiple choice, 57 subjects",
        ("MMLU (cais/mmlu), test part", "MIT", "Hendrycks et al. 2021, MMLU"),
        "{question}\nA. {choice} … D. {choice}\nAnswer:",
        ("accuracy",),
        MAJORITY_CHOICE,
        5,
    ),
    _task(
        "arc-challenge",
        _Harness("arc_challenge", "ai2_arc", "arc"),
        "Grade-school science, hard questions",
        _ARC,
        _QUESTION,
        ("accuracy_norm", "accuracy"),
        MAJORITY_CHOICE,
    ),
    _task(
        "arc-easy",
        _Harness("arc_easy", "ai2_arc", "arc"),
        "Grade-school science, easy questions",
        _ARC,
        _QUESTION,
        ("accuracy_norm", "accuracy"),
        MAJORITY_CHOICE,
    ),
    _task(
        "hellaswag",
        _Harness("hellaswag", "hellaswag", "hellaswag"),
        "How everyday scenes go on",
        ("HellaSwag (Rowan/hellaswag), validation part", "MIT", "Zellers et al. 2019, HellaSwag"),
        "{activity}: {context}",
        ("accuracy_norm", "accuracy"),
        MAJORITY_CHOICE,
    ),
    _task(
        "gsm8k",
        _Harness("gsm8k", "gsm8k", "gsm8k", 5),
        "Grade-school mathematics, worked answers",
        ("GSM8K (openai/gsm8k), test part", "MIT", "Cobbe et al. 2021, GSM8K"),
        _QUESTION,
        ("exact_match", "exact_match_flexible"),
        MAJORITY_NUMBER,
        5,
    ),
    _task(
        "ifeval",
        _Harness("ifeval", "ifeval", "ifeval"),
        "Instructions whose following can be checked",
        ("IFEval (google/IFEval)", "Apache-2.0", "Zhou et al. 2023, IFEval"),
        "{prompt}",
        ("prompt_accuracy", "instruction_accuracy", "prompt_accuracy_loose", "instruction_accuracy_loose"),
        SILENCE,
    ),
]


def other(name: str) -> Task | None:
    """The task "lm:NAME" of lm_eval, by those of its metrics that are known here; None for other names."""
    if not name.startswith(PREFIX):
        return None
    known = name.removeprefix(PREFIX)
    index = _manager("").task_index
    if known not in index:
        raise UserError(f"lm_eval has no task '{known}'; `lm-eval ls tasks` lists them")
    config = index[_leaves(index, known)[0]].cfg
    given = [entry["metric"] for entry in config.get("metric_list", ()) if isinstance(entry["metric"], str)]
    if config.get("output_type") == "multiple_choice":
        given = given or ["acc"]
    metrics = tuple(_NAMES[metric] for metric in given if metric in _NAMES)
    if not metrics or config.get("filter_list") or config.get("repeats", 1) != 1:
        raise UserError(f"'{name}' is scored in a way that has no interval here; run it with lm-eval itself")
    source = (f"lm_eval's {known} ({config.get('dataset_path')})", "see its dataset", "")
    return _task(
        name,
        _Harness(known, known),
        f"lm_eval's {known}",
        source,
        "lm_eval's own",
        metrics,
        MAJORITY_CHOICE,
        config.get("num_fewshot") or 0,
    )
