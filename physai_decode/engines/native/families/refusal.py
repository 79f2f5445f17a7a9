"""How a family refuses what the native engine does not run."""

from physai_decode.engine import EngineError


def unsupported(what: str) -> EngineError:
    """Give the error that names what is asked for, and the way out."""
    return EngineError(f'the native engine does not run {what}; '
                       'set engine.name to transformers, which runs every architecture it knows')
