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

"""One thing to measure: an engine with its settings, on a model, over contexts."""

from dataclasses import asdict
from dataclasses import dataclass
from dataclasses import fields
from dataclasses import replace
import hashlib
import json
import re
from typing import Any

from physai_decode.config import check
from physai_decode.config import ConfigError
from physai_decode.config import EngineConfig
from physai_decode.config import SamplingConfig

GREEDY = 'greedy'                   # a sampling without settings


@dataclass(frozen=True)
class Source:
    """Where the model comes from: ``path``, or random weights of the shape ``synthetic``."""

    path: str = ''                  # builtin:NAME, a folder or a hub id
    synthetic: str = ''             # a name in synthetic.SHAPES
    quantization: str = 'none'      # of the random weights
    written: bool = False           # a folder with weights in it, which every library can read
    seed: int = 0

    def __str__(self):
        if self.path:
            return self.path
        kind = 'bf16' if self.quantization == 'none' else self.quantization
        return f'{self.synthetic}, random weights, {kind}'


@dataclass(frozen=True)
class Case:
    """One engine to be measured in a process of its own; all of it is plain data."""

    label: str
    engine: EngineConfig
    source: Source
    contexts: tuple[int, ...]
    steps: int = 30                 # measured ones, after `warmup`
    warmup: int = 5
    kernels: bool = False           # also a kernel table, on CUDA
    peak_gb_s: float = 0.0          # 0: find out
    requires: tuple[str, ...] = ()  # modules that this path needs beside torch and transformers
    samplings: tuple[str, ...] = ()  # also time the step under these, as `parse_sampling` reads
    captured: bool = False          # unavailable where the step is not captured in a CUDA graph
    beside: tuple[str, ...] = ()    # also time the step beside these, as `neighbour.parse` reads
    schema: str = ''                # also time the step under this JSON Schema
    prompts: tuple[int, ...] = ()   # also the time to the first token of prompts of these lengths
    session: str = ''               # tells apart repeated sessions of an A/B

    def to_dict(self) -> dict[str, Any]:
        """Give the case as JSON holds it."""
        return dict(json.loads(json.dumps(asdict(self))))

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> 'Case':
        """Read what ``to_dict`` gave, also after JSON."""
        return cls(**{**data, 'engine': EngineConfig(**data['engine']),
                      'source': Source(**data['source']), 'contexts': tuple(data['contexts']),
                      'requires': tuple(data['requires']),
                      'samplings': tuple(data['samplings']), 'beside': tuple(data['beside']),
                      'prompts': tuple(data.get('prompts', ()))})

    def key(self) -> str:
        """Give a file name that tells this case from every other one."""
        digest = hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()
        words = re.sub(r'[^a-zA-Z0-9.]+', '-', f'{self.session} {self.label}').strip('-').lower()
        return f'{words}-{digest[:8]}'


def parse_engine(text: str, base: EngineConfig) -> EngineConfig:
    """
    Read ``NAME`` or ``NAME:setting=value,...``, such as ``native:cuda_graph=false``.

    :param base: the settings that the text does not give.
    :raises ConfigError: an unknown engine or setting, a value that is not allowed, or a setting
        that a measurement sets itself.
    """
    name, _, rest = text.partition(':')
    if re.search(r'(^|,)max_context=', rest):
        raise ConfigError(f'{text}: max_context is the context that is measured: give it to '
                          '--contexts')
    config = replace(base, name=name, **_settings(
        text, rest, 'engine', EngineConfig, {'name', 'max_context'}))
    check('engine', config)
    return config


def parse_sampling(text: str) -> SamplingConfig:
    """
    Read ``greedy`` or ``setting=value,...``, such as ``temperature=0.8,top_p=0.9``.

    :raises ConfigError: an unknown setting, a value that is not allowed, or a setting that a
        measurement sets itself.
    """
    rest = '' if text == GREEDY else text
    config = SamplingConfig(**_settings(
        text, rest, 'sampling', SamplingConfig, {'max_new_tokens', 'stop', 'from_checkpoint'}))
    check('sampling', config)
    return config


def _settings(text, pairs, group, config, own):
    """Read ``setting=value,...``; ``own`` are the settings that a measurement sets itself."""
    kinds = {spec.name: type(spec.default) for spec in fields(config) if spec.name not in own}
    settings = {}
    for setting in filter(None, pairs.split(',')):
        key, _, value = setting.partition('=')
        if key not in kinds:
            raise ConfigError(f'{text}: no {group} setting {key!r}; there are '
                              f'{", ".join(sorted(kinds))}')
        settings[key] = _read(text, key, value, kinds[key])
    return settings


def _read(text, key, value, kind):
    try:
        return {'true': True, 'false': False}[value.lower()] if kind is bool else kind(value)
    except (KeyError, ValueError):
        wanted = 'true or false' if kind is bool else f'a {kind.__name__}'
        raise ConfigError(f'{text}: {key} is {value!r}: expected {wanted}') from None
