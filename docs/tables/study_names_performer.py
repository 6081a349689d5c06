"""What the names in a study of Performer mean, those of what stands beside the methods included."""

from __future__ import annotations

from effattn.study import performer, words


def render() -> str:
    """A list."""
    methods = [*performer.METHODS, "theory", *performer.BASELINES, *performer.CONTROLS]
    return words.listed(methods, size="m")
