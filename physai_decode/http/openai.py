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
Converts bodies of OpenAI's API to requests, and answers to OpenAI's objects.

Requests already use OpenAI's field names. This module handles the remaining fields of the API, and
the format of answers, streams and errors.
"""

from collections.abc import Collection
from collections.abc import Iterator
from collections.abc import Mapping
from dataclasses import replace
import json
import re
import time
from typing import Any
from typing import NamedTuple
from uuid import uuid4

from physai_decode.config import shown_json as shown
from physai_decode.http.exchange import Piece
from physai_decode.request import is_client_id
from physai_decode.request import Request
from physai_decode.request import RequestError
from physai_decode.request import TEXTS
from physai_decode.result import ANSWERED
from physai_decode.result import chat_completion
from physai_decode.timing import RequestReport

DONE = b'data: [DONE]\n\n'
# Fields that the node does not support, and their values without effect, which it accepts.
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    'n': (1,), 'best_of': (1,), 'echo': (False,), 'suffix': ('',), 'logprobs': (False,),
    'top_logprobs': (0,), 'logit_bias': ({},), 'presence_penalty': (0,),
    'frequency_penalty': (0,), 'modalities': (['text'],), 'functions': ([],),
    'function_call': ('none', 'auto')}
# Fields that never affect the answer.
_IGNORED = ('user', 'safety_identifier', 'prompt_cache_key', 'prompt_cache_retention', 'store',
           'service_tier')
_REQUIRED = 'model', 'messages', 'prompt'     # fields that an error names if they are missing
_STREAM_OPTIONS = ('include_usage', 'include_obfuscation')
# The beginning of a message about the input text, whatever field of the body it came in.
_OF_INPUT = re.compile(
    r"(the prompt|the model's chat template|the \w+( reasoning)? text|tool_calls)\b")
# HTTP status and OpenAI's code, by the kind of a refusal or by finish reason.
_REFUSALS = {'invalid': (400, 'invalid_request'), 'too_large': (413, 'request_too_large'),
             'duplicate': (409, 'duplicate_id'), 'full': (429, 'queue_full'),
             'inactive': (503, 'model_not_active')}
_ENDS = {'error': (500, 'error'), 'deadline': (504, 'deadline'), 'cancelled': (503, 'cancelled'),
         'preempted': (503, 'preempted')}
_TYPES = {401: 'authentication_error', 429: 'rate_limit_error'}


class ApiError(Exception):
    """An error response."""

    def __init__(self, status: int, code: str, message: str, param: str | None = None,
                 headers: Mapping[str, str] | None = None, **details: Any) -> None:
        """
        Create an error response.

        :param status: the HTTP status.
        :param code: a word for programs.
        :param param: the wrong field of the body.
        :param headers: additional headers of the response.
        :param details: additional fields of the body, beside the error.
        """
        super().__init__(message)
        self.status, self.code, self.param = status, code, param
        self.headers, self._details = dict(headers or {}), details

    @property
    def body(self) -> dict[str, Any]:
        """The body in OpenAI's format."""
        kind = _TYPES.get(
            self.status, 'server_error' if self.status >= 500 else 'invalid_request_error')
        return {'error': {'message': str(self), 'type': kind, 'param': self.param,
                          'code': self.code}, **self._details}


class Completion(NamedTuple):
    """A parsed body."""

    request: Request                # with an id
    names: frozenset[str]           # of the fields of the body that are not null
    formatter: 'Formatter'
    stream: bool


