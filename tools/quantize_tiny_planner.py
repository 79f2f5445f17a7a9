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
Quantise the embedded model to 4 bits with GPTQModel: the checkpoints that the GPTQ tests read.

This needs a separate environment (pip install torch==2.13.0 gptqmodel==7.6.0) and no GPU. Each
checkpoint is compared with the library's dequantised weights and logits, and the results go into
the README.md beside it. The tokenizer stays with the embedded model.
"""

import argparse
import json
import os
from pathlib import Path
from random import Random
import shutil
import sys
import tempfile

# The library's loader needs two threads, even on a machine with one core.
os.environ.setdefault('GPTQMODEL_CPU_WORKERS', '2')

from evaluate_tiny_planner import FOLDER
from evaluate_tiny_planner import messages
from evaluate_tiny_planner import ROOT
from planner_data import conversation
import torch
from transformers import AutoTokenizer

sys.path.insert(0, str(ROOT))

DATA = ROOT / 'test' / 'data'
CONVERSATIONS = 128
SETTINGS = {
    'tiny_planner_gptq': {
        'bits': 4, 'group_size': 128, 'sym': True, 'desc_act': False, 'format': 'gptq'},
    'tiny_planner_gptq_v2': {
        'bits': 4, 'group_size': 32, 'sym': False, 'desc_act': True, 'format': 'gptq_v2'}}
# The settings of the library that determine the layout of the tensors.
KEPT = ('bits', 'group_size', 'sym', 'desc_act', 'format', 'checkpoint_format', 'quant_method',
        'lm_head', 'pack_dtype')
README = """\
# {name}

The embedded model `tiny_planner` quantised to 4 bits by GPTQModel {version}, for the tests:
{settings}.

    python tools/quantize_tiny_planner.py

Calibrated on {count} conversations that `tools/planner_data.py` makes for training. Observed when
it was made, native engine against GPTQModel's PyTorch kernel, on a CPU:

- dequantised weights of all {linears} projections: largest difference {weights:.1e}, both rounded
  to float16; the largest weight is {largest:.2f};
- logits of {tokens} tokens, ours in float32, theirs in float16: relative difference
  {logits:.1e}, the same likeliest token at {agreed} of {tokens} places.

Licence: Apache-2.0, as the model's.
"""


def calibration() -> list[str]:
    """Draw conversations of the training set, formatted for the model."""
    tokenizer, rng = AutoTokenizer.from_pretrained(FOLDER), Random('quantize')
    texts = []
    for _ in range(CONVERSATIONS):
        drawn = conversation(rng)
        turns = [next(drawn) for _ in range(3)]
        chat = [*messages(*turns), {'role': 'assistant', 'content': turns[-1].answer}]
        texts.append(tokenizer.apply_chat_template(chat, tokenize=False))
    return texts


def quantize(folder: Path, settings: dict, texts: list[str]) -> None:
    """Write one quantised checkpoint."""
    from gptqmodel import GPTQModel
    from gptqmodel import QuantizeConfig

    torch.manual_seed(0)
    model = GPTQModel.load(str(FOLDER), QuantizeConfig(device='cpu', **settings))
    model.quantize(texts, batch_size=8)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        model.save(scratch)
        shutil.copyfile(Path(scratch, 'model.safetensors'), folder / 'model.safetensors')
        config = json.loads(Path(scratch, 'config.json').read_text())
    saved = config['quantization_config']
    config['quantization_config'] = {
        **{key: saved[key] for key in KEPT if key in saved},
        'meta': {'quantizer': saved['meta']['quantizer']}}
    (folder / 'config.json').write_text(json.dumps(config, indent=2) + '\n')
    shutil.copyfile(FOLDER / 'generation_config.json', folder / 'generation_config.json')


def compare(folder: Path, text: str) -> dict[str, float]:
    """Compare the native engine with the library's kernel on one checkpoint."""
    from gptqmodel import BACKEND
    from gptqmodel import GPTQModel
    from physai_decode.checkpoint import inspect
    from physai_decode.config import EngineConfig
    from physai_decode.engines.native import formats
    from physai_decode.engines.native import fusion
    from physai_decode.engines.native import source
    from physai_decode.engines.native.engine import NativeEngine

    with tempfile.TemporaryDirectory() as scratch:
        for file in (*folder.iterdir(), *FOLDER.glob('tokenizer*.json')):
            shutil.copy(file, scratch)
        library = GPTQModel.load(
            scratch, backend=BACKEND.GPTQ_TORCH, device='cpu', dtype=torch.float16).model
    found = inspect(folder)
    format_, stored = formats.parse(found.quantized), source.Files(found, torch.device('cpu'))
    linears, worst, largest = 0, 0.0, 0.0
    for name, module in library.named_modules():
        if not format_.holds(stored, name):
            continue
        theirs = module.dequantize_weight().t()
        weight = fusion.dense_weight(format_.read(stored, name, *theirs.shape), torch.float16)
        linears += 1
        worst = max(worst, float((weight - theirs).abs().max()))
        largest = max(largest, float(theirs.abs().max()))
    ids = AutoTokenizer.from_pretrained(FOLDER)(text)['input_ids']
    with torch.inference_mode():
        theirs = library(torch.tensor([ids])).logits[0].float()
    ours = NativeEngine(inspect(folder), EngineConfig(device='cpu')).prefill_logits(ids)
    return {
        'linears': linears, 'weights': worst, 'largest': largest, 'tokens': len(ids),
        'logits': float((ours - theirs).norm() / theirs.norm()),
        'agreed': int((ours.argmax(-1) == theirs.argmax(-1)).sum())}


def main(arguments: list[str]) -> int:
    """Create the checkpoints and print the comparison."""
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument('folder', type=Path, nargs='?', default=DATA)
    args = parser.parse_args(arguments)

    from gptqmodel import __version__

    texts, target = calibration(), args.folder.resolve()
    # The library writes its logs into the working directory.
    os.chdir(tempfile.mkdtemp())
    for name, settings in SETTINGS.items():
        folder = target / name
        quantize(folder, settings, texts)
        observed = compare(folder, texts[0])
        (folder / 'README.md').write_text(README.format(
            name=name, version=__version__, count=CONVERSATIONS,
            settings=', '.join(f'{key} {value}' for key, value in settings.items()), **observed))
        print(name, observed, flush=True)
    return 0


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
