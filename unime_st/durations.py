"""Durations in the words of a reader, for estimates."""

from __future__ import annotations

_MINUTE, _HOUR = 60.0, 3600.0


def format_duration(seconds: float) -> str:
    """Write a duration in seconds (below two minutes), minutes (below two hours) or hours.

    One decimal below 10, none above; less than 0.1 seconds counts as 0.1.

    Example:
        >>> from unime_st.durations import format_duration
        >>> [format_duration(seconds) for seconds in (1.26, 150, 8000, 4_000_000)]
        ['1.3 seconds', '2.5 minutes', '2.2 hours', '1,111 hours']
    """
    if seconds < 2 * _MINUTE:
        count, unit = max(seconds, 0.1), "seconds"
    elif seconds < 2 * _HOUR:
        count, unit = seconds / _MINUTE, "minutes"
    else:
        count, unit = seconds / _HOUR, "hours"
    return f"{count:.1f} {unit}" if count < 10 else f"{count:,.0f} {unit}"
