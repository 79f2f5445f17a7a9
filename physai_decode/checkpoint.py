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
Find and inspect a model folder in Hugging Face layout.

This module reads the JSON files and the headers of safetensors files. It refuses missing,
incomplete and unsupported files by name. It never opens a pickle and never runs code from a model
folder.
"""

from collections.abc import Iterator
from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import dataclass
import errno
from fnmatch import fnmatch
from functools import cached_property
import json
import math
import os
from pathlib import Path
import re
import struct
from typing import Any

from physai_decode import model_config
from physai_decode import regular_file
from physai_decode.config import shown_json as shown
from physai_decode.engine import EngineError
from physai_decode.engine import first_line
from physai_decode.model_config import Quantization
from physai_decode.pip_command import install

MODEL_PATH = 'model.path'      # the setting that names the model, unless another does
_MODELS = Path(__file__).parent / 'models'
_ITEM_BITS = {
    'BOOL': 8, 'U8': 8, 'I8': 8, 'F8_E4M3': 8, 'F8_E5M2': 8, 'F8_E8M0': 8, 'U16': 16, 'I16': 16,
    'F16': 16, 'BF16': 16, 'U32': 32, 'I32': 32, 'F32': 32, 'U64': 64, 'I64': 64, 'F64': 64,
    'C64': 64, 'F4': 4, 'F6_E2M3': 6, 'F6_E3M2': 6}
_MAX_HEADER_BYTES = 100_000_000    # limit of the safetensors format
# Size limits in bytes by file name, several times the sizes in the largest models. Files with
# other names are weights, or are not read.
_MAX_BYTES = {
    'config.json': 2**24, '*_config.json': 2**24, 'special_tokens_map.json': 2**24,
    'added_tokens.json': 2**24, '*.index.json': 2**26, '*.jinja': 2**22,
    'chat_template.json': 2**22, 'tokenizer.json': 2**28, 'tekken.json': 2**28,
    'vocab.json': 2**28, 'vocab.txt': 2**28, 'merges.txt': 2**28, '*.model': 2**28,
    '*.tiktoken': 2**28}
_POINTER = b'version https://git-lfs'
_NO_GGUF = ('get the model in Hugging Face layout, with safetensors, or serve the file with '
            'llama-server and set engine.name to openai')
# Of a folder that cannot be written.
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS,
                errno.ENOTDIR)
_DOWNLOADED = ['*.json', '*.safetensors', '*.model', '*.txt', '*.jinja']


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a safetensors file; ``start`` and ``stop`` are byte offsets in that file."""

    dtype: str                # safetensors name: BF16, F32, I32, ...
    shape: tuple[int, ...]
    path: Path
    start: int
    stop: int

    @property
    def bytes(self) -> int:
        """The stored size in bytes."""
        return self.stop - self.start


@dataclass(frozen=True)
class Checkpoint:
    """The contents of a model folder."""

    folder: Path
    config: Mapping[str, Any]            # config.json
    generation: Mapping[str, Any]        # generation_config.json; empty without one
    eos_token_ids: tuple[int, ...]       # ids that end an answer
    tensors: Mapping[str, TensorEntry]

    @property
    def text_config(self) -> Mapping[str, Any]:
        """The config of the language model, which multimodal configs nest."""
        return model_config.part(self.config, 'text_config') or self.config

    @property
    def sampling(self) -> Mapping[str, Any]:
        """Sampling settings in generation_config.json, by field of `SamplingConfig`."""
        return model_config.sampling(self.generation)

    @property
    def unapplied(self) -> tuple[str, ...]:
        """Settings in generation_config.json that change the text, but that no engine applies."""
        return model_config.unapplied(self.generation)

    @property
    def vocab_size(self) -> int | None:
        """The vocabulary size; None if the config does not set it."""
        size = self.text_config.get('vocab_size')
        return size if type(size) is int else None

    @property
    def model_type(self) -> str:
        """The model family: qwen2, llama, ..."""
        return str(self.config['model_type'])

    @property
    def notes(self) -> tuple[str, ...]:
        """Ambiguities in config.json, and how they are resolved."""
        return model_config.notes(self.config)

    @property
    def quantized(self) -> Quantization | None:
        """The quantisation of the weights; None if there is none."""
        return model_config.quantization(self.config)

    @property
    def quantization(self) -> str:
        """The name of the quantisation: none, gptq-int4-g128, bitsandbytes-nf4, ..."""
        found = self.quantized
        return 'none' if found is None else found.name

    @cached_property
    def weight_bytes(self) -> int:
        """The stored size of all weights in bytes."""
        return sum(entry.bytes for entry in self.tensors.values())

    @property
    def random_weights(self) -> Mapping[str, Any] | None:
        """How to create the weights, if the folder only describes them; else None."""
        return model_config.random_weights(self.config)

    @property
    def context_limit(self) -> int | None:
        """The context that the model supports, in tokens; None if the config does not set it."""
        return model_config.context_limit(self.text_config)


