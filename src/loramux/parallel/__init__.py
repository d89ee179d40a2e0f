"""Tensor parallelism: the group of ranks, and how layers are cut among them."""

from __future__ import annotations

from loramux.parallel.cuts import (
    STYLES,
    Cut,
    Kind,
    Stripe,
    all_of,
    cut_linear,
    head_stripe,
    stripe,
)
from loramux.parallel.group import ALONE, Group, PlannedGroup, join

__all__ = [
    "ALONE",
    "STYLES",
    "Cut",
    "Group",
    "Kind",
    "PlannedGroup",
    "Stripe",
    "all_of",
    "cut_linear",
    "head_stripe",
    "join",
    "stripe",
]
