"""Filters of the next-token distribution, against a plain recomputation."""

import numpy as np
import pytest
import torch

from core_llm.errors import UserError
from core_llm.sampling import Sampling, filtered, next_tokens

LOGITS = torch.log(torch.tensor([[0.5, 0.25, 0.15, 0.07, 0.03], [0.03, 0.07, 0.15, 0.25, 0.5]]))


def kept(**settings: float) -> list[list[int]]:
    rows = filtered(LOGITS, Sampling(temperature=1.0, **settings))  # type: ignore[arg-type]
    return [row.isfinite().nonzero()[:, 0].tolist() for row in rows]


def test_top_k_top_p_and_min_p_keep_what_they_should() -> None:
    assert kept(top_k=2) == [[0, 1], [3, 4]]
    assert kept(top_p=0.6) == [[0, 1], [3, 4]]
    assert kept(top_p=0.1) == [[0], [4]]
    assert kept(min_p=0.2) == [[0, 1, 2], [2, 3, 4]]
    assert kept() == [[0, 1, 2, 3, 4]] * 2


def test_zero_temperature_takes_the_most_probable() -> None:
    assert next_tokens(LOGITS, Sampling(), []).tolist() == [0, 4]


def test_draws_follow_the_distribution_and_the_seed() -> None:
    def draws(seed: int) -> list[int]:
        generator = [torch.Generator().manual_seed(seed)]
        return [int(next_tokens(LOGITS[:1], Sampling(temperature=1.0), generator)) for _ in range(4000)]

    first = draws(1)
    assert first == draws(1) != draws(2)
    share = np.bincount(first, minlength=5) / 4000
    # Four standard errors of a share of one half over 4,000 draws.
    np.testing.assert_allclose(share, [0.5, 0.25, 0.15, 0.07, 0.03], atol=4 * 0.5 / 4000**0.5)


def test_a_rows_draws_do_not_depend_on_its_neighbours() -> None:
    def one(row: torch.Tensor) -> int:
        return int(next_tokens(row, Sampling(temperature=1.0), [torch.Generator().manual_seed(7)])[0])

    both = next_tokens(
        LOGITS, Sampling(temperature=1.0), [torch.Generator().manual_seed(7) for _ in range(2)]
    )
    assert both.tolist() == [one(LOGITS[:1]), one(LOGITS[1:])]


@pytest.mark.parametrize(
    "wrong", [{"temperature": -1}, {"top_p": 0}, {"top_k": -1}, {"min_p": 2}, {"max_new_tokens": 0}]
)
def test_values_out_of_range_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(UserError):
        Sampling(**wrong)  # type: ignore[arg-type]
