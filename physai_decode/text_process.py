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
`Text` in a process of its own, where the files of a model can do no harm.

A chat template is a program, and a tokenizer's rules are little less: either may run for ever,
fill the memory, or keep the interpreter's lock. So they are loaded and run by a child process, of
which the kernel limits the CPU time and the memory. The parent gets the tokenizer back for
decoding when the child has tried it.
"""

from array import array
from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import asdict
import fcntl
import json
from math import ceil
from multiprocessing.connection import Connection
import os
from pathlib import Path
import resource
import select
import signal
import socket
import subprocess
import sys
import time
from types import MappingProxyType
from typing import Any

from physai_decode.config import ChatConfig
from physai_decode.constraint import Vocabulary
from physai_decode.detokenizer import Detokenizer
from physai_decode.engine import described
from physai_decode.realtime import follow
from physai_decode.request import Call
from physai_decode.request import Message
from physai_decode.speech import Manner
from physai_decode.speech import TAIL
from physai_decode.text import Text
from physai_decode.tokenizer_files import load_tokenizer
from physai_decode.tokenizer_files import TextError

FILES = ('tokenizer*', 'vocab*', 'merges*', '*tokens*.json', '*.model', '*.tiktoken', '*.jinja',
         'chat_template.json', 'additional_chat_templates/*.jinja')
MAX_FILE_BYTES = 100_000_000
# The tokenizer of a vocabulary of 262144, in a file of 22 MB, takes 0.64 GB, and 8 s on a server.
LOAD_CPU_S, LOAD_CPU_S_PER_BYTE = 20.0, 2e-6
MEMORY_BYTES, MEMORY_PER_FILE_BYTE = 1 << 29, 40
# A prompt of 1 MB takes 0.2 GB, and 1 s.
PROMPT_CPU_S, PROMPT_CPU_S_PER_BYTE = 5.0, 1e-5
MEMORY_PER_PROMPT_BYTE = 500
POLL_S = 0.05                   # how often a cancel is looked for
_START = ('import sys; sys.path = [*filter(None, sys.path)]; '     # not what is in the folder
          'from physai_decode.text_process import serve; serve()')
_ONE_THREAD = {'TOKENIZERS_PARALLELISM': 'false', 'OMP_NUM_THREADS': '1'}
_BLAMED = "the model's tokenizer or chat template"
_ADVICE = 'choose another model, or set chat.template to off if the template is why'
_DONE, _REFUSED = b'+', b'-'


class TextProcess:
    """
    What turns prompts into ids, and ids into text, for the tokenizer of one model.

    The child ends with this process, however that ends, and with ``close``. One that had to be
    ended for a limit or a cancel is replaced: the next prompt waits for that, for about a second.
    """

    def __init__(self, folder: str, chat: ChatConfig, vocab_size: int | None = None,
                 end_ids: Sequence[int] = ()) -> None:
        """
        Load the tokenizer and try the chat template.

        :param folder: a folder in Hugging Face layout. Nothing is fetched.
        :param chat: which template to use, and the system prompt.
        :param vocab_size: ids that the model has; None where that is not known.
        :param end_ids: ids that end an answer of the model, by its config.
        :raises TextError: naming the folder and what is wrong with it; also where it takes too
            much time or memory.
        """
        from tokenizers import Tokenizer

        files = {path for name in FILES for path in Path(folder).glob(name)}
        size = sum(path.stat().st_size for path in files if path.is_file())
        if size > MAX_FILE_BYTES:
            raise TextError(
                f"no tokenizer can be loaded from {folder}: its tokenizer's files hold "
                f'{size / 1e6:.0f} MB, and {MAX_FILE_BYTES / 1e6:.0f} MB are allowed: '
                'choose another model')
        self._cpu_s = LOAD_CPU_S + LOAD_CPU_S_PER_BYTE * size
        self._memory = MEMORY_BYTES + MEMORY_PER_FILE_BYTE * size
        self._arguments = json.dumps(
            [folder, asdict(chat), vocab_size, [*end_ids], self._cpu_s, self._memory])
        self._start()
        state = json.loads(self._loaded(lambda: None))
        self._backend = Tokenizer.from_str(state['backend'])
        self._special_ids = frozenset(state['special_ids'])
        self.template: str = state['template']          # its name; none, or off
        # What ends an answer: by the config, the tokenizer and the template, without words.
        self.end_ids: tuple[int, ...] = tuple(state['end_ids'])
        manner = state['manner']
        self.manner = Manner(**manner | {'close_ids': tuple(manner['close_ids'])})
        self._vocabulary: Vocabulary | None = None

    def encode(self, messages: Sequence[Message],
               chat_template_kwargs: Mapping[str, Any] = MappingProxyType({}),
               heartbeat: Callable[[], None] = lambda: None,
               tools: Sequence[Mapping[str, Any]] = ()) -> list[int]:
        """
        Give the ids of a conversation, up to where the answer begins; see `Text.encode`.

        One thread at a time may call this.

        :param heartbeat: is called now and then; what it raises ends the work, and is raised here.
        :raises TextError: half a surrogate pair in a text, a template that refuses it, or a limit.
        """
        return self._asked([messages, dict(chat_template_kwargs), tools], heartbeat).tolist()

    def count(self, text: str) -> int:
        """Count the tokens of a text by itself; see `encode`."""
        return self._asked(text, lambda: None)[0]

    def detokenizer(self, stop: Sequence[str] = (), seen: Iterable[str] = ()) -> Detokenizer:
        """
        Give what turns one answer's ids into text.

        :param stop: it ends at any of these texts.
        :param seen: special tokens that are text nevertheless.
        """
        hidden = self._special_ids.difference(map(self._backend.token_to_id, seen))
        return Detokenizer(self._backend, hidden, stop)

    def tail(self, prompt_ids: Sequence[int]) -> str:
        """Give the end of a prompt as the model sees it, with special tokens."""
        return str(self._backend.decode(list(prompt_ids[-TAIL:]), skip_special_tokens=False))

    def named(self, ids: Iterable[int]) -> list[str]:
        """Give the names of tokens; of one that the tokenizer does not know, its id."""
        return [self._backend.id_to_token(id_) or str(id_) for id_ in ids]

    def vocabulary(self, size: int, end_ids: Sequence[int]) -> Vocabulary:
        """
        Give what compiles constraints for this model; made at the first call, in a second.

        :param size: ids that the model has.
        :param end_ids: ids that end an answer.
        :raises ConstraintError: the tokenizer is of a kind that can't be constrained.
        """
        if self._vocabulary is None:
            self._vocabulary = Vocabulary(self._backend, size, end_ids)
        return self._vocabulary

    def close(self) -> None:
        """End the child."""
        self._process.kill()
        self._process.communicate()
        self._connection.close()

    def _asked(self, question: list[Any] | str, heartbeat: Callable[[], None]) -> 'array[int]':
        """Have the child encode a conversation, or count a text's tokens."""
        request = json.dumps(question).encode()
        memory, cpu_s = _prompt_limits(self._memory, len(request))
        if self._process.poll() is not None:        # it was killed
            self.close()
            self._start()
        try:
            if not self._ready:
                self._loaded(heartbeat)
            return array('I', self._reply(
                'the prompt can not be encoded', memory, cpu_s, heartbeat, request))
        finally:
            if self._process.returncode is not None:
                self._start()

    def _start(self) -> None:
        ours, theirs = socket.socketpair()
        self._ready, self._connection = False, Connection(ours.detach())
        path = os.pathsep.join(each or os.getcwd() for each in sys.path)
        # Its standard input is a leash; in a session of its own, Ctrl-C is not for it.
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, '-c', _START, str(theirs.fileno()), self._arguments],
                stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()], start_new_session=True,
                env={**os.environ, **_ONE_THREAD, 'PYTHONPATH': path})

    def _loaded(self, heartbeat: Callable[[], None]) -> bytes:
        """Wait for the child's own; it has ended where this raises."""
        folder = json.loads(self._arguments)[0]
        try:
            state = self._reply(f'no tokenizer can be loaded from {folder}', self._memory,
                                self._cpu_s, heartbeat)
        except BaseException:
            self.close()
            raise
        self._ready = True
        return state

    def _reply(self, what: str, memory: int, cpu_s: float, heartbeat: Callable[[], None],
               request: bytes = b'') -> bytes:
        """Wait for the child's answer; it has ended where this raises anything but a refusal."""
        try:
            if request:
                self._connection.send_bytes(request)
            while not self._connection.poll(POLL_S):
                heartbeat()
            reply = self._connection.recv_bytes()
        except BaseException as error:
            if not isinstance(error, (EOFError, OSError)):
                self.close()
                raise
            code = self._process.wait()
            self.close()
            told = (f'takes more than {cpu_s:.0f} s of CPU time' if code == -signal.SIGXCPU
                    else f'takes more than {memory / 1e6:.0f} MB of memory' if code < 0
                    else f'ended its process with exit code {code}')
            raise TextError(f'{what}: {_BLAMED} {told}: {_ADVICE}') from error
        if reply[:1] == _REFUSED:
            raise TextError(reply[1:].decode())
        return reply[1:]


