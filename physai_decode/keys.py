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

"""What the keys of `/diagnostics` and of the other statuses mean."""

DESCRIPTIONS = {
    'bandwidth_gb_s': 'bytes that the step read divided by its time, in 1e9 bytes per second',
    'cached_tokens': 'tokens of the prompt that were already in the KV cache',
    'cancel_ms': 'from the cancel to the end of the request',
    'callback_errors': 'errors in callbacks since the process started, such as messages that '
                       'could not be parsed or sent; the log has each',
    'chat_template': "name of the chat template in use: default, one of the model's own names, "
                     'none if the model has none, or off',
    'checkpoint_sampling': 'settings of `sampling` in generation_config.json; they take effect '
                           'only with `sampling.from_checkpoint`',
    'checkpoint_weight_gb': 'all weights of the checkpoint at their stored size',
    'client_id': 'id that the client gave the request',
    'config_notes': 'ambiguities in config.json and how they are resolved, or none',
    'consecutive_misses': 'deadline misses in a row, including the newest token',
    'context_tokens': 'tokens whose keys and values the step read',
    'count': 'tokens with a latency in the window',
    'cuda_graph': 'captured, off or unavailable',
    'deadline_missed': '1 if this token missed its deadline, else 0',
    'deadline_misses': 'deadline misses of first tokens, further tokens and requests; on '
                       '/diagnostics since activation',
    'decode_cores': 'cores that the decode thread may use, as the kernel reports',
    'device': 'cpu or cuda:N',
    'device_ms': 'time of the step on the device; on a CPU the time of the step itself',
    'device_name': 'name of the device',
    'device_uuid': 'UUID of the device',
    'dtype': 'number format of activations and unquantised weights',
    'encode_ms': 'time for the chat template and the tokenizer, including the wait for their '
                 'process',
    'end_tokens': 'tokens that end an answer, from the config, the generation config, the '
                  'tokenizer and the chat template',
    'energy_j': 'energy in joules that the device used during the answer, including other '
                'programs; on a Jetson, that of the whole board; on /diagnostics the sum over all '
                'answers since activation',
    'engine_reason': 'why this engine was chosen',
    'engine': 'engine that runs the model; before a model is loaded, the parameter; in '
              '~/request_stats the engine that answered, n/a if none did',
    'fallback': 'why the local model answered instead of the server, see offboard.md; in '
                '~/model_info the name of the local model',
    'fallbacks': 'requests that the local model answered instead of the server',
    'finish_reason': 'stop, tool_calls, length, deadline, cancelled, preempted, rejected or error',
    'first_item_ms': 'from received to the first element on `~/item`',
    'floor_ms': 'least time that the memory bus allows for the step; on /diagnostics the median '
                'of the window',
    'generate_action': 'available, or why there is no `~/generate`',
    'head_dim': 'size of an attention head',
    'host_gap_ms': 'itl_ms minus device_ms; on /diagnostics the median of the window',
    'index': 'position of the token in the answer, from 0',
    'items': 'elements on `~/item`; n/a if the request does not constrain the answer to JSON',
    'itl_max_activation_ms': 'maximum latency of a token since activation',
    'itl_max_ms': 'maximum latency of a token',
    'itl_ms': 'latency: the time since the previous token, minus wait_ms; the tokens of one pass '
              'share its time evenly',
    'itl_p50_ms': 'median latency of a token',
    'itl_p95_ms': '95th percentile of the latency',
    'itl_p99_ms': '99th percentile of the latency',
    'j_per_token': 'energy_j over the tokens of the answer',
    'jitter_ms': 'standard deviation of the latency',
    'kv_bytes_per_token': 'bytes of keys and values that a step reads per token of context',
    'kv_gb': 'size of the keys and values that a step reads at the newest context',
    'kv_heads': 'KV heads',
    'layers': 'layers of the model',
    'max_consecutive_misses': 'longest run of deadline misses in a row',
    'mask_ms': 'host time for the mask of a constrained answer, see requests.md; on /diagnostics '
               'the median of the constrained tokens in the window',
    'max_context': 'size of the KV cache in tokens, prompt and answer together',
    'memory_clock_mhz': 'clock of the memory',
    'memory_locked': '1 if the memory of the process is locked against paging, else 0',
    'memory_free_gb': 'free memory on the device',
    'memory_used_gb': 'used memory on the device; on a CPU that of the process',
    'model': 'the parameter `model.path`; with a server `remote.model`',
    'model_type': "model_type in the checkpoint's config.json",
    'no_floor': 'why the memory bus sets no floor for a step, such as weights that fit in a cache',
    'output_tokens': 'tokens of the answer',
    'paced': '1 if `pace.tokens_per_s` delays steps, else 0; on /diagnostics for the newest '
             'token. Latencies do not include the delay',
    'pass_tokens': 'number of tokens of the pass, which share its times and floor evenly; of a '
                   'request, the mean after the first token',
    'peak_bandwidth_gb_s': 'peak bandwidth of the memory bus',
    'peak_source': 'source of the peak bandwidth: parameter, driver, a datasheet by name, '
                   'measured, observed in steps (they exceeded the previous peak), or unknown',
    'power_mode': 'power mode of a Jetson, from jetson-stats',
    'power_w': 'power draw of the device; in ~/request_stats the mean over the answer',
    'prefill_ms': 'from dequeued to the first token, including encode_ms, sample_ms, and '
                  'the wait for a server that failed. A draft model reads the prompt later; '
                  'itl_ms of a later token includes that',
    'prompt_tokens': 'tokens of the prompt, including template and history',
    'publish_ms': 'time to publish the previous token',
    'quantization': 'quantisation of the weights, or none',
    'queue_capacity': 'requests that may wait',
    'queue_depth': 'requests that wait',
    'queue_ms': 'from received to dequeued',
    'reasoning': 'the piece of a thought that this token completed, see requests.md',
    'reasoning_tokens': 'tokens of the thought, which output_tokens includes',
    'r_floor': 'floor_ms over itl_ms; 1 is the limit; on /diagnostics the median of the window',
    'r_floor_p50': 'median of r_floor',
    'r_ttft': 'ttft_floor_ms over prefill_ms; 1 is the limit of the memory bus',
    'read_weight_gb': 'size of the weights that one step actually reads',
    'realtime_refused': 'settings of `realtime` that the system does not permit, and how to '
                        'permit them',
    'refusal': 'why a request was rejected: `invalid`; `too_large`; `duplicate`: a request with '
               'this id is already running or waiting; `full`: send it again later; `inactive`: '
               'no model is active, and the message says whether one is loading, its load failed, '
               'or the node needs a transition',
    'refusals': 'requests refused so far',
    'request_deadline_ms': 'the parameter `deadline.request_ms`, if it is set',
    'request_id': 'number of the request, from 1; it continues across activations',
    'requests': 'requests so far',
    'sample_ms': 'time on the device to choose the first token (on a CPU on the host)',
    'scheduling': 'scheduling class of the decode thread, as the kernel reports: other, with its '
                  'time slice if `engine.blocking_wait` shortens it, or fifo with its priority',
    'seed': 'seed that the tokens were sampled with',
    'server_tokens': 'tokens of the answer as the server counts them; `output_tokens` counts the '
                     'pieces of text that it sent',
    'sliding_window': 'maximum number of context tokens that a step reads; 0: all',
    'sm_clock_mhz': 'clock of the SMs',
    'state': 'unconfigured (no model is loaded), inactive (one is loaded), loading, idle, '
             'generating (also during a measurement), stalled, failed or finalized',
    'temperature_c': 'temperature of the device',
    'throttle_reasons': 'why the clocks are throttled, or none; on a Jetson with jetson-stats, '
                        'the clocks below their maximum while the GPU is busy',
    'token_deadline_ms': 'the parameter `deadline.token_ms`, if it is set',
    'token_id': 'id of the token in the vocabulary; n/a if a server sent it as text',
    'thought_markers': "strings that begin and end the model's thoughts, or none",
    'tokens': 'tokens so far',
    'tokens_per_s': 'tokens after the first divided by their time',
    'tool_calls': 'tool calls that this token completed, as a JSON list',
    'tool_form': 'the syntax of the tool calls of this model and why it was chosen; or none, and '
                 'why',
    'total_ms': 'from received to the end',
    'ttft_deadline_ms': 'the parameter `deadline.ttft_ms`, if it is set',
    'ttft_last_ms': 'time to first token of the newest answer that had a token, since activation',
    'ttft_floor_ms': 'floor of prefill_ms by the memory bus: the time to read the weights, and '
                     'the keys and values of cached_tokens, once. A long prompt is limited by '
                     'arithmetic instead',
    'ttft_ms': 'time to first token: queue_ms plus prefill_ms',
    'unknown_parameters': 'parameters given at start that the node does not have',
    'verdict': 'what limits the steps of the window most (bytes, drafts, kernels, host, clocks, '
               'a neighbour, pacing), by how much, and which setting to change; see tuning.md',
    'vocab_size': 'size of the vocabulary',
    'wait_ms': 'how long `pace.tokens_per_s` delayed the step; on /diagnostics the median of the '
               'paced tokens in the window',
    'weight_gb': 'size of the weights that one step actually reads',
    'window_s': 'length of the window in seconds',
    'worst_overrun_ms': 'largest overrun of a deadline; on /diagnostics since activation',
}
