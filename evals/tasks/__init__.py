"""The tasks of the harness. A new one is a `Task` in one of these modules, listed here."""

import difflib

from core_llm.errors import UserError
from evals.tasks.base import Control, Options, Output, Sample, Task

SCENE_TASKS = (
    "scenes",
    "scenes-count",
    "scenes-relation",
    "scenes-word",
    "scenes-chart",
    "scenes-crowded",
)
# Need neither data nor network, and together less than two minutes.
QUICKSTART = (
    "text-qa",
    "text-regression",
    *SCENE_TASKS,
    "spoken-digits",
    "spoken-scenes",
    "guard-basics",
)


def registry() -> dict[str, Task]:
    """Every known task by name, in the order of the scorecard."""
    from evals.tasks import (
        lm_harness,
        memory,
        modalities,
        needle,
        regression,
        requests,
        safety,
        speech,
        speech_corpora,
        text,
        vision,
        vision_questions,
    )

    tasks = [
        *text.TASKS,
        *needle.TASKS,
        *regression.TASKS,
        *lm_harness.TASKS,
        *memory.TASKS,
        *vision.TASKS,
        *vision_questions.TASKS,
        *speech.TASKS,
        *speech_corpora.TASKS,
        *safety.TASKS,
        *modalities.TASKS,
        *requests.TASKS,
    ]
    return {task.name: task for task in tasks}


def find(names: list[str]) -> list[Task]:
    """The named tasks, each once; raises `UserError` that names the closest known ones.

    Beside the registry's: one part of a corpus ("fleurs:de_de"), any task of lm_eval ("lm:piqa"), one's own
    training text ("memorisation:FILE").
    """
    from evals.tasks import lm_harness, memory, requests, speech_corpora

    known = registry()
    found = {}
    for name in names:
        name = requests.ALIASES.get(name, name)
        task = known.get(name) or speech_corpora.part(name) or lm_harness.other(name) or memory.of_file(name)
        if task is None:
            raise UserError(_unknown(name, list(known)))
        found[task.name] = task
    return list(found.values())


def _unknown(name: str, known: list[str]) -> str:
    """One line about a name that is none."""
    close = difflib.get_close_matches(name, known, n=3)
    meant = f"do you mean {' or '.join(close)}? " if close else ""
    return f"unknown task '{name}'; {meant}known tasks: {', '.join(known)}"


__all__ = ["QUICKSTART", "SCENE_TASKS", "Control", "Options", "Output", "Sample", "Task", "find", "registry"]
