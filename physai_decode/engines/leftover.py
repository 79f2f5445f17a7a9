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
Tensors of a checkpoint that the engine did not read: harmless, or a model other than it computes.

Harmless is what other parts of a model bring (a vision tower, a draft head), and what says nothing
new: frequencies, biases of zero, a head that is the embedding. Knows no network.
"""

from collections.abc import Iterable

from physai_decode.checkpoint import Checkpoint
from physai_decode.engine import EngineError
from physai_decode.engines import stored

PREFIXES = ('model.', 'lm_head.')
_DERIVED = ('.rotary_emb.inv_freq', '.rotary_emb.cos_cached', '.rotary_emb.sin_cached')
# How activations and the cache are quantised, which are kept in half precision instead.
_ACTIVATIONS = ('.activation_scale', '.input_scale', '.input_zero_point', '.input_global_scale',
                '.output_scale', '.output_zero_point', '.k_scale', '.v_scale')


def check(checkpoint: Checkpoint, left: Iterable[str],
          prefixes: tuple[str, ...] = PREFIXES) -> None:
    """
    Look at the tensors that were not read.

    :param left: their names.
    :param prefixes: how the names of the network's own begin.
    :raises EngineError: one of them belongs to the network, and changes what it computes.
    """
    for name in sorted(left):
        if name.startswith(prefixes) and not _is_harmless(checkpoint, name):
            raise EngineError(
                f'{checkpoint.folder}: the tensor {name} belongs to the network, but nothing in '
                'config.json says so, and without it the model would answer wrongly: copy or '
                'download the model again')


def check_same(checkpoint: Checkpoint, names: Iterable[str]) -> None:
    """
    Look at tensors that the network has as one, such as an embedding and the head tied to it.

    :param names: of those; some may not be in the checkpoint.
    :raises EngineError: two of them differ.
    """
    stored_twice = [name for name in names if name in checkpoint.tensors]
    for name in stored_twice[1:]:
        if not _equal(checkpoint, name, stored_twice[0]):
            raise EngineError(
                f'{checkpoint.folder}: config.json has {name} and {stored_twice[0]} as one (by '
                'tie_word_embeddings), but they differ: copy or download the model again')


def _is_harmless(checkpoint, name):
    entry = checkpoint.tensors[name]
    if name.endswith(_DERIVED + _ACTIVATIONS):
        return True
    if name.endswith('.bias'):
        return not stored.read(entry).any()
    return name.endswith('lm_head.weight') and any(
        _equal(checkpoint, name, other) for other in checkpoint.tensors
        if other.endswith('embed_tokens.weight'))


def _equal(checkpoint, name, other):
    one, two = checkpoint.tensors[name], checkpoint.tensors.get(other)
    return two is not None and (one.dtype, one.shape) == (two.dtype, two.shape) and \
        stored.read(one).equal(stored.read(two))
