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
Write docs/interface.md from the code: parameters, topics, services, keys.

Names, types, defaults, ranges, QoS and keys come from a node that this script creates without a
model. The descriptions are here, and those of keys in physai_decode/keys.py. A missing description
is an error, as is one of a name that no longer exists. `--check` writes nothing; its exit code
tells if the file is up to date.
"""

import os
from pathlib import Path
import re
import sys

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault('ROS_AUTOMATIC_DISCOVERY_RANGE', 'LOCALHOST')

from physai_decode import histogram
from physai_decode.keys import DESCRIPTIONS
from physai_decode.ros import messages
from physai_decode.ros import parameters
from physai_decode.ros.node import DecodeNode
import rclpy
from rclpy.parameter import Parameter
from std_srvs.srv import Trigger

PAGE = ROOT / 'docs' / 'interface.md'

TOPICS = {
    '~/prompt': 'in: a prompt',
    '~/request': 'in: a request as JSON, see requests.md',
    '~/result': 'the end of each request as JSON, including refused ones, see requests.md',
    '~/item': "each element of a JSON answer's array as soon as it is complete, as JSON: "
              '`request_id`, `id`, `index`, `path` of the array, `t_ms`, `value`; see requests.md',
    '~/accepted': 'each queued request, as JSON: `request_id`, `id`, `stamp` (seconds), `request`',
    '~/tokens': 'a piece of text per token; a character is never split, so a piece can be empty',
    '~/response': 'the whole text, once, at the end of a request; not for a refused one',
    '~/token_stats': 'the figures of each token, in step with `~/tokens`',
    '~/request_stats': 'the figures of each request, including refused ones',
    '~/model_info': 'the loaded model, whenever it changes; values are n/a while none is loaded',
    '~/itl_ms': 'time since the previous token, in milliseconds; not for the first token of a '
                'request',
    '~/r_floor': 'the floor over that time; 1 is the limit',
    '/diagnostics': 'every `diagnostics.period_s`, in every lifecycle state: the last three '
                    'tables below',
}
# These exist only if physai_decode_msgs is built.
TYPED = [
    ('`~/generate`', 'action physai_decode_msgs/Generate',
     'a request as the goal; its tokens as feedback, in batches; the elements of a JSON answer '
     'as feedback at once, as on `~/item`; its end as the result. A refused goal is first '
     'accepted and then aborted, because only a result can carry the reason'),
    ('`~/stamped_tokens`', 'physai_decode_msgs/Token',
     'for each token, in step with `~/tokens`: stamp, ids, text and figures in one message')]
SERVICES = {
    '~/cancel': 'cancels the running request and empties the queue',
    '~/reset': 'clears the conversation',
    '~/measure_gap': 'times the decode step of the loaded model in two ways while no request '
                     'runs or waits: on a GPU with and without its CUDA graph, on a CPU with '
                     "native and with transformers. The response's message contains the result, "
                     'or why there is none. Requests wait meanwhile, and the state is generating',
}
STATUSES = (
    ('~/token_stats', 'decode: token', messages.TOKEN_KEYS,
     'The message is the piece of text. WARN if the token missed its deadline.'),
    ('~/request_stats', 'decode: request', messages.REQUEST_KEYS,
     'The message is the finish reason, with an explanation if there is one. WARN for '
     f'{" and ".join(messages.WARN_REASONS)} and for a fallback, ERROR for error.'),
    ('~/model_info', 'decode: model', messages.MODEL_KEYS,
     'An engine adds its own keys at the end, such as `cpu_threads`, the threads in use.'),
    ('/diagnostics', 'decode: latency', messages.LATENCY_KEYS,
     'WARN if a deadline was missed since the previous message, or if the newest token missed '
     'its deadline. ERROR if `deadline.max_consecutive_misses` tokens in a row missed theirs. '
     'Late tokens in a row count until a token is in time, or until the last one is older than '
     '`diagnostics.window_s`. The level can therefore outlast an answer by that time, 10 s by '
     'default.'),
    ('/diagnostics', 'decode: bandwidth', messages.BANDWIDTH_KEYS,
     'WARN if r_floor is below `diagnostics.warn_r_floor`, or if that is set and there is no '
     'r_floor.'),
    ('/diagnostics', 'decode: engine', messages.ENGINE_KEYS,
     'ERROR if the state is stalled or failed, or if another node has the same name or publishes '
     'on `~/tokens`. WARN if the local model answers instead of the server, for unknown '
     'parameters, for a params file without a section for this node, and for a setting of '
     '`realtime` that is not permitted. The message says which.'),
)


def table(titles, rows) -> str:
    """Format a Markdown table."""
    lines = [titles, ['---'] * len(titles), *rows]
    return '\n'.join(f'| {" | ".join(line)} |' for line in lines)


def message_type(kind) -> str:
    """Return the ROS name of a message or service type."""
    return f'{kind.__module__.split(".")[0]}/{kind.__name__}'


def quality(qos) -> str:
    """Describe a quality of service."""
    kept = 'latched, ' if qos.durability.name == 'TRANSIENT_LOCAL' else ''
    return f'{qos.reliability.name.lower().replace("_", " ")}, {kept}keep last {qos.depth}'


def topics(node) -> list[list[str]]:
    """Return a row for each topic of the node."""
    private = node.get_fully_qualified_name() + '/'
    ends = {end.topic_name.replace(private, '~/'): end
            for end in (*node.publishers, *node.subscriptions)}
    ends.pop('~/stamped_tokens', None)      # see TYPED
    described(TOPICS, [name for name in ends if name.startswith('~/') or name == '/diagnostics'])
    return [[f'`{name}`', message_type(ends[name].msg_type), quality(ends[name].qos_profile), text]
            for name, text in TOPICS.items()]


def services(node) -> list[list[str]]:
    """Return a row for each service that the node defines."""
    private = node.get_fully_qualified_name() + '/'
    found = [service.srv_name.replace(private, '~/') for service in node.services
             if service.srv_type is Trigger]
    described(SERVICES, found)
    return [[f'`{name}`', message_type(Trigger), text] for name, text in SERVICES.items()]


def settings() -> list[list[str]]:
    """Return a row for each parameter."""
    rows = []
    for name, field in parameters.specs().items():
        meta = field.metadata
        choices = [f'`{choice}`' for choice in meta['choices']]
        allowed = (', '.join([*choices, *filter(None, [meta['others']])])
                   or parameters.length_limit(field))
        if meta['low'] is not None and not allowed:
            allowed = f'{written(meta["low"])} to {written(meta["high"])}'
        rows.append([f'`{name}`', parameters.kind(field).name.lower(),
                     f'`{written(field.default)}`', allowed, 'yes' if meta['dynamic'] else '',
                     meta['description']])
    return rows


def written(value) -> str:
    """Format a value as in a params file."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        text = f'{value:.9f}'.rstrip('0')
        return f'{text}0' if text.endswith('.') else text
    return {'': "''", (): '[]'}.get(value, str(value))


