"""The tasks of the harness. A new one is a `Task` in one of these modules, listed here."""

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
    from evals.tasks import modalities, needle, regression, safety, speech, text, vision

    tasks = [
        *text.TASKS,
        *needle.TASKS,
        *regression.TASKS,
        *vision.TASKS,
        *speech.TASKS,
        *safety.TASKS,
        *modalities.TASKS,
    ]
    return {task.name: task for task in tasks}


def find(names: list[str]) -> list[Task]:
    """The named tasks; raises `UserError` that lists the known ones."""
    known = registry()
    for name in names:
        if name not in known:
            raise UserError(f"unknown task '{name}'; known tasks: {', '.join(known)}")
    return [known[name] for name in dict.fromkeys(names)]


__all__ = ["QUICKSTART", "SCENE_TASKS", "Control", "Options", "Output", "Sample", "Task", "find", "registry"]
