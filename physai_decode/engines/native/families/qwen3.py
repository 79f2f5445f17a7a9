"""Qwen3: queries and keys normalised, windows as Qwen2 has them."""

from collections.abc import Mapping
from typing import Any

from physai_decode.engines.native.architecture import Architecture
from physai_decode.engines.native.families import shared
from physai_decode.model_config import number
from physai_decode.model_config import windows


def parse(config: Mapping[str, Any]) -> Architecture:
    """See `families.Family`."""
    layers = number(config, 'num_hidden_layers')
    bias = bool(config.get('attention_bias', False))
    return shared.read(config, {'num_key_value_heads': 32, 'head_dim': 128}, qk_norm=True,
                       qkv_bias=bias, out_bias=bias, windows=windows(config, layers))