def described(texts, found) -> None:
    """
    Check that descriptions and names match.

    :raises SystemExit: a description is missing, or its name does not exist.
    """
    if differ := set(texts) ^ set(found):
        sys.exit(f'without a description, or described but missing: {", ".join(sorted(differ))}')


def page() -> str:
    """Return the whole page."""
    described(DESCRIPTIONS, {key for _, _, keys, _ in STATUSES for key in keys})
    rclpy.init()
    node = DecodeNode(parameter_overrides=[Parameter('autostart', value=False)],
                      use_global_arguments=False)
    try:
        topic_rows, service_rows = topics(node), services(node)
    finally:
        node.close(1.0)
        node.destroy_node()
        rclpy.shutdown()
    parts = [
        '# Interface of `decode_node`',
        '`tools/make_interface_reference.py` generates this page from the code; edit it there.',
        "`~/` stands for the node's full name, `/decode` by default.",
        '## Topics', table(('name', 'type', 'QoS', 'description'), topic_rows),
        'To change history, depth, reliability or durability of a topic, set the parameters '
        '`qos_overrides.<topic>.publisher.<policy>` and `.subscription.<policy>` at start. '
        '`<topic>` is its full name after remapping, such as `/decode/tokens`.',
        'If the package `physai_decode_msgs` is built (`make msgs` or colcon), there are also:',
        table(('name', 'type', 'description'), TYPED),
        '## Services', table(('name', 'type', 'description'), service_rows),
        'The node is a lifecycle node with the usual services: `~/change_state`, `~/get_state` '
        'and the others of lifecycle_msgs. `configure` loads the model and warms it up, '
        '`activate` accepts requests, `deactivate` cancels them, and `cleanup` frees the memory.',
        '## Parameters',
        table(('name', 'type', 'default', 'allowed', 'at any time', 'description'), settings()),
        'Parameters without a yes can be set only while the node is unconfigured. The node '
        'refuses an invalid value and says why. It reports unknown names in the params file in '
        'the log and on `/diagnostics`.',
        '## Keys',
        'A value is a plain decimal number or a word. The suffix of the key is the unit: `_ms` '
        'milliseconds, `_s` seconds, `_gb` 1e9 bytes, `_c` degrees Celsius. An unknown value is '
        '`n/a`. A status always has the same keys, in the same order. The `frame_id` of each '
        "header is the node's full name. The name of each status begins with the same name "
        'without its leading slash: `arm/decode: token` for a node `/arm/decode`.',
        'Medians and percentiles are exact for up to '
        f'{histogram.EXACT_ROWS} tokens in the window and {histogram.EXACT_VALUES} in a request. '
        'Beyond that, they are within 0.5 %, and the window can begin too early by up to '
        f'1/{histogram.SLICES} of its length.']
    for topic, name, keys, text in STATUSES:
        parts += [f'### `{name}` on `{topic}`', text,
                  table(('key', 'description'), [[f'`{key}`', DESCRIPTIONS[key]] for key in keys])]
    linked = re.sub(r'\b(\w+\.md)\b', r'[\1](\1)', '\n\n'.join(parts))
    return linked + '\n'


def main(arguments: list[str]) -> int:
    """Write the page, or compare with --check; return the exit code."""
    text = page()
    if '--check' not in arguments:
        PAGE.write_text(text)
    elif not PAGE.exists() or PAGE.read_text() != text:
        print(f'{PAGE.name} is out of date: run tools/make_interface_reference.py',
              file=sys.stderr)
        return 1
    return 0


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
