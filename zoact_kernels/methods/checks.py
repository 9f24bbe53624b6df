"""Arguments that several methods have."""

from __future__ import annotations


def check_share(name: str, value: float) -> None:
    if not 0 <= value < 1:
        raise ValueError(f"{name} is {value}; it lies in [0, 1)")


def check_period(period: int) -> None:
    if period < 1:
        raise ValueError(f"period is {period}; it has to be at least 1 step")
