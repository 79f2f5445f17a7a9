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
The answer to one request, on the decode thread: prompt to ids, ids to text, tokens to listeners.

It ends at an end token, a stop text, a limit, a deadline, or where somebody asks for it. It knows
nothing of the queue, nor of who listens.
"""

from collections.abc import Callable
from collections.abc import Generator
from collections.abc import Mapping
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from typing import Any
from typing import cast
from typing import NamedTuple
from typing import Protocol

from physai_decode.config import SamplingConfig
from physai_decode.constraint import Constraint
from physai_decode.constraint import ConstraintError
from physai_decode.constraint import Vocabulary
from physai_decode.conversation import Conversation
from physai_decode.conversation import Turn
from physai_decode.decode_loop import DecodeLoop
from physai_decode.decode_loop import Step
from physai_decode.items import Items
from physai_decode.pace import Pace
from physai_decode.request import Call
from physai_decode.request import Calls
from physai_decode.request import Form
from physai_decode.request import JSON_NAMES
from physai_decode.request import Message
from physai_decode.request_queue import Ticket
from physai_decode.speech import Kind
from physai_decode.speech import Manner
from physai_decode.speech import Part
from physai_decode.speech import Speech
from physai_decode.speech import Thought
from physai_decode.timing import ItemReport
from physai_decode.timing import RequestRecorder
from physai_decode.timing import TokenReport

LOOK_UP_S = 0.02        # how often a deadline is looked for while a paced step waits
RAW = Manner(reason='raw_prompt goes without the chat template')
PIECE = 32768           # characters of a text that are looked at in one go: some 0.03 s
SHORTEN = "shorten the prompt, or raise engine.max_context if the model's own limit is higher"


class Detokenizer(Protocol):
    """What turns one answer's ids into text; see ``physai_decode.detokenizer.Detokenizer``."""

    stopped: bool

    @property
    def held(self) -> bool:
        """Tell whether text is held back."""
        ...

    def push(self, token_id: int) -> str:
        """Take a token, give the text that it completed."""
        ...

    def flush(self) -> str:
        """Give the text that is held back."""
        ...


class TextCoder(Protocol):
    """What turns messages into ids; see ``physai_decode.text_process.TextProcess``."""

    manner: Manner
    """How the model marks its thoughts and its calls of tools."""

    def encode(self, messages: Sequence[Message], chat_template_kwargs: Mapping[str, Any] = ...,
               go_on: Callable[[], None] = ..., tools: Sequence[Mapping[str, Any]] = ...
               ) -> list[int]:
        """Give the ids of a conversation; what ``go_on`` raises ends that."""
        ...

    def count(self, text: str) -> int:
        """Count the tokens of a text by itself."""
        ...

    def detokenizer(self, stop: Sequence[str] = (), seen: Sequence[str] = ()) -> Detokenizer:
        """Give what turns the ids of one answer into text, these special tokens too."""
        ...

    def tail(self, prompt_ids: Sequence[int]) -> str:
        """Give the end of a prompt as the model sees it."""
        ...

    def vocabulary(self, size: int, end_ids: Sequence[int]) -> Vocabulary:
        """Give what compiles constraints."""
        ...


class Refused(Exception):
    """The model can't take this prompt; the message says why."""


class End(NamedTuple):
    """Why an answer ended: a finish reason, and words where it does not say it all."""

    reason: str
    message: str


class Ended(Exception):
    """The answer is to end now, and not at its next token."""

    def __init__(self, end: End) -> None:
        """Keep why."""
        super().__init__(*end)
        self.end = end


ASKED = End('cancelled', '')        # the ticket knows better
LATE = End('deadline', 'deadline.request_ms has passed')


