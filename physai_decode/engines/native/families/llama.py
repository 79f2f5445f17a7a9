"""Llama, with biases where its config asks for them."""

from collections.abc import Mapping
from typing import Any

from physai_decode.engines.native.architecture import Architecture
from physai_decode.engines.native.families import shared


def parse(config: Mapping[str, Any]) -> Architecture:
    """See `families.Family`."""
    bias = bool(config.get('attention_bias', False))
    return shared.read(config, {}, qkv_bias=bias, out_bias=bias,
                       mlp_bias=bool(config.get('mlp_bias', False)))
