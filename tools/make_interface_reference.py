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

Names, types, defaults, ranges, qualities of service and keys are taken from a node that is made
for it and loads nothing. Only the sentences are here; one that is missing, or that describes what
is not there any more, is an error. `--check` writes nothing and says by its exit code whether the
file is current.
"""

import os
from pathlib import Path
import sys

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault('ROS_AUTOMATIC_DISCOVERY_RANGE', 'LOCALHOST')

from physai_decode import histogram
from physai_decode.ros import messages
from physai_decode.ros import parameters
from physai_decode.ros.node import DecodeNode
import rclpy
from rclpy.parameter import Parameter
from std_srvs.srv import Trigger

PAGE = ROOT / 'docs' / 'interface.md'

TOPICS = {
    '~/prompt': 'in: a prompt',
    '~/request': 'in: a request in JSON, see requests.md',
    '~/result': "each request's end in JSON, also of a refused one, see requests.md",
    '~/item': "each element of a JSON answer's array as soon as it is complete, in JSON: "
              '`request_id`, `id`, `index`, `path` of the array, `t_ms`, `value`; see requests.md',
    '~/accepted': 'each request that was queued, in JSON: `request_id`, `id`, `stamp` (seconds), '
                  '`request`',
    '~/tokens': 'a piece of text for each token; a character is never split, so a piece may be '
                'empty',
    '~/response': "the whole text, once, at a request's end; not for one that was refused",
    '~/token_stats': 'for each token, in step with `~/tokens`: its figures',
    '~/request_stats': 'for each request, also a refused one: its figures',
    '~/model_info': 'what is loaded, when that changes; values are n/a where nothing is',
    '~/itl_ms': 'the time since the token before, in milliseconds; none for the first token of a '
                'request',
    '~/r_floor': 'the floor over that time; 1 is the limit',
    '/diagnostics': 'every `diagnostics.period_s`, in every state: the last three tables below',
}
# What is there only where physai_decode_msgs is built.
TYPED = [
    ('`~/generate`', 'action physai_decode_msgs/Generate',
     'a request as a goal; its tokens in batches as feedback, and at once the elements of a JSON '
     'answer, each as on `~/item`; its end as the result. A request '
     'that is refused is a goal that is accepted and then aborted, for only a result can say why'),
    ('`~/stamped_tokens`', 'physai_decode_msgs/Token',
     'for each token, in step with `~/tokens`: stamp, ids, text and figures in one message')]
SERVICES = {
    '~/cancel': 'ends the running request and empties the queue',
    '~/reset': 'forgets the conversation',
    '~/measure_gap': "times the loaded model's step, where nothing runs or waits, in two ways: on "
                     'a GPU with and without its CUDA graph, on a CPU natively and by '
                     'transformers; the message is the result, or why there is none. Requests '
                     'wait meanwhile, the state is generating',
}
KEYS = {
    'bandwidth_gb_s': 'bytes that the step read, over its time, in 1e9 bytes per second',
    'cached_tokens': 'tokens of the prompt whose keys and values were still there',
    'cancel_ms': 'from the cancel asked for to the end of the request',
    'callback_errors': 'errors in callbacks since the process began, such as messages that could '
                       'not be read; each is in the log',
    'chat_template': "the name of the chat template in use: default, one of the model's own "
                     'names, none where it has none, or off',
    'checkpoint_sampling': 'what generation_config.json sets of `sampling`; it is taken only '
                           'with `sampling.from_checkpoint`',
    'checkpoint_weight_gb': 'all weights of the checkpoint at their stored size',
    'client_id': 'what the client called the request',
    'consecutive_misses': 'late tokens in a row, up to now',
    'context_tokens': 'tokens whose keys and values the step read',
    'count': 'tokens with a time in the window',
    'cuda_graph': 'captured, off or unavailable',
    'deadline_missed': '1 where this token was late, else 0',
    'deadline_misses': 'first tokens, further tokens and requests that were late; on /diagnostics '
                       'since activation',
    'decode_cores': 'cores that the decode thread may use, as the kernel says',
    'device': 'cpu or cuda:N',
    'device_ms': "the step's time on the device; on a CPU the step's own time",
    'device_name': "the device's name",
    'device_uuid': "the device's identity",
    'dtype': 'number format of activations and unquantised weights',
    'end_tokens': 'tokens that end an answer: those of the config, generation config, '
                  'tokenizer and chat template',
    'energy_j': 'energy in joules that the device took for the answer, for all programs on it; of '
                'a Jetson the whole board; on /diagnostics of all answers since activation',
    'engine_reason': 'why that engine runs it',
    'engine': 'what runs the model; before it is loaded, the parameter; in ~/request_stats what '
              'answered',
    'fallback': "why the local model answered in the server's place, see offboard.md; in "
                '~/model_info which model that is',
    'fallbacks': "requests that the local model answered in the server's place",
    'finish_reason': 'stop, tool_calls, length, deadline, cancelled, preempted, rejected or error',
    'first_item_ms': 'from received to the first element on `~/item`',
    'floor_ms': 'the least time that the memory bus allows for the step; on /diagnostics the '
                'median of the window',
    'generate_action': 'available, or why there is no `~/generate`',
    'head_dim': 'size of an attention head',
    'host_gap_ms': 'itl_ms less device_ms; on /diagnostics the median of the window',
    'index': '0 is the first token of the answer',
    'items': 'elements on `~/item`; n/a where the answer is not JSON by its form',
    'itl_max_activation_ms': 'largest time from token to token since activation',
    'itl_max_ms': 'largest time from token to token',
    'itl_ms': 'time from the token before, less wait_ms',
    'itl_p50_ms': 'median time from token to token',
    'itl_p95_ms': '95th percentile of it',
    'itl_p99_ms': '99th percentile of it',
    'j_per_token': 'energy_j over the tokens of the answer',
    'jitter_ms': 'its standard deviation',
    'kv_bytes_per_token': 'keys and values that a token adds to what a step reads',
    'kv_gb': 'keys and values that a step reads at the newest context',
    'kv_heads': 'heads of keys and values',
    'layers': 'layers of the model',
    'max_consecutive_misses': 'longest row of late tokens',
    'mask_ms': "what the mask of the answer's constraint took on the host, see requests.md; on "
               '/diagnostics the median of the window',
    'max_context': 'tokens of prompt and answer that fit',
    'memory_clock_mhz': 'clock of the memory',
    'memory_locked': "1 where the process's memory is locked against paging, else 0",
    'memory_free_gb': 'memory that is left on the device',
    'memory_used_gb': "memory in use on the device; on a CPU the process's own",
    'model': 'the parameter `model.path`, of a server `remote.model`',
    'model_type': "as the checkpoint's config.json says",
    'no_floor': 'why the memory bus is no floor of a step, such as weights that fit a cache',
    'output_tokens': 'tokens of the answer',
    'paced': '1 where steps are held back by `pace.tokens_per_s`, else 0; on /diagnostics of the '
             'newest token. All times from token to token are without that',
    'peak_bandwidth_gb_s': 'what the memory bus can do',
    'peak_source': 'where that is from: parameter, driver, a datasheet by name, measured, '
                   'observed in steps (which beat the one before), unknown',
    'power_mode': "the Jetson's power mode, by jetson-stats",
    'power_w': 'power that the device draws; in ~/request_stats its mean over the answer',
    'prefill_ms': 'from taken to first token known',
    'prompt_tokens': 'tokens of the prompt, with template and history',
    'publish_ms': 'what publishing the token before this one took',
    'quantization': 'none, or the kind',
    'queue_capacity': 'requests that may wait',
    'queue_depth': 'requests that wait',
    'queue_ms': 'from received to taken',
    'reasoning': 'the piece of a thought that this token completed, see requests.md',
    'reasoning_tokens': 'of output_tokens, those of a thought',
    'r_floor': 'floor_ms over itl_ms; 1 is the limit; on /diagnostics the median of the window',
    'r_floor_p50': 'median of r_floor',
    'read_weight_gb': 'weights that one step really reads',
    'realtime_refused': 'what the parameters `realtime` ask for and the system does not permit, '
                        'and how to permit it',
    'refusal': 'why a request was rejected: `invalid`; `too_large`; `full`, send it again later; '
               '`inactive`, no model runs',
    'refusals': 'requests refused so far',
    'request_deadline_ms': 'the parameter `deadline.request_ms`, where it sets one',
    'request_id': 'counts from 1, over activations',
    'requests': 'requests so far',
    'scheduling': "the decode thread's scheduling class as the kernel says: other, or fifo and "
                  'its priority',
    'seed': 'what the tokens were drawn with',
    'server_tokens': "tokens of the answer by a server's count; `output_tokens` are the pieces of "
                     'text that it sent',
    'sliding_window': 'tokens of context that a step reads at most; 0: all',
    'sm_clock_mhz': 'clock of the processor',
    'state': 'inactive, loading, idle, generating (also in a measurement), stalled or failed',
    'temperature_c': 'temperature of the device',
    'throttle_reasons': 'why the clocks are held down, or none',
    'token_deadline_ms': 'the parameter `deadline.token_ms`, where it sets one',
    'token_id': 'its number in the vocabulary; n/a where a server sent it as text',
    'thought_markers': 'what begins and ends a thought of the model, or none',
    'tokens': 'tokens so far',
    'tokens_per_s': 'tokens after the first, over their time',
    'tool_calls': 'calls of tools that this token completed, a JSON list',
    'tool_form': 'the form in which the model calls tools and why it is that, or none and why',
    'total_ms': 'from received to the end',
    'ttft_deadline_ms': 'the parameter `deadline.ttft_ms`, where it sets one',
    'ttft_last_ms': 'time to the first token of the last request',
    'ttft_ms': 'time to the first token: queue_ms and prefill_ms',
    'unknown_parameters': 'names given at start that are no parameter',
    'verdict': 'what holds a step of the window back most (bytes, kernels, host, clocks, a '
               'neighbour, pacing), by how much, and which setting answers it; see tuning.md',
    'vocab_size': 'size of the vocabulary',
    'wait_ms': 'for how long the step was held back by `pace.tokens_per_s`; on /diagnostics the '
               'median of the window',
    'weight_gb': 'weights that one step really reads',
    'window_s': 'how long the window looks back, in seconds',
    'worst_overrun_ms': 'how late the latest was; on /diagnostics since activation',
}
STATUSES = (
    ('~/token_stats', 'decode: token', messages.TOKEN_KEYS,
     'Its message is the piece of text. WARN where the token was late.'),
    ('~/request_stats', 'decode: request', messages.REQUEST_KEYS,
     'Its message is the finish reason and, where there is more to say, why. WARN for '
     f'{" and ".join(messages.FAILED)} and where there is a fallback, ERROR for error.'),
    ('~/model_info', 'decode: model', messages.MODEL_KEYS,
     'An engine may add keys of its own at the end.'),
    ('/diagnostics', 'decode: latency', messages.LATENCY_KEYS,
     'WARN where a deadline was missed since the message before, ERROR where '
     '`deadline.max_consecutive_misses` tokens in a row were late.'),
    ('/diagnostics', 'decode: bandwidth', messages.BANDWIDTH_KEYS,
     'WARN where r_floor is below `diagnostics.warn_r_floor`.'),
    ('/diagnostics', 'decode: engine', messages.ENGINE_KEYS,
     'ERROR where the state is stalled or failed, or where another node has the same name or '
     "publishes on `~/tokens`. WARN where the local model answers in the server's place, where "
     'there are unknown parameters, a params file that holds nothing for this node, or a setting '
     'of `realtime` that is not permitted. Its message says which.'),
)


def table(titles, rows) -> str:
    """Give a Markdown table."""
    lines = [titles, ['---'] * len(titles), *rows]
    return '\n'.join(f'| {" | ".join(line)} |' for line in lines)


def message_type(kind) -> str:
    """Name a message or service type as ROS does."""
    return f'{kind.__module__.split(".")[0]}/{kind.__name__}'


def quality(qos) -> str:
    """Put a quality of service in words."""
    kept = 'latched, ' if qos.durability.name == 'TRANSIENT_LOCAL' else ''
    return f'{qos.reliability.name.lower().replace("_", " ")}, {kept}keep last {qos.depth}'


def topics(node) -> list[list[str]]:
    """Give a row for each topic of the node."""
    private = node.get_fully_qualified_name() + '/'
    ends = {end.topic_name.replace(private, '~/'): end
            for end in (*node.publishers, *node.subscriptions)}
    ends.pop('~/stamped_tokens', None)      # see TYPED
    described(TOPICS, [name for name in ends if name.startswith('~/') or name == '/diagnostics'])
    return [[f'`{name}`', message_type(ends[name].msg_type), quality(ends[name].qos_profile), text]
            for name, text in TOPICS.items()]


def services(node) -> list[list[str]]:
    """Give a row for each service of the node's own."""
    private = node.get_fully_qualified_name() + '/'
    found = [service.srv_name.replace(private, '~/') for service in node.services
             if service.srv_type is Trigger]
    described(SERVICES, found)
    return [[f'`{name}`', message_type(Trigger), text] for name, text in SERVICES.items()]


