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
The answer to one request from a model server.

It runs in the decode thread. It never blocks for longer than `delivery.POLL_S` without a check for
a cancel or a deadline.
"""

from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Mapping
from contextlib import closing
from dataclasses import fields
from dataclasses import replace
import secrets
from typing import Any

from physai_decode.config import RemoteConfig
from physai_decode.config import SamplingConfig
from physai_decode.config import shown_json as shown
from physai_decode.conversation import Turn
from physai_decode.delivery import Delivery
from physai_decode.delivery import End
from physai_decode.delivery import Ended
from physai_decode.delivery import POLL_S
from physai_decode.delivery import Refused
from physai_decode.delivery import with_parts
from physai_decode.engines.openai import Delta
from physai_decode.engines.openai import Fragment
from physai_decode.engines.openai import Server
from physai_decode.engines.openai import ServerError
from physai_decode.engines.openai import ServerRequest
from physai_decode.engines.openai import Usage
from physai_decode.request import Call
from physai_decode.request import Form
from physai_decode.request import parse_value
from physai_decode.request import RequestError
from physai_decode.speech import Part
from physai_decode.speech import PartKind

USAGE_TIMEOUT_S = 1.0           # for the token counts after the end of the answer
TOO_LONG = (400, 413)           # the status of servers for a conversation beyond the context
# Settings that vLLM and others add to OpenAI's API. They are sent only if they differ from their
# defaults, because other servers reject them.
_EXTENSIONS = ('top_k', 'min_p', 'repetition_penalty')
_DEFAULTS = {spec.name: spec.default for spec in fields(SamplingConfig)}
_FROM_CHECKPOINT = ('temperature', 'top_p', *_EXTENSIONS)


class ServerAnswer(Delivery):
    """One answer from a server."""

    def __init__(self, server: Server, config: RemoteConfig, thought_tokens: int = 0,
                 local: Callable[[], Delivery] | None = None, **arguments: Any) -> None:
        """
        Prepare an answer; `give` starts it.

        :param thought_tokens: the limit of tokens of a thought; 0 for no limit.
        :param local: creates the local answer that replaces this one if the server fails; None
            for no fallback.
        :param arguments: see `Delivery`.
        """
        super().__init__(**arguments)
        self._server, self._config, self._thought_tokens = server, config, thought_tokens
        self.local = local
        request = self._ticket.request
        self._calls = _ToolCalls(
            {tool['function']['name'] for tool in request.forced or request.offered})

    def give(self) -> End:
        """
        Produce the answer. If the server fails in mid-answer, the answer ends with an error.

        :raises Refused: the request has an option that servers do not support.
        :raises ServerError: the server failed before its first piece.
        """
        try:
            end = self._give()
        except Ended as ended:
            end = ended.end
        except ServerError as error:
            if not self._given:
                raise
            end = End('error', f'{error}, in mid-answer: the text so far is incomplete')
        finally:
            self._release('')
        return End('tool_calls', end.message) if end.reason == 'stop' and self.calls else end

    def _give(self) -> End:
        self._look_for_end()
        options, turn = self._options(), self._ticket.turn
        self.times.engine = self._server.footprint.engine
        end_s = self._clock() + 1e-3 * self._config.first_token_timeout_ms
        self._alive(self._clock())
        if turn is None:
            return self._ask(options, [], end_s)
        known, lost = self._conversation.before(turn)
        turns = known
        while True:
            try:
                end = self._ask(options, turns, end_s)
            except ServerError as error:
                if self._given or error.status not in TOO_LONG or not turns:
                    raise
                turns = turns[len(turns) // 2 or 1:]
                continue
            self._drop(known[:len(known) - len(turns)], lost,
                       'the conversation is too long for the server')
            return end

    def _ask(self, options: Mapping[str, Any], turns: list[Turn], end_s: float) -> End:
        """Send the prompt after these turns, and receive the answer."""
        request, turn = self._ticket.request, self._ticket.turn
        if request.raw_prompt:
            path = 'completions'
            body: dict[str, Any] = {'prompt': request.raw_prompt}
        else:
            messages = request.messages if turn is None else \
                self._conversation.messages(turns, turn.prompt)
            path = 'chat/completions'
            body = {'messages': [message.to_json() for message in messages]}
        with closing(self._server.ask(path, {**body, **options})) as exchange:
            return self._receive(exchange, end_s)

    def _receive(self, exchange: ServerRequest, end_s: float) -> End:
        """Emit the answer piece by piece, until its end."""
        limit = self._sampling.max_new_tokens
        while True:
            delta = self._next(exchange, end_s)
            if delta.over:                          # the stream ended without a finish reason
                raise ServerError(f'{self._server.address} ended the stream too early')
            now_s = self._clock()
            if delta.usage is not None:
                self._count(delta.usage)
            if delta.is_piece:
                self._alive(now_s)
                if self._given >= 2 * limit:        # a piece is at least one token
                    raise ServerError(
                        f'{self._server.address} exceeds max_tokens, which is {limit}')
                self._emit_piece(now_s, delta)
            if delta.finish_reason:
                self._release('', self._calls.take(delta.finish_reason))
                end = self._end(delta.finish_reason)
                if delta.usage is None:
                    self._await_usage(exchange)
                return end
            if delta.is_piece:
                self._look_for_end()
                self._hold_pace(now_s, 1)
                end_s = self._clock() + 1e-3 * self._config.token_timeout_ms

    def _next(self, exchange: ServerRequest, end_s: float) -> Delta:
        """
        Wait for the next delta.

        :raises Ended: a cancel or a deadline ends the answer.
        :raises ServerError: no token arrived until ``end_s``.
        """
        while True:
            delta = exchange.get(POLL_S)
            self._look_for_end()
            is_empty = delta is None or not (delta.is_piece or delta.finish_reason)
            if is_empty and self._clock() > end_s:
                name = 'token' if self._given else 'first_token'
                timeout_ms = getattr(self._config, f'{name}_timeout_ms')
                raise ServerError(f'{self._server.address} sent no token within '
                                  f'remote.{name}_timeout_ms, which is {timeout_ms:g}')
            if delta is not None:
                assert isinstance(delta, Delta)
                return delta

    def _await_usage(self, exchange: ServerRequest) -> None:
        """Wait for the token counts, which may follow the end; the answer does not need them."""
        end_s = self._clock() + USAGE_TIMEOUT_S
        while self._clock() < end_s:
            try:
                delta = exchange.get(POLL_S)
            except ServerError:
                return
            if delta is not None and delta.usage is not None:
                self._count(delta.usage)
                return
            if delta is not None and delta.over or self._ticket.end_reason or self._is_late():
                return

    def _count(self, usage: Usage) -> None:
        self.times.prompt_tokens, self.times.cached_tokens = usage.prompt, usage.cached
        self.times.server_tokens = usage.output

    def _emit_piece(self, now_s: float, delta: Delta) -> None:
        """Record a piece and emit it, unless it belongs to an incomplete tool call."""
        completed = self._calls.take() if delta.content else []
        completed += self._calls.push(delta.calls)
        early, now = (completed, []) if self._waiting is not None else ([], completed)
        self._release('', early)
        report = self.times.token(now_s, None, delta.content, publish_s=self._publish_s,
                                  waited_s=self._waited_s)
        self._given += 1
        if delta.reasoning:
            report = replace(report, reasoning=delta.reasoning)
            self.times.reasoning_tokens += 1
        report = with_parts(report, now)
        if self._calls.are_open:
            self._waiting = report
        else:
            self._give_out(report)

    def _end(self, reason: str) -> End:
        """
        Return the end for the server's finish reason.

        :raises ServerError: the answer violates the request, or the reason is unknown.
        """
        if reason in ('stop', 'tool_calls', 'function_call'):
            request, address = self._ticket.request, self._server.address
            if self._form is not None and not _is_plausible(self.text, self._form):
                raise ServerError(f'{address} violates {self._form.name}')
            if len(self.calls) > 1 and not request.parallel_tool_calls:
                raise ServerError(f'{address} ignores parallel_tool_calls, which is '
                                  f'false: it made {len(self.calls)} calls')
            if request.forced and not self.calls:
                raise ServerError(f'{address} ignores tool_choice: it called no tool')
            if reason != 'stop' and not self.calls:
                raise ServerError(f'{address} ended the answer with {reason}, but sent no call')
            return End('stop', '')
        if reason == 'length':
            return End('length', f'{self._named("max_new_tokens")} is '
                       f"{self._sampling.max_new_tokens}, or the server's context is full")
        raise ServerError(f'{self._server.address} ended the answer with {shown(reason)}')

    def _options(self) -> dict[str, Any]:
        """
        Return the fields of the body other than the prompt or messages.

        :raises Refused: the request has an option that servers do not support.
        """
        request, sampling = self._ticket.request, self._sampling
        if self._thought_tokens:
            raise Refused(f'thinking.max_tokens is {self._thought_tokens}, which servers do not '
                          'support: set it to 0')
        form = self._checked_form()
        if request.raw_prompt and request.offered:
            raise Refused('tools cannot be used: raw_prompt bypasses the chat template')
        options: dict[str, Any] = {
            'temperature': sampling.temperature, 'top_p': sampling.top_p,
            'max_tokens': sampling.max_new_tokens, 'seed': sampling.seed}
        options.update({name: getattr(sampling, name) for name in _EXTENSIONS
                        if getattr(sampling, name) != _DEFAULTS[name]})
        if sampling.from_checkpoint:                # the server has the checkpoint's settings
            for name in _FROM_CHECKPOINT:
                if name not in request.sampling:
                    options.pop(name, None)
        if sampling.stop:
            options['stop'] = [*sampling.stop]
        if request.chat_template_kwargs and not request.raw_prompt:
            options['chat_template_kwargs'] = dict(request.chat_template_kwargs)
        if request.tools and not request.raw_prompt:
            options['tools'] = [*request.tools]
            options['tool_choice'] = request.tool_choice or 'auto'
            if not request.parallel_tool_calls:
                options['parallel_tool_calls'] = False
        return options | (_form_fields(form) if form is not None else {})


class _ToolCalls:
    """Assembles tool calls from their fragments."""

    def __init__(self, names: set[str]) -> None:
        self._names = names
        self._open: dict[int, list[Fragment]] = {}      # by the index of the call
        self._next = 0                                  # the smallest index of a further call
        self._ids = {''}                                # of calls that have begun

    @property
    def are_open(self) -> bool:
        """Whether there are calls that `take` has not returned yet."""
        return bool(self._open)

    def push(self, fragments: Iterable[Fragment]) -> list[Part]:
        """
        Add fragments, and return the calls that they completed.

        Some servers give each call the index 0. A name with a new id then begins another call.

        :raises ServerError: a call is invalid (see `take`), or a fragment comes after its end.
        """
        completed: list[Part] = []
        for each in fragments:
            begins = bool(each.name) and each.id not in self._ids
            fragments_so_far = self._open.get(each.place, [])
            if not fragments_so_far or begins and any(known.id for known in fragments_so_far):
                completed += self.take()
                if each.place in self._open:
                    raise ServerError('the server began a tool call before the end of another '
                                      f'with the index {each.place}')
                if each.place < self._next and not begins:
                    raise ServerError('the server sent a fragment of a tool call after its end')
            self._open.setdefault(each.place, []).append(each)
            self._ids.add(each.id)
        return completed

    def take(self, end: str = '') -> list[Part]:
        """
        Remove and return the open calls up to the first whose arguments are incomplete.

        :param end: the finish reason of the answer; empty if it goes on. A call may have no
            arguments, but only the end shows that. The end ``length`` drops incomplete calls.
        :raises ServerError: a tool is not allowed, or a call is incomplete at another end.
        """
        parts: list[Part] = []
        while self._open:
            place = min(self._open)
            name, written = (''.join(getattr(each, field) for each in self._open[place])
                             for field in ('name', 'arguments'))
            try:
                arguments = {} if end not in ('', 'length') and not written.strip() else \
                    parse_value(written, name)
            except RequestError:
                arguments = None
            if not end and not isinstance(arguments, dict):
                break
            fragments, self._next = self._open.pop(place), max(self._next, place + 1)
            if end == 'length' and not isinstance(arguments, dict):
                continue
            if name not in self._names:
                raise ServerError(f'the server calls the tool {shown(name)}, but the request '
                                  f'allows {", ".join(sorted(self._names)) or "none"}')
            if not isinstance(arguments, dict):
                raise ServerError(f'the server calls the tool {name} with {shown(written)}, which '
                                  'is not a JSON object')
            id_ = next((each.id for each in fragments if each.id), '')
            parts.append(Part(PartKind.CALL, call=Call(
                id_ or f'call_{secrets.token_hex(12)}', name, arguments)))
        return parts


def _is_plausible(text: str, form: Form) -> bool:
    """Return False if a text clearly violates a constraint, which some servers ignore."""
    if form.kind == 'choice':
        return text in form.content
    if form.kind != 'json_schema':
        return True
    try:
        value = parse_value(text, form.name)
    except RequestError:
        return False
    return form.content != {'type': 'object'} or isinstance(value, dict)


def _form_fields(form: Form) -> dict[str, Any]:
    """Return the field of the body that requests a constraint."""
    if form.kind == 'json_schema':
        if form.content == {'type': 'object'}:
            return {'response_format': {'type': 'json_object'}}
        return {'response_format': {'type': 'json_schema', 'json_schema': {
            'name': 'answer', 'schema': form.content, 'strict': True}}}
    return {'structured_outputs': {form.kind: form.content}}
