"""What the guard's tests share."""

import pytest
import torch

from guard.guard import Guard
from guard.testing import WordGuard, tiny_guard


@pytest.fixture(scope="session")
def guard() -> Guard:
    """A random guard: real code, meaningless verdicts."""
    torch.set_num_threads(2)
    return tiny_guard()


@pytest.fixture
def word_guard() -> WordGuard:
    """A guard with verdicts that a test can foresee."""
    return WordGuard()
