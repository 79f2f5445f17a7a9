"""
The transformers library's own model: the baseline, and the way for every other architecture.

One step is the library's forward pass over its own cache, and its own logits processors choose the
token. On a CPU, and on a GPU with ``cuda_graph`` off, the cache grows and the host launches every
kernel: the eager step of arXiv 2605.30571. With ``cuda_graph`` on a GPU the cache is the library's
static one, and the forward pass with the choice of the likeliest token is captured whole in one
CUDA graph; a sampled token is chosen after it. Attention is PyTorch's scaled_dot_product_attention
where the model has it, without cuDNN's, which would plan anew for each length; a captured step has
one length for ever and takes what PyTorch prefers. The engine knows nothing of how a model
computes and never runs code from a model folder.
"""

from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Sequence
from contextlib import contextmanager
from contextlib import nullcontext
import gc
from importlib.util import find_spec
import inspect
from pathlib import Path
import re
import traceback
from urllib.error import URLError

from physai_decode import checkpoint
from physai_decode.checkpoint import Checkpoint
from physai_decode.config import EngineConfig
from physai_decode.config import SamplingConfig
from physai_decode.engine import checked_prompt
from physai_decode.engine import EngineError
from physai_decode.engine import first_line
from physai_decode.engine import Footprint
from physai_decode.engine import shared_prefix
from physai_decode.engine import Step
from physai_decode.engines import device as devices
import torch
import transformers
from transformers.cache_utils import Cache
from transformers.cache_utils import DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.cache_utils import DynamicSlidingWindowLayer
from transformers.cache_utils import StaticCache
from transformers.cache_utils import StaticLayer
from transformers.cache_utils import StaticSlidingWindowLayer
from transformers.generation.logits_process import LogitsProcessorList
from transformers.generation.logits_process import MinPLogitsWarper
from transformers.generation.logits_process import RepetitionPenaltyLogitsProcessor
from transformers.generation.logits_process import TemperatureLogitsWarper
from transformers.generation.logits_process import TopKLogitsWarper
from transformers.generation.logits_process import TopPLogitsWarper
from transformers.utils import is_accelerate_available

# A prompt goes in pieces of so many tokens, so that it can be cancelled between two of them.
_PIECE_TOKENS = {'cpu': 256, 'cuda': 2048}
_WARMUP_TOKENS = 8
# What transformers calls for quantised weights.
_LIBRARIES = {
    'awq': ('gptqmodel', 'accelerate'), 'bitsandbytes': ('bitsandbytes', 'accelerate'),
    'gptq': ('gptqmodel', 'optimum', 'accelerate')}
_FLOATS = ('F64', 'F32', 'F16', 'BF16')