def _prompt_limits(memory: int, size: int) -> tuple[int, float]:
    """Give the memory in bytes and the CPU time in seconds that a request of a size may take."""
    return memory + MEMORY_PER_PROMPT_BYTE * size, PROMPT_CPU_S + PROMPT_CPU_S_PER_BYTE * size


def serve() -> None:
    """Be the child: load, then encode whatever comes, till the parent ends."""
    _end_with_parent()
    follow(os.getppid())                # and not the thread that started this process
    connection = Connection(int(sys.argv[1]))
    folder, chat, vocab_size, end_ids, cpu_s, memory = json.loads(sys.argv[2])
    # Without torch, transformers takes 1 s and 70 MB to import, and not 3 s and 400 MB.
    sys.modules['torch'] = None         # type: ignore[assignment]
    texts: list[Text] = []

    def load() -> bytes:
        _limit(memory, cpu_s)
        texts.append(Text(load_tokenizer(folder), ChatConfig(**chat), vocab_size, end_ids))
        return _tried(texts[0])

    def encode() -> bytes:
        _limit(*_prompt_limits(memory, len(request)))
        question = json.loads(request)
        if isinstance(question, str):
            return array('I', [texts[0].count(question)]).tobytes()
        messages, kwargs, tools = question
        messages = [_message(*message) for message in messages]
        return array('I', texts[0].encode(messages, kwargs, tools)).tobytes()

    loaded = _outcome(load)
    connection.send_bytes(loaded)
    while loaded[:1] == _DONE:
        request = connection.recv_bytes()
        connection.send_bytes(_outcome(encode))


