"""
Tensors of a checkpoint that the engine did not read: harmless, or a model other than it computes.

Harmless is what other parts of a model bring (a vision tower, a draft head), and what says nothing
new: frequencies, biases of zero, a head that is the embedding. Knows no network.
"""

from collections.abc import Iterable

from physai_decode.checkpoint import Checkpoint
from physai_decode.engine import EngineError
from physai_decode.engines import stored

_PREFIXES = ('model.', 'lm_head.')
_DERIVED = ('.rotary_emb.inv_freq', '.rotary_emb.cos_cached', '.rotary_emb.sin_cached')


def check(checkpoint: Checkpoint, used: Iterable[str]) -> tuple[str, ...]:
    """
    Look at the tensors that were not read.

    :param used: names of those that were.
    :returns: names of the others.
    :raises EngineError: one of them belongs to the network, and changes what it computes.
    """
    left = sorted(checkpoint.tensors.keys() - used)
    for name in left:
        if name.startswith(_PREFIXES) and not _is_harmless(checkpoint, name):
            raise EngineError(
                f'{checkpoint.folder}: the tensor {name} belongs to the network, but nothing in '
                'config.json says so, and without it the model would answer wrongly: copy or '
                'download the model again')
    return tuple(left)


def _is_harmless(checkpoint, name):
    entry = checkpoint.tensors[name]
    if name.endswith(_DERIVED):
        return True
    if name.endswith('.bias'):
        return not stored.read(entry).any()
    embedding = checkpoint.tensors.get('model.embed_tokens.weight')
    return name == 'lm_head.weight' and embedding is not None and \
        (entry.dtype, entry.shape) == (embedding.dtype, embedding.shape) and \
        stored.read(entry).equal(stored.read(embedding))