def settings() -> list[list[str]]:
    """Give a row for each parameter."""
    rows = []
    for name, field in parameters.specs().items():
        meta = field.metadata
        choices = [f'`{choice}`' for choice in meta['choices']]
        allowed = (', '.join([*choices, *filter(None, [meta['others']])])
                   or parameters.length(field))
        if meta['low'] is not None and not allowed:
            allowed = f'{written(meta["low"])} to {written(meta["high"])}'
        rows.append([f'`{name}`', parameters.kind(field).name.lower(),
                     f'`{written(field.default)}`', allowed, 'yes' if meta['dynamic'] else '',
                     meta['description']])
    return rows


def written(value) -> str:
    """Write a value as in a params file."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        text = f'{value:.9f}'.rstrip('0')
        return f'{text}0' if text.endswith('.') else text
    return {'': "''", (): '[]'}.get(value, str(value))


def described(texts, found) -> None:
    """
    Compare what is described with what is there.

    :raises SystemExit: they differ.
    """
    if differ := set(texts) ^ set(found):
        sys.exit(f'described or there, but not both: {", ".join(sorted(differ))}')


def page() -> str:
    """Give the whole page."""
    described(KEYS, {key for _, _, keys, _ in STATUSES for key in keys})
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
        'Made from the code by `tools/make_interface_reference.py`; change it there.',
        "`~/` stands for the node's full name, `/decode` where it was not changed.",
        '## Topics', table(('name', 'type', 'quality of service', 'what'), topic_rows),
        'History, depth, reliability and durability of each can be set by the parameters '
        '`qos_overrides.<topic>.publisher.<policy>` and `.subscription.<policy>` at start.',
        'Where the package `physai_decode_msgs` is built (`make msgs` or colcon), there are also:',
        table(('name', 'type', 'what'), TYPED),
        '## Services', table(('name', 'type', 'what'), service_rows),
        'It is a lifecycle node and has the services of one: `~/change_state`, `~/get_state` and '
        'the others of lifecycle_msgs. `configure` loads the model and warms it up, `activate` '
        'takes prompts, `deactivate` cancels what runs, `cleanup` frees the memory.',
        '## Parameters',
        table(('name', 'type', 'default', 'allowed', 'at any time', 'what'), settings()),
        'Those without a yes can be set only while the node is unconfigured. A wrong value is '
        'refused with the reason; a name in the params file that is none of these is told in the '
        'log and on `/diagnostics`.',
        '## Keys',
        'A value is a bare decimal number or a word. The unit is the end of the key: `_ms` '
        'milliseconds, `_s` seconds, `_gb` 1e9 bytes, `_c` degrees Celsius. What is not known is '
        '`n/a`. The keys of a status are always the same, in the same order. The `frame_id` of '
        "each header is the node's full name, and the name of each status begins with it, less "
        'the leading slash: `arm/decode: token` for a node `/arm/decode`.',
        'Medians and percentiles are exact for up to '
        f'{histogram.EXACT_ROWS} tokens in the window and {histogram.EXACT_VALUES} in a request. '
        'For more, they are within 0.5 %, and the window may begin up to '
        f'1/{histogram.SLICES} of itself too early.']
    for topic, name, keys, text in STATUSES:
        parts += [f'### `{name}` on `{topic}`', text,
                  table(('key', 'what'), [[f'`{key}`', KEYS[key]] for key in keys])]
    return '\n\n'.join(parts) + '\n'


def main(arguments: list[str]) -> int:
    """Write the page, or with --check compare; gives the exit code."""
    text = page()
    if '--check' not in arguments:
        PAGE.write_text(text)
    elif not PAGE.exists() or PAGE.read_text() != text:
        print(f'{PAGE.name} is not what the code says: run tools/make_interface_reference.py',
              file=sys.stderr)
        return 1
    return 0


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
