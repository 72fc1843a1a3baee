"""Measuring a guard: rows, scores, baselines, intervals, figures."""
