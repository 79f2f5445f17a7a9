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
Compare ExLlamaV2's own generator with the exllamav2 engine, on GPTQ or EXL2 weights.

The engine calls the library's forward pass and keeps the ids on the device. The dynamic generator
is the API that the library documents. Both decode greedily after the same ids, at the same
context, with the same attention, on the same GPU, in one process.
"""

import argparse
from pathlib import Path
from statistics import median
import sys
import time

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from physai_decode import checkpoint
from physai_decode.config import EngineConfig
from physai_decode.config import SamplingConfig
from physai_decode.decode_loop import DecodeLoop
from physai_decode.engines.device import attention_backends
from physai_decode.engines.exllamav2 import ExLlamaV2Engine
from physai_decode.engines.exllamav2.attention import attend_by_groups
import torch

WARM_UP = 220       # the library captures its CUDA graphs after 205 calls


def by_engine(folder: Path, ids: list[int], steps: int, limit: int) -> list[float]:
    """Return the inter-token latencies of the engine in seconds."""
    engine = ExLlamaV2Engine(
        checkpoint.inspect(folder), EngineConfig(max_context=limit), print)
    stamps = []
    for step in DecodeLoop(engine).stream(ids, SamplingConfig(max_new_tokens=WARM_UP + steps)):
        stamps += [time.perf_counter()] * len(step.token_ids)
    engine.close()
    return gaps(stamps, steps)


def by_generator(folder: Path, ids: list[int], steps: int, limit: int) -> list[float]:
    """Return the inter-token latencies of the dynamic generator in seconds."""
    from exllamav2 import attn
    from exllamav2 import ExLlamaV2
    from exllamav2 import ExLlamaV2Cache
    from exllamav2 import ExLlamaV2Config
    from exllamav2 import ExLlamaV2Tokenizer
    from exllamav2.generator import ExLlamaV2DynamicGenerator
    from exllamav2.generator import ExLlamaV2DynamicJob
    from exllamav2.generator import ExLlamaV2Sampler

    config = ExLlamaV2Config(str(folder))
    config.max_seq_len = limit
    config.no_xformers = True
    model = ExLlamaV2(config)
    model.load()
    attend_by_groups(model)
    generator = ExLlamaV2DynamicGenerator(
        model=model, cache=ExLlamaV2Cache(model), tokenizer=ExLlamaV2Tokenizer(config),
        paged=attn.has_flash_attn_with_paged)
    generator.enqueue(ExLlamaV2DynamicJob(
        input_ids=torch.tensor([ids]), max_new_tokens=WARM_UP + steps,
        gen_settings=ExLlamaV2Sampler.Settings.greedy()))
    stamps = []
    with attention_backends(torch.device('cuda')):
        while generator.num_remaining_jobs():
            generator.iterate()         # first chunks of the prompt, then one token per call
            stamps.append(time.perf_counter())
    model.unload()
    return gaps(stamps, steps)


def gaps(stamps: list[float], steps: int) -> list[float]:
    """Return the last differences."""
    return [late - early for early, late in zip(stamps, stamps[1:])][-steps:]


def main(arguments: list[str]) -> int:
    """Print one line for each."""
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument('folder', type=Path, help='a model with its tokenizer')
    parser.add_argument('--context', type=int, default=2048)
    parser.add_argument('--steps', type=int, default=100)
    args = parser.parse_args(arguments)
    ids = [3 + index % 100 for index in range(args.context - WARM_UP)]
    # The generator's cache has pages of 256 tokens.
    limit = -(-(args.context + args.steps + 1) // 256) * 256
    for name, way in (('engine, forward pass', by_engine), ('dynamic generator', by_generator)):
        times = way(args.folder, ids, args.steps, limit)
        print(f'{name}: {1e3 * median(times):.3f} ms a token, median of {len(times)}, at context '
              f'{args.context}', flush=True)
    return 0


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
