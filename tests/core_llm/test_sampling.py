"""Filters and draws against transformers' logits processors."""

import pytest
import torch
from torch import Tensor

from core_llm.errors import UserError
from core_llm.sampling import Sampling, filtered, log_probabilities, next_tokens, uniforms

LOGITS = torch.log(torch.tensor([[0.5, 0.25, 0.15, 0.07, 0.03], [0.03, 0.07, 0.15, 0.25, 0.5]]))
FILTERS: list[dict[str, float]] = [
    {"temperature": 0.7},
    {"temperature": 1.3, "top_k": 9},
    {"temperature": 1.0, "top_p": 0.8},
    {"temperature": 0.9, "min_p": 0.05},
    {"temperature": 1.5, "top_k": 20, "top_p": 0.7, "min_p": 0.1},
]


def kept(**settings: float) -> list[list[int]]:
    rows = filtered(LOGITS, Sampling(temperature=1.0, **settings))  # type: ignore[arg-type]
    return [row.isfinite().nonzero()[:, 0].tolist() for row in rows]


def expected(logits: Tensor, s: Sampling) -> Tensor:
    """Probabilities by transformers, its processors in the order in which its `generate` applies them."""
    from transformers.generation.logits_process import (
        LogitsProcessorList,
        MinPLogitsWarper,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    chain = LogitsProcessorList([TemperatureLogitsWarper(s.temperature)])
    if s.top_k:
        chain.append(TopKLogitsWarper(s.top_k))
    if s.top_p < 1:
        chain.append(TopPLogitsWarper(s.top_p))
    if s.min_p:
        chain.append(MinPLogitsWarper(s.min_p))
    return chain(torch.zeros(1, 1, dtype=torch.long), logits).softmax(-1)


def test_top_k_top_p_and_min_p_keep_what_they_should() -> None:
    assert kept(top_k=2) == [[0, 1], [3, 4]]
    assert kept(top_p=0.6) == [[0, 1], [3, 4]]
    assert kept(top_p=0.1) == [[0], [4]]
    assert kept(min_p=0.2) == [[0, 1, 2], [2, 3, 4]]
    assert kept() == [[0, 1, 2, 3, 4]] * 2


def test_top_k_keeps_no_more_among_equals() -> None:
    s = Sampling(temperature=1.0, top_k=3)
    assert filtered(torch.zeros(2, 8), s).isfinite().sum(-1).tolist() == [3, 3]


@pytest.mark.parametrize("settings", FILTERS)
def test_filters_equal_transformers(settings: dict[str, float]) -> None:
    logits = 2 * torch.randn(6, 300, generator=torch.Generator().manual_seed(4))
    s = Sampling(**settings)  # type: ignore[arg-type]
    torch.testing.assert_close(filtered(logits, s).softmax(-1), expected(logits, s), atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("settings", FILTERS)
def test_draws_follow_the_distribution_of_transformers(settings: dict[str, float]) -> None:
    from scipy.stats import chisquare

    logits = 2 * torch.randn(1, 40, generator=torch.Generator().manual_seed(5))
    s = Sampling(max_new_tokens=20_000, seed=11, **settings)  # type: ignore[arg-type]
    draws = uniforms([s])[0]
    tokens = next_tokens(logits.expand(len(draws), -1), [s] * len(draws), draws)
    counts = tokens.bincount(minlength=40).double()
    p = expected(logits.double(), s)[0]
    assert counts[p == 0].sum() == 0
    # Cells with few expected counts are pooled, as the test's approximation asks for.
    small = p * len(draws) < 5
    pool = small & (p > 0)
    seen = torch.cat([counts[~small], counts[pool].sum()[None]]) if pool.any() else counts[~small]
    due = torch.cat([p[~small], p[pool].sum()[None]]) if pool.any() else p[~small]
    assert chisquare(seen.numpy(), (due * counts.sum()).numpy()).pvalue > 1e-3
    # Control: the same counts do not fit the distribution at another temperature.
    other = expected(logits.double(), Sampling(**{**settings, "temperature": settings["temperature"] * 1.3}))[
        0
    ]  # type: ignore[arg-type]
    wrong = other[~small] / other[~small].sum() * counts[~small].sum()
    assert chisquare(counts[~small].numpy(), wrong.numpy()).pvalue < 1e-6


def test_zero_temperature_takes_the_most_probable() -> None:
    assert next_tokens(LOGITS, [Sampling()] * 2, torch.rand(2)).tolist() == [0, 4]


def test_a_tiny_temperature_takes_the_most_probable_without_overflow() -> None:
    s = Sampling(temperature=1e-30, top_p=0.9)
    logits = torch.tensor([[1e4, 1e4 - 1, -1e4]])
    assert next_tokens(logits, [s], torch.tensor([0.999], dtype=torch.float64)).tolist() == [0]


def test_extreme_draws_never_take_an_excluded_token() -> None:
    logits = torch.tensor([[float("-inf"), 0.0, float("-inf"), 0.0, float("-inf")]])
    s = [Sampling(temperature=1.0)]
    for draw, token in ((0.0, 1), (0.5 - 1e-12, 1), (0.5, 3), (1 - 2**-53, 3)):
        assert next_tokens(logits, s, torch.tensor([draw], dtype=torch.float64)).tolist() == [token]


def test_a_rows_numbers_depend_on_its_seed_alone() -> None:
    alone = uniforms([Sampling(5, seed=3)])[0]
    together = uniforms([Sampling(90, seed=1), Sampling(5, seed=3), Sampling(40, seed=3)])
    assert torch.equal(together[1, :5], alone)
    assert torch.equal(together[2, :5], alone)
    assert not torch.equal(together[0, :5], alone)
    assert ((together >= 0) & (together < 1)).all()


def test_rows_with_different_settings_draw_as_each_would_alone() -> None:
    logits = torch.randn(4, 50, generator=torch.Generator().manual_seed(0))
    hot = Sampling(temperature=2.0, top_k=5)
    settings = [Sampling(), hot, Sampling(temperature=0.5, min_p=0.1), hot]
    draws = torch.tensor([0.1, 0.9, 0.6, 0.3], dtype=torch.float64)
    together = next_tokens(logits, settings, draws).tolist()
    alone = [int(next_tokens(logits[i : i + 1], settings[i : i + 1], draws[i : i + 1])) for i in range(4)]
    assert together == alone


def test_log_probabilities_are_the_unfiltered_ones() -> None:
    logits = torch.randn(3, 30, generator=torch.Generator().manual_seed(0))
    tokens = torch.tensor([4, 0, 29])
    chosen, values, ids = log_probabilities(logits, tokens, 2)
    log_p = logits.double().log_softmax(-1)
    torch.testing.assert_close(chosen.double(), log_p[torch.arange(3), tokens], atol=1e-6, rtol=0)
    assert ids.tolist() == log_p.argsort(dim=-1, descending=True)[:, :2].tolist()
    torch.testing.assert_close(values.double(), log_p.gather(-1, ids), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -1},
        {"temperature": float("nan")},
        {"top_p": 0},
        {"top_k": -1},
        {"min_p": 2},
        {"max_new_tokens": 0},
        {"seed": -1},
    ],
)
def test_values_out_of_range_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(UserError):
        Sampling(**wrong)  # type: ignore[arg-type]
