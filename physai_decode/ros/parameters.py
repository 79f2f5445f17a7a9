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
Declares and reads the fields of the settings as ROS parameters.

A parameter is named after its group and field, such as ``sampling.top_p``. A parameter that can't
change while the node runs can still be set while the node is unconfigured.
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
from physai_decode.config import MAX_ITEMS
from physai_decode.config import shown
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
LOAD_GROUPS = 'model', 'engine', 'remote', 'speculation', 'chat'    # these decide what is loaded


def specs() -> dict[str, Field[Any]]:
    """Map the name of each parameter to its field."""
    found: dict[str, Field[Any]] = {}
    for field in fields(DecodeConfig):
        if is_dataclass(field.default):
            found.update({f'{field.name}.{inner.name}': inner for inner in fields(field.default)})
        else:
            found[field.name] = field
    return found


def kind(field: Field[Any]) -> Parameter.Type:
    """Return the type of a field's parameter."""
    found = type(field.default)
    return LISTS[field.metadata['items']] if found is tuple else TYPES[found]


def declare(node: Node, instead: Mapping[str, Any] = MappingProxyType({})) -> None:
    """
    Declare every parameter with its value from the command line or a params file, or its default.

    :param instead: defaults that replace those of the settings, by parameter name.
    :raises ConfigError: a value is wrong; the message has its name, value and allowed values.
    """
    given = node._parameter_overrides
    merge(DecodeConfig(), given.values())
    for name, field in specs().items():
        value = Parameter(name, kind(field), instead.get(name, field.default))
        # Declared by type and then set, because rclpy can't infer a type from an empty list.
        node.declare_parameter(name, kind(field), _descriptor(field), ignore_override=True)
        node.set_parameters([_typed(given.get(name, value), field)])


def read(node: Node) -> DecodeConfig:
    """Return the settings with the current values of the parameters."""
    return merge(DecodeConfig(), node.get_parameters(list(specs())))


def merge(config: DecodeConfig, parameters: Iterable[Parameter]) -> DecodeConfig:
    """
    Return the settings with these parameters applied; ignore names that are not fields.

    :raises ConfigError: a value is wrong; the message has its name, value and allowed values.
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
        raise ConfigError(f'autostart is {shown(top["autostart"])}: expected true or false')
    for group, values in groups.items():
        top[group] = replace(getattr(config, group), **values)
        check(group, top[group])
    return replace(config, **top)


def typed(parameters: Iterable[Parameter]) -> list[Parameter]:
    """
    Convert parameters to the types of their fields where that is lossless.

    This covers an integer for a float, an empty list (which has no type in a file) for any list,
    and false for ``off``, because YAML reads ``off`` as false.
    """
    known = specs()
    return [_typed(parameter, known[parameter.name]) if parameter.name in known else parameter
            for parameter in parameters]


def from_messages(messages: Iterable[ParameterMessage]) -> list[Parameter]:
    """
    Convert the parameters of a service call.

    :raises ConfigError: a value has a type that does not exist.
    """
    parameters = []
    for message in messages:
        try:
            parameters.append(Parameter.from_parameter_msg(message))
        except ValueError:
            raise ConfigError(
                f'{message.name} has a value of type {message.value.type}: expected a type of '
                'rcl_interfaces/msg/ParameterType, 0 to 9') from None
    return parameters


def fixed(parameters: Iterable[Parameter]) -> list[str]:
    """List those parameters that can't change while the node runs, by name."""
    known = specs()
    return [parameter.name for parameter in parameters
            if parameter.name in known and not known[parameter.name].metadata['dynamic']]


def length_limit(field: Field[Any]) -> str:
    """Describe the longest allowed value; empty if the field is neither a string nor a list."""
    meta = field.metadata
    characters = meta['characters']
    if type(field.default) is tuple:
        return f'up to {MAX_ITEMS} numbers of {meta["low"]} to {meta["high"]}' \
            if meta['items'] is int else f'up to {MAX_ITEMS} strings of {characters} characters'
    return f'up to {characters} characters' if type(field.default) is str else ''


def affects_load(name: str) -> bool:
    """Return whether a parameter affects what is loaded."""
    return name.partition('.')[0] in LOAD_GROUPS


def unknown(node: Node) -> list[str]:
    """List the names given at start that are not declared."""
    return sorted(name for name in node._parameter_overrides if not node.has_parameter(name))


def unknown_message(name: str) -> str:
    """Describe an unknown parameter, and suggest the closest name."""
    nearest = get_close_matches(name, specs(), n=1)
    return f'{name} is not a parameter of this node' + (
        f'; did you mean {nearest[0]}?' if nearest else '')


def _typed(parameter: Parameter, field: Field[Any]) -> Parameter:
    if type(field.default) is float and type(parameter.value) is int:
        return Parameter(parameter.name, Parameter.Type.DOUBLE, float(parameter.value))
    # YAML reads off as false, in a file and on the command line.
    if parameter.value is False and 'off' in field.metadata['choices']:
        return Parameter(parameter.name, Parameter.Type.STRING, 'off')
    given = parameter.type_
    if type(field.default) is tuple and (given == Parameter.Type.NOT_SET or (
            given.name.endswith('ARRAY') and not len(parameter.value))):
        return Parameter(parameter.name, kind(field), [])
    return parameter


def _descriptor(field: Field[Any]) -> ParameterDescriptor:
    meta = field.metadata
    choices = ', '.join(filter(None, (*meta['choices'], meta['others'])))
    limit = length_limit(field)
    notes = [f'one of: {choices}'] if choices else [limit] if limit else []
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
