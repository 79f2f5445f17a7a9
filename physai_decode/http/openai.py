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
Bodies of OpenAI's API to requests, and ends of requests to OpenAI's objects.

`request.py` has OpenAI's names already. What is here is what it does not know: the fields of the
API that are not the request's, and the shape of answers, streams and errors.
"""

from collections.abc import Iterator
from collections.abc import Mapping
from dataclasses import replace
import json
import re
import time
from typing import Any
from typing import NamedTuple
from uuid import uuid4

from physai_decode.config import shown
from physai_decode.http.exchange import Piece
from physai_decode.request import is_client_id
from physai_decode.request import Request
from physai_decode.request import RequestError
from physai_decode.result import ANSWERED
from physai_decode.result import chat_completion
from physai_decode.timing import RequestReport

DONE = b'data: [DONE]\n\n'
# Fields of the API that do nothing here: only a value that asks for nothing is taken.
_IDLE: dict[str, tuple[Any, ...]] = {
    'n': (1,), 'best_of': (1,), 'echo': (False,), 'suffix': ('',), 'logprobs': (False,),
    'top_logprobs': (0,), 'logit_bias': ({},), 'presence_penalty': (0,),
    'frequency_penalty': (0,), 'modalities': (['text'],), 'functions': ([],),
    'function_call': ('none', 'auto')}
# Those that change no answer, whatever they hold.
_UNUSED = ('user', 'safety_identifier', 'prompt_cache_key', 'prompt_cache_retention', 'store',
           'service_tier')
_STREAM_OPTIONS = ('include_usage', 'include_obfuscation')
# Kind of a refusal, or end of a request: HTTP status and OpenAI's code.
_REFUSALS = {'invalid': (400, 'invalid_request'), 'too_large': (413, 'request_too_large'),
             'full': (429, 'queue_full'), 'inactive': (503, 'model_not_active')}
_ENDS = {'error': (500, 'error'), 'deadline': (504, 'deadline'), 'cancelled': (503, 'cancelled'),
         'preempted': (503, 'preempted')}
_TYPES = {401: 'authentication_error', 429: 'rate_limit_error'}


class ApiError(Exception):
    """What is answered in place of an answer."""

    def __init__(self, status: int, code: str, message: str, param: str | None = None,
                 headers: Mapping[str, str] | None = None, **details: Any) -> None:
        """
        Keep what is to be said.

        :param status: of HTTP.
        :param code: a word for programs.
        :param param: the field of the body that is wrong.
        :param headers: further ones.
        :param details: stand beside the error in the body.
        """
        super().__init__(message)
        self.status, self.code, self.param = status, code, param
        self.headers, self._details = dict(headers or {}), details

    @property
    def body(self) -> dict[str, Any]:
        """Give it in OpenAI's form."""
        kind = _TYPES.get(
            self.status, 'server_error' if self.status >= 500 else 'invalid_request_error')
        return {'error': {'message': str(self), 'type': kind, 'param': self.param,
                          'code': self.code}, **self._details}


class Asked(NamedTuple):
    """What a body asks for."""

    request: Request                # with an id
    shape: 'Shape'
    stream: bool


class Shape(NamedTuple):
    """How one answer is put into OpenAI's objects."""

    id: str
    model: str
    created: int                    # Unix time
    chat: bool                      # a chat completion; else a text completion
    usage: bool                     # the stream tells the counts of tokens too

    def whole(self, report: RequestReport, text: str) -> dict[str, Any]:
        """Give a complete answer."""
        found = chat_completion(report, text, self.model, self.created)
        found['id'] = self.id
        if not self.chat:
            (choice,) = found['choices']
            found['object'] = 'text_completion'
            found['choices'] = [{'index': 0, 'text': text, 'logprobs': None,
                                 'finish_reason': choice['finish_reason']}]
        return found

    def begin(self) -> Iterator[dict[str, Any]]:
        """Give what comes before the first piece."""
        if self.chat:
            yield self._chunk({'delta': {'role': 'assistant', 'content': ''}})

    def piece(self, piece: Piece) -> dict[str, Any]:
        """Give a piece of the answer."""
        if not self.chat:
            return self._chunk({'text': piece.content})
        calls = [{'index': index, **call.to_json()} for index, call in piece.calls]
        delta = {'reasoning_content': piece.reasoning, 'content': piece.content,
                 'tool_calls': calls}
        return self._chunk({'delta': {name: value for name, value in delta.items() if value}})

    def end(self, report: RequestReport, text: str) -> Iterator[dict[str, Any]]:
        """Give what comes after the last piece."""
        whole = self.whole(report, text)
        reason = whole['choices'][0]['finish_reason']
        yield self._chunk({'delta': {}} if self.chat else {'text': ''}, reason)
        if self.usage:
            yield {**self._chunk({}), 'choices': [], 'usage': whole['usage']}

    def _chunk(self, content: dict[str, Any], reason: str | None = None) -> dict[str, Any]:
        kind = 'chat.completion.chunk' if self.chat else 'text_completion'
        chunk = {'id': self.id, 'object': kind, 'created': self.created, 'model': self.model,
                 'choices': [{'index': 0, **content, 'logprobs': None, 'finish_reason': reason}]}
        return {**chunk, 'usage': None} if self.usage else chunk


