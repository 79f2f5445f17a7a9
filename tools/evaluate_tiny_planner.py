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
Measure the accuracy of the embedded model on held-out commands, and print ten examples.

An answer is correct if it equals the expected text exactly, with greedy decoding. By default,
transformers decodes in batches; `--engine` selects one of the package's engines instead.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path
from random import Random
import sys
import time

from planner_data import conversation
from planner_data import SYSTEM_PROMPTS
from planner_data import Turn
from planner_data import turn
import torch
from transformers import AutoModelForCausalLM
from transformers import AutoTokenizer

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / 'physai_decode' / 'models' / 'tiny_planner'
MAX_NEW_TOKENS = 400


def messages(*turns: Turn, system: str = '') -> list[dict[str, str]]:
    """Convert turns to messages; the last one has no answer."""
    result = [{'role': 'system', 'content': system}] if system else []
    for drawn in turns[:-1]:
        result += [{'role': 'user', 'content': drawn.text},
                 {'role': 'assistant', 'content': drawn.answer}]
    return [*result, {'role': 'user', 'content': turns[-1].text}]


def held_out_sets(seed: int, count: int) -> Iterator[tuple[str, list, list[str]]]:
    """Draw the evaluation's sets: name, chats, expected answers; the first is the main one."""
    rng = Random(f'{seed} evaluation')
    commands = [turn(rng, held_out=True, commands_only=True) for _ in range(count)]
    answers = [command.answer for command in commands]
    yield 'held-out commands', [messages(command) for command in commands], answers
    yield ('held-out commands, system prompt before them',
           [messages(command, system=rng.choice(SYSTEM_PROMPTS)) for command in commands], answers)
    chats, answers = [], []
    for _ in range(count // 2):
        drawn = conversation(rng, held_out=True)
        turns = [next(drawn) for _ in range(rng.randint(2, 4))]
        chats.append(messages(*turns))
        answers.append(turns[-1].answer)
    yield 'held-out turns after one to three others', chats, answers


class LibraryAnswers:
    """Greedy answers of transformers, in batches."""

    def __init__(self, folder, device, dtype, batch):
        self.tokenizer = AutoTokenizer.from_pretrained(folder, padding_side='left')
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device).eval()
        self.batch = batch

    def __call__(self, chats: list) -> list[str]:
        """Answer all chats; chats of similar length share a batch."""
        order = sorted(range(len(chats)), key=lambda index: len(str(chats[index])))
        answers = [''] * len(chats)
        for start in range(0, len(order), self.batch):
            indices = order[start:start + self.batch]
            texts = self.tokenizer.apply_chat_template(
                [chats[index] for index in indices], tokenize=False, add_generation_prompt=True)
            inputs = self.tokenizer(texts, return_tensors='pt', padding=True).to(self.model.device)
            with torch.inference_mode():
                ids = self.model.generate(
                    **inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
            texts = self.tokenizer.batch_decode(
                ids[:, inputs['input_ids'].shape[1]:], skip_special_tokens=True)
            for index, text in zip(indices, texts, strict=True):
                answers[index] = text
        return answers


class EngineAnswers:
    """Greedy answers of one of the package's engines, one at a time, as in the node."""

    def __init__(self, folder, device, name):
        sys.path.insert(0, str(ROOT))
        from physai_decode import checkpoint
        from physai_decode.config import EngineConfig
        from physai_decode.config import SamplingConfig
        from physai_decode.decode_loop import DecodeLoop
        from physai_decode.engines import build

        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.sampling = SamplingConfig(max_new_tokens=MAX_NEW_TOKENS)
        self.loop = DecodeLoop(build(
            checkpoint.inspect(folder), EngineConfig(name=name, device=device)))

    def __call__(self, chats: list) -> list[str]:
        """Answer all chats."""
        return [self._answer(chat) for chat in chats]

    def _answer(self, chat):
        text = self.tokenizer.apply_chat_template(
            chat, tokenize=False, add_generation_prompt=True)
        ids, ends = [], self.loop.engine.footprint.eos_token_ids
        steps = self.loop.stream(self.tokenizer(text)['input_ids'], self.sampling)
        try:
            for step in steps:
                ids += step.token_ids
                if any(token in ends for token in step.token_ids):
                    break
        finally:
            steps.close()
        ids = ids[:next((at for at, token in enumerate(ids) if token in ends), len(ids))]
        return self.tokenizer.decode(ids)


def parse(arguments: list[str]) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument('folder', type=Path, nargs='?', default=FOLDER)
    parser.add_argument('--count', type=int, default=1000, help='held-out commands')
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--device', default='cpu', help='cpu, cuda or cuda:N')
    parser.add_argument('--dtype', default='float32', choices=('float32', 'bfloat16', 'float16'),
                        help="for the library; an engine takes its device's own")
    parser.add_argument('--batch', type=int, default=64)
    parser.add_argument('--engine', default='', choices=('native', 'transformers'),
                        help="one of the package's engines, not the library's batches")
    parser.add_argument('--mistakes', type=int, default=5, help='how many wrong answers to print')
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> int:
    """Print the figures; return 1 if the first one is below 98 %."""
    args = parse(arguments)
    if args.engine:
        answer = EngineAnswers(args.folder, args.device, args.engine)
    else:
        answer = LibraryAnswers(args.folder, args.device, getattr(torch, args.dtype), args.batch)
    shares, examples = [], []
    for name, chats, expected in held_out_sets(args.seed, args.count):
        start_s = time.monotonic()
        got = answer(chats)
        right = sum(one == other for one, other in zip(got, expected, strict=True))
        shares.append(right / len(chats))
        print(f'{name}: {right} of {len(chats)} right, {shares[-1]:.2%} '
              f'({time.monotonic() - start_s:.0f} s)', flush=True)
        wrong = [index for index in range(len(chats)) if got[index] != expected[index]]
        for index in wrong[:args.mistakes]:
            print(f'  wrong: {chats[index][-1]["content"]}\n    {got[index]}\n'
                  f'    expected {expected[index]}')
        examples = examples or list(zip(chats, got, strict=True))[:10]
    print('\nExamples')
    for chat, text in examples:
        print(f'  {chat[-1]["content"]}\n    {text}')
    return 0 if shares[0] >= 0.98 else 1


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
