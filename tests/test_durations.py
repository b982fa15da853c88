"""Durations of estimates: unit and digits."""

from __future__ import annotations

import pytest

from unime_st.durations import format_duration


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.0, "0.1 seconds"),
        (1.26, "1.3 seconds"),
        (119.0, "119 seconds"),
        (120.0, "2.0 minutes"),
        (7199.0, "120 minutes"),
        (7200.0, "2.0 hours"),
        (3.6e6, "1,000 hours"),
    ],
)
def test_unit_and_digits_fit(seconds: float, words: str) -> None:
    assert format_duration(seconds) == words