class TransformersEngine:
    """See `physai_decode.engine.Engine`."""

    footprint: Footprint

    def __init__(self, folder: Path, config: EngineConfig,
                 progress: Callable[[str], None] = lambda text: None):
        """
        Load, warm up and, with ``cuda_graph`` on a GPU, capture.

        :raises EngineError: the model can't be had on this device; nothing stays allocated.
        """
        self._decoder: Decoder | None = None
        self._device, dtype = devices.select(config)
        devices.use(self._device)
        model = checkpoint.inspect(folder)
        dtype = _dtype(model, config, self._device, dtype)
        limit = min(config.max_context, model.context_limit or config.max_context)
        captured = config.cuda_graph and self._device.type == 'cuda'
        try:
            with devices.enough_memory(self._device, _needed_bytes(model, dtype)):
                progress(f'loading {model.weight_bytes / 1e9:.2f} GB of weights to {self._device}')
                network = _load(model, self._device, dtype)
                progress('warming up' + (' and capturing the step' if captured else ''))
                self._decoder = (CapturedDecoder if captured else Decoder)(
                    network, self._device, limit)
                self.footprint = _footprint(model, self._decoder, limit)
        except BaseException as error:
            traceback.clear_frames(error.__traceback__)
            self.close()
            raise

    def stream(self, prompt_ids: Sequence[int], sampling: SamplingConfig) -> Iterator[Step]:
        """See `physai_decode.engine.Engine.stream`."""
        return self._steps(checked_prompt(prompt_ids, self.footprint), sampling)

    def close(self) -> None:
        """See `physai_decode.engine.Engine.close`."""
        self._decoder = None
        gc.collect()
        if self._device.type == 'cuda':
            torch.cuda.empty_cache()

    @property
    def cached_ids(self) -> list[int]:
        """Give the ids whose keys and values are in the cache."""
        return list(self._decoder.seen)

    @contextmanager
    def trial(self, captured: bool | None = None) -> Iterator[None]:
        """
        Let `stream` be tried inside ``with``; the cache then forgets what it brought.

        :param captured: whether the step runs in its CUDA graph, or is launched kernel by kernel;
            None as it was loaded.
        :raises EngineError: it was never captured.
        """
        decoder, before = self._decoder, self.cached_ids
        if captured is not None and not decoder.captured:
            raise EngineError(
                "transformers' step was loaded without a CUDA graph, which needs another cache: "
                'clean up, set engine.cuda_graph to true and configure again')
        graph = decoder._graph
        if captured is False:
            decoder._graph = None
        try:
            yield
        finally:
            decoder._graph = graph
            decoder.rewind([*before, 0])

    def _steps(self, prompt, sampling):
        devices.use(self._device)
        decoder, watch = self._decoder, devices.Stopwatch(self._device)
        choose = Chooser(sampling, prompt, self.footprint.max_context, self._device)
        cached = decoder.rewind(prompt)
        *pieces, last = decoder.pieces(prompt[cached:])
        prefill_s = 0.0
        for piece in pieces:
            watch.start()
            decoder.feed(piece)
            watch.stop()
            prefill_s += watch.read_s()
            yield Step((), None, cached)
        watch.start()
        token = choose(*decoder.feed(last))
        watch.stop()
        number = int(token)
        yield Step((number,), prefill_s + watch.read_s(), cached)
        room = self.footprint.max_context - len(prompt)
        for _ in range(min(sampling.max_new_tokens, room) - 1):
            watch.start()
            token = choose(*decoder.step(token, number))
            watch.stop()
            number = int(token)
            yield Step((number,), watch.read_s(), cached)


