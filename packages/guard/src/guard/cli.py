"""`guard`: train a guard, judge texts, serve the moderation API."""

from core_llm import cli_tools
from guard.cli_classify import classify
from guard.cli_evaluate import evaluate
from guard.cli_policy import policy
from guard.cli_serve import key, serve
from guard.cli_train import prune, train


def main() -> None:
    """Entry point of the console script."""
    cli_tools.run(
        "guard",
        "A safety guard on a Llama core: train it, judge texts, serve the moderation API.",
        {
            "train": train,
            "prune": prune,
            "classify": classify,
            "policy": policy,
            "evaluate": evaluate,
            "serve": serve,
            "key": key,
        },
    )