class Answer:
    """One answer, from the ticket taken to its last token."""

    def __init__(self, ticket: Ticket, loop: DecodeLoop, text: TextCoder,
                 conversation: Conversation, sampling: SamplingConfig, times: RequestRecorder,
                 emit: Callable[[TokenReport], None], emit_item: Callable[[ItemReport], None],
                 alive: Callable[[float], None], clock: Callable[[], float],
                 form: Form | None = None, tokens_per_s: float = 0.0,
                 thought_tokens: int = 0) -> None:
        """
        Take what the answer needs.

        :param sampling: of this request.
        :param times: records its tokens.
        :param emit: gets each token's report.
        :param emit_item: gets each element's, of an answer that is JSON.
        :param alive: is called for each sign of life of the engine, with the time by which the
            next one is to come at the earliest.
        :param form: what the answer has to look like, None for anything.
        :param tokens_per_s: how fast it comes at most; 0: as fast as it can.
        :param thought_tokens: tokens after which a thought is ended; 0: none.
        """
        self._ticket, self._loop, self._text = ticket, loop, text
        self._conversation, self._sampling, self.times = conversation, sampling, times
        self._emit, self._emit_item = emit, emit_item
        self._alive, self._clock = alive, clock
        self._form, self._thought_tokens = form, thought_tokens
        self._items: Items | None = None
        if form is not None and form.kind == 'json_schema':
            self._items, times.items = Items(), 0
        self._tokens_per_s = tokens_per_s
        times.paced = tokens_per_s > 0
        self._pace: Pace | None = None              # from the first step on
        self._waited_s: float | None = None         # before the step that runs
        self._manner = RAW if ticket.request.raw_prompt else text.manner
        self._speech: Speech | None = None          # None: all that the model says is its answer
        self._ids_said: list[int] = []              # kept only while a thought may be ended
        self._given = 0
        self._pieces: list[str] = []
        self._thoughts: list[str] = []
        self.calls: list[Call] = []                 # those that were given out
        self._waiting: TokenReport | None = None    # its text is not known to the end
        self._publish_s: float | None = None
        self.energy_j: float | None = None          # of the device, when this began
        self.note = ''                              # for the report, beside why it ended

    @property
    def text(self) -> str:
        """All that was given out so far."""
        return ''.join(self._pieces)

    @property
    def reasoning(self) -> str:
        """All thoughts that were given out so far."""
        return ''.join(self._thoughts)

    def give(self) -> End:
        """
        Answer.

        :raises Refused: the prompt is too long, or empty, or the answer's form can't be kept, or
            tools can't be offered.
        :raises TextError: the prompt can't be encoded.
        """
        end = self._give()
        if self._speech is not None and self._speech.problem:
            self._remark(self._speech.problem)
        if end.reason == 'stop' and self.calls:
            return End('tool_calls', end.message)
        return end

    def _give(self) -> End:
        manner, tools = self._manner, self._ticket.request.offered
        if tools and not manner.form:
            raise Refused(f'tools can not be used: {manner.reason}')
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
                tail, parts = _sorted(self._speech.push(tail) + self._speech.flush())
            self._release(tail, parts)

    def _decode(self) -> End:
        if self._is_late():
            return End('deadline', 'deadline.request_ms had passed before its turn came')
        form = self._checked_form()
        prompt_ids = self._encode()
        self.times.prompt_tokens = len(prompt_ids)
        thought = self._listen(prompt_ids)
        constraint = None if form is None else self._constraint(form, thought)
        sampling = self._sampling
        while (end := self._decode_after(prompt_ids, sampling, constraint)) is None:
            prompt_ids = [*prompt_ids, *self._end_thought(constraint)]
            sampling = replace(self._sampling,
                               max_new_tokens=self._sampling.max_new_tokens - self._given)
            if len(prompt_ids) >= self._loop.engine.footprint.max_context:
                return self._full()
        return end

    def _decode_after(self, prompt_ids: list[int], sampling: SamplingConfig,
                      constraint: Constraint | None) -> End | None:
        """Decode to the end of the answer, or to that of a thought that is to end: None."""
        footprint, limit = self._loop.engine.footprint, self._sampling.max_new_tokens
        # Closing the generator is what cancels the engine, however this loop is left.
        with closing(cast('Generator[Step, None, None]',
                          self._loop.stream(prompt_ids, sampling, constraint,
                                            ahead=not self.times.paced))) as steps:
            for step in steps:
                now_s = self._clock()
                self._alive(now_s)
                self._check_end()
                if not self._given:
                    self.times.cached_tokens = step.cached_tokens
                device_s = step.device_s
                for token_id in step.token_ids:
                    if token_id in footprint.eos_token_ids:
                        return End('stop', '')
                    self._token(now_s, token_id, device_s, step.mask_s)
                    device_s = None                 # a step's time goes to its first token
                    self._given += 1
                    if self._detokenizer.stopped:
                        return End('stop', f'a text of {self._named("stop")} was met')
                    if constraint is not None and constraint.ended:
                        return End('stop', '')
                    if self._given == limit:
                        return End('length', f'{self._named("max_new_tokens")} is {limit}')
                    if self._thought_tokens and self._thinks_too_long():
                        return None
                if self._is_late():
                    return LATE
                if self.times.paced and step.token_ids:
                    self._pace = self._pace or Pace(self._tokens_per_s, now_s)
                    self._wait(self._pace.due_s(self._clock(), len(step.token_ids)))
        return self._full()

    def _full(self) -> End:
        context = self._loop.engine.footprint.max_context
        return End('length', f'the context of {context} tokens is full')

    def _wait(self, due_s: float) -> None:
        """Wait until the next step is to start, and end where that is due before."""
        begin_s = self._clock()
        self._alive(due_s)
        while (left_s := due_s - self._clock()) > 0:
            self._ticket.ending.wait(min(left_s, LOOK_UP_S))
            self._check_end()
            if self._is_late():
                raise Ended(LATE)
        self._waited_s = self._clock() - begin_s

    def _checked_form(self) -> Form | None:
        """Give what the answer has to look like, which may be calls of tools."""
        request, form = self._ticket.request, self._form
        if request.offered and form is not None:
            raise Refused(f'{form.name} says what every answer looks like, so that none can call '
                          'a tool: set "response_format" to {"type": "text"} in the request')
        if request.forced:
            single = len(request.forced) == 1 and request.tool_choice != 'required'
            form = Form('calls', Calls(self._manner.form, request.forced, single),
                        'tool_choice')
        if form is not None and self._sampling.stop:
            raise Refused(f'{self._named("stop")} can not be used with {form.name}, which '
                          'says itself where the answer ends: set "stop" to [] in the request')
        return form

    def _listen(self, prompt_ids: list[int]) -> Thought | None:
        """Begin to take apart what is said; give the thought that may come first."""
        manner = self._manner
        names = [tool['function']['name'] for tool in self._ticket.request.offered]
        if not names and not manner.opens:
            return None
        inside = manner.is_inside(self._text.tail(prompt_ids)) if manner.opens else False
        self._speech = Speech(manner, names, bool(inside))
        return None if inside is False else Thought(manner.opens, manner.closes, bool(inside))

    def _constraint(self, form: Form, thought: Thought | None) -> Constraint:
        """Compile what the answer has to look like."""
        footprint = self._loop.engine.footprint
        constraint = self._text.vocabulary(
            footprint.vocab_size, footprint.eos_token_ids).constraint(form, thought)
        self._look_up()
        return constraint

    def _thinks_too_long(self) -> bool:
        speech = self._speech
        return (speech is not None and speech.thinking
                and self._given >= self._thought_tokens)

    def _end_thought(self, constraint: Constraint | None) -> list[int]:
        """End the thought in the model's place; give the tokens since the prompt."""
        manner = self._manner
        assert self._speech is not None
        if constraint is not None:
            for token_id in manner.close_ids:
                constraint.accept(token_id)
        self._release(*_sorted(self._speech.push(
            f'{self._detokenizer.flush()}\n{manner.closes}\n\n')))
        own = 'max_tokens' in self._ticket.request.thinking
        self._remark(f'the thought was ended: thinking.max_tokens is {self._thought_tokens}'
                     + (' in the request' if own else ''))
        return [*self._ids_said, *manner.close_ids]

    def _remark(self, text: str) -> None:
        """Add a note for the report."""
        self.note = '; '.join(filter(None, (self.note, text)))

    def _named(self, setting: str) -> str:
        """Name a setting where it came from: the request's own field, or the node's parameter."""
        own = setting in self._ticket.request.sampling
        return JSON_NAMES[setting] if own else f'sampling.{setting}'

    def _encode(self) -> list[int]:
        """Give the prompt's ids, with as much of the conversation as leaves room."""
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
        if len(turn.prompt) >= context or not known:    # it may be too long all by itself
            prompt_ids = self._checked(self._ids(self._conversation.messages([], turn.prompt)))
        room = context - min(self._sampling.max_new_tokens, context // 2)
        turns = self._newest(known, room)
        if known:
            prompt_ids = self._ids(self._conversation.messages(turns, turn.prompt))
        # Down to half: to drop a turn each time would change the beginning, and with it lose all
        # that is cached, at every request.
        if len(prompt_ids) > room or len(turns) < len(known):
            while turns and len(prompt_ids) > room // 2:
                turns = turns[len(turns) // 2 or 1:]
                prompt_ids = self._ids(self._conversation.messages(turns, turn.prompt))
        self._checked(prompt_ids)
        dropped = known[:len(known) - len(turns)]
        self._conversation.drop(dropped)
        if count := lost + len(dropped):
            self.note = (f'the conversation no longer fits {room} tokens: its oldest {count} '
                         f'turn{"" if count == 1 else "s"} dropped')
        return prompt_ids

    def _newest(self, turns: list[Turn], room: int) -> list[Turn]:
        """Give the newest turns that may fit; the others need not be encoded to be dropped."""
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
        """Count a text's tokens, about, and no further than what is far too long."""
        text, count = text.strip(), 0               # a chat template may do that too
        for begin in range(0, len(text), PIECE):
            count += self._text.count(text[begin:begin + PIECE])
            self._look_up()
            if count > self._far_too_long:
                break
        return count

    @property
    def _far_too_long(self) -> int:
        """More tokens than this can't become few enough by encoding them in one go."""
        return self._loop.engine.footprint.max_context * 9 // 8

    def _ids(self, messages: Sequence[Message]) -> list[int]:
        request = self._ticket.request
        encode = partial(self._text.encode, tools=request.offered) if request.offered else \
            self._text.encode
        prompt_ids = encode(messages, request.chat_template_kwargs, self._look_up)
        self._look_up()
        return prompt_ids

    def _look_up(self) -> None:
        """While and after texts are encoded: give a sign of life, and end where that is due."""
        self._alive(self._clock())
        self._check_end()
        if self._is_late():
            raise Ended(LATE)

    def _checked(self, prompt_ids: list[int]) -> list[int]:
        context = self._loop.engine.footprint.max_context
        if not prompt_ids:
            raise Refused('the prompt holds no token: send some text')
        if len(prompt_ids) >= context:
            raise Refused(
                f'the prompt is {len(prompt_ids)} tokens long with its chat template, and the '
                f'context holds {context} tokens, one of them for the answer: {SHORTEN}')
        return prompt_ids

    def _check_end(self) -> None:
        if self._ticket.end_reason:
            raise Ended(ASKED)

    def _token(self, now_s: float, token_id: int, device_s: float | None,
               mask_s: float | None) -> None:
        """Record a token, and give it out unless its text is still open."""
        piece, speech = self._detokenizer.push(token_id), self._speech
        held = self._detokenizer.held
        others: Sequence[Part] = ()
        if speech is not None:
            thinking = speech.thinking
            piece, others = _sorted(speech.push(piece))
            if thinking or speech.thinking:
                self.times.reasoning_tokens = self._given + 1
            if self._thought_tokens:
                self._ids_said.append(token_id)
            held = held or speech.held
        self._release('')
        report = self.times.token(
            now_s, token_id, piece, device_s, self._publish_s, mask_s, self._waited_s)
        self._waited_s = None if self._waited_s is None else 0.0
        if others:
            report = _with(report, others)
        if held:
            self._waiting = report
        else:
            self._give_out(report)

    def _release(self, tail: str, others: Sequence[Part] = ()) -> None:
        """Give out the token that waits, with the text that turned out to be its own."""
        waiting, self._waiting = self._waiting, None
        if waiting is not None:
            waiting = replace(waiting, text=waiting.text + tail)
            self._give_out(_with(waiting, others) if others else waiting)

    def _give_out(self, report: TokenReport) -> None:
        if self._ticket.finished:                   # the worker has given it up
            return
        self._pieces.append(report.text)
        if self._speech is not None:
            self._thoughts.append(report.reasoning)
            self.calls += report.tool_calls
        begin_s = self._clock()
        self._emit(report)
        if self._items is not None:
            for item in self._items.feed(report.text):
                self._emit_item(self.times.item(self._clock(), *item))
        self._publish_s = self._clock() - begin_s

    def _is_late(self) -> bool:
        """Tell whether the request is to end because its time is over."""
        deadline = self.times.deadline
        spent_ms = 1e3 * (self._clock() - self._ticket.received_s)
        return (deadline.action == 'truncate' and deadline.request_ms > 0
                and spent_ms > deadline.request_ms)


def _sorted(parts: Sequence[Part]) -> tuple[str, list[Part]]:
    """Give the answer's own text among these parts, and the others."""
    return (''.join(part.text for part in parts if part.kind is Kind.CONTENT),
            [part for part in parts if part.kind is not Kind.CONTENT])


def _with(report: TokenReport, parts: Sequence[Part]) -> TokenReport:
    """Give a token's report with thoughts and calls that it completed."""
    return replace(
        report, reasoning=report.reasoning + ''.join(part.text for part in parts),
        tool_calls=(*report.tool_calls, *(part.call for part in parts if part.call is not None)))
