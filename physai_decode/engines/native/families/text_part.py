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
The language model of a model that sees too, for prompts without images.

Its config is nested, or was flat in earlier versions. Where there is text alone, positions of
several axes are all the same, and turn heads as plain ones do.
"""

from collections.abc import Callable
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from physai_decode.engines.native.architecture import Architecture
from physai_decode.engines.native.families.refusal import unsupported
from physai_decode.model_config import part

_NESTED = (('model.language_model.', 'lm_head'), ('model.', 'lm_head'),
           ('language_model.model.', 'language_model.lm_head'))


def of(families: Mapping[str, Callable[[Mapping[str, Any]], Architecture]], default: str = '',
       tied: bool | None = False,
       **defaults: Any) -> Callable[[Mapping[str, Any]], Architecture]:
    """
    Return the family of such models.

    :param families: what reads the nested config, by its ``model_type``.
    :param default: the one that is meant where it has none.
    :param tied: whether the head is the embedding where the config does not say; None: the files
        do.
    :param defaults: of keys of the nested config, where they are not its family's own.
    """
    def parse(config: Mapping[str, Any]) -> Architecture:
        text = {**defaults, **(part(config, 'text_config') or config)}
        name = text.get('model_type') if 'text_config' in config else None
        name = name or default or next(iter(families))
        if name not in families:
            raise unsupported(f'model_type {name!r} of the text_config (of '
                              f'{config["model_type"]} it runs {", ".join(families)})')
        told = [each['tie_word_embeddings'] for each in (config, text)
                if each.get('tie_word_embeddings') is not None]
        found = families[name]({**text, 'model_type': name, **_one_axis(text)})
        return replace(found, model_type=config['model_type'],
                       tied_head=any(told) if told else tied,
                       names=replace(found.names, trunks=_NESTED))

    return parse


def _one_axis(text):
    """Return what is to change in a config whose positions have several axes."""
    key = 'rope_scaling' if part(text, 'rope_scaling') else 'rope_parameters'
    rope = part(text, key)
    if 'mrope' not in (rope.get('rope_type'), rope.get('type')):
        return {}
    return {key: {**rope, 'rope_type': 'default', 'type': 'default'}}
