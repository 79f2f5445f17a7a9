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
Load the tokenizer of a model folder from tokenizer.json.

The class that tokenizer_config.json names can build a different tokenizer from the same file, so
the file is loaded directly. The other files only add special tokens and the chat template.
Contradictory and incomplete files are refused.
"""

from collections.abc import Iterable
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version
import json
from pathlib import Path
import re
from typing import Any

from physai_decode.config import shown_json as shown
from physai_decode.pip_command import install

SAMPLE = 'Hello, world! What is 12 + 3?'    # letters, blanks, digits and punctuation
_NAMED = ('bos_token', 'eos_token', 'unk_token', 'sep_token', 'pad_token', 'cls_token',
          'mask_token')
_LISTS = ('additional_special_tokens', 'extra_special_tokens')
_AGAIN = 'copy or download the model again'


class TextError(ValueError):
    """A prompt cannot be encoded, or a tokenizer cannot be loaded; the message says why."""


def load_tokenizer(folder: str) -> Any:
    """
    Load the tokenizer of a model.

    :param folder: a folder in Hugging Face layout. No code from it runs; nothing is downloaded.
    :returns: a fast tokenizer of the transformers library.
    :raises TextError: it cannot be loaded; the message names the folder and the reason.
    """
    path = Path(folder)
    try:
        exists = (path / 'tokenizer.json').is_file()
        tokenizer = _from_file(path) if exists else _converted(path)
        _check_sample(tokenizer, '' if exists else 'it has no tokenizer.json, and ')
        return tokenizer
    except MemoryError:
        raise
    except TextError as error:
        reason = str(error)
    # The libraries raise exceptions of any type.
    except Exception as error:
        message = ' '.join(str(error).split('\n', 2)[:2])
        reason = (f'{type(error).__name__}: {message}; copy or download config.json, '
                  'tokenizer.json and tokenizer_config.json again')
    raise TextError(f'no tokenizer can be loaded from {folder}: {reason}')


def _from_file(folder: Path) -> Any:
    """Load tokenizer.json; take special tokens and the chat template from the config."""
    import transformers

    config = _read(folder / 'tokenizer_config.json')
    own_class = 'AutoTokenizer' in (config.get('auto_map') or {})
    if own_class and not hasattr(transformers, str(config.get('tokenizer_class'))):
        raise _own_code()
    backend = _backend(folder / 'tokenizer.json')
    _add(backend, config.get('added_tokens_decoder') or {})
    named = {**_read(folder / 'special_tokens_map.json'), **{
        key: value for key, value in config.items() if value is not None}}
    special = {key: _content(named[key], key) for key in _NAMED if named.get(key)}
    further = [_content(token, key) for key in _LISTS for token in _listed(named.get(key))]
    # A token that the config names is special, even if the file says otherwise. If the file lacks
    # it, it stays text.
    _make_special(backend, (*special.values(), *further))
    known = {key: name for key, name in special.items() if backend.token_to_id(name) is not None}
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **known)
    _set_templates(tokenizer, folder, config)
    tokenizer.absent_tokens = {key: name for key, name in special.items() if key not in known}
    return tokenizer


def _backend(path: Path) -> Any:
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_file(str(path))
    except MemoryError:
        raise
    # The library raises plain exceptions.
    except Exception as error:
        _read(path)                     # raises if it is not JSON
        raise TextError(
            f'tokenizer.json is damaged, or written for a version of tokenizers after '
            f'{version("tokenizers")}: {install("-U", "tokenizers")}, or {_AGAIN}') from error


def _converted(folder: Path) -> Any:
    """Let the transformers library convert older files."""
    from transformers import AutoTokenizer

    for model in sorted((*folder.glob('*.model'), *folder.glob('*.tiktoken'))):
        missing = [name for name in _libraries(model) if not _installed(name)]
        if missing:
            raise TextError(
                f'it has {model.name} but no tokenizer.json: to convert the file, '
                f'{install(*missing)}, or save the model with its fast tokenizer')
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False)
    except MemoryError:
        raise
    except Exception as error:
        if 'trust_remote_code' in str(error):
            raise _own_code() from error
        raise TextError(
            'it has no tokenizer.json, and no other files that can be converted to one: '
            f'{_AGAIN}, or save it with its fast tokenizer') from error
    names = dict(getattr(tokenizer, 'vocab_files_names', {}))
    names.pop('tokenizer_file', None)
    absent = sorted(name for name in names.values() if not (folder / name).is_file())
    if absent and not (folder / 'tekken.json').is_file():
        raise TextError(f'it has no tokenizer.json, and no {" and no ".join(absent)} to convert: '
                        f'{_AGAIN}')
    _set_templates(tokenizer, folder, {'chat_template': tokenizer.chat_template})
    return tokenizer


def _libraries(path: Path) -> tuple[str, ...]:
    """Return the libraries that read an older file: lines of base64 and a number, or protobuf."""
    with path.open('rb') as file:
        lines = re.fullmatch(rb'[\w+/=]+ \d+\s*', file.readline(1000))
    return ('tiktoken',) if lines else ('sentencepiece', 'protobuf')


def _installed(name: str) -> bool:
    try:
        return bool(version(name))
    except PackageNotFoundError:
        return False


def _own_code() -> TextError:
    return TextError('it needs code from that folder, which is never run: choose another model')


def _check_sample(tokenizer: Any, lacks: str) -> None:
    """Refuse a vocabulary that lacks the tokens of ordinary text."""
    backend = getattr(tokenizer, 'backend_tokenizer', None)
    if backend is None:
        return                          # `Text` refuses it
    ids = backend.encode(SAMPLE, add_special_tokens=False).ids
    unknown = tokenizer.unk_token_id
    if all(id_ == unknown for id_ in ids):
        raise TextError(
            f'{lacks}none of its {backend.get_vocab_size()} tokens is text (it cannot encode '
            f'{SAMPLE!r}): {_AGAIN}')


def _add(backend: Any, listed: Mapping[str, Any]) -> None:
    """Add the tokens of the config, whose flags take precedence, and check that the ids agree."""
    from tokenizers import AddedToken

    known, tokens = backend.get_added_tokens_decoder(), {
        int(id_): AddedToken(**{key: value for key, value in token.items() if key != '__type'})
        for id_, token in sorted(listed.items(), key=lambda item: int(item[0]))}
    # Two are equal if their contents are, whatever their flags.
    backend.add_tokens([token for id_, token in tokens.items()
                        if repr(token) != repr(known.get(id_))])
    for id_, token in tokens.items():
        if backend.token_to_id(token.content) != id_:
            raise TextError(
                f'tokenizer_config.json gives {shown(token.content)} the id {id_}, tokenizer.json '
                f'gives it {backend.token_to_id(token.content)}: {_AGAIN}')


def _make_special(backend: Any, names: Iterable[str]) -> None:
    """Make tokens special if the vocabulary has them; their other flags stay as they are."""
    from tokenizers import AddedToken

    known = {token.content: token for token in backend.get_added_tokens_decoder().values()}
    tokens = [known.get(name) or AddedToken(name, normalized=False)
              for name in dict.fromkeys(names) if backend.token_to_id(name) is not None]
    for token in tokens:
        token.special = True
    backend.add_special_tokens(tokens)


def _listed(value: Any) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value or ()


def _content(token: Any, key: str) -> str:
    name = token.get('content') if isinstance(token, dict) else token
    if not isinstance(name, str):
        raise TextError(f'tokenizer_config.json has {shown(name)} as {key}: expected a string; '
                        f'{_AGAIN}')
    return name


def _set_templates(tokenizer: Any, folder: Path, config: Mapping[str, Any]) -> None:
    """Set the chat template, or several by name, and the file of each."""
    found: dict[str, str] = {}
    value, source = config.get('chat_template'), folder / 'tokenizer_config.json'
    if not value:
        source = folder / 'chat_template.json'
        value = _read(source).get('chat_template')
    if isinstance(value, list):
        found = {each['name']: each['template'] for each in value}
    elif isinstance(value, dict):
        found = value
    elif value:
        found = {'default': value}
    single = folder / 'chat_template.jinja'
    files = [*sorted((folder / 'additional_chat_templates').glob('*.jinja'))]
    if single.is_file():
        found = {}
        files.insert(0, single)
    sources = dict.fromkeys(found, source)
    for path in files:
        name = 'default' if path == single else path.stem
        try:
            found[name], sources[name] = path.read_text(encoding='utf-8'), path
        except UnicodeDecodeError:
            raise TextError(f'{path.name} is damaged (it is not UTF-8): {_AGAIN}') from None
    for name, template in found.items():
        if not isinstance(template, str):
            raise TextError(f'its chat template {shown(name)} is {shown(template)}: expected a '
                            f'string; {_AGAIN}')
    tokenizer.chat_template = found['default'] if found.keys() == {'default'} else found or None
    tokenizer.template_files = {found[name]: str(path) for name, path in sources.items()}


def _read(path: Path) -> dict[str, Any]:
    """Read the JSON object in a file; empty if there is no file."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding='utf-8'))
    except ValueError as error:
        raise TextError(f'{path.name} is damaged ({error}): {_AGAIN}') from error
    if not isinstance(value, dict):
        raise TextError(f'{path.name} is damaged (it is not a JSON object): {_AGAIN}')
    return value
