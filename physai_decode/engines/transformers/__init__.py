"""The engine of the transformers library."""

from physai_decode.engines.transformers.engine import TransformersEngine

__all__ = ['TransformersEngine']
