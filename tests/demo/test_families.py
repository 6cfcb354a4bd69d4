"""Operand plots of known functions get the labels that they should."""

from __future__ import annotations

import numpy as np
import pytest
import task
from families import label, partitions

A, B = task.all_pairs()
S = A + B
PLOTS = {
    "a ends in 6": (A % 10 == 6, "ends in"),
    "b ends in 0,5": (np.isin(B % 10, (0, 5)), "ends in"),
    "sum ends in 5": (S % 10 == 5, "ends in"),
    "_6+_9": ((A % 10 == 6) & (B % 10 == 9), "lookup table"),
    "_{3,6}+_{1,2,9}": (
        np.isin(A % 10, (3, 6)) & np.isin(B % 10, (1, 2, 9)),
        "lookup table",
    ),
    "digits add to 15": (A % 10 + B % 10 == 15, "ends in"),
    "a = 36": (A == 36, "add x"),
    "b in 33..38": ((B >= 33) & (B <= 38), "add x"),
    "a in 30..49": (np.isin(A // 10, (3, 4)), "magnitude"),
    "sum in 80..99": (np.isin(S // 10, (8, 9)), "magnitude"),
    "sum in 92..97": ((S >= 92) & (S <= 97), "sum in range"),
    "30s+50s": ((A // 10 == 3) & (B // 10 == 5), "magnitude"),
    "sum ends in 5, 15..95": ((S % 10 == 5) & (S > 9) & (S < 100), "ends in"),
}


@pytest.mark.parametrize("text", PLOTS)
def test_known_plots(text: str):
    on_N, family = PLOTS[text]
    key = np.sin(1e4 * np.arange(len(on_N)))  # noise of a tenth
    found = label(3.0 * on_N + 0.1 * key, partitions())
    assert found.text == text
    assert found.family == family
    assert found.fit > 0.9


def test_noise_gets_no_label():
    plot_N = np.abs(np.sin(1e4 * np.arange(len(A)) ** 1.5))
    found = label(plot_N, partitions())
    assert not found.clear
    assert not found.belongs
