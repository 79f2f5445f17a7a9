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
The answer to one request, from a server: messages out, its pieces to listeners.

It runs on the decode thread, and never waits for the server longer than a cancel or a deadline may
take to be heard.
"""

from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Mapping
from contextlib import closing
from dataclasses import fields
from dataclasses import replace
import json
import secrets
from typing import Any

from physai_decode.config import RemoteConfig
from physai_decode.config import SamplingConfig
from physai_decode.config import shown
from physai_decode.conversation import Turn
from physai_decode.delivery import Delivery
from physai_decode.delivery import End
from physai_decode.delivery import Ended
from physai_decode.delivery import LOOK_UP_S
from physai_decode.delivery import Refused
from physai_decode.engines.openai import Delta
from physai_decode.engines.openai import Exchange
from physai_decode.engines.openai import Fragment
from physai_decode.engines.openai import Server
from physai_decode.engines.openai import ServerError
from physai_decode.engines.openai import Usage
from physai_decode.request import Call
from physai_decode.request import Form
from physai_decode.speech import Kind
from physai_decode.speech import Part

USAGE_S = 1.0                   # that the counts may come after the answer
TOO_LONG = (400, 413)           # what servers answer to a conversation that exceeds the context
# Settings that OpenAI's API does not have, but vLLM and others do: not sent where they ask for
# nothing, for then a server that does not know them can do it too.
_EXTRAS = ('top_k', 'min_p', 'repetition_penalty')
_DEFAULTS = {spec.name: spec.default for spec in fields(SamplingConfig)}
_FROM_CHECKPOINT = ('temperature', 'top_p', *_EXTRAS)


class ServerAnswer(Delivery):
    """One answer of a server, from the ticket taken to its last piece."""

    def __init__(self, server: Server, config: RemoteConfig, thought_tokens: int = 0,
                 local: Callable[[], Delivery] | None = None, **given: Any) -> None:
        """
        Take what the answer needs.

        :param thought_tokens: tokens after which a thought is to be ended; 0: none.
        :param local: makes the answer that takes this one's place; None where there is none.
        :param given: see `Delivery`.
        """
        super().__init__(**given)
        self._server, self._config, self._thought_tokens = server, config, thought_tokens
        self.local = local
        self.times.engine = server.footprint.engine
        self._calls = _Calls({tool['function']['name'] for tool in self._ticket.request.offered})

    def give(self) -> End:
        """
        Answer; where the server fails after it said something, that is the end.

        :raises Refused: the server can't be asked for this.
        :raises ServerError: it failed before it said anything.
        """
        try:
            end = self._give()
        except Ended as ended:
            end = ended.end
        except ServerError as error:
            if not self._given:
                raise
            end = End('error', f'{error}, in mid-answer: what was said until then is not whole')
        finally:
            self._release('')
        return End('tool_calls', end.message) if end.reason == 'stop' and self.calls else end

    def _give(self) -> End:
        self._look_for_end()
        options, turn = self._options(), self._ticket.turn
        until_s = self._clock() + 1e-3 * self._config.first_token_timeout_ms
        self._alive(self._clock())
        if turn is None:
            return self._ask(options, [], until_s)
        known, lost = self._conversation.before(turn)
        turns = known
        while True:
            try:
                end = self._ask(options, turns, until_s)
            except ServerError as error:
                if self._given or error.status not in TOO_LONG or not turns:
                    raise
                turns = turns[len(turns) // 2 or 1:]
                continue
            dropped = known[:len(known) - len(turns)]
            self._conversation.drop(dropped)
            if count := lost + len(dropped):
                self._remark('the server took no longer conversation: its oldest '
                             f'{count} turn{"" if count == 1 else "s"} dropped')
            return end

    def _ask(self, options: Mapping[str, Any], turns: list[Turn], until_s: float) -> End:
        """Have the server answer after these turns."""
        request, turn = self._ticket.request, self._ticket.turn
        if request.raw_prompt:
            what = 'completions'
            asked: dict[str, Any] = {'prompt': request.raw_prompt}
        else:
            messages = request.messages if turn is None else \
                self._conversation.messages(turns, turn.prompt)
            what = 'chat/completions'
            asked = {'messages': [message.to_json() for message in messages]}
        with closing(self._server.ask(what, {**asked, **options})) as exchange:
            return self._hear(exchange, until_s)

    def _hear(self, exchange: Exchange, until_s: float) -> End:
        """Give out what the server says, to its end."""
        most = self._sampling.max_new_tokens
        while True:
            delta = self._next(exchange, until_s)
            if delta.over:                          # not before its end
                raise ServerError(f'{self._server.address} broke the answer off')
            now_s = self._clock()
            if delta.usage is not None:
                self._count(delta.usage)
            if delta.is_piece:
                self._alive(now_s)
                if self._given >= 2 * most:         # a piece is a token, or more
                    raise ServerError(f'{self._server.address} does not keep to max_tokens, which '
                                      f'is {most}')
                self._say(now_s, delta)
            if delta.finish_reason:
                self._release('', self._calls.take())
                end = self._end(delta.finish_reason)
                self._await_usage(exchange)
                return end
            if delta.is_piece:
                self._look_for_end()
                self._hold_pace(now_s, 1)
                until_s = self._clock() + 1e-3 * self._config.token_timeout_ms

    def _next(self, exchange: Exchange, until_s: float) -> Delta:
        """Wait for what the server says next."""
        while True:
            found = exchange.get(LOOK_UP_S)
            self._look_for_end()
            says_nothing = found is None or not (found.is_piece or found.finish_reason)
            if says_nothing and self._clock() > until_s:
                name = 'token' if self._given else 'first_token'
                timeout_ms = getattr(self._config, f'{name}_timeout_ms')
                raise ServerError(f'{self._server.address} brings no token within '
                                  f'remote.{name}_timeout_ms, which is {timeout_ms:g}')
            if found is not None:
                assert isinstance(found, Delta)
                return found

    def _await_usage(self, exchange: Exchange) -> None:
        """Take the counts, which may come behind the end; the answer is whole without them."""
        until_s = self._clock() + USAGE_S
        while self._clock() < until_s and self.times.server_tokens is None:
            try:
                found = exchange.get(LOOK_UP_S)
            except ServerError:
                return
            if found is not None and found.usage is not None:
                self._count(found.usage)
            if found is not None and found.over or self._ticket.end_reason or self._is_late():
                return

    def _count(self, usage: Usage) -> None:
        self.times.prompt_tokens, self.times.cached_tokens = usage.prompt, usage.cached
        self.times.server_tokens = usage.output

    def _say(self, now_s: float, delta: Delta) -> None:
        """Record a piece, and give it out unless it is of a call that is not whole."""
        done = self._calls.push(delta.calls)
        if delta.content:
            done += self._calls.take()
        self._release('', done)
        report = self.times.token(now_s, None, delta.content, publish_s=self._publish_s,
                                  waited_s=self._waited_s)
        self._given += 1
        if delta.reasoning:
            report = replace(report, reasoning=delta.reasoning)
            self.times.reasoning_tokens += 1
        if delta.calls:
            self._waiting = report
        else:
            self._give_out(report)

    def _end(self, reason: str) -> End:
        """Give the end by the server's reason."""
        if reason in ('stop', 'tool_calls', 'function_call'):
            if self._form is not None and not _may_be(self.text, self._form):
                raise ServerError(f'{self._server.address} does not keep to {self._form.name}')
            if len(self.calls) > 1 and not self._ticket.request.parallel_tool_calls:
                raise ServerError(f'{self._server.address} does not keep to parallel_tool_calls, '
                                  f'which is false: it made {len(self.calls)} calls')
            return End('stop', '')
        if reason == 'length':
            return End('length', f'{self._named("max_new_tokens")} is '
                       f"{self._sampling.max_new_tokens}, or the server's context is full")
        raise ServerError(f'{self._server.address} ended the answer with {shown(reason)}')

    def _options(self) -> dict[str, Any]:
        """
        Give the fields of the body beside what the model reads.

        :raises Refused: there is none for what is asked.
        """
        request, sampling = self._ticket.request, self._sampling
        if self._thought_tokens:
            raise Refused(f'thinking.max_tokens is {self._thought_tokens}, for which a server can '
                          'not be asked: set it to 0')
        form = self._checked_form()
        if request.raw_prompt and request.offered:
            raise Refused('tools can not be used: raw_prompt goes without the chat template')
        options: dict[str, Any] = {
            'temperature': sampling.temperature, 'top_p': sampling.top_p,
            'max_tokens': sampling.max_new_tokens, 'seed': sampling.seed}
        options.update({name: getattr(sampling, name) for name in _EXTRAS
                        if getattr(sampling, name) != _DEFAULTS[name]})
        if sampling.from_checkpoint:                # the server has it
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