class Decoder:
    """
    A network and the library's dynamic cache; the host launches every kernel.

    ``seen`` are the ids whose keys and values the cache holds, or as good as none while a step
    runs, because one that raises leaves the cache in doubt. What runs a network returns the
    float32 logits [1, vocab] after its last token and the likeliest token [1].
    """

    captured = False
    advice = 'choose another model, or another engine.name'
    _graph: torch.cuda.CUDAGraph | None = None

    def __init__(self, network: torch.nn.Module, device: torch.device, limit: int):
        """
        Make the cache and warm up.

        :param limit: tokens that the cache must hold.
        """
        self.network = network
        self.seen: list[int] = []
        self._device = device
        self._limit = limit
        parameters = inspect.signature(network.forward).parameters
        self._cache_name = next(
            (name for name in ('past_key_values', 'cache_params') if name in parameters), '')
        if not self._cache_name:
            raise EngineError(
                f'{network.config.model_type}: its forward pass in transformers '
                f'{transformers.__version__} takes no cache, so it can not be decoded token by '
                'token: choose another model')
        self._options = {'use_cache': True}
        if 'logits_to_keep' in parameters:
            self._options['logits_to_keep'] = 1
        self.cache = self._new_cache()
        self.attends = all(
            type(layer) in (DynamicLayer, DynamicSlidingWindowLayer, StaticLayer)
            for layer in self.cache.layers)
        self._takes_positions = 'position_ids' in parameters
        # The library raises whatever its many models raise.
        with self._telling(Exception, f'transformers {transformers.__version__} does not decode '
                           'it token by token over this cache'):
            self._warm_up()
        self.rewind([0])

    @contextmanager
    def _telling(self, kind, problem):
        """Turn errors of a kind, but a lack of memory, into one that names model and way out."""
        try:
            yield
        except kind as error:
            if devices.is_out_of_memory(error):
                raise
            raise EngineError(f'{self.network.config.model_type}: {problem} '
                              f'({first_line(error)}): {self.advice}') from None

    def _warm_up(self):
        token = self.feed([0] * min(_WARMUP_TOKENS, self._limit // 2))[1]
        for _ in range(2):
            token = self.step(token, int(token))[1]
        kept = [getattr(layer, 'keys', None) is not None for layer in self.cache.layers]
        # A layer without keys has its state elsewhere.
        self.attends = self.attends and all(kept)
        # Of each layer that has keys and values: heads, widths of a key and a value, bytes.
        self.kv_shapes = [
            (layer.keys.shape[1], layer.keys.shape[-1], layer.values.shape[-1],
             layer.keys.element_size())
            for layer, has in zip(self.cache.layers, kept) if has]
        self.windows = [
            window for layer, has in zip(DynamicCache(config=self.network.config).layers, kept)
            if has and (window := getattr(layer, 'sliding_window', 0))]

    def pieces(self, ids: list[int]) -> list[list[int]]:
        """Cut a prompt; a state other than keys and values gets it in one piece."""
        size = _PIECE_TOKENS[self._device.type] if self.attends else len(ids)
        return [ids[i:i + size] for i in range(0, len(ids), size)]

    def rewind(self, prompt: list[int]) -> int:
        """Keep what the cache has in common with all of a prompt but its last token, at most."""
        seen, self.seen = self.seen, []
        keep = self._crop(len(seen), shared_prefix(seen, prompt[:-1]))
        self.seen = seen[:keep]
        return keep

    def feed(self, ids: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Run a piece of a prompt."""
        return self._advance(lambda start: self._forward(
            torch.tensor([ids], device=self._device), start), ids)

    def step(self, token: torch.Tensor, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Run one token [1], which is on the device and has this number."""
        return self._advance(lambda start: self._forward(token.view(1, 1), start), [number])

    def _advance(self, run, ids):
        seen, self.seen = self.seen, []
        outcome = run(len(seen))
        seen.extend(ids)
        self.seen = seen
        return outcome

    @torch.inference_mode()
    def _forward(self, ids, start=0):
        cache = {self._cache_name: self.cache}
        if self._takes_positions and not self.attends:
            # Where it keeps another state, some a model does not tell its place from the cache.
            cache['position_ids'] = torch.arange(
                start, start + ids.shape[1], device=self._device)[None]
        one_length = self.captured and ids.shape[1] == 1
        with nullcontext() if one_length else devices.attention_backends(self._device):
            logits = self.network(input_ids=ids, **cache, **self._options).logits[:, -1].float()
        return logits, logits.argmax(-1)

    def _new_cache(self):
        return DynamicCache(config=self.network.config)

    def _crop(self, length, keep):
        removed = length - keep
        # A full sliding window has dropped what an earlier position would read.
        slid = any(isinstance(layer, DynamicSlidingWindowLayer) and length >= layer.sliding_window
                   for layer in self.cache.layers)
        if not keep or not self.attends or (removed and slid):
            self.cache = self._new_cache()
            return 0
        if removed:
            self.cache.crop(-removed)
        return keep


class CapturedDecoder(Decoder):
    """
    A network and the library's static cache, one decode step captured in a CUDA graph.

    All its layers hold the whole context, also those with a sliding window, whose own static cache
    branches on the host; the library's mask keeps what such a layer reads to its window. The
    position is on the device, in the cache; the graph advances it.
    """

    captured = True
    advice = 'set engine.cuda_graph to false'

    def __init__(self, network: torch.nn.Module, device: torch.device, limit: int):
        """Make the cache, warm up, capture, and hold the captured step against the uncaptured."""
        super().__init__(network, device, limit)
        with self._telling(
                RuntimeError, "transformers' decode step can not be captured in a CUDA graph"):
            self._compare()
            self._capture()
        self.rewind([0])

    def step(self, token: torch.Tensor, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Decoder.step`; what it returns is overwritten by the next step."""
        if self._graph is None:
            return super().step(token, number)
        return self._advance(lambda start: self._replay(token), [number])

    def _compare(self):
        """Hold the static cache against the dynamic one."""
        if not self.attends:
            raise RuntimeError('it keeps a state outside of the cache')
        ids, answers = list(range(1, min(_WARMUP_TOKENS, self._limit // 2) + 1)), []
        static = self.cache
        for cache in (static, DynamicCache(config=self.network.config)):
            self.cache, self.seen = cache, []
            self.feed(ids)
            token = torch.tensor(ids[:1], device=self._device)
            answers.append(Decoder.step(self, token, ids[0])[0].clone())
        self.cache = static
        whole, plain = answers
        # Other kernels add in another order: a wrong mask shows all the same.
        if not torch.allclose(whole, plain, rtol=0, atol=0.1 * plain.abs().max()):
            raise RuntimeError('over a cache of one length it gives other logits')

    @torch.inference_mode()
    def _capture(self):
        self._input = torch.zeros((1, 1), dtype=torch.long, device=self._device)
        self._set_length(1)
        self._graph = devices.capture(self._captured_step, self._device)
        # A host value baked into the graph would show at another position than the captured one.
        for position in (2, 6):
            token = torch.full((1,), position, device=self._device)
            self._set_length(position)
            replayed = self._replay(token)[0].clone()
            self._set_length(position)
            launched = self._forward(token.view(1, 1))[0]
            if not torch.allclose(replayed, launched, rtol=0, atol=0.02 * launched.abs().max()):
                raise RuntimeError(
                    f'replayed at position {position} it gives other logits than uncaptured')

    def _captured_step(self):
        self._logits, self._likeliest = self._forward(self._input)
        self._input.copy_(self._likeliest.view(1, 1))

    @torch.inference_mode()
    def _replay(self, token):
        if token is not self._likeliest:
            self._input.copy_(token.view(1, 1))
        self._graph.replay()
        return self._logits, self._likeliest

    def _new_cache(self):
        return whole_cache(self.network.config, self._limit)

    @torch.inference_mode()
    def _set_length(self, length):
        for layer in self.cache.layers:
            layer.cumulative_length.fill_(length)

    def _crop(self, length, keep):
        self._set_length(keep)
        return keep


class Chooser:
    """
    The library's logits processors in its own order, and one random generator, for one request.

    The repetition penalty covers the prompt and the answer; it also acts on the likeliest token.
    """

    def __init__(self, sampling: SamplingConfig, prompt: Sequence[int], limit: int,
                 device: torch.device):
        """
        Set up the processors.

        :param limit: tokens of prompt and answer at most.
        """
        self._processors = LogitsProcessorList()
        self._generator = None
        self._ids = None
        if sampling.repetition_penalty != 1.0:
            self._processors.append(
                RepetitionPenaltyLogitsProcessor(float(sampling.repetition_penalty)))
            self._ids = torch.empty((1, limit), dtype=torch.long, device=device)
            self._ids[0, :len(prompt)] = torch.tensor(prompt, device=device)
            self._count = len(prompt)
        if sampling.temperature == 0.0:
            return
        self._generator = torch.Generator(device).manual_seed(sampling.seed)
        self._processors.append(TemperatureLogitsWarper(float(sampling.temperature)))
        if sampling.top_k:
            self._processors.append(TopKLogitsWarper(sampling.top_k))
        if sampling.top_p < 1.0:
            self._processors.append(TopPLogitsWarper(float(sampling.top_p)))
        if sampling.min_p:
            self._processors.append(MinPLogitsWarper(float(sampling.min_p)))

    @torch.inference_mode()
    def __call__(self, logits: torch.Tensor, likeliest: torch.Tensor) -> torch.Tensor:
        """
        Choose a token.

        :param logits: float32 [1, vocab]; they are left as they are.
        :param likeliest: the token [1] that has the highest of them.
        :returns: the token's id [1], on the device.
        """
        if not self._processors:
            return likeliest
        ids = None if self._ids is None else self._ids[:, :self._count]
        scores = self._processors(ids, logits)
        if self._generator is None:
            token = scores.argmax(-1)
        else:
            token = torch.multinomial(scores.softmax(-1), 1, generator=self._generator).view(1)
        if self._ids is not None:
            self._ids[0, self._count:self._count + 1] = token
            self._count += 1
        return token


def whole_cache(config: transformers.PretrainedConfig, limit: int) -> Cache:
    """
    Make a static cache whose every layer holds the whole context.

    :param limit: tokens that it holds.
    :raises EngineError: the model keeps a state that is not keys and values of the context.
    """
    layers = StaticCache(config=config, max_cache_len=limit).layers
    other = next((type(layer).__name__ for layer in layers
                  if type(layer) not in (StaticLayer, StaticSlidingWindowLayer)), None)
    if other:
        raise EngineError(
            f'{config.model_type}: its cache ({other}) can not be captured in a CUDA graph: set '
            'engine.cuda_graph to false')
    return Cache(layers=[StaticLayer(limit) for _ in layers])


def _dtype(model, config, device, dtype):
    method = model.quantization_config.get('quant_method')
    if device.type == 'cpu' or method not in ('awq', 'gptq'):
        return dtype
    if config.dtype == 'auto':
        return torch.float16
    if method == 'awq' and dtype != torch.float16:
        raise EngineError(
            f'engine.dtype is {config.dtype}, but transformers computes in float16 with AWQ '
            'weights on a GPU: set it to float16 or auto')
    return dtype


def _needed_bytes(model: Checkpoint, dtype: torch.dtype) -> int:
    if model.quantization_config:
        return model.weight_bytes
    return sum(
        entry.bytes if entry.dtype not in _FLOATS
        else entry.bytes * dtype.itemsize // {'F64': 8, 'F32': 4}.get(entry.dtype, 2)
        for entry in model.tensors.values())


def _load(model, device, dtype):
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    if model.model_type not in transformers.CONFIG_MAPPING:
        folder_code = ' (the folder brings its own code, which is never run)' \
            if 'auto_map' in model.config else ''
        raise EngineError(
            f'{model.folder}: the architecture {model.model_type!r} is not in transformers '
            f'{transformers.__version__}{folder_code}: choose another model, or a version of '
            'transformers that has it')
    method = model.quantization_config.get('quant_method')
    missing = [name for name in _LIBRARIES.get(method, ()) if find_spec(name) is None]
    if missing:
        raise EngineError(
            f'{model.folder}: transformers needs more libraries for {model.quantization} weights: '
            f'pip install {" ".join(missing)}')
    placed = bool(model.quantization_config) or (
        device.type == 'cuda' and is_accelerate_available())
    try:
        config = transformers.AutoConfig.from_pretrained(model.folder, trust_remote_code=False)
        known = transformers.MODEL_FOR_CAUSAL_LM_MAPPING
        if config.is_encoder_decoder or type(config) not in known:
            raise EngineError(
                f'{model.folder}: {model.model_type!r} is not a model that continues text: choose '
                'a causal language model')
        kind = known[type(config)]
        attention = 'sdpa' if kind._supports_sdpa else 'eager'
        if 'physai_decode_random_weights' in model.config:
            return _random(model, config, attention, device, dtype)
        network, found = kind.from_pretrained(
            model.folder, config=config, dtype=dtype, use_safetensors=True,
            attn_implementation=attention,
            device_map={'': device} if placed else None, output_loading_info=True)
    except EngineError:
        raise
    except ImportError as error:
        raise EngineError(
            f'{model.folder}: {model.quantization} weights need a library that is not here: '
            f'{first_line(error)}') from None
    # The library raises whatever its many parts raise.
    except Exception as error:
        if devices.is_out_of_memory(error):
            raise
        told = first_line(error)
        if isinstance(error, URLError):
            told += (' (a library wanted to download something: connect this machine for one '
                     'start, or choose another engine.name)')
        raise EngineError(
            f'{model.folder} can not be loaded by transformers {transformers.__version__}: '
            f'{told}') from None
    lost = sorted(found['missing_keys'])
    if lost:
        raise EngineError(
            f'{model.folder} lacks {len(lost)} of the weights that its config.json asks for, '
            f'{lost[0]} for one: copy or download the model again')
    if not placed:
        network.to(device)
    return network.eval()


def _random(model, config, attention, device, dtype):
    """Make weights at random on the device, for a folder that only describes their shapes."""
    if model.quantization_config:
        raise EngineError(
            f'{model.folder} only describes {model.quantization} weights, which transformers can '
            'not make at random: write them with decode_bench --write-checkpoint')
    # By default it would open every GPU of the machine.
    used = [device] if device.type == 'cuda' else []
    with torch.random.fork_rng(devices=used), torch.device(device):
        torch.manual_seed(model.config['physai_decode_random_weights'].get('seed', 0))
        return transformers.AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation=attention).eval()


def _footprint(model, decoder, limit):
    network, device = decoder.network, decoder._device
    config = network.config.get_text_config(decoder=True)
    # A layer that caches a compressed form has keys and values of different widths.
    heads, key_width, value_width, element_bytes = \
        decoder.kv_shapes[0] if decoder.kv_shapes else (0, 0, 0, network.dtype.itemsize)
    windows = decoder.windows
    name, uuid = devices.describe(device)
    graph = 'captured' if decoder.captured else 'off' if device.type == 'cuda' else 'unavailable'
    return Footprint(
        engine='transformers', model_type=model.model_type,
        dtype=str(network.dtype).partition('.')[2], quantization=model.quantization,
        device=str(device), device_name=name, device_uuid=uuid, cuda_graph=graph,
        max_context=limit, vocab_size=config.vocab_size, eos_token_ids=model.eos_token_ids,
        read_weight_bytes=_read_weight_bytes(network, config),
        checkpoint_weight_bytes=model.weight_bytes, layers=len(decoder.kv_shapes),
        kv_heads=heads, head_dim=(key_width + value_width) // 2,
        kv_element_bytes=element_bytes,
        sliding_window=max(windows, default=0), windowed_layers=len(windows) or None,
        details={'attention': str(config._attn_implementation), 'torch': torch.__version__,
                 'transformers': transformers.__version__})


def _read_weight_bytes(network, config):
    """Weights that one step reads: a row of each embedding, and of experts those it asks."""
    head = getattr(network.get_output_embeddings(), 'weight', None)
    read_whole = None if head is None else head.data_ptr()
    embeddings = {
        module.weight.data_ptr() for module in network.modules()
        if isinstance(module, torch.nn.Embedding)} - {read_whole}
    experts = next((getattr(config, name) for name in (
        'num_local_experts', 'num_experts', 'n_routed_experts') if getattr(config, name, 0)), 0)
    asked = next((getattr(config, name) for name in (
        'num_experts_per_tok', 'top_k_experts') if getattr(config, name, 0)), experts)
    # What sees or hears is not asked at a step. A tensor that two modules share has one address
    # and is counted once.
    weights = {tensor.data_ptr(): (name, tensor)
               for part in (network.get_decoder() or network, network.get_output_embeddings())
               if part is not None for name, tensor in part.state_dict().items()
               if isinstance(tensor, torch.Tensor)}
    total = 0
    for address, (name, tensor) in weights.items():
        size = tensor.numel() * tensor.element_size()
        if address in embeddings:
            size //= tensor.shape[0]
        elif experts and _is_of_experts(name, tensor, experts):
            size = size * asked // experts
        total += size
    return total


def _is_of_experts(name, tensor, experts):
    """Tell whether a tensor is one expert's, or all experts' in one."""
    return bool(re.search(r'\.experts\.\d+\.', name)) or tensor.shape[:1] == (experts,) and (
        tensor.dim() == 3 or (tensor.dim() == 2 and name.endswith('bias')))
