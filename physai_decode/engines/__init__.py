"""
Name to engine; an engine's module is imported only when it is chosen.

Knows which engines there are and what each needs installed, nothing of how they work.
"""

from collections.abc import Callable
from importlib import import_module

from physai_decode.checkpoint import Checkpoint
from physai_decode.config import EngineConfig
from physai_decode.engine import Engine
from physai_decode.engine import EngineError

_CLASSES = {
    'native': 'NativeEngine', 'transformers': 'TransformersEngine', 'exllamav2': 'ExLlamaV2Engine'}
_INSTALL = {
    'torch': 'PyTorch (pip install torch; on a Jetson the wheel for its JetPack)',
    'transformers': 'transformers (pip install -U transformers)',
    'safetensors': 'safetensors (pip install safetensors)',
    'triton': 'Triton (pip install triton)',
    'exllamav2': 'ExLlamaV2 (pip install exllamav2; it also needs a CUDA toolkit)'}


def build(model: Checkpoint, config: EngineConfig,
          progress: Callable[[str], None] = lambda text: None) -> Engine:
    """
    Load a model into the engine that the settings name.

    ``auto`` takes the native engine where it runs the model's architecture and quantisation,
    exllamav2 for EXL2 weights, else transformers; no other reason makes it change its choice.

    :param progress: called with a line of text now and then while it loads, in this thread.
    :raises EngineError: the engine can't be had, or can't run the model; nothing stays allocated.
    """
    name = config.name
    if name == 'auto':
        name = _choose(model, progress)
    if name not in _CLASSES:
        raise EngineError(
            f'engine.name is {name!r}: allowed are auto, {", ".join(_CLASSES)}')
    return getattr(_load(name), _CLASSES[name])(model, config, progress)


def _choose(model, progress):
    _load('native')
    from physai_decode.engines.native import architecture
    from physai_decode.engines.native import gptq
    try:
        architecture.parse(model.config)
        if model.quantized:
            gptq.parse(model.quantized)
    except EngineError as reason:
        exl2 = model.quantized and model.quantized.method == 'exl2'
        name = 'exllamav2' if exl2 else 'transformers'
        progress(f'engine {name}, because {reason}')
        return name
    progress('engine native')
    return 'native'


def _load(name):
    try:
        return import_module(f'physai_decode.engines.{name}')
    except ImportError as error:
        missing = (error.name or '').partition('.')[0].replace('physai_decode', name)
        raise EngineError(
            f'the engine {name} is not installed ({error}): install '
            f'{_INSTALL.get(missing or name, missing)} or choose another engine.name') from None
