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
The language model of a vision-language model, for prompts without images.

Its config is nested; older ones are flat. For text, all axes of a multi-axis (mrope) position are
equal, so its rotary embedding is the plain one.
"""

from collections.abc import Callable
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from physai_decode.config import shown_json as shown
from physai_decode.engines.native.architecture import Architecture
from physai_decode.engines.native.families.refusal import unsupported
from physai_decode.model_config import part
from physai_decode.model_config import rope_settings

_NESTED = (('model.language_model.', 'lm_head'), ('model.', 'lm_head'),
           ('language_model.model.', 'language_model.lm_head'))


def of(families: Mapping[str, Callable[[Mapping[str, Any]], Architecture]],
       tied: bool | None = False,
       **defaults: Any) -> Callable[[Mapping[str, Any]], Architecture]:
    """
    Return the family of a vision-language model.

    :param families: the families of its language model, by the nested ``model_type``; the first
        is that of a config without one.
    :param tied: whether the head shares the embedding if the config does not say; None: it does
        if the checkpoint has no head.
    :param defaults: defaults for keys of the nested config that differ from its family's.
    """
    def parse(config: Mapping[str, Any]) -> Architecture:
        text = {**defaults, **(part(config, 'text_config') or config)}
        name = text.get('model_type') if 'text_config' in config else None
        name = name or next(iter(families))
        if name not in families:
            raise unsupported(f'model_type {shown(name)} of the text_config (it runs '
                              f'{config["model_type"]} with {", ".join(families)})')
        ties = [each['tie_word_embeddings'] for each in (config, text)
                if each.get('tie_word_embeddings') is not None]
        found = families[name]({**text, 'model_type': name, **_one_axis(text)})
        return replace(found, model_type=config['model_type'],
                       tied_head=any(ties) if ties else tied,
                       names=replace(found.names, trunks=_NESTED))

    return parse


def _one_axis(text: Mapping[str, Any]) -> dict[str, Any]:
    """Return the overrides that reduce multi-axis positions (mrope) to plain ones."""
    rope = rope_settings(text)
    if rope.get('rope_type') != 'mrope':
        return {}
    return {'rope_parameters': {**rope, 'rope_type': 'default'}, 'rope_scaling': None}