def read(body: Any, model: str, chat: bool) -> Asked:
    """
    Read a body.

    :param body: the JSON, already parsed.
    :param model: the name that the model goes by.
    :param chat: of a chat completion; else of a text completion.
    :raises RequestError: naming the first field that is wrong, its value and what is allowed.
    :raises ApiError: the model is not this one.
    """
    if not isinstance(body, dict):
        raise RequestError(f'the body is {shown(body)}: expected a JSON object')
    fields = {name: value for name, value in body.items()
              if value is not None and name not in _UNUSED}
    asked = fields.pop('model', None)
    if type(asked) is not str:
        raise RequestError(f'model is {shown(asked)}: expected {model!r}, as /v1/models has it')
    if asked != model:
        raise ApiError(404, 'model_not_found', f'model is {shown(asked)}: the node has {model!r}',
                       'model')
    for name, idle in _IDLE.items():
        value = fields.pop(name, idle[0])
        if not any(value == each and isinstance(value, bool) == isinstance(each, bool)
                   for each in idle):
            raise RequestError(
                f'{name} is {shown(value)}, which the node does not do: leave it out')
    stream = _flag(fields, 'stream')
    usage = _include_usage(fields, stream)
    if 'max_completion_tokens' in fields:
        if 'max_tokens' in fields:
            raise RequestError('max_completion_tokens and max_tokens were both given: give one')
        fields['max_tokens'] = fields.pop('max_completion_tokens')
    _put_text(fields, chat)
    request = Request.from_json(fields)
    if not request.client_id:
        request = replace(
            request, client_id=f'{"chatcmpl" if chat else "cmpl"}-{uuid4().hex}')
    return Asked(request, Shape(request.client_id, model, int(time.time()), chat, usage), stream)


def client_id(body: Any) -> str:
    """Give the id of a body that may be wrong elsewhere; empty where it has none."""
    given = body.get('id') if isinstance(body, dict) else None
    return given if isinstance(given, str) and is_client_id(given) else ''


def wrong(error: RequestError, body: Any) -> ApiError:
    """Give what is answered to a body that can't be read."""
    status, code = _REFUSALS['invalid']
    return ApiError(status, code, str(error), _param(str(error), body))


def failure(report: RequestReport, text: str) -> ApiError | None:
    """Give what is answered where a request has no answer, None where it has one."""
    if report.finish_reason in ANSWERED:
        return None
    if report.finish_reason == 'rejected':
        status, code = _REFUSALS[report.refusal or 'invalid']
        return ApiError(status, code, report.message)
    status, code = _ENDS[report.finish_reason]
    message = report.message or f'the request was {report.finish_reason}'
    # Clients send again what failed by a status like these; the robot would be asked twice.
    return ApiError(status, code, message, headers={'x-should-retry': 'false'},
                    physai={'request_id': report.request_id, 'text': text,
                            'finish_reason': report.finish_reason})


def model(name: str, created: int, max_context: int) -> dict[str, Any]:
    """
    Tell of a model.

    :param max_context: tokens that fit; 0 where that is not known.
    """
    return {'id': name, 'object': 'model', 'created': created, 'owned_by': 'physai_decode',
            'max_model_len': max_context or None}


def event(value: Mapping[str, Any]) -> bytes:
    """Give one event of a stream."""
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
            raise RequestError(f'{shown(f"stream_options.{name}")} is no field of a body: allowed '
                               f'are {", ".join(_STREAM_OPTIONS)}')
    given = {name: value for name, value in options.items() if value is not None}
    _flag(given, 'include_obfuscation', 'stream_options.')
    return _flag(given, 'include_usage', 'stream_options.')


def _put_text(fields: dict[str, Any], chat: bool) -> None:
    """Put what the model reads where a request has it."""
    wanted = 'messages' if chat else 'prompt'
    for name in ('messages', 'prompt', 'raw_prompt'):
        if name in fields and name != wanted:
            raise RequestError(f'{name} is no field of this body: give {wanted}')
    if wanted not in fields:
        raise RequestError(f'{wanted} is missing: give what the model is to read')
    if chat:
        messages = fields['messages']
        if type(messages) is list:
            fields['messages'] = [_message(each) for each in messages]
        return
    prompt = fields.pop('prompt')
    if type(prompt) is list and len(prompt) == 1:
        prompt = prompt[0]
    if type(prompt) is not str:
        raise RequestError(f'prompt is {shown(prompt)}: expected one text')
    if not prompt:
        raise RequestError("prompt is '': send some text")
    fields['raw_prompt'] = prompt


def _message(value: Any) -> Any:
    """Leave out the fields of a message that hold nothing, as an answer that is sent back has."""
    if not isinstance(value, dict):
        return value
    held = {name: each for name, each in value.items()
            if each is not None and (each != [] or name == 'content')}
    if held.get('role') != 'tool':
        held.pop('name', None)                  # of who speaks: no chat template is given it
    if held.get('role') == 'developer':         # OpenAI's newer name
        held['role'] = 'system'
    return held


def _param(message: str, body: Any) -> str | None:
    """Give the field that a message begins with, if the body has it."""
    named = re.match(r"'?(\w+)", message)
    return named[1] if named and isinstance(body, dict) and named[1] in body else None
