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
Train the model that ships with the package, `builtin:tiny_planner`, and write its folder.

A seeded run creates everything from scratch: the data (planner_data.py), the tokenizer and the
weights. It needs no network. On a GPU the sums of a training step have no fixed order, so two runs
with one seed give models that are equally good but not equal bit for bit.
"""

import argparse
import json
from pathlib import Path
from random import Random
import sys
import time

from evaluate_tiny_planner import held_out_sets
from evaluate_tiny_planner import LibraryAnswers
from planner_data import conversation
from planner_data import system_prompt
import tokenizers
from tokenizers import Tokenizer
import torch
from torch.nn import functional
from torch.utils.data import DataLoader
from torch.utils.data import Dataset
from transformers import GenerationConfig
from transformers import LlamaConfig
from transformers import LlamaForCausalLM

SPECIAL_TOKENS = ('<|endoftext|>', '<|im_start|>', '<|im_end|>')
ANSWER = '<|im_start|>assistant\n'
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
IGNORED = -100
WARMUP = 0.03
DECAY = 0.5


def model_config(max_position_embeddings: int = 8192) -> LlamaConfig:
    """Return the model's shape; widths are multiples of 128, heads are 64 wide."""
    return LlamaConfig(
        vocab_size=1024, hidden_size=256, intermediate_size=640, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=max_position_embeddings, rope_theta=10000.0, rms_norm_eps=1e-6,
        head_dim=64, tie_word_embeddings=True, bos_token_id=None, eos_token_id=2,
        pad_token_id=0, dtype='bfloat16')


def chat(role: str, content: str) -> str:
    """Return one message as the chat template writes it."""
    return f'<|im_start|>{role}\n{content}<|im_end|>\n'


def train_tokenizer(seed: int) -> Tokenizer:
    """Train a byte-level BPE of 1024 tokens on commands and answers: it encodes any text."""
    tokenizer = Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([
        tokenizers.pre_tokenizers.Digits(individual_digits=True),
        tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=1024, special_tokens=list(SPECIAL_TOKENS), show_progress=False,
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()))
    rng = Random(f'{seed} tokenizer')
    drawn = conversation(rng)
    texts = []
    for _ in range(20000):
        turn = next(drawn)
        texts += [
            f'user\n{turn.text}', f'assistant\n{turn.answer}', f'system\n{system_prompt(rng)}']
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


