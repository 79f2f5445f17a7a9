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
Run `Text` in a child process that confines the files of a model.

A chat template is a program, and the rules of a tokenizer are close to one. Either can run
forever, fill the memory, or hold the interpreter's lock. A child process therefore loads and runs
them, and the kernel limits its CPU time and memory. Once the child has tested the tokenizer, the
parent receives a copy for decoding.
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
from operator import itemgetter
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
from physai_decode.config import shown_json as shown
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
# A tokenizer with a vocabulary of 262144 (a 22 MB file) takes 0.64 GB, and 8 s on a server.
LOAD_CPU_S, LOAD_CPU_S_PER_BYTE = 20.0, 2e-6
MEMORY_BYTES, MEMORY_PER_FILE_BYTE = 1 << 29, 40
# A prompt of 1 MB takes 0.2 GB and 1 s.
PROMPT_CPU_S, PROMPT_CPU_S_PER_BYTE = 5.0, 1e-5
MEMORY_PER_PROMPT_BYTE = 500
POLL_S = 0.05                   # period of the heartbeat
_START = ('import sys; sys.path = [*filter(None, sys.path)]; '     # without the working directory
          'from physai_decode.text_process import serve; serve()')
_ONE_THREAD = {'TOKENIZERS_PARALLELISM': 'false', 'OMP_NUM_THREADS': '1'}
_CULPRIT = "the model's tokenizer or chat template"
_ADVICE = 'choose another model, or set chat.template to off if the template is the cause'
_DONE, _REFUSED = b'+', b'-'


