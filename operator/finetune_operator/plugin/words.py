"""Spans of time, sums of money, counts and addresses, as kubectl and people write them."""

from __future__ import annotations

from finetune_api.status import DESTINATIONS, Result


def span(seconds: float) -> str:
    """A duration with at most two units: 42s, 4m30s, 27m, 2h40m, 3d4h, 12d. Negative ones are 0s."""
    left = max(0, int(seconds))
    if left < 60:
        return f"{left}s"
    minutes, rest = divmod(left, 60)
    if minutes < 60:
        return f"{minutes}m{rest}s" if minutes < 10 and rest else f"{minutes}m"
    hours, minutes = divmod(minutes, 60)
    if hours < 24:
        return f"{hours}h{minutes}m" if minutes else f"{hours}h"
    days, hours = divmod(hours, 24)
    return f"{days}d{hours}h" if days < 10 and hours else f"{days}d"


def money(amount: float, currency: str | None) -> str:
    """A sum in the runtime's currency."""
    return f"{amount:,.2f}{f' {currency}' if currency else ''}"


def short_count(number: float) -> str:
    """A count with three figures: 950, 4.88M, 24.6B."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.0f}"


def several(number: int, noun: str) -> str:
    """1 job, 2 jobs."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def reached_by(result: Result) -> str:
    """What the workers reached that no training needs; empty: nothing of it."""
    return ", ".join(f"{DESTINATIONS[each.to]} ({each.address})" for each in result.egress if each.reached)
