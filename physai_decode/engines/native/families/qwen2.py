"""Qwen2: biases of query, key and value alone; windows from some layer on."""

from collections.abc import Mapping
from typing import Any

from physai_decode.engines.native.architecture import Architecture
from physai_decode.engines.native.families import shared
from physai_decode.model_config import number
from physai_decode.model_config import windows


def parse(config: Mapping[str, Any]) -> Architecture:
    """See `families.Family`."""
    layers = number(config, 'num_hidden_layers')
    return shared.read(
        config, {'num_key_value_heads': 32}, qkv_bias=True, windows=windows(config, layers))
