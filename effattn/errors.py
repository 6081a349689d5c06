"""The errors that users meet. Each message says what was given, what was expected, and what to do."""

from __future__ import annotations


class EffattnError(Exception):
    """Base of every error that effattn raises on purpose."""


class RequestError(EffattnError, ValueError):
    """The request or the environment is wrong, so nothing was judged. The command line exits with 2."""


class TooLarge(RequestError):
    """The tensors of a case don't fit into memory."""


class NotSupported(EffattnError):
    """Raised by a method that does not offer what a case asks for: counted and shown, never a failure."""


class ArgumentError(EffattnError, ValueError):
    """A kernel was given an argument of a wrong shape or value."""


class ArgumentTypeError(EffattnError, TypeError):
    """A kernel was given an argument of a wrong type, dtype or device."""


class WrongReturn(EffattnError):
    """A method returned something that holds no output tensor, so there is nothing to judge."""
