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
from physai_decode.request import Form
from physai_decode.request import JSON_NAMES
from physai_decode.request import Message
from physai_decode.request_queue import Ticket
from physai_decode.timing import ItemReport
from physai_decode.timing import RequestRecorder
from physai_decode.timing import TokenReport

LOOK_UP_S = 0.02        # how often a deadline is looked for while a paced step waits
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

    def encode(self, messages: Sequence[Message], chat_template_kwargs: Mapping[str, Any] = ...,
               go_on: Callable[[], None] = ...) -> list[int]:
        """Give the ids of a conversation; what ``go_on`` raises ends that."""
        ...

    def count(self, text: str) -> int:
        """Count the tokens of a text by itself."""
        ...

    def detokenizer(self, stop: Sequence[str] = ()) -> Detokenizer:
        """Give what turns the ids of one answer into text."""
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
                 form: Form | None = None, tokens_per_s: float = 0.0) -> None:
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
        """
        self._ticket, self._loop, self._text = ticket, loop, text
        self._conversation, self._sampling, self.times = conversation, sampling, times
        self._emit, self._emit_item = emit, emit_item
        self._alive, self._clock = alive, clock
        self._form = form
        self._items: Items | None = None
        if form is not None and form.kind == 'json_schema':
            self._items, times.items = Items(), 0
        self._tokens_per_s = tokens_per_s
        times.paced = tokens_per_s > 0
        self._waited_s: float | None = None         # before the step that runs
        self._pieces: list[str] = []
        self._waiting: TokenReport | None = None    # its text is not known to the end
        self._publish_s: float | None = None
        self.energy_j: float | None = None          # of the device, when this began
        self.note = ''                              # for the report, beside why it ended

    @property
    def text(self) -> str:
        """All that was given out so far."""
        return ''.join(self._pieces)

    def give(self) -> End:
        """
        Answer.

        :raises Refused: the prompt is too long, or empty, or the answer's form can't be kept.
        :raises TextError: the prompt can't be encoded.
        """
        self._detokenizer = self._text.detokenizer(self._sampling.stop)
        try:
            return self._decode()
        except Ended as ended:
            return ended.end
        except ConstraintError as error:
            if not self._pieces:
                raise
            return End('error', str(error))
        finally:
            self._release(self._detokenizer.flush())

    def _decode(self) -> End:
        if self._is_late():
            return End('deadline', 'deadline.request_ms had passed before its turn came')
        footprint, limit = self._loop.engine.footprint, self._sampling.max_new_tokens
        constraint = self._constraint()
        prompt_ids = self._encode()
        self.times.prompt_tokens = len(prompt_ids)
        count, paced, pace = 0, self.times.paced, None
        # Closing the generator is what cancels the engine, however this loop is left.
        with closing(cast('Generator[Step, None, None]',
                          self._loop.stream(prompt_ids, self._sampling, constraint,
                                            ahead=not paced))) as steps:
            for step in steps:
                now_s = self._clock()
                self._alive(now_s)
                self._check_end()
                if not count:
                    self.times.cached_tokens = step.cached_tokens
                device_s = step.device_s
                for token_id in step.token_ids:
                    if token_id in footprint.eos_token_ids:
                        return End('stop', '')
                    self._token(now_s, token_id, device_s, step.mask_s)
                    device_s = None                 # a step's time goes to its first token
                    count += 1
                    if self._detokenizer.stopped:
                        return End('stop', f'a text of {self._named("stop")} was met')
                    if constraint is not None and constraint.ended:
                        return End('stop', '')
                    if count == limit:
                        return End('length', f'{self._named("max_new_tokens")} is {count}')
                if self._is_late():
                    return LATE
                if paced and step.token_ids:
                    pace = pace or Pace(self._tokens_per_s, now_s)
                    self._wait(pace.due_s(self._clock(), len(step.token_ids)))
        return End('length', f'the context of {footprint.max_context} tokens is full')

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

    def _constraint(self) -> Constraint | None:
        """Compile what the answer has to look like."""
        if self._form is None:
            return None
        if self._sampling.stop:
            raise Refused(f'{self._named("stop")} can not be used with {self._form.name}, which '
                          'says itself where the answer ends: set "stop" to [] in the request')
        footprint = self._loop.engine.footprint
        constraint = self._text.vocabulary(
            footprint.vocab_size, footprint.eos_token_ids).constraint(self._form)
        self._look_up()
        return constraint

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
        prompt_ids = self._text.encode(
            messages, self._ticket.request.chat_template_kwargs, self._look_up)
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
        piece = self._detokenizer.push(token_id)
        self._release('')
        report = self.times.token(
            now_s, token_id, piece, device_s, self._publish_s, mask_s, self._waited_s)
        self._waited_s = None if self._waited_s is None else 0.0
        if self._detokenizer.held:
            self._waiting = report
        else:
            self._give_out(report)

    def _release(self, tail: str) -> None:
        """Give out the token that waits, with the text that turned out to be its own."""
        waiting, self._waiting = self._waiting, None
        if waiting is not None:
            self._give_out(replace(waiting, text=waiting.text + tail))

    def _give_out(self, report: TokenReport) -> None:
        if self._ticket.finished:                   # the worker has given it up
            return
        self._pieces.append(report.text)
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
