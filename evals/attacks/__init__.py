"""Attacks on a safety task: its requests in other forms, and what each form changes, on the same rows."""

from evals.attacks.apply import apply
from evals.attacks.base import Attack
from evals.attacks.registry import ATTACKS, compose, find

__all__ = ["ATTACKS", "Attack", "apply", "compose", "find"]
