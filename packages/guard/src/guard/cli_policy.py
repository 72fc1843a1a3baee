"""`guard policy`: look at a policy, and check one before it is used."""

from pathlib import Path
from typing import Literal

from core_llm.cli_tools import Positional


def policy(
    action: Positional[Literal["show", "check"]],
    file: Positional[Path | None] = None,
    model: str | None = None,
) -> None:
    """Print a policy as a YAML file (show), or say whether a file is one that a guard can follow (check).

    Args:
        action: show prints FILE, or without it the policy of --model, or the standard one: a file to begin
            with. check reads FILE and ends with status 2 where it is not valid.
        file: The policy.
        model: The guard that is to follow it: nano, a folder, or a hub id. Its weights are not read.
    """
    from core_llm.errors import UserError
    from guard.policy import Policy

    prompter = None
    if model is not None:
        from guard.guard import find_guard
        from guard.prompter import Prompter

        prompter = Prompter.of_folder(find_guard(model))
    if file is None and action == "check":
        raise UserError("name the policy to check: guard policy check FILE")
    if file is not None:
        read = Policy.read(file)
    else:
        read = prompter.policy if prompter is not None else Policy()
    if prompter is not None:
        prompter.reading(read)
    if action == "show":
        print(read.as_yaml(), end="")
        return
    own = sum(category.threshold is not None for category in read.enabled)
    print(
        f"{file}: valid; {read.name}, version {read.version}, {len(read.enabled)} of {len(read.categories)} "
        f"categories on, {own} with a threshold of their own"
    )
    print(f"digest {read.digest}")
