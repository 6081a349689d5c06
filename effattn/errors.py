"""The errors that users meet. Each message says what was given, what was expected, and what to do."""

from __future__ import annotations


class EffattnError(Exception):
    """Base of every error that effattn raises on purpose."""


class RequestError(EffattnError, ValueError):
    """The request or the environment is wrong, so nothing was judged. The command line exits with 2."""


class NotSupported(EffattnError):
    """Raised by a method that does not offer what a case asks for: counted and shown, never a failure."""