class Formatter(NamedTuple):
    """Formats one answer as OpenAI's objects."""

    id: str
    model: str
    created: int                    # Unix time
    chat: bool                      # a chat completion; otherwise a text completion
    usage: bool                     # whether the stream ends with the token counts, if known

    def complete(self, report: RequestReport, text: str) -> dict[str, Any]:
        """Return the object of a complete answer."""
        completion = chat_completion(report, text, self.model, self.created)
        completion['id'] = self.id
        if completion['usage']['total_tokens'] is None:     # clients expect integers
            completion['usage'] = None
        if not self.chat:
            (choice,) = completion['choices']
            completion['object'] = 'text_completion'
            completion['choices'] = [{'index': 0, 'text': text, 'logprobs': None,
                                      'finish_reason': choice['finish_reason']}]
        return completion

    def begin(self) -> Iterator[dict[str, Any]]:
        """Yield the chunks before the first piece."""
        if self.chat:
            yield self._chunk({'delta': {'role': 'assistant', 'content': ''}})

    def piece(self, piece: Piece) -> dict[str, Any]:
        """Return the chunk of a piece."""
        if not self.chat:
            return self._chunk({'text': piece.content})
        calls = [{'index': index, **call.to_json()} for index, call in piece.tool_calls]
        delta = {'reasoning_content': piece.reasoning, 'content': piece.content,
                 'tool_calls': calls}
        return self._chunk({'delta': {name: value for name, value in delta.items() if value}})

    def end(self, report: RequestReport, text: str) -> Iterator[dict[str, Any]]:
        """Yield the chunks after the last piece."""
        completion = self.complete(report, text)
        reason = completion['choices'][0]['finish_reason']
        yield self._chunk({'delta': {}} if self.chat else {'text': ''}, reason)
        if self.usage and completion['usage']:
            yield {**self._chunk({}), 'choices': [], 'usage': completion['usage']}

    def _chunk(self, content: dict[str, Any], reason: str | None = None) -> dict[str, Any]:
        kind = 'chat.completion.chunk' if self.chat else 'text_completion'
        chunk = {'id': self.id, 'object': kind, 'created': self.created, 'model': self.model,
                 'choices': [{'index': 0, **content, 'logprobs': None, 'finish_reason': reason}]}
        return {**chunk, 'usage': None} if self.usage else chunk


def read(body: Any, model: str, chat: bool) -> Completion:
    """
    Convert a body.

    :param body: the parsed JSON.
    :param model: the name of the loaded model.
    :param chat: whether this is a chat completion; otherwise it is a text completion.
    :raises RequestError: a field is wrong; the message has its name, value and allowed values.
    :raises ApiError: the body names another model.
    """
    if not isinstance(body, dict):
        raise RequestError(f'the body is {shown(body)}: expected a JSON object')
    fields = {name: value for name, value in body.items()
              if value is not None and name not in _IGNORED}
    named = fields.pop('model', None)
    if type(named) is not str:
        problem = 'missing' if named is None else shown(named)
        raise RequestError(f'model is {problem}: expected {shown(model)}, as in /v1/models')
    if named != model:
        raise ApiError(404, 'model_not_found',
                       f'model is {shown(named)}: the node has {shown(model)}', 'model')
    for name, accepted in _UNSUPPORTED.items():
        value = fields.pop(name, accepted[0])
        if not any(value == each and isinstance(value, bool) == isinstance(each, bool)
                   for each in accepted):
            raise RequestError(
                f'{name} is {shown(value)}, which the node does not support: leave it out')
    stream = _flag(fields, 'stream')
    usage = _include_usage(fields, stream)
    if 'max_completion_tokens' in fields:
        if 'max_tokens' in fields:
            raise RequestError('max_completion_tokens and max_tokens are both set: set one')
        fields['max_tokens'] = fields.pop('max_completion_tokens')
    _convert_input(fields, chat)
    try:
        request = Request.from_json(fields)
    except RequestError as error:
        if body.get('max_completion_tokens') is None:
            raise
        message = re.sub(r'^max_tokens\b', 'max_completion_tokens', str(error))
        raise RequestError(message, error.client_id) from None
    if not request.client_id:
        request = replace(
            request, client_id=f'{"chatcmpl" if chat else "cmpl"}-{uuid4().hex}')
    return Completion(
        request, frozenset(name for name, value in body.items() if value is not None),
        Formatter(request.client_id, model, int(time.time()), chat, usage), stream)


def client_id(body: Any) -> str:
    """Return the id of a body that may be invalid, empty if there is no valid id."""
    value = body.get('id') if isinstance(body, dict) else None
    return value if isinstance(value, str) and is_client_id(value) else ''


