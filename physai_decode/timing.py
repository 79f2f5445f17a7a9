"""
When tokens came and how late: stamps in, frozen reports out.

All times come from one monotonic clock, in seconds inside and milliseconds in reports. What is not
known is None, never 0.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class TokenReport:
    """One token; the keys of ``~/token_stats``."""

    request_id: int
    index: int                        # 0 is the first token of the answer
    token_id: int
    text: str                         # the piece this token completed; may be empty
    context_tokens: int               # tokens of keys and values that the step read
    itl_ms: float | None              # None for the first token
    device_ms: float | None
    host_gap_ms: float | None
    publish_ms: float | None          # what the token before this one took to publish
    floor_ms: float | None
    r_floor: float | None
    bandwidth_gb_s: float | None
    deadline_missed: bool


@dataclass(frozen=True)
class RequestReport:
    """One request, also one that was refused; the keys of ``~/request_stats``."""

    request_id: int
    finish_reason: str                # stop length deadline cancelled preempted rejected error
    message: str                      # why, in words, where the reason alone does not say it
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    output_tokens: int = 0
    queue_ms: float | None = None
    prefill_ms: float | None = None
    ttft_ms: float | None = None
    total_ms: float | None = None
    itl_p50_ms: float | None = None
    itl_p95_ms: float | None = None
    itl_p99_ms: float | None = None
    itl_max_ms: float | None = None
    jitter_ms: float | None = None
    tokens_per_s: float | None = None
    r_floor_p50: float | None = None
    deadline_misses: int = 0
    max_consecutive_misses: int = 0
    worst_overrun_ms: float | None = None
    cancel_ms: float | None = None    # from the cancel asked for to the request ended


@dataclass(frozen=True)
class WindowReport:
    """The tokens of the last ``window_s`` seconds, and counts since the recorder was made."""

    window_s: float
    count: int                        # tokens with an itl_ms in the window
    itl_p50_ms: float | None
    itl_p95_ms: float | None
    itl_p99_ms: float | None
    itl_max_ms: float | None
    jitter_ms: float | None           # standard deviation of itl_ms
    ttft_last_ms: float | None
    ttft_deadline_ms: float | None    # None: no deadline
    token_deadline_ms: float | None
    request_deadline_ms: float | None
    deadline_misses: int              # since activation
    consecutive_misses: int           # late tokens in a row, up to now
    miss_limit_reached: bool          # consecutive_misses >= deadline.max_consecutive_misses
    worst_overrun_ms: float | None    # since activation
    itl_max_activation_ms: float | None
    context_tokens: int | None        # of the newest token in the window
    kv_bytes: int | None              # at that context
    floor_ms: float | None            # medians over the window
    r_floor: float | None
    bandwidth_gb_s: float | None
    host_gap_ms: float | None
