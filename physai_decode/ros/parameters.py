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
The settings' fields as ROS parameters: declared, checked as a whole, read back.

A parameter is named after its group and field, such as ``sampling.top_p``. Those that can't change
while the node runs can still be set while it is unconfigured. It does not apply anything.
"""

from array import array
from collections.abc import Iterable
from collections.abc import Mapping
from dataclasses import Field
from dataclasses import fields
from dataclasses import is_dataclass
from dataclasses import replace
from difflib import get_close_matches
from types import MappingProxyType
from typing import Any

from physai_decode.config import check
from physai_decode.config import ConfigError
from physai_decode.config import DecodeConfig
from rcl_interfaces.msg import FloatingPointRange
from rcl_interfaces.msg import IntegerRange
from rcl_interfaces.msg import Parameter as ParameterMessage
from rcl_interfaces.msg import ParameterDescriptor
from rclpy.node import Node
from rclpy.parameter import Parameter

TYPES = {
    bool: Parameter.Type.BOOL, int: Parameter.Type.INTEGER, float: Parameter.Type.DOUBLE,
    str: Parameter.Type.STRING}
LISTS = {str: Parameter.Type.STRING_ARRAY, int: Parameter.Type.INTEGER_ARRAY}
FIXED = 'can be set only while the node is unconfigured'
LOAD_GROUPS = ('model', 'engine', 'remote', 'chat')     # what a load reads


def specs() -> dict[str, Field]:
    """Map each parameter's name to its field."""
    found = {}
    for field in fields(DecodeConfig):
        if is_dataclass(field.default):
            found.update({f'{field.name}.{inner.name}': inner for inner in fields(field.default)})
        else:
            found[field.name] = field
    return found


def kind(field: Field) -> Parameter.Type:
    """Give the type of a field's parameter."""
    found = type(field.default)
    return LISTS[field.metadata['items']] if found is tuple else TYPES[found]


def declare(node: Node, instead: Mapping[str, Any] = MappingProxyType({})) -> None:
    """
    Declare every parameter with its default or its value from the command line or a file.

    :param instead: defaults that differ from the settings', by the parameters' names.
    :raises ConfigError: a given value is wrong; the message gives name, value and what is allowed.
    """
    given = node._parameter_overrides
    merge(DecodeConfig(), given.values())
    for name, field in specs().items():
        value = Parameter(name, kind(field), instead.get(name, field.default))
        # Declared by type and set then: an empty list has no type that rclpy could infer.
        node.declare_parameter(name, kind(field), _descriptor(field), ignore_override=True)
        node.set_parameters([_typed(given.get(name, value), field)])


def read(node: Node) -> DecodeConfig:
    """Give the settings as the parameters stand now."""
    return merge(DecodeConfig(), node.get_parameters(list(specs())))


def merge(config: DecodeConfig, parameters: Iterable[Parameter]) -> DecodeConfig:
    """
    Put parameters into settings; names that are no field's are left out.

    :raises ConfigError: naming the first parameter that is wrong, its value and what is allowed.
    """
    known = specs()
    groups: dict[str, dict[str, Any]] = {}
    for parameter in parameters:
        if parameter.name in known:
            value = _typed(parameter, known[parameter.name]).value
            group, _, name = parameter.name.rpartition('.')
            groups.setdefault(group, {})[name] = \
                tuple(value) if type(value) in (list, array) else value
    top = groups.pop('', {})
    if type(top.get('autostart', True)) is not bool:
        raise ConfigError(f'autostart is {top["autostart"]!r}: expected true or false')
    for group, values in groups.items():
        top[group] = replace(getattr(config, group), **values)
        check(group, top[group])
    return replace(config, **top)


def typed(parameters: Iterable[Parameter]) -> list[Parameter]:
    """
    Give parameters the types of their fields where nothing is lost by it.

    A whole number will do for one with a fraction, an empty list, which has no type in a file, for
    a list of any kind, and false for off, which YAML takes for one.
    """
    known = specs()
    return [_typed(parameter, known[parameter.name]) if parameter.name in known else parameter
            for parameter in parameters]


def from_messages(messages: Iterable[ParameterMessage]) -> list[Parameter]:
    """
    Read the parameters of a call.

    :raises ConfigError: the type of a value is none of a parameter.
    """
    read = []
    for message in messages:
        try:
            read.append(Parameter.from_parameter_msg(message))
        except ValueError:
            raise ConfigError(
                f'{message.name} has a value of type {message.value.type}: the types are those '
                'of rcl_interfaces/msg/ParameterType, 0 to 9') from None
    return read


def fixed(parameters: Iterable[Parameter]) -> list[str]:
    """List the names that can't change while the node runs."""
    known = specs()
    return [parameter.name for parameter in parameters
            if parameter.name in known and not known[parameter.name].metadata['dynamic']]


def length(field: Field) -> str:
    """Say how long a value may be; empty where it is no text."""
    meta = field.metadata
    characters, texts = meta['characters'], meta['texts']
    if type(field.default) is tuple:
        return f'up to {texts} numbers of {meta["low"]} to {meta["high"]}' \
            if meta['items'] is int else f'up to {texts} texts of {characters} characters'
    return f'up to {characters} characters' if type(field.default) is str else ''


def decides_load(name: str) -> bool:
    """Tell whether a parameter is of those that decide what is loaded."""
    return name.partition('.')[0] in LOAD_GROUPS


def unknown(node: Node) -> list[str]:
    """List the names given at start that nothing has declared."""
    return sorted(name for name in node._parameter_overrides if not node.has_parameter(name))


def unknown_text(name: str) -> str:
    """Say that there is no parameter of this name, and which is nearest."""
    nearest = get_close_matches(name, specs(), n=1)
    return f'{name} is no parameter of this node' + (
        f'; did you mean {nearest[0]}?' if nearest else '')


def _typed(parameter: Parameter, field: Field) -> Parameter:
    if type(field.default) is float and type(parameter.value) is int:
        return Parameter(parameter.name, Parameter.Type.DOUBLE, float(parameter.value))
    # YAML reads off as false, in a file and on the command line.
    if parameter.value is False and 'off' in (field.metadata['choices'] or ()):
        return Parameter(parameter.name, Parameter.Type.STRING, 'off')
    given = parameter.type_
    if type(field.default) is tuple and (given == Parameter.Type.NOT_SET or (
            given.name.endswith('ARRAY') and not len(parameter.value))):
        return Parameter(parameter.name, kind(field), [])
    return parameter


def _descriptor(field: Field) -> ParameterDescriptor:
    meta = field.metadata
    choices = ', '.join(filter(None, (*meta['choices'], meta['others'])))
    notes = [f'one of: {choices}'] if choices else [length(field)] if length(field) else []
    notes += [] if meta['dynamic'] else [FIXED]
    descriptor = ParameterDescriptor(
        description=meta['description'], additional_constraints='; '.join(notes))
    if type(field.default) is float and meta['low'] is not None:
        descriptor.floating_point_range = [
            FloatingPointRange(from_value=float(meta['low']), to_value=float(meta['high']))]
    if type(field.default) is int and meta['low'] is not None:
        descriptor.integer_range = [
            IntegerRange(from_value=int(meta['low']), to_value=int(meta['high']))]
    return descriptor
