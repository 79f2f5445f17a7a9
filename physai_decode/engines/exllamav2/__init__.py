"""The engine of the ExLlamaV2 library."""

from importlib.util import find_spec

if find_spec('exllamav2') is None:
    raise ModuleNotFoundError("No module named 'exllamav2'", name='exllamav2')

from physai_decode.engines.exllamav2.engine import ExLlamaV2Engine

__all__ = ['ExLlamaV2Engine']
