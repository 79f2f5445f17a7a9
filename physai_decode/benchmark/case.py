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

"""A benchmark case: an engine with its settings, a model, and contexts."""

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
class ModelSource:
    """The model: a ``path``, or random weights of the shape ``synthetic``."""

    path: str = ''                  # builtin:NAME, a folder or a hub id
    synthetic: str = ''             # a key of synthetic.SHAPES
    quantization: str = 'none'      # of the random weights
    written: bool = False           # write the weights to files, which every library can read
    seed: int = 0

    def __str__(self) -> str:
        if self.path:
            return self.path
        kind = 'bf16' if self.quantization == 'none' else self.quantization
        return f'{self.synthetic}, random weights, {kind}'


@dataclass(frozen=True)
class Case:
    """An engine to measure in a separate process; plain data."""

    label: str
    engine: EngineConfig
    source: ModelSource
    contexts: tuple[int, ...]
    steps: int = 30                 # measured steps, after `warmup`
    warmup: int = 5
    kernels: bool = False           # also time each kernel, on CUDA
    peak_gb_s: float = 0.0          # peak memory bandwidth; 0 detects it
    requires: tuple[str, ...] = ()  # modules needed besides torch and transformers
    samplings: tuple[str, ...] = ()  # also time the step with these; see `parse_sampling`
    captured: bool = False          # needs a step that is captured in a CUDA graph
    beside: tuple[str, ...] = ()    # also time the step beside these; see `neighbour.parse`
    pace: float = 0.0               # also beside these, at this many tokens per second; 0: no
    schema: str = ''                # also time the step under this JSON Schema
    prompts: tuple[int, ...] = ()   # also measure the time to the first token at these lengths
    session: str = ''               # name of a repeated session of an A/B

    def to_dict(self) -> dict[str, Any]:
        """Return the case as JSON data."""
        return dict(json.loads(json.dumps(asdict(self))))

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> 'Case':
        """Create a case from the data of ``to_dict``."""
        return cls(**{**data, 'engine': EngineConfig(**data['engine']),
                      'source': ModelSource(**data['source']), 'contexts': tuple(data['contexts']),
                      'requires': tuple(data['requires']),
                      'samplings': tuple(data['samplings']), 'beside': tuple(data['beside']),
                      'prompts': tuple(data.get('prompts', ()))})

    def key(self) -> str:
        """Return a unique file name."""
        digest = hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()
        words = re.sub(r'[^a-zA-Z0-9.]+', '-', f'{self.session} {self.label}').strip('-').lower()
        return f'{words}-{digest[:8]}'


def parse_engine(text: str, base: EngineConfig) -> EngineConfig:
    """
    Parse ``NAME`` or ``NAME:setting=value,...``, such as ``native:cuda_graph=false``.

    :param base: values of all other settings.
    :raises ConfigError: an engine, setting or value is invalid, or the benchmark itself sets the
        setting.
    """
    name, _, rest = text.partition(':')
    if re.search(r'(^|,)max_context=', rest):
        raise ConfigError(f'{text}: max_context follows from the measured contexts: set '
                          '--contexts instead')
    config = replace(base, name=name, **_settings(
        text, rest, 'engine', EngineConfig, {'name', 'max_context'}))
    check('engine', config)
    return config


def parse_sampling(text: str) -> SamplingConfig:
    """
    Parse ``greedy`` or ``setting=value,...``, such as ``temperature=0.8,top_p=0.9``.

    :raises ConfigError: a setting or value is invalid, or the benchmark itself sets the setting.
    """
    rest = '' if text == GREEDY else text
    config = SamplingConfig(**_settings(
        text, rest, 'sampling', SamplingConfig, {'max_new_tokens', 'stop', 'from_checkpoint'}))
    check('sampling', config)
    return config


def _settings(text: str, pairs: str, group: str, config: Any,
              fixed: set[str]) -> dict[str, Any]:
    """Parse ``setting=value,...``; the benchmark sets the settings in ``fixed`` itself."""
    kinds = {spec.name: type(spec.default) for spec in fields(config) if spec.name not in fixed}
    settings = {}
    for setting in filter(None, pairs.split(',')):
        key, _, value = setting.partition('=')
        if key not in kinds:
            raise ConfigError(f'{text}: there is no {group} setting {key!r}: expected one of '
                              f'{", ".join(sorted(kinds))}')
        settings[key] = _read(text, key, value, kinds[key])
    return settings


def _read(text: str, key: str, value: str, kind: Any) -> Any:
    try:
        return {'true': True, 'false': False}[value.lower()] if kind is bool else kind(value)
    except (KeyError, ValueError):
        expected = 'true or false' if kind is bool else f'a {kind.__name__}'
        raise ConfigError(f'{text}: {key} is {value!r}: expected {expected}') from None