def _message(role: str, content: str, calls: list[Any], *others: str) -> Message:
    """Give a message as it was before it went through JSON."""
    return Message(role, content, tuple(Call(*call) for call in calls), *others)


def _outcome(work: Callable[[], bytes]) -> bytes:
    """Do some work; give what it gives, or why it can't be done."""
    try:
        return _DONE + work()
    except TextError as error:
        reason = str(error)
    except MemoryError:
        limit = resource.getrlimit(resource.RLIMIT_AS)[0]
        reason = f'{_BLAMED} takes more than {limit / 1e6:.0f} MB of memory: {_ADVICE}'
    except BaseException as error:      # such as a panic of the tokenizers library
        reason = f"the model's tokenizer can't be used: {described(error)}"
    return _REFUSED + reason.encode(errors='backslashreplace')


def _tried(text: Text) -> bytes:
    """Try what the parent will do with a tokenizer, and give it."""
    from tokenizers import Tokenizer

    state = text.backend.to_str()
    if '"Regex"' in json.dumps(json.loads(state)['decoder']):
        raise TextError("the tokenizer's decoder has a regular expression, which may take for "
                        'ever: choose another model')
    backend = Tokenizer.from_str(state)
    backend.decode_batch([[id_] for id_ in range(backend.get_vocab_size())])
    return json.dumps({'backend': state, 'special_ids': sorted(text.special_ids),
                       'template': text.template, 'end_ids': text.end_ids,
                       'manner': asdict(text.manner)}).encode()


def _limit(memory: int, cpu_s: float) -> None:
    """Let this process use so much memory in all, in bytes, and so much more CPU time."""
    for kind, limit in ((resource.RLIMIT_AS, memory),
                        (resource.RLIMIT_CPU, ceil(time.process_time() + cpu_s))):
        hard = resource.getrlimit(kind)[1]
        resource.setrlimit(kind, (limit if hard < 0 else min(limit, hard), hard))


def _end_with_parent() -> None:
    """
    Let the kernel end this process when its standard input is closed, whatever it does then.

    A signal for that is asked for by ``O_ASYNC``. Unlike ``PR_SET_PDEATHSIG``, it does not come
    when the thread ends that started the child.
    """
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    ending = {signal.SIGIO, signal.SIGXCPU}
    for number in ending:
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, ending)
    fcntl.fcntl(0, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(0, fcntl.F_SETFL, fcntl.fcntl(0, fcntl.F_GETFL) | os.O_ASYNC)
    leash = select.poll()
    leash.register(0, 0)
    if leash.poll(0):                   # it was closed before
        sys.exit(1)
