"""Checks at construction that a user's own object has the members of a protocol."""

from __future__ import annotations


def members(protocol: type) -> list[str]:
    """Returns the names of a protocol's members."""
    return [name for name in vars(protocol) if not name.startswith("_")]


def missing_members(value: object, protocol: type) -> list[str]:
    """Returns the names of a protocol's members that an object lacks."""
    return [name for name in members(protocol) if not hasattr(value, name)]