class TextProcess:
    """
    The tokenizer of a model: converts prompts to ids, and ids to text.

    The child ends with this process, however that ends, or with ``close``. A child that was killed
    after a limit or a cancel is replaced; the next prompt waits about a second for it.
    """

    def __init__(self, folder: str, chat: ChatConfig, vocab_size: int | None = None,
                 end_ids: Sequence[int] = ()) -> None:
        """
        Load the tokenizer and test the chat template.

        :param folder: a folder in Hugging Face layout. Nothing is downloaded.
        :param chat: template and system prompt.
        :param vocab_size: vocabulary size of the model; None if unknown.
        :param end_ids: ids in the model's config that end an answer.
        :raises TextError: the tokenizer cannot be loaded, or takes too much time or memory; the
            message names the folder and the reason.
        """
        from tokenizers import Tokenizer

        files = {path for name in FILES for path in Path(folder).glob(name)}
        size = sum(path.stat().st_size for path in files if path.is_file())
        if size > MAX_FILE_BYTES:
            raise TextError(
                f"no tokenizer can be loaded from {folder}: its tokenizer's files have "
                f'{size / 1e6:.0f} MB, and {MAX_FILE_BYTES / 1e6:.0f} MB are allowed: '
                'choose another model')
        self._cpu_s = LOAD_CPU_S + LOAD_CPU_S_PER_BYTE * size
        self._memory = MEMORY_BYTES + MEMORY_PER_FILE_BYTE * size
        self._arguments = json.dumps(
            [folder, asdict(chat), vocab_size, [*end_ids], self._cpu_s, self._memory])
        self._start()
        state = json.loads(self._await_load(lambda: None))
        self._backend = Tokenizer.from_str(state['backend'])
        self._special_ids = frozenset(state['special_ids'])
        self.template: str = state['template']          # its name, none or off
        # Ids that end an answer, from the config, the tokenizer and the template; no plain words.
        self.end_ids: tuple[int, ...] = tuple(state['end_ids'])
        manner = state['manner']
        self.manner = Manner(**manner | {'close_ids': tuple(manner['close_ids'])})
        self._vocabulary: Vocabulary | None = None

    def encode(self, messages: Sequence[Message],
               chat_template_kwargs: Mapping[str, Any] = MappingProxyType({}),
               heartbeat: Callable[[], None] = lambda: None,
               tools: Sequence[Mapping[str, Any]] = ()) -> list[int]:
        """
        Encode a conversation up to the start of the answer; see `Text.encode`.

        Not thread-safe.

        :param heartbeat: called every `POLL_S`; its exceptions end the work and are raised here.
        :raises TextError: a text has an unpaired surrogate, the template refuses the conversation,
            or a limit was exceeded.
        """
        return self._request([messages, dict(chat_template_kwargs), tools], heartbeat).tolist()

    def count(self, text: str) -> int:
        """Count the tokens of a text; see `Text.count`."""
        return self._request(text, lambda: None)[0]

    def detokenizer(self, stop: Sequence[str] = (), seen: Iterable[str] = ()) -> Detokenizer:
        """
        Create a detokenizer for one answer.

        :param stop: strings that end the answer.
        :param seen: special tokens to keep in the text.
        """
        hidden = self._special_ids.difference(map(self._backend.token_to_id, seen))
        return Detokenizer(self._backend, hidden, stop)

    def tail(self, prompt_ids: Sequence[int]) -> str:
        """Return the end of a prompt as text with special tokens."""
        return str(self._backend.decode(list(prompt_ids[-TAIL:]), skip_special_tokens=False))

    def named(self, ids: Iterable[int]) -> list[str]:
        """Return the names of tokens; an id that the tokenizer lacks stays a number."""
        return [self._backend.id_to_token(id_) or str(id_) for id_ in ids]

    def difference(self, other: 'TextProcess') -> str:
        """Describe the first id or token that the vocabularies map differently; '' if none."""
        ours, theirs = (each._backend.get_vocab(True) for each in (self, other))
        for token, id_ in sorted(theirs.items(), key=itemgetter(1)):
            known = self._backend.id_to_token(id_)
            if known not in (token, None):
                return f'id {id_} is {shown(token)}, but in the model it is {shown(known)}'
            if ours.get(token, id_) != id_:
                return f'{shown(token)} is id {id_}, but in the model it is {ours[token]}'
        return ''

    def vocabulary(self, size: int, end_ids: Sequence[int]) -> Vocabulary:
        """
        Return the vocabulary that compiles constraints; the first call takes about a second.

        :param size: vocabulary size of the model.
        :param end_ids: ids that end an answer.
        :raises ConstraintError: this kind of tokenizer does not support constraints.
        """
        if self._vocabulary is None:
            self._vocabulary = Vocabulary(self._backend, size, end_ids)
        return self._vocabulary

    def close(self) -> None:
        """Kill the child."""
        self._process.kill()
        self._process.communicate()
        self._connection.close()

    def _request(self, content: list[Any] | str, heartbeat: Callable[[], None]) -> 'array[int]':
        """Let the child encode a conversation, or count the tokens of a text."""
        request = json.dumps(content).encode()
        memory, cpu_s = _prompt_limits(self._memory, len(request))
        if self._process.poll() is not None:        # killed from outside
            self.close()
            self._start()
        try:
            if not self._ready:
                self._await_load(heartbeat)
            return array('I', self._reply(
                'the prompt cannot be encoded', memory, cpu_s, heartbeat, request))
        finally:
            if self._process.returncode is not None:
                self._start()

    def _start(self) -> None:
        ours, theirs = socket.socketpair()
        self._ready, self._connection = False, Connection(ours.detach())
        path = os.pathsep.join(each or os.getcwd() for each in sys.path)
        # When its standard input closes, the child ends. A new session keeps Ctrl-C from it.
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, '-c', _START, str(theirs.fileno()), self._arguments],
                stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()], start_new_session=True,
                env={**os.environ, **_ONE_THREAD, 'PYTHONPATH': path})

    def _await_load(self, heartbeat: Callable[[], None]) -> bytes:
        """Wait until the child has loaded; if this raises, the child has ended."""
        folder = json.loads(self._arguments)[0]
        try:
            state = self._reply(f'no tokenizer can be loaded from {folder}', self._memory,
                                self._cpu_s, heartbeat)
        except BaseException:
            self.close()
            raise
        self._ready = True
        return state

    def _reply(self, failure: str, memory: int, cpu_s: float, heartbeat: Callable[[], None],
               request: bytes = b'') -> bytes:
        """
        Send a request, if there is one, and wait for the reply.

        If this raises anything but the error that the child reported, the child has ended.
        """
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
            if code == -signal.SIGKILL:
                raise TextError(f'{failure}: its process was killed: try again; if dmesg says '
                                'that memory ran out, free some') from error
            reason = (f'takes more than {cpu_s:.0f} s of CPU time' if code == -signal.SIGXCPU
                      else f'takes more than {memory / 1e6:.0f} MB of memory' if code < 0
                      else f'ended its process with exit code {code}')
            raise TextError(f'{failure}: {_CULPRIT} {reason}: {_ADVICE}') from error
        if reply[:1] == _REFUSED:
            raise TextError(reply[1:].decode())
        return reply[1:]