class _Calls:
    """Calls of tools, put together from their fragments."""

    def __init__(self, names: set[str]) -> None:
        self._names = names
        self._parts: list[Fragment] = []            # of the call that is open
        self._next = 0                              # the least index that may follow

    def push(self, fragments: Iterable[Fragment]) -> list[Part]:
        """
        Take fragments, give the calls that the next one ended.

        :raises ServerError: as `take`, or fragments are in no order.
        """
        done: list[Part] = []
        for each in fragments:
            if self._parts and each.place != self._parts[0].place:
                done += self.take()
            if each.place < self._next:
                raise ServerError('the server sends a part of a call of a tool behind its end')
            self._parts.append(each)
        return done

    def take(self) -> list[Part]:
        """
        Give the call that is open, if there is one: it is whole.

        :raises ServerError: it is no call of a tool that was offered.
        """
        parts, self._parts = self._parts, []
        if not parts:
            return []
        self._next = parts[0].place + 1
        name, written = (''.join(getattr(each, field) for each in parts)
                         for field in ('name', 'arguments'))
        id_ = next((each.id for each in parts if each.id), '')
        if name not in self._names:
            raise ServerError(f'the server calls the tool {shown(name)}, which it was not offered')
        try:
            arguments = json.loads(written) if written.strip() else {}
        except (ValueError, RecursionError):
            arguments = None
        if not isinstance(arguments, dict):
            raise ServerError(f'the server calls the tool {name} with {shown(written)}, which is '
                              'no JSON object')
        return [Part(Kind.CALL, call=Call(id_ or f'call_{secrets.token_hex(12)}', name,
                                          arguments))]


def _may_be(text: str, form: Form) -> bool:
    """Tell whether a text may have a form, as far as that is plain: a server may not know it."""
    if form.kind == 'choice':
        return text in form.content
    if form.kind != 'json_schema':
        return True
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _form_fields(form: Form) -> dict[str, Any]:
    """Give the field that asks for a form."""
    if form.kind == 'json_schema':
        if form.content == {'type': 'object'}:
            return {'response_format': {'type': 'json_object'}}
        return {'response_format': {'type': 'json_schema', 'json_schema': {
            'name': 'answer', 'schema': form.content, 'strict': True}}}
    return {'structured_outputs': {form.kind: form.content}}
