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
Time a plan, free and constrained, to the first token, the first action and the end.

The engine runs alone in this process, and behind each endpoint of a node in another process, in
alternating blocks. A client measures all times, from before it sends the request. Only constrained
answers are published element by element, and not over HTTP; otherwise the client finds the first
action in the text. A different command precedes each request, so that only the common prefix of
the prompts is cached. The output is a Markdown table of medians.

With --speculation, only the engine runs, alternately with drafts and without. It also answers each
command a second time, with the first plan in the conversation to copy. With --draft-model, it also
runs with drafts of that model.

With --shape, the weights are random, and only the engine runs, without ROS; with --doors, so does
the node. Such a model writes no free plan, so its free answer is text with the number of tokens
of the constrained one. A regex constrains it, so the client finds the first action in the text.
"""

import argparse
from collections import defaultdict
from contextlib import closing
from contextlib import ExitStack
from dataclasses import replace
import gc
from itertools import takewhile
import json
import os
from pathlib import Path
import platform
from statistics import median
import sys
from tempfile import TemporaryDirectory
import time
from typing import Any

from physai_decode import host
from physai_decode.benchmark import synthetic
from physai_decode.config import DecodeConfig
from physai_decode.config import EngineConfig
from physai_decode.config import ModelConfig
from physai_decode.config import SamplingConfig
from physai_decode.config import SpeculationConfig
from physai_decode.decode_loop import DecodeLoop
from physai_decode.items import Items
from physai_decode.request import Message
from physai_decode.request import Request
from prompt import PROMPT

ROOT = Path(__file__).resolve().parent.parent
OTHER = 'Put the green book on the shelf.'
BLOCK = 5                       # plans of each kind per block
CONTEXT = 4096                  # of random weights: room for a prompt and a plan
# A plan of five actions for random weights, which would otherwise fill it with whitespace.
ACTION = r'\{"action":"(find|open|close|pick)","object":"[^"\\\x00-\x1f]{8,16}"\}'
RANDOM = {'structured_outputs': {'regex': rf'\[{ACTION}(,{ACTION}){{4}}\]'}}
TITLES = 'first token', 'first action', 'whole plan', 'mask, each token'
PASS_TITLES = 'first action', 'whole plan', 'each token', 'tokens a pass'
# The arguments of `ask` by the name of an answer: how to read it, its form and its token limit.
Answers = dict[str, tuple[str, dict[str, Any], int]]


class Plan:
    """The times of the parts of an answer, in milliseconds from its creation."""

    def __init__(self, kind: str = '') -> None:
        self._begin_s = time.monotonic()
        self._items = Items() if kind == 'free' else None
        self.marks: dict[str, float] = {}

    def token(self, text: str) -> None:
        """Add a piece of text."""
        self.mark('first token')
        if self._items and self._items.feed(text):
            self.mark('first action')

    def mark(self, what: str) -> None:
        """Record the time of a mark, once."""
        self.marks.setdefault(what, 1e3 * (time.monotonic() - self._begin_s))


class Alone:
    """The engine with decode loop and tokenizer, without queue, threads and messages."""

    name = 'the engine alone'

    def __init__(self, config: DecodeConfig) -> None:
        self._engine, self._text, *_ = host.load(config, lambda line: None)
        self._loop = DecodeLoop(self._engine, speculation=config.speculation)
        self._shape = self._engine.footprint
        self.details = self._shape.details
        self.device = self._shape.device_name
        self.tokens: dict[str, int] = {}        # of the last answer, up to each mark

    def open(self) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""

    def ask(self, prompt: str, kind: str, form: dict[str, Any], limit: int,
            before: tuple[Message, ...] = ()) -> Plan:
        """
        Answer a prompt.

        :param form: fields of a request that constrain the answer.
        :param before: the conversation before it.
        """
        plan, masks_ms, constraint = Plan('free'), list[float](), None
        if kind == 'constrained':
            vocabulary = self._text.vocabulary(self._shape.vocab_size, self._shape.eos_token_ids)
            constraint = vocabulary.constraint(Request.from_json({'prompt': prompt, **form}).form)
        decoder, count, passes, self.tokens, self.said = self._text.detokenizer(), 0, 0, {}, ''
        for step in self._steps(prompt, limit, constraint, before):
            if step.mask_s is not None:
                masks_ms.append(1e3 * step.mask_s)
            ids = list(takewhile(self._is_text, step.token_ids))
            count += len(ids)
            passes += bool(ids)
            if piece := ''.join(map(decoder.push, ids)):
                self.said += piece
                plan.token(piece)
            for name in plan.marks:
                self.tokens.setdefault(name, count)
            if len(ids) < len(step.token_ids):
                break
        plan.mark('whole plan')
        self.tokens['whole plan'] = count
        if passes > 1:
            spent_ms = plan.marks['whole plan'] - plan.marks['first token']
            plan.marks['each token'] = spent_ms / (count - 1)
            plan.marks['tokens a pass'] = (count - 1) / (passes - 1)
        if masks_ms:
            plan.marks['mask, each token'] = median(masks_ms)
        return plan

    def text(self, prompt: str, tokens: dict[str, int]) -> Plan:
        """Write free text, and mark its last counted token."""
        plan, count = Plan(), 0
        for step in self._steps(prompt, tokens['whole plan']):
            count += len(step.token_ids)
            for name, enough in tokens.items():
                if count >= enough:
                    plan.mark(name)
        return plan

    def end(self) -> None:
        """Free the engine."""
        self._engine.close()
        self._text.close()

    def _is_text(self, token_id):
        return token_id not in self._shape.eos_token_ids

    def _steps(self, prompt, limit, constraint=None, before=()):
        return self._loop.stream(self._text.encode([*before, Message('user', prompt)]),
                                 SamplingConfig(max_new_tokens=limit), constraint)


class Table:
    """The times of each endpoint and kind of answer, and their medians as rows."""

    def __init__(self) -> None:
        self._found: dict[tuple[str, str], list[dict[str, float]]] = defaultdict(list)

    def add(self, way: str, kind: str, plan: Plan) -> None:
        """Add the times of an answer."""
        self._found[way, kind].append(plan.marks)

    def show(self, titles: tuple[str, ...] = TITLES) -> None:
        """Print the table."""
        print(f'| | | {" | ".join(titles)} |\n|{"---|" * (2 + len(titles))}')
        for (way, kind), plans in self._found.items():
            cells = [f'{median(plan[title] for plan in plans):.2f}'
                     if all(title in plan for plan in plans) else '' for title in titles]
            print(f'| {way} | {kind} | {" | ".join(cells)} |')


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split('\n\n')[0])
    parser.add_argument('--model', default=ModelConfig.path, help='as the parameter model.path')
    parser.add_argument('--shape', default='', choices=['', *synthetic.SHAPES], metavar='SHAPE',
                        help='instead: random weights, and the engine alone')
    parser.add_argument('--doors', action='store_true',
                        help='with --shape: the endpoints of a node, too')
    parser.add_argument('--quantization', default='none', choices=synthetic.DESCRIBED,
                        metavar='FORMAT', help=f'of them: {", ".join(synthetic.DESCRIBED)}')
    parser.add_argument('--schema', type=Path, default=ROOT / 'config' / 'plan.schema.json',
                        help='a file with the JSON Schema of the plan (%(default)s); random '
                        'weights have one of five short actions')
    parser.add_argument('--prompt', default=PROMPT, help='what is asked (%(default)s)')
    parser.add_argument('--cpu-threads', type=int, default=1, metavar='N',
                        help='of the engine; its client needs a core too (%(default)s)')
    parser.add_argument('--rounds', type=int, default=30, metavar='N',
                        help='plans of each kind (%(default)s)')
    parser.add_argument('--speculation', action='store_true',
                        help='the engine alone, with drafts and without')
    parser.add_argument('--draft-model', default='', metavar='MODEL',
                        help='with --speculation: as the parameter speculation.draft_model')
    arguments = parser.parse_args()
    if arguments.speculation:
        return drafted_plans(arguments)
    return random_plans(arguments) if arguments.shape else plans(arguments)


def plans(arguments: argparse.Namespace) -> int:
    """Time plans of a model, alone and behind each endpoint of a node."""
    from plan_doors import DOORS
    from plan_doors import Node

    config = DecodeConfig(model=ModelConfig(path=arguments.model),
                          engine=EngineConfig(cpu_threads=arguments.cpu_threads))
    table, limit = Table(), config.sampling.max_new_tokens
    form = plan_form(arguments.schema)
    answers: Answers = {'free': ('free', {}, limit), 'constrained': ('constrained', form, limit)}
    with ExitStack() as undo:
        alone = Alone(config)
        undo.callback(alone.end)
        node = Node(config)
        undo.callback(node.close)
        head(alone, arguments.model, arguments.rounds)
        gc.freeze()                             # what is loaded is not the clients'
        ways = [alone, *(door(node) for door in DOORS)]
        for begin in range(0, arguments.rounds, BLOCK):
            for way in ways:
                block(way, answers, arguments.prompt, min(BLOCK, arguments.rounds - begin), table)
    table.show()
    return 0


def plan_form(schema: Path) -> dict[str, Any]:
    """Return the fields of a request that constrain the answer to the JSON Schema of a file."""
    return {'response_format': {'type': 'json_schema', 'json_schema': {
        'name': 'plan', 'schema': json.loads(schema.read_text())}}}


def block(way: Any, answers: Answers, prompt: str, count: int, table: Table) -> None:
    """Add the times of ``count`` answers of each kind to a table; one before them warms up."""
    way.open()
    for number in range(count + 1):
        for name, (kind, form, limit) in answers.items():
            way.ask(OTHER, 'free', {}, 1)
            plan = way.ask(prompt, kind, form, limit)
            if number:
                table.add(way.name, name, plan)
    way.close()


def drafted_plans(arguments: argparse.Namespace) -> int:
    """Time plans with drafts and without, and plans that copy one in the prompt."""
    config = DecodeConfig(model=ModelConfig(path=arguments.model),
                          engine=EngineConfig(cpu_threads=arguments.cpu_threads))
    form = plan_form(arguments.schema)
    table, limit, same = Table(), config.sampling.max_new_tokens, True
    with ExitStack() as undo:
        names = ('off', 'lookup', 'model') if arguments.draft_model else ('off', 'lookup')
        ways = {name: Alone(replace(config, speculation=SpeculationConfig(
            name, arguments.draft_model))) for name in names}
        for way in ways.values():
            undo.callback(way.end)
        head(ways['off'], arguments.model, arguments.rounds)
        ways['off'].ask(arguments.prompt, 'free', {}, limit)
        before = Message('user', arguments.prompt), Message('assistant', ways['off'].said)
        kinds = {'free': ({}, ()), 'constrained': (form, ()), 'copied': ({}, before)}
        for number in range(arguments.rounds + 1):
            for kind, (fields, known) in kinds.items():
                said = set()
                for name, way in ways.items():
                    way.ask(OTHER, 'free', {}, 1)
                    plan = way.ask(arguments.prompt, 'constrained' if fields else 'free', fields,
                                   limit, known)
                    said.add(way.said)
                    if number:
                        table.add(f'speculation {name}', kind, plan)
                same &= len(said) == 1
        for name in names[1:]:
            found = ways[name].details
            print(f'speculation {name} is {found["speculation"]}', found.get('draft_model', ''))
        print(f'all answers are the same: {same}\n')
    table.show(PASS_TITLES)
    return not same


def random_plans(arguments: argparse.Namespace) -> int:
    """Time plans of random weights, and free text with the same number of tokens."""
    table = Table()
    with TemporaryDirectory() as folder, ExitStack() as undo:
        synthetic.describe(Path(folder), arguments.shape, arguments.quantization)
        config = DecodeConfig(
            model=ModelConfig(path=folder),
            engine=EngineConfig(cpu_threads=arguments.cpu_threads, max_context=CONTEXT))
        alone = Alone(config)
        undo.callback(alone.end)
        head(alone, f'{arguments.shape} {arguments.quantization}, random weights',
             arguments.rounds)
        for number in range(arguments.rounds + 1):
            alone.text(OTHER, {'whole plan': 1})
            plan = alone.ask(arguments.prompt, 'constrained', RANDOM, CONTEXT)
            tokens = alone.tokens
            alone.text(OTHER, {'whole plan': 1})
            text = alone.text(arguments.prompt, tokens)
            if number:
                table.add(alone.name, 'text', text)
                table.add(alone.name, 'constrained', plan)
        if arguments.doors:
            random_doors(config, arguments, tokens['whole plan'], table)
    table.show()
    print('\ntokens: ' + ', '.join(f'{count} to the {name}' for name, count in tokens.items()))
    return 0


def random_doors(config: DecodeConfig, arguments: argparse.Namespace, tokens: int,
                 table: Table) -> None:
    """Time the same behind each endpoint of a node."""
    from plan_doors import DOORS
    from plan_doors import Node

    answers: Answers = {
        'text': ('free', {}, tokens), 'constrained': ('free', RANDOM, CONTEXT)}
    with closing(Node(config)) as node:
        for door in DOORS:
            block(door(node), answers, arguments.prompt, arguments.rounds, table)


def head(alone: Alone, model: str, rounds: int) -> None:
    """Describe the measurement and the machine."""
    print(f'{alone.device}, {len(os.sched_getaffinity(0))} cores, Python '
          f'{platform.python_version()}, {model}, medians of {rounds}, ms\n', flush=True)


if __name__ == '__main__':
    sys.exit(main())