def _prompt_limits(memory: int, size: int) -> tuple[int, float]:
    """Return the limits of a request of ``size`` bytes: memory in bytes, CPU time in seconds."""
    return memory + MEMORY_PER_PROMPT_BYTE * size, PROMPT_CPU_S + PROMPT_CPU_S_PER_BYTE * size


def serve() -> None:
    """Run the child: load, then serve requests until the parent ends."""
    _end_with_parent()
    follow(os.getppid())                # the scheduling of the parent, not of its calling thread
    connection = Connection(int(sys.argv[1]))
    folder, chat, vocab_size, end_ids, cpu_s, memory = json.loads(sys.argv[2])
    # Without torch, importing transformers takes 1 s and 70 MB instead of 3 s and 400 MB.
    sys.modules['torch'] = None         # type: ignore[assignment]
    texts: list[Text] = []

    def load() -> bytes:
        _limit(memory, cpu_s)
        texts.append(Text(load_tokenizer(folder), ChatConfig(**chat), vocab_size, end_ids))
        return _tested(texts[0])

    def encode() -> bytes:
        _limit(*_prompt_limits(memory, len(request)))
        content = json.loads(request)
        if isinstance(content, str):
            return array('I', [texts[0].count(content)]).tobytes()
        messages, kwargs, tools = content
        messages = [_message(*message) for message in messages]
        return array('I', texts[0].encode(messages, kwargs, tools)).tobytes()

    loaded = _outcome(load)
    connection.send_bytes(loaded)
    while loaded[:1] == _DONE:
        request = connection.recv_bytes()
        connection.send_bytes(_outcome(encode))


def _message(role: str, content: str, calls: list[Any], *rest: str) -> Message:
    """Restore a message from its JSON array."""
    return Message(role, content, tuple(Call(*call) for call in calls), *rest)


def _outcome(work: Callable[[], bytes]) -> bytes:
    """Run some work; return the reply with its result or its error."""
    try:
        return _DONE + work()
    except TextError as error:
        reason = str(error)
    except MemoryError:
        limit = resource.getrlimit(resource.RLIMIT_AS)[0]
        reason = f'{_CULPRIT} takes more than {limit / 1e6:.0f} MB of memory: {_ADVICE}'
    except BaseException as error:      # such as a panic of the tokenizers library
        reason = f'{_CULPRIT} cannot be used ({described(error)}): {_ADVICE}'
    return _REFUSED + reason.encode(errors='backslashreplace')


def _tested(text: Text) -> bytes:
    """Test what the parent will do with the tokenizer, and serialise it."""
    from tokenizers import Tokenizer

    state = text.backend.to_str()
    if '"Regex"' in json.dumps(json.loads(state)['decoder']):
        raise TextError("the tokenizer's decoder has a regular expression, which may run "
                        'forever: choose another model')
    backend = Tokenizer.from_str(state)
    backend.decode_batch([[id_] for id_ in range(backend.get_vocab_size())])
    return json.dumps({'backend': state, 'special_ids': sorted(text.special_ids),
                       'template': text.template, 'end_ids': text.end_ids,
                       'manner': asdict(text.manner)}).encode()


def _limit(memory: int, cpu_s: float) -> None:
    """Limit the total memory of this process, in bytes, and its further CPU time."""
    for kind, limit in ((resource.RLIMIT_AS, memory),
                        (resource.RLIMIT_CPU, ceil(time.process_time() + cpu_s))):
        hard = resource.getrlimit(kind)[1]
        resource.setrlimit(kind, (limit if hard < 0 else min(limit, hard), hard))


def _end_with_parent() -> None:
    """
    Make the kernel end this process when its standard input is closed, whatever it is doing.

    ``O_ASYNC`` requests a signal for that. Unlike the signal of ``PR_SET_PDEATHSIG``, it does not
    come when the thread that started the child ends.
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
    if leash.poll(0):                   # already closed
        sys.exit(1)