def locate(path: str, revision: str = '', parameter: str = MODEL_PATH) -> Path:
    """
    Find the folder of a model.

    :param path: ``builtin:NAME``, a folder, or a hub id such as ``ORG/NAME``.
    :param revision: branch, tag or commit of a hub id; empty for its default branch.
    :param parameter: the setting that names the model, for errors.
    :returns: the folder; a hub id that is not in the local cache is downloaded first.
    :raises EngineError: the model does not exist, or cannot be downloaded.
    """
    if path.startswith('builtin:'):
        name = path[len('builtin:'):]
        known = sorted(each.parent.name for each in _MODELS.glob('*/config.json'))
        if name not in known:
            raise EngineError(
                f'{parameter} {path!r}: the package does not contain this model; it has '
                f'{", ".join("builtin:" + each for each in known) or "none"}')
        return _MODELS / name
    try:
        folder = Path(path).expanduser()
        is_folder, exists = path and folder.is_dir(), path and folder.exists()
    # The home of an unknown user, a name that is too long, or a folder without permission.
    except (OSError, RuntimeError) as error:
        raise EngineError(
            f'{parameter} {path!r} cannot be accessed ({error}): set it to a folder that this '
            'user can read') from None
    if is_folder:
        return folder
    if exists and path.lower().endswith('.gguf'):
        raise EngineError(
            f'{parameter} {path!r} is a GGUF file, which no engine reads: {_NO_GGUF}')
    if exists:
        raise EngineError(
            f'{parameter} {path!r} is a file: set it to the folder that contains config.json')
    if not re.fullmatch(r'[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*', path):
        raise EngineError(
            f'{parameter} {path!r}: no such folder; expected builtin:NAME, a folder in Hugging '
            'Face layout, or a hub id ORG/NAME')
    return _download(path, revision, parameter)


def local_folder(path: str) -> Path | None:
    """Find the folder of a model like `locate`, but download nothing; None if it is not found."""
    try:
        if path.startswith('builtin:') or Path(path).expanduser().exists():
            return locate(path)
        from huggingface_hub import snapshot_download
        return Path(snapshot_download(path, local_files_only=True))
    # The client raises its own errors and those of the operating system.
    except Exception:
        return None


def open(path: str, revision: str = '', parameter: str = MODEL_PATH) -> Checkpoint:
    """Find a model and inspect its folder; see `locate` and `inspect`."""
    return inspect(locate(path, revision, parameter), parameter)


def inspect(folder: Path, parameter: str = MODEL_PATH) -> Checkpoint:
    """
    Inspect a model folder without loading the weights.

    :param folder: a folder in Hugging Face layout.
    :param parameter: see `locate`.
    :raises EngineError: the folder is missing, empty or incomplete, is not a model, or has an
        unsupported format; the message names the file and says what to do.
    """
    try:
        if not folder.is_dir():
            raise EngineError(f'{folder}: no such folder')
        return _inspect(folder, parameter)
    except OSError as error:
        advice = 'correct its permissions' if isinstance(error, PermissionError) else \
            'copy or download the model again'
        raise EngineError(f'{folder} cannot be read ({error}): {advice}') from None


@contextmanager
def parsing(path: Path | str) -> Iterator[None]:
    """
    Convert parsing errors inside ``with`` into an EngineError that names the file.

    :raises EngineError: a value in the file has the wrong type or range.
    """
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError,
            ValueError) as error:
        reason = error if isinstance(error, ValueError) else repr(error)
        if isinstance(error, KeyError):
            reason = f'{shown(error.args[0])} is missing'
        raise EngineError(
            f'{path} is damaged ({reason}): copy or download the model again, or correct the '
            'file') from error


