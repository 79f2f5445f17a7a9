# Copyright 2026 physai_decode developers
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""
Check the checkpoint tensors that an engine did not read.

Some are harmless: other parts of the model (a vision tower, a draft head) and redundant tensors
(rotary frequencies, zero biases, an lm_head equal to the embedding). Any other unread tensor means
that the engine would compute a different model.
"""

from collections.abc import Iterable
import re

from physai_decode.checkpoint import Checkpoint
from physai_decode.engine import EngineError
from physai_decode.engines import stored

PREFIXES = ('model.', 'lm_head.')
_DERIVED = ('.rotary_emb.inv_freq', '.rotary_emb.cos_cached', '.rotary_emb.sin_cached')
# Scales of quantised activations and KV caches. The engines keep both in half precision.
_ACTIVATIONS = ('.activation_scale', '.input_scale', '.input_zero_point', '.input_global_scale',
                '.output_scale', '.output_zero_point', '.k_scale', '.v_scale')

_LAYER = re.compile(r'(.*\blayers\.)(\d+)\.')


def check(checkpoint: Checkpoint, left: Iterable[str],
          prefixes: tuple[str, ...] = PREFIXES) -> None:
    """
    Refuse unread tensors that belong to the network.

    :param left: names of the unread tensors.
    :param prefixes: name prefixes of the network's own tensors.
    :raises EngineError: an unread tensor would change the result of the network.
    """
    for name in sorted(left):
        if name.startswith(prefixes) and not _is_harmless(checkpoint, name):
            check_layers(checkpoint, name)
            if name.endswith('lm_head.weight'):
                raise _untied(checkpoint, name, 'the embedding')
            raise EngineError(
                f'{checkpoint.folder}: the tensor {name} belongs to the network, but config.json '
                'does not describe it; without it the answers would be wrong: copy or download '
                'the model again')


def check_same(checkpoint: Checkpoint, names: Iterable[str]) -> None:
    """
    Check that tied tensors, such as an embedding and its lm_head, are equal.

    :param names: names of the tied tensors; the checkpoint may lack some.
    :raises EngineError: two of them differ.
    """
    stored_twice = [name for name in names if name in checkpoint.tensors]
    for name in stored_twice[1:]:
        if not _equal(checkpoint, name, stored_twice[0]):
            raise _untied(checkpoint, name, stored_twice[0])


def check_layers(checkpoint: Checkpoint, name: str) -> None:
    """
    Compare num_hidden_layers with the weights, to explain a tensor that only one of them has.

    :param name: the name of that tensor; nothing is checked unless it belongs to a layer.
    :raises EngineError: the tensor belongs to a layer that only one of them has.
    """
    layer = _LAYER.match(name)
    if layer is None:
        return
    stored_layers = 1 + max((int(found[2]) for found in map(_LAYER.match, checkpoint.tensors)
                             if found and found[1] == layer[1]), default=-1)
    said = checkpoint.text_config.get('num_hidden_layers')
    if stored_layers and type(said) is int and min(said, stored_layers) <= int(layer[2]):
        owner = 'the weights have' if name in checkpoint.tensors else 'config.json implies'
        raise EngineError(
            f'{checkpoint.folder}: num_hidden_layers in config.json is {said}, but the weights '
            f'have {stored_layers} layers (only {owner} {name}): copy or download the model '
            'again, or correct num_hidden_layers')


def _untied(checkpoint: Checkpoint, name: str, embedding: str) -> EngineError:
    return EngineError(
        f'{checkpoint.folder}: {name} differs from {embedding}, to which config.json ties it: '
        'set tie_word_embeddings in config.json to false if the model has a head of its own, '
        'or copy or download the model again')


def _is_harmless(checkpoint: Checkpoint, name: str) -> bool:
    entry = checkpoint.tensors[name]
    if name.endswith(_DERIVED + _ACTIVATIONS):
        return True
    if name.endswith('.bias'):
        return not stored.read(entry).any()
    return name.endswith('lm_head.weight') and any(
        _equal(checkpoint, name, embedding) for embedding in checkpoint.tensors
        if embedding.endswith('embed_tokens.weight'))


def _equal(checkpoint: Checkpoint, first: str, second: str) -> bool:
    a, b = checkpoint.tensors[first], checkpoint.tensors[second]
    return (a.dtype, a.shape) == (b.dtype, b.shape) and stored.read(a).equal(stored.read(b))
