"""Naming: what the names of files and folders say about which pictures belong together."""

from __future__ import annotations

from collections.abc import Sequence

MOST_NAMES = 5  # that a message lists


def listed(names: Sequence[str]) -> str:
    """The first five names and how many more there are."""
    shown = ", ".join(names[:MOST_NAMES])
    return shown + (f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else "")
