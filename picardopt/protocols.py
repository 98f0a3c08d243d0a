"""Checks at construction that a user's own object has what a protocol asks for."""

from __future__ import annotations


def members(protocol: type) -> list[str]:
    """Returns the names that a protocol asks for."""
    return [name for name in vars(protocol) if not name.startswith("_")]


def missing_members(value: object, protocol: type) -> list[str]:
    """Returns the names that a protocol asks for and an object lacks."""
    return [name for name in members(protocol) if not hasattr(value, name)]
