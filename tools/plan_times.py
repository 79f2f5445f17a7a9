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
Time one plan, free and constrained: to the first token, to the first action, to the whole.

The engine answers alone, in this process, then through each door of a node in another process.
All times are a client's own, from before it asks. A free answer is not published element by
element, so its client finds the first action in the tokens. Another command is asked for before
each, so that only what all prompts begin with is in the cache. Printed are medians, as a Markdown
table.
"""

import argparse
from collections.abc import Callable
import json
import os
from pathlib import Path
import platform
from statistics import median
import subprocess
import sys
import time

from demo import PROMPT
from node_cost import cpu
from physai_decode import host
from physai_decode.config import DecodeConfig
from physai_decode.config import EngineConfig
from physai_decode.config import ModelConfig
from physai_decode.config import SamplingConfig
from physai_decode.decode_loop import DecodeLoop
from physai_decode.items import Items
from physai_decode.request import Form
from physai_decode.request import Message
from physai_decode.ros.topics import stream_qos
from physai_decode.ros.typed import Generate
import rclpy
from rclpy.action import ActionClient
from std_msgs.msg import String

ROOT = Path(__file__).resolve().parent.parent
OTHER = 'Put the green book on the shelf.'
PATIENCE_S = 120.0
FORMS = 'free', 'constrained'


class Plan:
    """When the parts of one answer came, in milliseconds from its making on."""

    def __init__(self, form: str = '') -> None:
        self._begin_s = time.monotonic()
        self._items = Items() if form == 'free' else None
        self.marks: dict[str, float] = {}

    def token(self, text: str) -> None:
        """Take a piece of text."""
        self.mark('first token')
        if self._items and self._items.feed(text):
            self.mark('first action')

    def mark(self, what: str) -> None:
        """Note the time of what came for the first time."""
        self.marks.setdefault(what, 1e3 * (time.monotonic() - self._begin_s))


class Alone:
    """The engine with its decode loop and tokenizer, without queue, threads and messages."""

    name = 'the engine alone'

    def __init__(self, config: DecodeConfig, form: Form) -> None:
        self._engine, self._text, *_ = host.load(config, lambda line: None)
        self._loop, self._form = DecodeLoop(self._engine), form

    def ask(self, prompt: str, form: str, limit: int) -> Plan:
        """Answer a prompt."""
        shape = self._engine.footprint
        plan, items, masks_ms = Plan(form), Items(), []
        vocabulary = self._text.vocabulary(shape.vocab_size, shape.eos_token_ids)
        constraint = vocabulary.constraint(self._form) if form == 'constrained' else None
        decoder = self._text.detokenizer()
        for step in self._loop.stream(
                self._text.encode([Message('user', prompt)]),
                SamplingConfig(max_new_tokens=limit), constraint):
            if step.mask_s is not None:
                masks_ms.append(1e3 * step.mask_s)
            if set(step.token_ids) & set(shape.eos_token_ids):
                break
            piece = ''.join(map(decoder.push, step.token_ids))
            if piece:
                plan.token(piece)
            if constraint and items.feed(piece):
                plan.mark('first action')
        plan.mark('whole plan')
        if masks_ms:
            plan.marks['mask, each token'] = median(masks_ms)
        return plan

    def close(self) -> None:
        """Free the engine."""
        self._engine.close()
        self._text.close()


class Door:
    """A client of the node, and the node with it."""

    def __init__(self, config: DecodeConfig, form: Form) -> None:
        self._options = {'free': {'type': 'text'}, 'constrained': {
            'type': 'json_schema', 'json_schema': {'schema': form.content}}}
        self._process = subprocess.Popen([
            sys.executable, '-m', 'physai_decode.ros.process',
            '--ros-args', '--log-level', 'error', '-p', f'model.path:={config.model.path}',
            '-p', f'engine.cpu_threads:={config.engine.cpu_threads}'])
        rclpy.init()
        self.node = rclpy.create_node('plan_times')
        self.plan = Plan()
        self.begin()
        # Refused until the model is loaded.
        self.wait(lambda: 'first token' in self.ask(OTHER, 'free', 1).marks)

    def begin(self) -> None:
        """Make what the client needs, and wait for the node."""

    def send(self, fields: dict, limit: int) -> None:
        """Ask."""

    def ask(self, prompt: str, form: str, limit: int) -> Plan:
        """Have the node answer a prompt."""
        self.plan = Plan(form)
        self.send({'prompt': prompt, 'response_format': self._options[form]}, limit)
        self.wait(lambda: 'whole plan' in self.plan.marks)
        return self.plan

    def wait(self, done: Callable[[], bool]) -> None:
        """Serve callbacks until something is so."""
        end_s = time.monotonic() + PATIENCE_S
        while not done():
            if time.monotonic() > end_s:
                sys.exit(f'{self.name}: no answer within {PATIENCE_S:g} s')
            rclpy.spin_once(self.node, timeout_sec=0.05)

    def close(self) -> None:
        """End the node."""
        self._process.terminate()
        self._process.wait()
        self.node.destroy_node()
        rclpy.shutdown()


class Topic(Door):
    """~/request, ~/tokens, ~/item and ~/result."""

    name = 'topics'

    def begin(self) -> None:
        """Subscribe."""
        for topic, callback in (
                ('tokens', lambda message: self.plan.token(message.data)),
                ('item', lambda message: self.plan.mark('first action')),
                ('result', lambda message: self.plan.mark('whole plan'))):
            self.node.create_subscription(String, f'/decode/{topic}', callback, stream_qos())
        self._request = self.node.create_publisher(String, '/decode/request', stream_qos())
        self.wait(lambda: self._request.get_subscription_count()
                  and self.node.count_publishers('/decode/result'))

    def send(self, fields: dict, limit: int) -> None:
        """Publish the request."""
        self._request.publish(String(data=json.dumps({**fields, 'max_tokens': limit})))


class Action(Door):
    """~/generate."""

    name = 'action'

    def begin(self) -> None:
        """Make a client."""
        self._client = ActionClient(
            self.node, Generate, '/decode/generate', feedback_sub_qos_profile=stream_qos())
        self.wait(self._client.server_is_ready)

    def send(self, fields: dict, limit: int) -> None:
        """Send the goal."""
        goal = Generate.Goal(prompt=fields['prompt'], options_json=json.dumps(
            {'response_format': fields['response_format']}))
        goal.sampling.max_tokens = limit
        self._client.send_goal_async(goal, self._hear).add_done_callback(
            lambda sent: sent.result().get_result_async().add_done_callback(
                lambda ended: self.plan.mark('whole plan')))

    def _hear(self, message):
        for token in message.feedback.tokens:
            self.plan.token(token.text)
        if message.feedback.items_json:
            self.plan.mark('first action')


WAYS = [Alone, Topic] + ([Action] if Generate else [])


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split('\n\n')[0])
    parser.add_argument('--model', default=ModelConfig.path, help='as the parameter model.path')
    parser.add_argument('--schema', type=Path, default=ROOT / 'config' / 'plan.schema.json',
                        help='a file with the JSON Schema of the plan (%(default)s)')
    parser.add_argument('--prompt', default=PROMPT, help='what is asked (%(default)s)')
    parser.add_argument('--cpu-threads', type=int, default=1, metavar='N',
                        help='of the engine; its client needs a core too (%(default)s)')
    parser.add_argument('--rounds', type=int, default=20, metavar='N',
                        help='plans of each kind (%(default)s)')
    arguments = parser.parse_args()
    config = DecodeConfig(model=ModelConfig(path=arguments.model),
                          engine=EngineConfig(cpu_threads=arguments.cpu_threads))
    form = Form('json_schema', json.loads(arguments.schema.read_text()), '--schema')
    titles = 'first token', 'first action', 'whole plan', 'mask, each token'
    print(f'{cpu()}, {len(os.sched_getaffinity(0))} cores, Python {platform.python_version()}, '
          f'{arguments.model}, medians of {arguments.rounds}, ms\n')
    print(f'| | | {" | ".join(titles)} |\n|{"---|" * 6}', flush=True)
    for way in WAYS:
        asker = way(config, form)
        try:
            found: dict[str, list[dict[str, float]]] = {kind: [] for kind in FORMS}
            for number in range(arguments.rounds + 1):
                for kind in FORMS:
                    asker.ask(OTHER, 'free', 1)
                    plan = asker.ask(arguments.prompt, kind, config.sampling.max_new_tokens)
                    if number:                          # the first one compiles the schema
                        found[kind].append(plan.marks)
        finally:
            asker.close()
        for kind, plans in found.items():
            cells = [f'{median(plan[title] for plan in plans):.2f}'
                     if all(title in plan for plan in plans) else '' for title in titles]
            print(f'| {way.name} | {kind} | {" | ".join(cells)} |', flush=True)
    return 0


if __name__ == '__main__':
    sys.exit(main())
