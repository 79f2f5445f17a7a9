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
Text to token ids, and ids to text.

User text never becomes control tokens: special tokens, or others that begin or end a turn. For
this, the encoder is a copy of the model's tokenizer in which these tokens have secret names. Only
those that the chat template writes receive these names; see `chat_template`. The whole is encoded
at once, so that the ids are those that the model was trained on. Other added tokens, such as
`<tool_call>`, are encoded wherever they occur, as in the library.
"""

from collections.abc import Iterable
from collections.abc import Mapping
from collections.abc import Sequence
import json
from types import MappingProxyType
from typing import Any

from physai_decode.chat_template import ChatTemplate
from physai_decode.chat_template import check_text
from physai_decode.config import ChatConfig
from physai_decode.config import shown_json
from physai_decode.conversation import Conversation
from physai_decode.detokenizer import Detokenizer
from physai_decode.request import Message
from physai_decode.speech import Manner
from physai_decode.tokenizer_files import TextError

_BLANKS = ' \t\n\r\u2581'
# The markers of thoughts in the known model families.
_THOUGHTS = (('<think>', '</think>'), ('[THINK]', '[/THINK]'), ('<seed:think>', '</seed:think>'),
             ('<|START_THINKING|>', '<|END_THINKING|>'))


class Text:
    """Converts prompts to ids, and ids to text, with one tokenizer."""

    def __init__(self, tokenizer: Any, chat: ChatConfig, vocab_size: int | None = None,
                 end_ids: Iterable[int] = ()) -> None:
        """
        Prepare the tokenizer.

        :param tokenizer: a fast tokenizer of the transformers library.
        :param chat: template and system prompt.
        :param vocab_size: vocabulary size of the model; None if unknown.
        :param end_ids: ids in the model's config that end an answer.
        :raises TextError: the tokenizer is not fast or does not fit the model, the template does
            not exist or refuses the system prompt, or the installed jinja2 cannot confine it.
        """
        backend = getattr(tokenizer, 'backend_tokenizer', None)
        if backend is None:
            raise TextError(
                f'the tokenizer is a {type(tokenizer).__name__}, which has no tokenizer.json: '
                'save the model with its fast tokenizer')
        self.backend = backend
        self._chat_template = ChatTemplate(tokenizer, chat.template)
        self.template = self._chat_template.name
        tokens = backend.get_added_tokens_decoder()
        added = {id_: token.content for id_, token in tokens.items()}
        # Runs of blanks keep their names: they are ordinary text in many vocabularies.
        names = {name: id_ for id_, name in added.items() if name.strip(_BLANKS)}
        named = {each for each in tokenizer.special_tokens_map.values() if isinstance(each, str)}
        self.special_ids = frozenset(
            id_ for id_, token in tokens.items()
            if token.special or token.content in named)
        end, turns = self._chat_template.find_turns(names)
        own_ends = [id_ for id_ in (tokenizer.eos_token_id, names.get(end)) if id_ is not None]
        secret_ids = {*self.special_ids, *own_ends, *end_ids, *map(names.__getitem__, turns)}
        self._encoder = _renamed(backend, self._chat_template.prepare({
            name: id_ for name, id_ in names.items() if id_ in secret_ids}))
        # Ids that end an answer, from the config, the tokenizer and the template; no plain words.
        ends = dict.fromkeys((*end_ids, *own_ends))
        self.end_ids = tuple(id_ for id_ in ends if id_ in added) or tuple(ends)
        self.manner = self._find_manner(added)
        # Raises if the template refuses the system prompt.
        ids = self.encode(Conversation(chat.system_prompt).messages([], '?'))
        _check_ids(backend, ids, vocab_size)

    def encode(self, messages: Sequence[Message],
               chat_template_kwargs: Mapping[str, Any] = MappingProxyType({}),
               tools: Sequence[Mapping[str, Any]] = ()) -> list[int]:
        """
        Encode a conversation up to the start of the answer.

        Without a template, or if a message has no role, the texts of the messages are joined,
        after the tokens that the tokenizer adds to every text.

        :param messages: texts of any content; special tokens in them remain text.
        :param chat_template_kwargs: further variables of the template.
        :param tools: tools that the template presents to the model.
        :raises TextError: a text has an unpaired surrogate, the template refuses or omits a
            message, or its control tokens cannot be told from the texts.
        """
        for message in messages:
            check_text(f'the {message.role or "raw"} text', message.content)
            check_text(f'the {message.role} reasoning text', message.reasoning_content)
        if tools and not self.manner.form:
            raise TextError(self.manner.tools_problem)
        if not self._chat_template.source or any(not message.role for message in messages):
            calls = any(message.tool_calls for message in messages)
            if chat_template_kwargs or calls:
                raise TextError(f'{"tool_calls" if calls else "chat_template_kwargs"} cannot be '
                                'used without a chat template: leave it out')
            whole = ''.join(message.content for message in messages)
            return self._ids(whole, add_special_tokens=True)
        whole = self._chat_template.conversation(messages, chat_template_kwargs, tools)
        return self._ids(whole, add_special_tokens=False)

    def count(self, text: str) -> int:
        """Count the tokens of a text, which may have unpaired surrogates."""
        return len(self._ids(text.encode(errors='replace').decode(), add_special_tokens=False))

    def detokenizer(self, stop: Sequence[str] = ()) -> Detokenizer:
        """Create a detokenizer for one answer, which any of the strings in ``stop`` ends."""
        return Detokenizer(self.backend, self.special_ids, stop)

    def _ids(self, text: str, add_special_tokens: bool) -> list[int]:
        # As a batch, because encoding a single text holds the interpreter's lock.
        batch = self._encoder.encode_batch([text], add_special_tokens=add_special_tokens)
        return list(batch[0].ids)

    def _find_manner(self, added: Mapping[int, str]) -> Manner:
        """Find the markers of thoughts and the syntax of tool calls."""
        template, names = self._chat_template, set(added.values())
        if not template.source:
            return Manner(reason=template.reason)
        opens, closes = next((pair for pair in _THOUGHTS if pair[1] in template.source
                              or names.issuperset(pair)), ('', ''))
        ids = self.backend.encode(f'\n{closes}\n\n', add_special_tokens=False).ids
        return Manner(opens, closes, tuple(ids) if opens else (), template.form, template.reason)


def _check_ids(backend: Any, ids: Sequence[int], vocab_size: int | None) -> None:
    """Check that the ids of a prompt, and all ids of ordinary tokens, are in the vocabulary."""
    if vocab_size is None:
        return
    beyond = next((id_ for id_ in ids if id_ >= vocab_size), None)
    if beyond is not None:
        raise TextError(
            f'the chat template writes {shown_json(backend.id_to_token(beyond))}, token {beyond}, '
            f"but the model has {vocab_size}: the tokenizer's files and config.json do not belong "
            'together; copy or download the model again')
    added = backend.get_added_tokens_decoder().keys()
    last = max(backend.get_vocab(with_added_tokens=True).values())
    words = backend.get_vocab_size()
    while last in added:
        last -= 1
    if last >= vocab_size or words < vocab_size // 2:
        raise TextError(
            f'the tokenizer has {words} tokens, with ids up to {last} without the added ones, and '
            f'the model {vocab_size}: tokenizer.json and config.json do not belong together; copy '
            'or download the model again')


def _renamed(backend: Any, names: Mapping[str, str]) -> Any:
    """
    Copy a tokenizer and rename some of its added tokens, without changing ids.

    :raises TextError: the copy has another id for a token.
    """
    from tokenizers import Tokenizer

    state = json.loads(backend.to_str())
    state['truncation'] = state['padding'] = None
    for token in state['added_tokens']:
        token['content'] = names.get(token['content'], token['content'])
    model = state['model']
    if isinstance(model['vocab'], dict):
        model['vocab'] = {names.get(word, word): id_ for word, id_ in model['vocab'].items()}
    else:
        model['vocab'] = [[names.get(word, word), score] for word, score in model['vocab']]
    if model.get('unk_token') in names:
        model['unk_token'] = names[model['unk_token']]
    try:
        copy = Tokenizer.from_str(json.dumps(state))
    except MemoryError:
        raise
    except Exception as error:          # the library raises no narrower type
        raise TextError(f'the tokenizer builds its special tokens from other tokens: {error}'
                        ) from error
    for name, secret in names.items():
        if copy.token_to_id(secret) != backend.token_to_id(name):
            raise TextError(f'tokenizer.json gives {shown_json(name)} two ids: copy or download '
                            'the model again')
    return copy
