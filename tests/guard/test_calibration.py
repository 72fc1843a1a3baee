"""Temperatures against scikit-learn's, and what is kept of them."""

import json
from pathlib import Path

import numpy as np
import pytest
from sklearn.calibration import calibration_curve
from sklearn.linear_model import LogisticRegression

from core_llm.errors import CheckpointError, UserError
from guard import calibration
from guard.guard import Guard


def overconfident(n: int = 600, seed: int = 0, factor: float = 3.0) -> tuple[np.ndarray, np.ndarray]:
    """P(unsafe) whose log-odds are `factor` times what they should be, and labels."""
    rng = np.random.default_rng(seed)
    odds = rng.normal(0, 1.5, n)
    labels = (rng.random(n) < 1 / (1 + np.exp(-odds))).astype(int)
    return 1 / (1 + np.exp(-factor * odds)), labels


def test_temperature_equals_an_unregularised_regression_without_intercept() -> None:
    said, labels = overconfident()
    fitted = calibration.fit(said.tolist(), labels.tolist())
    odds = (np.log(said) - np.log1p(-said))[:, None]
    peer = LogisticRegression(C=np.inf, fit_intercept=False, tol=1e-10, max_iter=1000).fit(odds, labels)
    assert fitted.temperature == pytest.approx(1 / peer.coef_[0, 0], rel=1e-4)
    assert fitted.temperature == pytest.approx(3.0, rel=0.2)
    assert calibration.scaled(said, fitted.temperature) == pytest.approx(
        peer.predict_proba(odds)[:, 1], abs=1e-4
    )


def test_fitted_temperature_is_the_likeliest() -> None:
    said, labels = overconfident(seed=1, factor=0.4)
    fitted = calibration.fit(said.tolist(), labels.tolist())
    for other in (0.97, 1.03):
        worse = calibration.scaled(said, fitted.temperature * other)
        assert calibration.negative_log_likelihood(worse, labels) > fitted.nll_after
    assert fitted.nll_after < fitted.nll_before


def test_temperature_one_changes_no_bit_and_none_changes_the_order() -> None:
    said, _ = overconfident()
    assert (calibration.scaled(said, 1.0) == said).all()
    hotter = calibration.scaled(said, 4.0)
    assert (np.argsort(hotter, kind="stable") == np.argsort(said, kind="stable")).all()
    assert ((hotter >= 0.5) == (said >= 0.5)).all()
    assert np.isfinite(calibration.scaled([0.0, 1.0], 3.0)).all()


@pytest.mark.parametrize("labels", [[1] * 100, [0] * 100, [0, 1] * 5])
def test_rows_that_tell_no_temperature_are_refused(labels: list[int]) -> None:
    with pytest.raises(UserError, match="validation rows of both kinds"):
        calibration.fit([0.3] * len(labels), labels)


def test_a_guard_that_ranks_backwards_is_refused() -> None:
    said, labels = overconfident()
    with pytest.raises(UserError, match="no better than a coin"):
        calibration.fit((1 - said).tolist(), labels.tolist())


def test_scores_without_a_mistake_get_the_coldest_temperature() -> None:
    fitted = calibration.fit([0.4] * 50 + [0.6] * 50, [0] * 50 + [1] * 50)
    assert fitted.temperature == pytest.approx(calibration.COLDEST)


def test_reliability_bins_equal_scikit_learn() -> None:
    said, labels = overconfident()
    bins = [b for b in calibration.reliability(said, labels.tolist(), 10) if b.rows]
    share, mean = calibration_curve(labels, said, n_bins=10)
    assert [b.unsafe_share for b in bins] == pytest.approx(share)
    assert [b.mean_probability for b in bins] == pytest.approx(mean)
    assert sum(b.rows for b in bins) == len(said)


def test_stored_temperature_is_the_guards_from_then_on(guard: Guard, tmp_path: Path) -> None:
    from core_llm.chat import Message

    guard.save(tmp_path)
    asked = [[Message("user", text)] for text in ("bread", "a small red circle", "go away")]
    plain = Guard.load(tmp_path).classify(asked)
    calibration.store(tmp_path, calibration.Calibration(2.5, 100, 40, 0.7, 0.6))
    again = Guard.load(tmp_path)
    assert again.temperature == 2.5
    got = again.classify(asked)
    expected = calibration.scaled([v.probability for v in plain], 2.5)
    assert [v.probability for v in got] == pytest.approx(expected, abs=1e-9)
    assert [v.mass for v in got] == [v.mass for v in plain]
    guard.save(tmp_path)  # trained anew: the old temperature is not its own
    assert Guard.load(tmp_path).temperature == 1.0


def test_temperature_beside_a_released_guard(tmp_path: Path) -> None:
    assert calibration.stored_beside(tmp_path) == 1.0
    calibration.store(tmp_path, calibration.Calibration(1.7, 100, 40, 0.7, 0.6))
    assert calibration.stored_beside(tmp_path) == 1.7
    for bad in (0, -1, "2", None, True, float("inf")):
        (tmp_path / calibration.BESIDE).write_text(json.dumps({"temperature": bad}))
        with pytest.raises(CheckpointError, match="positive number"):
            calibration.stored_beside(tmp_path)
