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
The answer of an engine to one request, on the decode thread.

It encodes the prompt, decodes tokens, converts them to text, and emits their reports. It ends at
an end token, a stop string, a limit or a deadline, or if the request is cancelled or preempted.
"""

from collections.abc import Callable
from collections.abc import Generator
from collections.abc import Mapping
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
import re
from typing import Any
from typing import cast
from typing import Protocol

from physai_decode.config import SamplingConfig
from physai_decode.constraint import Constraint
from physai_decode.constraint import ConstraintError
from physai_decode.constraint import Vocabulary
from physai_decode.conversation import Turn
from physai_decode.decode_loop import DecodeLoop
from physai_decode.decode_loop import Step
from physai_decode.delivery import Delivery
from physai_decode.delivery import End
from physai_decode.delivery import Ended
from physai_decode.delivery import LATE
from physai_decode.delivery import Refused
from physai_decode.delivery import with_parts
from physai_decode.request import Calls
from physai_decode.request import Form
from physai_decode.request import Message
from physai_decode.request_queue import LATE_IN_QUEUE
from physai_decode.speech import Manner
from physai_decode.speech import Part
from physai_decode.speech import PartKind
from physai_decode.speech import Speech
from physai_decode.speech import Thought

RAW = Manner(reason='raw_prompt bypasses the chat template')
PIECE = 32768           # characters per call of the tokenizer; takes about 0.03 s
# An unnecessary JSON escape, such as \u0061 for a. llguidance allows it only in the name of a
# property, and then does not recognise the name as one that the schema lists.
_ESCAPED = re.compile(r'(?<!\\)(?:\\\\)*\\u(?!00(?:[01]|7[Ff]))')
SHORTEN = "shorten the prompt, or raise engine.max_context if the model's own limit is higher"


class Detokenizer(Protocol):
    """Converts the ids of an answer to text; see ``physai_decode.detokenizer.Detokenizer``."""

    stopped: bool

    @property
    def held(self) -> bool:
        """Whether text is held back."""
        ...

    def push(self, token_id: int) -> str:
        """Add a token and return the text that it completes."""
        ...

    def flush(self) -> str:
        """Return the text that is held back."""
        ...


class TextCoder(Protocol):
    """Converts messages to ids; see ``physai_decode.text_process.TextProcess``."""

    manner: Manner
    """How the model marks its thoughts and tool calls."""

    def encode(self, messages: Sequence[Message], chat_template_kwargs: Mapping[str, Any] = ...,
               heartbeat: Callable[[], None] = ..., tools: Sequence[Mapping[str, Any]] = ...
               ) -> list[int]:
        """Encode a conversation; an exception from ``heartbeat`` ends the call."""
        ...

    def count(self, text: str) -> int:
        """Count the tokens of a text."""
        ...

    def detokenizer(self, stop: Sequence[str] = (), seen: Sequence[str] = ()) -> Detokenizer:
        """Create a detokenizer that keeps the special tokens in ``seen``."""
        ...

    def tail(self, prompt_ids: Sequence[int]) -> str:
        """Return the end of a prompt as text with special tokens."""
        ...

    def vocabulary(self, size: int, end_ids: Sequence[int]) -> Vocabulary:
        """Return the vocabulary that compiles constraints."""
        ...


class Answer(Delivery):
    """The answer of an engine to one ticket."""

    _hidden = _ESCAPED

    def __init__(self, loop: DecodeLoop, text: TextCoder, thought_tokens: int = 0,
                 **arguments: Any) -> None:
        """
        Create an answer; `give` generates it.

        :param thought_tokens: limit on the tokens of a thought; 0 for none.
        :param arguments: see `Delivery`.
        """
        super().__init__(**arguments)
        self._loop, self._text, self._thought_tokens = loop, text, thought_tokens
        self._manner = RAW if self._ticket.request.raw_prompt else text.manner
        self._speech: Speech | None = None          # None: all text is the answer
        self._generated_ids: list[int] = []         # kept only if thoughts are limited

    def give(self) -> End:
        """
        Generate the answer.

        :raises Refused: the prompt is empty or too long, or the model does not support tools or
            the constraint.
        :raises TextError: the prompt cannot be encoded.
        """
        end = self._generate()
        if self._speech is not None and self._speech.problem:
            self._remark(self._speech.problem)
        if end.reason == 'stop' and self.calls:
            return End('tool_calls', end.message)
        if end.reason == 'stop' and self._ticket.request.forced:
            return End('error', 'the answer is not the tool call that tool_choice requires')
        if end.reason == 'stop' and self._items is not None and _ESCAPED.search(self.text):
            return End('error', 'the answer escapes a character in the name of a property, which '
                       'the schema may list: set additionalProperties to false')
        return end

    def _generate(self) -> End:
        manner, tools = self._manner, self._ticket.request.offered
        if tools and not manner.form:
            raise Refused(f'tools cannot be used: {RAW.reason}' if manner is RAW
                          else manner.tools_problem)
        seen = manner.markers(bool(tools))
        self._detokenizer = self._text.detokenizer(self._sampling.stop, seen) if seen else \
            self._text.detokenizer(self._sampling.stop)
        try:
            return self._decode()
        except Ended as ended:
            return ended.end
        except ConstraintError as error:
            if not self._pieces:
                raise
            return End('error', str(error))
        finally:
            tail, parts = self._detokenizer.flush(), list[Part]()
            if self._speech is not None:
                tail, parts = _split(self._speech.push(tail) + self._speech.flush())
            self._release(tail, parts)

    def _decode(self) -> End:
        if self._is_late():
            return End('deadline', LATE_IN_QUEUE)
        form = self._checked_form()
        prompt_ids = self._encode()
        self.times.encoded_s, self.times.prompt_tokens = self._clock(), len(prompt_ids)
        thought = self._start_speech(prompt_ids)
        constraint = None if form is None else self._constraint(form, thought)
        self.times.engine, sampling = self._loop.engine.footprint.engine, self._sampling
        while (end := self._decode_after(prompt_ids, sampling, constraint)) is None:
            prompt_ids = [*prompt_ids, *self._end_thought()]
            constraint = None if form is None else self._constraint(form, None)
            sampling = replace(self._sampling,
                               max_new_tokens=self._sampling.max_new_tokens - self._given)
            if len(prompt_ids) >= self._loop.engine.footprint.max_context:
                return self._full()
        return end

    def _decode_after(self, prompt_ids: list[int], sampling: SamplingConfig,
                      constraint: Constraint | None) -> End | None:
        """Decode until the answer ends; return None if a thought reaches its limit."""
        footprint, limit = self._loop.engine.footprint, self._sampling.max_new_tokens
        # Closing the generator cancels the engine, however this loop ends.
        with closing(cast('Generator[Step, None, None]',
                          self._loop.stream(prompt_ids, sampling, constraint,
                                            ahead=not self.times.paced))) as steps:
            for step in steps:
                now_s = self._clock()
                self._alive(now_s)
                self._check_end()
                if not self._given:
                    self.times.cached_tokens = step.cached_tokens
                    self.times.sample_s = step.sample_s
                for place, token_id in enumerate(step.token_ids, 1):
                    if token_id in footprint.eos_token_ids:
                        return End('stop', '')
                    self._token(now_s, token_id, step)
                    self._given += 1
                    surplus = len(step.token_ids) - place
                    end = self._end_here(limit, None if surplus else constraint)
                    if end is not None or self._thought_tokens and self._thinks_too_long():
                        self._discard(surplus, constraint)
                        if end is None:             # the answer goes on
                            self._hold_pace(now_s, place)
                        return end
                if self._is_late():
                    return LATE
                self._hold_pace(now_s, len(step.token_ids))
        return self._full()

    def _end_here(self, limit: int, constraint: Constraint | None) -> End | None:
        """Return the end that the newest token causes, or None; ``constraint`` has accepted it."""
        if self._detokenizer.stopped:
            return End('stop', f'a string in {self._named("stop")} matched')
        if constraint is not None and constraint.ended:
            return End('stop', '')
        if self._speech is not None and self._speech.ended:
            return End('stop', 'parallel_tool_calls is false')
        if self._given == limit:
            return End('length', f'{self._named("max_new_tokens")} is {limit}')
        return None

    def _discard(self, surplus: int, constraint: Constraint | None) -> None:
        """Discard the tokens of a pass beyond the end of the answer."""
        if surplus:
            self._loop.forget(len(self._loop.cached_ids) - surplus)
            if constraint is not None:
                constraint.rollback(surplus)

    def _full(self) -> End:
        context = self._loop.engine.footprint.max_context
        return End('length', f'the context of {context} tokens is full')

    def _checked_form(self) -> Form | None:
        """Return the constraint on the answer, including forced tool calls."""
        request = self._ticket.request
        if request.forced and self._form is None:
            single = request.tool_choice != 'required' or not request.parallel_tool_calls
            calls = Form('calls', Calls(self._manner.form, request.forced, single), 'tool_choice')
            self._refuse_stop(calls)
            return calls
        return super()._checked_form()

    def _start_speech(self, prompt_ids: list[int]) -> Thought | None:
        """Start to separate thoughts and tool calls; return the thought that may come first."""
        manner = self._manner
        names = [tool['function']['name'] for tool in self._ticket.request.offered]
        if not names and not manner.opens:
            return None
        inside = manner.is_inside(self._text.tail(prompt_ids)) if manner.opens else False
        self._speech = Speech(manner, names, bool(inside),
                              not self._ticket.request.parallel_tool_calls)
        return None if inside is False else Thought(manner.opens, manner.closes, bool(inside))

    def _constraint(self, form: Form, thought: Thought | None) -> Constraint:
        footprint = self._loop.engine.footprint
        constraint = self._text.vocabulary(
            footprint.vocab_size, footprint.eos_token_ids).constraint(form, thought)
        self._heartbeat()
        if self._speech is not None:
            self._speech.exact = constraint.exact
        return constraint

    def _thinks_too_long(self) -> bool:
        speech = self._speech
        return (speech is not None and speech.thinking
                and self._given >= self._thought_tokens)

    def _end_thought(self) -> list[int]:
        """Close the thought in the model's place; return all tokens after the prompt."""
        manner = self._manner
        assert self._speech is not None
        blanks = '' if self._speech.exact else '\n\n'
        self._release(*_split(self._speech.push(
            f'{self._detokenizer.flush()}\n{manner.closes}{blanks}')))
        in_request = 'max_tokens' in self._ticket.request.thinking
        self._remark(f'the thought was ended: thinking.max_tokens is {self._thought_tokens}'
                     + (' in the request' if in_request else ''))
        self.times.added_tokens = len(manner.close_ids)
        return [*self._generated_ids, *manner.close_ids]

    def _encode(self) -> list[int]:
        """Encode the prompt and as many turns as leave room for the answer."""
        request, turn = self._ticket.request, self._ticket.turn
        context = self._loop.engine.footprint.max_context
        self._check_end()
        if len(request.text) > PIECE and self._count(request.text) > self._far_too_long:
            raise Refused(f'the prompt is more than {self._far_too_long} tokens long, and the '
                          f'context holds {context} tokens: {SHORTEN}')
        if turn is None:
            return self._checked(self._ids(
                request.messages or (Message('', request.raw_prompt),)))
        known, lost = self._conversation.before(turn)
        if len(turn.prompt) >= context or not known:    # the prompt alone may be too long
            prompt_ids = self._checked(self._ids(self._conversation.messages([], turn.prompt)))
        room = context - min(self._sampling.max_new_tokens, context // 2)
        turns = self._newest(known, room)
        if known:
            prompt_ids = self._ids(self._conversation.messages(turns, turn.prompt))
        # Drop turns until the prompt fits into half the room. One turn at a time would change the
        # beginning, and so invalidate the KV cache, with every request.
        if len(prompt_ids) > room or len(turns) < len(known):
            while turns and len(prompt_ids) > room // 2:
                turns = turns[len(turns) // 2 or 1:]
                prompt_ids = self._ids(self._conversation.messages(turns, turn.prompt))
        self._checked(prompt_ids)
        self._drop(known[:len(known) - len(turns)], lost,
                   f'the conversation no longer fits into {room} tokens')
        return prompt_ids

    def _newest(self, turns: list[Turn], room: int) -> list[Turn]:
        """Return the newest turns that may fit, without encoding the ones before."""
        if sum(len(each.prompt) + len(each.answer or '') for each in turns) <= PIECE:
            return turns
        for place in reversed(range(len(turns))):
            each = turns[place]
            if each.tokens is None:
                each.tokens = self._count(f'{each.prompt}\n{each.answer}')
            room -= each.tokens
            if room < 0:
                return turns[place + 1:]
        return turns

    def _count(self, text: str) -> int:
        """Estimate the tokens of a text; stop counting if it is far too long."""
        text, count = text.strip(), 0               # a chat template may strip it too
        for begin in range(0, len(text), PIECE):
            count += self._text.count(text[begin:begin + PIECE])
            self._heartbeat()
            if count > self._far_too_long:
                break
        return count

    @property
    def _far_too_long(self) -> int:
        """The count above which a prompt cannot fit; counting in pieces overestimates slightly."""
        return self._loop.engine.footprint.max_context * 9 // 8

    def _ids(self, messages: Sequence[Message]) -> list[int]:
        request = self._ticket.request
        encode = partial(self._text.encode, tools=request.offered) if request.offered else \
            self._text.encode
        prompt_ids = encode(messages, request.chat_template_kwargs, self._look_for_end)
        self._heartbeat()
        return prompt_ids

    def _heartbeat(self) -> None:
        """Report that the thread is alive; raise `Ended` if the answer has to end."""
        self._alive(self._clock())
        self._look_for_end()

    def _checked(self, prompt_ids: list[int]) -> list[int]:
        context = self._loop.engine.footprint.max_context
        if not prompt_ids:
            raise Refused('the prompt has no tokens: send some text')
        if len(prompt_ids) >= context:
            raise Refused(
                f'the prompt is {len(prompt_ids)} tokens long with its chat template, and the '
                f'context holds {context} tokens, one of them for the answer: {SHORTEN}')
        return prompt_ids

    def _token(self, now_s: float, token_id: int, step: Step) -> None:
        """Record a token, and emit it unless its text is incomplete."""
        piece, speech = self._detokenizer.push(token_id), self._speech
        held = self._detokenizer.held
        parts: Sequence[Part] = ()
        if speech is not None:
            thinking = speech.thinking
            piece, parts = _split(speech.push(piece))
            if thinking or speech.thinking:
                self.times.reasoning_tokens = self._given + 1
            if self._thought_tokens:
                self._generated_ids.append(token_id)
            held = held or speech.held
        self._release('')
        report = self.times.token(
            now_s, token_id, piece, step.device_s, self._publish_s, step.mask_s, self._waited_s,
            len(step.token_ids), step.draft_s)
        if parts:
            report = with_parts(report, parts)
        if held:
            self._waiting = report
        else:
            self._give_out(report)


def _split(parts: Sequence[Part]) -> tuple[str, list[Part]]:
    """Separate the text of the answer from thoughts and tool calls."""
    return (''.join(part.text for part in parts if part.kind is PartKind.CONTENT),
            [part for part in parts if part.kind is not PartKind.CONTENT])
