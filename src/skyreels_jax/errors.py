"""The exceptions this package raises on purpose.

Everything else that escapes is a bug. The command line turns each into one line on standard error
and the exit code below.
"""


class SkyReelsError(Exception):
    """Base of all errors raised on purpose; ``exit_code`` is what the command line returns."""

    exit_code: int = 2


class RequestError(SkyReelsError, ValueError):
    """A setting, prompt, image or path is illegal: says what was given, the rule, legal values."""


class WeightsError(SkyReelsError):
    """A checkpoint folder or file is incomplete, inconsistent, corrupt or not to be trusted."""


class UnsupportedError(SkyReelsError, NotImplementedError):
    """A named part (an attention path, a layout, a device) cannot serve the request; says why."""


class NumericsError(SkyReelsError, ArithmeticError):
    """A computation gave NaN or infinity; says where, and what may be the cause."""


class Stopped(SkyReelsError):
    """A generation ended early because somebody asked it to; says what is kept."""

    # What a shell returns for a program that SIGINT ended.
    exit_code = 130

    def __init__(self, message: str, exit_code: int = 130):
        super().__init__(message)
        self.exit_code = exit_code