def _inspect(folder: Path, parameter: str) -> Checkpoint:
    _check_files(folder)
    _check_adapter(folder, parameter)
    # A folder of another format often has no config.json either.
    if not (folder / 'config.json').exists() and not any(folder.glob('*.safetensors')):
        if error := _foreign_weights(folder):
            raise error
    config = _with_quantization(folder, _read_json(folder / 'config.json'))
    if not isinstance(config.get('model_type'), str):
        raise EngineError(
            f'{folder / "config.json"} has no model_type, so it is not a model in Hugging Face '
            f'layout: set {parameter} to such a folder')
    tensors: dict[str, TensorEntry] = {}
    for path, expected in _weight_files(folder).items():
        header = _read_header(path)
        absent = sorted(expected - header.keys())
        if absent:
            raise EngineError(
                f'{path} lacks {len(absent)} tensors that the index assigns to it, such as '
                f'{absent[0]}: copy or download the model again')
        twice = min(tensors.keys() & header.keys(), default=None)
        if twice is not None:
            raise EngineError(
                f'{tensors[twice].path} and {path.name} both have the tensor {twice}: remove the '
                'files of another model, or download the model into an empty folder')
        tensors.update(header)
    file = folder / 'generation_config.json'
    generation = _read_json(file) if file.exists() else {}
    with parsing(file):
        ends = model_config.end_ids(generation)
    with parsing(folder / 'config.json'):
        ends += model_config.end_ids(config)
        ends += model_config.end_ids(model_config.part(config, 'text_config'))
    # The end tokens of all files, as one of them may be out of date.
    model = Checkpoint(folder, config, generation, tuple(dict.fromkeys(ends)), tensors)
    with parsing(folder / 'config.json'):
        model_config.check(config)
        model_config.check(model.text_config)
        _ = model.quantization, model.context_limit, model.random_weights
    if model.text_config.get('is_causal') is False:
        raise EngineError(
            f'{folder}: is_causal is false in config.json, so the model reads text in both '
            'directions, as embedding models do, and cannot generate it: choose another model')
    with parsing(file):
        _ = model.sampling
    return model


def _check_files(folder: Path) -> None:
    """Check every file, because libraries also open some of them directly."""
    files = [*folder.iterdir(), *(folder / 'additional_chat_templates').glob('*')]
    if not files:
        raise EngineError(f'{folder} is empty: copy or download the model into it')
    for path in files:
        # A dangling link counts as a missing file.
        if path.exists() and not path.is_dir():
            limit = _max_bytes(path)
            regular_file.check(path, limit)
            if limit is not None:
                with regular_file.opened(path) as file:
                    _check_pulled(path, file.read(len(_POINTER)))


def _check_pulled(path: Path, begin: bytes) -> None:
    """Refuse a Git LFS pointer, which the beginning of the file reveals."""
    if begin == _POINTER:
        raise EngineError(f'{path} is a Git LFS pointer, not the file itself: run "git lfs pull" '
                          'in the folder')


def _check_adapter(folder: Path, parameter: str) -> None:
    """Refuse a folder that has an adapter, such as LoRA, but no weights of a model."""
    path = folder / 'adapter_config.json'
    weights = [each for end in ('safetensors', 'bin') for each in folder.glob(f'*.{end}')]
    if path.exists() and all(each.name.startswith('adapter') for each in weights):
        base = _read_json(path).get('base_model_name_or_path') or 'its base model'
        raise EngineError(
            f'{folder} has an adapter (adapter_config.json), but not the weights of a model: '
            f'merge it into {base} (with peft: merge_and_unload), save the result with its '
            f'tokenizer, and set {parameter} to that folder')


def _max_bytes(path: Path) -> int | None:
    return next((limit for pattern, limit in _MAX_BYTES.items() if fnmatch(path.name, pattern)),
                None)


def _download(path: str, revision: str, parameter: str) -> Path:
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.utils import disable_progress_bars
    except ImportError:
        raise EngineError(
            f'{parameter} {path!r} is not a local folder: to download it from the hub, '
            f'{install("huggingface_hub")}') from None
    disable_progress_bars()
    try:
        return Path(snapshot_download(
            path, revision=revision or None, allow_patterns=_DOWNLOADED, ignore_patterns=['*/*']))
    # The client raises its own errors and those of its HTTP library and the operating system.
    except Exception as error:
        if isinstance(error, OSError) and error.errno in _DISK_ERRORS:
            raise EngineError(
                f'{parameter} {path!r} could not be downloaded from the hub '
                f'({first_line(error)}): set HF_HOME in the environment to a folder that can be '
                'written, with space for the model') from None
        raise EngineError(
            f'{parameter} {path!r} is not a local folder and could not be downloaded from the hub '
            f'({first_line(error)}): on a machine with network access, run '
            f'"hf download {path} --local-dir FOLDER", copy the folder to this '
            f'machine, and set {parameter} to it') from None


def _read_json(path: Path) -> dict[str, Any]:
    limit = _max_bytes(path)
    assert limit is not None            # the patterns cover all JSON files
    try:
        with parsing(path):
            value = json.loads(regular_file.read(path, limit).decode())
            if not isinstance(value, dict):
                raise ValueError('it is not a JSON object')
            return value
    except FileNotFoundError:
        raise EngineError(
            f'{path} is missing, so {path.parent} is not a complete model folder in Hugging Face '
            'layout: copy or download the model again') from None


