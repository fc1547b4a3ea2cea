"""Hold what the benchmarks share: a row of the table that `python -m benchmarks` makes of them."""

from typing import NamedTuple


class Row(NamedTuple):
    """What was measured, against what, what came out, and in how many seconds each."""

    what: str
    against: str
    ratio: str
    seconds: str = ""


def rounded(seconds):
    """Return seconds with three digits, as text."""
    return f"{seconds:.3g} s" if seconds < 100 else f"{seconds:.0f} s"