class Batches(Dataset):
    """
    Batch ``index`` of a run: whole conversations in rows of one length, drawn from seed and index.

    Each batch has ``tokens`` tokens in rows of one length; batches take ``lengths`` in turn. Items
    are input ids and labels, int64 (rows, length); only the answers and the tokens that end them
    have labels.
    """

    def __init__(self, tokenizer, seed, steps, tokens, lengths):
        self.tokenizer = tokenizer
        self.seed = seed
        self.steps = steps
        self.tokens = tokens
        self.lengths = lengths

    def __len__(self):
        return self.steps

    def __getitem__(self, index):
        length = self.lengths[index % len(self.lengths)]
        rng = Random(f'{self.seed} batch {index}')
        rows = [self._row(rng, length) for _ in range(self.tokens // length)]
        ids = torch.tensor([row[0] for row in rows])
        return ids, torch.tensor([row[1] for row in rows])

    def _row(self, rng, length):
        ids, labels = [], []
        system = system_prompt(rng)
        if system:
            ids = self.tokenizer.encode(chat('system', system)).ids
            labels = [IGNORED] * len(ids)
        for turn in conversation(rng):
            question = self.tokenizer.encode(chat('user', turn.text) + ANSWER).ids
            answer = self.tokenizer.encode(f'{turn.answer}<|im_end|>').ids
            after = self.tokenizer.encode('\n').ids
            if len(ids) + len(question) + len(answer) > length:
                break
            ids += question + answer + after
            labels += [IGNORED] * len(question) + answer + [IGNORED] * len(after)
        room = length - len(ids)
        return (ids + [0] * room)[:length], (labels + [IGNORED] * room)[:length]


def learning_rate(progress: float) -> float:
    """Return the share of the peak rate at ``progress`` of the run: up, level, straight to 0."""
    return max(0.0, min(1.0, progress / WARMUP, (1 - progress) / DECAY))


def train(model, batches, args) -> int:
    """
    Train in place for ``args.steps`` steps or ``args.minutes``, whichever ends first.

    :return: how many steps were done.
    """
    matrices = [weight for weight in model.parameters() if weight.dim() > 1]
    vectors = [weight for weight in model.parameters() if weight.dim() < 2]
    optimizer = torch.optim.AdamW(
        [{'params': matrices, 'weight_decay': 0.1}, {'params': vectors, 'weight_decay': 0.0}],
        lr=args.lr, betas=(0.9, 0.95), fused=args.device.startswith('cuda'))
    loader = DataLoader(
        batches, batch_size=None, num_workers=args.workers,
        pin_memory=args.device.startswith('cuda'))
    start_s = said_s = time.monotonic()
    seen, done, losses = 0, 0, []
    for step, (ids, labels) in enumerate(loader):
        spent_s = time.monotonic() - start_s
        progress = max(step / args.steps, spent_s / (60 * args.minutes))
        if progress >= 1:
            break
        for group in optimizer.param_groups:
            group['lr'] = args.lr * learning_rate(progress)
        ids = ids.to(args.device, non_blocking=True)
        targets = labels.to(args.device, non_blocking=True)[:, 1:].reshape(-1)
        with torch.autocast(args.device.split(':')[0], dtype=torch.bfloat16):
            hidden = model.model(input_ids=ids[:, :-1], use_cache=False).last_hidden_state
            answered = targets != IGNORED
            logits = model.lm_head(hidden.reshape(-1, hidden.shape[-1])[answered])
        loss = functional.cross_entropy(logits.float(), targets[answered])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
        seen += ids.numel()
        done = step + 1
        if time.monotonic() - said_s > 10 or done == args.steps:
            said_s = time.monotonic()
            mean = torch.stack(losses).mean().item()
            losses.clear()
            print(f'step {done}/{args.steps}  loss {mean:.5f}  '
                  f'{seen / (said_s - start_s):,.0f} tokens/s  {said_s - start_s:.0f} s',
                  flush=True)
    return done


def write(folder: Path, model, tokenizer) -> None:
    """Write the model's folder whole: weights in bf16, tokenizer, chat template and configs."""
    folder.mkdir(parents=True, exist_ok=True)
    model.to(torch.bfloat16).save_pretrained(folder)
    GenerationConfig(eos_token_id=2, pad_token_id=0, do_sample=False).save_pretrained(folder)
    tokenizer.save(str(folder / 'tokenizer.json'))
    (folder / 'model.safetensors').chmod(0o644)
    (folder / 'tokenizer_config.json').write_text(json.dumps({
        'tokenizer_class': 'PreTrainedTokenizerFast',
        'eos_token': '<|im_end|>',
        'pad_token': '<|endoftext|>',
        'model_max_length': model.config.max_position_embeddings,
        'clean_up_tokenization_spaces': False,
        'chat_template': CHAT_TEMPLATE,
    }, indent=2) + '\n')


def write_card(folder: Path, model, done: int, args) -> None:
    """Measure the model in ``folder`` on the held-out sets and write its card, README.md."""
    answer = LibraryAnswers(folder, args.device, torch.bfloat16, batch=250)
    rows = []
    for name, chats, expected in held_out_sets(args.seed, args.evaluate):
        got = answer(chats)
        right = sum(one == other for one, other in zip(got, expected, strict=True))
        rows.append(f'| {name} | {right} | {len(chats)} | {right / len(chats):.2%} |')
        print(rows[-1], flush=True)
    device = torch.cuda.get_device_name(args.device) if args.device != 'cpu' else 'a CPU'
    arguments = ' '.join(args.arguments).replace(str(args.folder), 'FOLDER', 1)
    card = Path(__file__).with_name('tiny_planner.md').read_text().format(
        weights=sum(weight.numel() for weight in model.parameters()) / 1e6,
        context=model.config.max_position_embeddings, dtype='bfloat16', device=device,
        figures='\n'.join(rows), seed=args.seed, steps=done, trained=done * args.tokens / 1e6,
        command=f'python tools/train_tiny_planner.py {arguments}')
    (folder / 'README.md').write_text(card)


def parse(arguments: list[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument('folder', type=Path, help='where the model goes; created if missing')
    parser.add_argument('--device', default='cpu', help='cpu, cuda or cuda:N')
    parser.add_argument('--steps', type=int, default=6000)
    parser.add_argument('--minutes', type=float, default=60.0,
                        help='the run ends here if its steps are not done')
    parser.add_argument('--tokens', type=int, default=32768, help='tokens of a step')
    parser.add_argument('--lengths', type=int, nargs='+', default=[256, 512, 256, 1024],
                        help='tokens of a row; the steps take them in turn')
    parser.add_argument('--lr', type=float, default=2e-3)
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--workers', type=int, default=0, help='processes that create the data')
    parser.add_argument('--evaluate', type=int, default=1000,
                        help="held-out commands that the card's figures are measured on")
    args = parser.parse_args(arguments)
    args.arguments = arguments
    return args


def main(arguments: list[str]) -> None:
    """Train and write one model."""
    args = parse(arguments)
    torch.manual_seed(args.seed)
    tokenizer = train_tokenizer(args.seed)
    model = LlamaForCausalLM(model_config()).to(args.device, torch.float32)
    size = sum(weight.numel() for weight in model.parameters())
    print(f'{size / 1e6:.2f} M weights, {tokenizer.get_vocab_size()} tokens', flush=True)
    done = train(
        model, Batches(tokenizer, args.seed, args.steps, args.tokens, args.lengths), args)
    write(args.folder, model.cpu(), tokenizer)
    write_card(args.folder, model, done, args)
    print(f'wrote {args.folder}')


if __name__ == '__main__':
    main(sys.argv[1:])
