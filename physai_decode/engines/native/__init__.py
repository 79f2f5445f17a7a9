"""The native engine: its own transformer, kernels and captured decode step."""

from physai_decode.engines.native.engine import NativeEngine

__all__ = ['NativeEngine']