def _weight_files(folder: Path) -> dict[Path, set[str]]:
    """Return the safetensors files and the tensor names that the index lists in each."""
    index = folder / 'model.safetensors.index.json'
    single = folder / 'model.safetensors'
    if index.exists() and not single.exists():
        expected: dict[Path, set[str]] = {}
        weight_map = _read_json(index).get('weight_map')
        if not isinstance(weight_map, dict) or not weight_map:
            raise EngineError(f'{index} has no weight_map: copy or download it again')
        with parsing(index):
            for name, file in weight_map.items():
                expected.setdefault(folder / Path(file).name, set()).add(name)
        absent = sorted(path.name for path in expected if not path.exists())
        if absent:
            raise EngineError(
                f'{folder} lacks {len(absent)} of the {len(expected)} weight files that '
                f'{index.name} lists: {", ".join(absent)}; copy or download the model again')
        return expected
    paths = [single] if single.exists() else sorted(folder.glob('*.safetensors'))
    if not paths:
        raise _foreign_weights(folder) or EngineError(
            f'{folder} has no weights (no *.safetensors file): copy or download the model again')
    return {path: set() for path in paths}


def _with_quantization(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    """Add the quantisation from the file of its own in which ModelOpt may have written it."""
    path = folder / 'hf_quant_config.json'
    if config.get('quantization_config') or not path.exists():
        return config
    with parsing(path):
        found = model_config.part(_read_json(path), 'quantization')
    if not found.get('quant_algo'):
        return config
    return {**config, 'quantization_config': {'quant_method': 'modelopt', **found}}


def _foreign_weights(folder: Path) -> EngineError | None:
    """Return the error for weights in another format than safetensors; None if there are none."""
    for pattern, kind in (
            ('*.bin', 'pickle'), ('*.pt', 'pickle'), ('*.pth', 'pickle'), ('*.gguf', 'GGUF'),
            ('*.h5', 'HDF5'), ('*.msgpack', 'Flax'), ('*.onnx', 'ONNX')):
        found = sorted(folder.glob(pattern))
        if not found:
            continue
        if kind == 'pickle':
            return EngineError(
                f'{folder} has only pickle weights ({found[0].name}), which can run code when '
                'they are opened: convert them to safetensors')
        return EngineError(
            f'{folder} has only {kind} weights ({found[0].name}), which no engine reads: '
            f'{_NO_GGUF if kind == "GGUF" else "get the model in safetensors format"}')
    return None


def _read_header(path: Path) -> dict[str, TensorEntry]:
    """Read a safetensors header: its length in 8 bytes (little endian), then JSON, then data."""
    again = 'copy or download it again'
    with regular_file.opened(path) as file:
        size = os.fstat(file.fileno()).st_size
        prefix = file.read(8)
        _check_pulled(path, prefix + file.read(len(_POINTER) - 8))
        file.seek(8)
        if len(prefix) < 8:
            raise EngineError(f'{path} is truncated to {size} bytes: {again}')
        length = struct.unpack('<Q', prefix)[0]
        if length > _MAX_HEADER_BYTES:
            raise EngineError(f'{path} is not a safetensors file: {again}')
        if 8 + length > size:
            raise EngineError(
                f'{path} is truncated: its header ends at byte {8 + length}, but the file ends '
                f'at byte {size}; {again}')
        with parsing(path):
            header = json.loads(file.read(length))
            header.pop('__metadata__', None)
            entries = {name: _entry(value, path, 8 + length) for name, value in header.items()}
    end = 8 + length
    for name, entry in sorted(entries.items(), key=lambda each: (each[1].start, each[1].stop)):
        if entry.start != end:
            raise EngineError(
                f'{path}: tensor {name} begins at byte {entry.start}, but the previous one ends '
                f'at byte {end}: {again}')
        end = entry.stop
    if end != size:
        problem = 'is truncated' if end > size else 'has bytes that belong to no tensor'
        raise EngineError(
            f'{path} {problem}: its tensors end at byte {end}, but the file ends at byte '
            f'{size}; {again}')
    for name, entry in entries.items():
        bits = _ITEM_BITS.get(entry.dtype)
        if bits is not None and math.prod(entry.shape) * bits != entry.bytes * 8:
            raise EngineError(
                f'{path}: tensor {name} of shape {entry.shape} and dtype {entry.dtype} cannot '
                f'have {entry.bytes} bytes: {again}')
    return entries


def _entry(value: Mapping[str, Any], path: Path, begin: int) -> TensorEntry:
    dtype, shape, (start, stop) = value['dtype'], tuple(value['shape']), value['data_offsets']
    if not isinstance(dtype, str) or any(
            type(number) is not int or number < 0 for number in (*shape, start, stop)):
        raise ValueError(f'{shown(value)} does not describe a tensor')
    return TensorEntry(dtype, shape, path, begin + start, begin + stop)
