"""How a format refuses what the native engine does not run."""

from typing import Any

from physai_decode.engine import EngineError


def refusal(what: str, runs: str) -> EngineError:
    """Give the error that names what is asked for, what is run, and the way out."""
    return EngineError(f'the native engine does not run {what} (it runs {runs}); '
                       'set engine.name to transformers')


def check_group(name: str, size: Any) -> None:
    """
    Hold the columns that share a scale against what the kernels have.

    :param size: -1: all of a row's.
    :raises EngineError: it is another number, or none.
    """
    if type(size) is not int or (size != -1 and (size <= 0 or size % 32)):
        raise refusal(f'{name} groups of {size!r}', 'multiples of 32, and -1')