def invalid(error: RequestError, body: Any) -> ApiError:
    """Return the response to an invalid body."""
    status, code = _REFUSALS['invalid']
    names = (*body, *_REQUIRED) if isinstance(body, dict) else ()
    return ApiError(status, code, str(error), _param(str(error), names))


def failure(report: RequestReport, text: str, names: Collection[str]) -> ApiError | None:
    """
    Return the error response of a request that failed, None if it was answered.

    :param names: of the fields of the body.
    """
    if report.finish_reason in ANSWERED:
        return None
    if report.finish_reason == 'rejected':
        status, code = _REFUSALS[report.refusal or 'invalid']
        return ApiError(status, code, report.message, _param(report.message, names))
    status, code = _ENDS[report.finish_reason]
    message = report.message or f'the request was {report.finish_reason}'
    # Clients retry after such a status, and the robot would execute the request twice.
    return ApiError(status, code, message, headers={'x-should-retry': 'false'},
                    physai={'request_id': report.request_id, 'text': text,
                            'finish_reason': report.finish_reason})


def model(name: str, created: int, max_context: int) -> dict[str, Any]:
    """
    Return the object of a model.

    :param max_context: size of the context in tokens; 0 if unknown.
    """
    return {'id': name, 'object': 'model', 'created': created, 'owned_by': 'physai_decode',
            'max_model_len': max_context or None}


def event(value: Mapping[str, Any]) -> bytes:
    """Serialise one server-sent event."""
    return b'data: ' + json.dumps(value).encode() + b'\n\n'


def _flag(fields: dict[str, Any], name: str, prefix: str = '') -> bool:
    value = fields.pop(name, False)
    if type(value) is not bool:
        raise RequestError(f'{prefix}{name} is {shown(value)}: expected true or false')
    return value


def _include_usage(fields: dict[str, Any], stream: bool) -> bool:
    options = fields.pop('stream_options', {})
    if not isinstance(options, dict):
        raise RequestError(f'stream_options is {shown(options)}: expected an object')
    if options and not stream:
        raise RequestError('stream_options is given without stream: set stream to true')
    for name in options:
        if name not in _STREAM_OPTIONS:
            raise RequestError(f'{shown(f"stream_options.{name}")} is not a field of a body: '
                               f'the fields are {", ".join(_STREAM_OPTIONS)}')
    flags = {name: value for name, value in options.items() if value is not None}
    _flag(flags, 'include_obfuscation', 'stream_options.')
    return _flag(flags, 'include_usage', 'stream_options.')


def _convert_input(fields: dict[str, Any], chat: bool) -> None:
    """Replace the input text of a body by that of a request."""
    expected = 'messages' if chat else 'prompt'
    for name in TEXTS:
        if name in fields and name != expected:
            raise RequestError(f'{name} is not a field of this body: set {expected}')
    if expected not in fields:
        raise RequestError(f'{expected} is missing: set it to the input of the model')
    if chat:
        messages = fields['messages']
        if type(messages) is list:
            fields['messages'] = [_message(each) for each in messages]
        return
    prompt = fields.pop('prompt')
    if type(prompt) is list and len(prompt) == 1:
        prompt = prompt[0]
    if type(prompt) is not str:
        raise RequestError(f'prompt is {shown(prompt)}: expected one string')
    if not prompt:
        raise RequestError('prompt is "": send some text')
    fields['raw_prompt'] = prompt


def _message(value: Any) -> Any:
    """Remove the empty fields of a message, which an answer has when a client sends it back."""
    if not isinstance(value, dict):
        return value
    message = {name: each for name, each in value.items()
               if each is not None and (each != [] or name == 'content')}
    if message.get('role') != 'tool':
        message.pop('name', None)               # the speaker's name; chat templates don't use it
    if message.get('role') == 'developer':      # OpenAI's newer name
        message['role'] = 'system'
    return message


def _param(message: str, names: Collection[str]) -> str | None:
    """Return the field that a message is about, by its beginning, or None."""
    if _OF_INPUT.match(message):
        return next((name for name in ('messages', 'prompt') if name in names), None)
    if message.startswith('id ') and 'id' not in names:
        return 'metadata'                       # which has the id
    word = re.match(r'"?(\w+)', message)
    return word[1] if word and word[1] in names else None
