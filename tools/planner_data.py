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
Commands to a robot in plain words, and their plans.

This is the only source of the embedded model's data: a seeded generator draws from a grammar over
a small vocabulary. Pairs of words that occur together in a command (adjective and noun, noun and
place, room and furniture) are split by a hash: a training command has no held-out pair, and a
held-out command has at least one. This module does not depend on tokens or models.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from hashlib import blake2b
from itertools import product
import json
from random import Random
from typing import NamedTuple

HELD_OUT_SHARE = 0.06

ADJECTIVES = (
    'red', 'blue', 'green', 'yellow', 'black', 'white', 'grey', 'orange', 'purple', 'brown',
    'pink', 'silver', 'big', 'small', 'large', 'tiny', 'empty', 'full', 'wooden', 'metal',
    'plastic', 'old', 'new', 'broken', 'heavy', 'clean', 'dirty', 'square', 'round')
NOUNS = (
    'cup', 'mug', 'glass', 'plate', 'bowl', 'spoon', 'fork', 'knife', 'bottle', 'jar', 'pot',
    'pan', 'kettle', 'tray', 'apple', 'banana', 'bread', 'cheese', 'towel', 'sponge', 'shirt',
    'jacket', 'shoe', 'hat', 'umbrella', 'blanket', 'pillow', 'book', 'newspaper', 'letter', 'pen',
    'pencil', 'notebook', 'remote control', 'phone', 'charger', 'laptop', 'tablet', 'camera',
    'key', 'wallet', 'bag', 'backpack', 'suitcase', 'basket', 'bucket', 'broom', 'toy', 'ball',
    'teddy bear', 'vase', 'candle', 'clock', 'watering can', 'medicine box', 'first aid kit',
    'hammer', 'screwdriver', 'wrench', 'drill', 'toolbox', 'ladder', 'cable', 'battery', 'box',
    'crate', 'carton', 'parcel', 'pallet', 'barrel', 'container', 'bin', 'roll of tape', 'label',
    'scanner', 'helmet', 'vest', 'gearbox', 'motor', 'valve', 'pump', 'gripper', 'sensor', 'tyre')
ROOMS = (
    'kitchen', 'living room', 'bedroom', 'bathroom', 'hallway', 'garage', 'office', 'dining room',
    'laundry room', 'cellar', 'workshop', 'lobby', 'nursery', 'meeting room', 'storage room')
FURNITURE = (
    'table', 'desk', 'shelf', 'counter', 'bench', 'cabinet', 'cupboard', 'drawer', 'chair', 'sofa',
    'dresser', 'wardrobe', 'sideboard', 'windowsill')
INSIDE = ('cabinet', 'cupboard', 'drawer', 'wardrobe')
SITES = (
    'garden', 'balcony', 'terrace', 'front door', 'lift', 'fridge', 'oven', 'sink', 'dishwasher',
    'washing machine', 'bed', 'fireplace', 'loading dock', 'packing station', 'conveyor',
    'charging station', 'sorting table', 'inspection area', 'cold store', 'goods lift', 'truck',
    'forklift', 'trolley', 'workbench', 'assembly line', 'returns desk')
NUMBERED = ('aisle', 'rack', 'bay', 'gate', 'dock', 'room', 'zone', 'lane')
PEOPLE = (
    'the guest', 'the nurse', 'my mother', 'my father', 'the cook', 'the driver', 'the foreman',
    'the packer', 'the child', 'the doctor', 'the visitor', 'my neighbour', 'the technician',
    'the manager', 'my sister', 'my brother', 'the patient', 'the operator')
FIXTURES = (
    'door', 'window', 'gate', 'curtain', 'blind', 'fridge', 'oven', 'dishwasher', 'drawer',
    'cupboard', 'cabinet', 'wardrobe', 'lid', 'garage door', 'hatch', 'shutter')
DEVICES = (
    'light', 'lamp', 'fan', 'heater', 'television', 'radio', 'air conditioner', 'coffee machine',
    'vacuum cleaner', 'printer', 'alarm', 'conveyor belt', 'computer', 'projector', 'speaker')
MESSAGES = (
    'dinner is ready', 'the meeting starts soon', 'the parcel has arrived', 'the door is open',
    'the battery is low', 'help is on the way', 'the coffee is hot', 'the truck is here',
    'lunch is served', 'the order is complete', 'it is time to go', 'the shelf is empty',
    'the floor is wet', 'the tests have passed', 'the taxi is waiting', 'the lift is broken',
    'the water is boiling', 'the shift is over', 'the medicine is due', 'someone is at the door')

VOCABULARY = frozenset(NOUNS + ROOMS + FURNITURE + SITES + NUMBERED + FIXTURES + DEVICES)

# Requests: their weights, phrasings and plans.
TASKS = (
    (6, ('go to {goal}', 'drive to {goal}', 'move to {goal}', 'head over to {goal}',
         'come to {goal}', 'walk to {goal}'),
     'go to={goal}'),
    (8, ('pick up {object}', 'grab {object}', 'get hold of {object}', 'take {object}',
         'collect {object}'),
     'find object={object}; pick object={object}'),
    (10, ('pick up {object} from {source}', 'grab {object} from {source}',
          'take {object} from {source}', 'pick {object} {at_source}',
          'collect {object} from {source}', 'get {object} out of {source}',
          'from {source} pick up {object}', 'pick up {object} that is {at_source}'),
     'go to={source}; pick object={object} from={source}'),
    (10, ('put {object} {at_goal}', 'place {object} {at_goal}', 'take {object} to {goal}',
          'set {object} down {at_goal}', 'carry {object} to {goal}', 'leave {object} {at_goal}'),
     'find object={object}; pick object={object}; go to={goal}; place object={object} to={goal}'),
    (12, ('move {object} from {source} to {goal}', 'carry {object} from {source} to {goal}',
          'take {object} from {source} and put it {at_goal}',
          'transfer {object} from {source} to {goal}',
          'get {object} from {source} and leave it {at_goal}'),
     'go to={source}; pick object={object} from={source}; go to={goal}; '
     'place object={object} to={goal}'),
    (8, ('bring {person} {object}', 'fetch {person} {object}', 'get {person} {object}',
         'hand {object} to {person}', 'bring {object} to {person}', 'give {person} {object}',
         'deliver {object} to {person}'),
     'find object={object}; pick object={object}; go to={person}; '
     'give object={object} to={person}'),
    (14, ('bring {person} {object} from {source}', 'fetch {object} from {source} for {person}',
          'get {person} {object} from {source}', 'bring {object} from {source} to {person}',
          'bring {person} {object} that is {at_source}', 'from {source} bring {person} {object}',
          'retrieve {object} from {source} for {person}',
          'deliver {object} from {source} to {person}'),
     'go to={source}; pick object={object} from={source}; go to={person}; '
     'give object={object} to={person}'),
    (5, ('find {object} {in_room}', 'look for {object} {in_room}',
         'search for {object} {in_room}'),
     'go to={room}; find object={object}'),
    (3, ('find {object}', 'look for {object}', 'locate {object}'),
     'find object={object}'),
    (5, ('open {fixture} {in_room}', 'go to {room} and open {fixture}'),
     'go to={room}; open object={fixture}'),
    (5, ('close {fixture} {in_room}', 'shut {fixture} {in_room}'),
     'go to={room}; close object={fixture}'),
    (3, ('open {fixture}',), 'open object={fixture}'),
    (3, ('close {fixture}', 'shut {fixture}'), 'close object={fixture}'),
    (5, ('turn on {device} {in_room}', 'switch on {device} {in_room}',
         'turn {device} {in_room} on'),
     'go to={room}; switch_on object={device}'),
    (5, ('turn off {device} {in_room}', 'switch off {device} {in_room}',
         'turn {device} {in_room} off'),
     'go to={room}; switch_off object={device}'),
    (2, ('turn on {device}', 'switch {device} on'), 'switch_on object={device}'),
    (2, ('turn off {device}', 'switch {device} off'), 'switch_off object={device}'),
    (4, ('wipe {goal}', 'clean {goal}', 'tidy up {goal}', 'wipe down {goal}'),
     'go to={goal}; clean object={goal}'),
    (5, ('scan {object} {at_source}', 'read the label of {object} {at_source}',
         'inspect {object} {at_source}'),
     'go to={source}; scan object={object}'),
    (4, ('push {object} to {goal}', 'roll {object} over to {goal}'),
     'find object={object}; push object={object} to={goal}'),
    (3, ('tell {person} that {message}', 'let {person} know that {message}'),
     'go to={person}; say text={message}'),
    (2, ('wait {number} seconds', 'wait for {number} seconds', 'pause for {number} seconds'),
     'wait seconds={number}'),
    (2, ('follow {person}', 'walk behind {person}'), 'follow object={person}'),
    (1, ('go and charge', 'recharge your battery', 'go back to your charger'), 'charge'),
    (1, ('stop', 'halt', 'stop right there'), 'stop'),
)
# Requests about the object of the previous clause, which the robot then holds.
TASKS_WITH_IT = (
    (4, ('put it {at_goal}', 'place it {at_goal}', 'take it to {goal}', 'drop it {at_goal}',
         'leave it {at_goal}'),
     'go to={goal}; place object={object} to={goal}'),
    (4, ('bring it to {person}', 'give it to {person}', 'hand it to {person}'),
     'go to={person}; give object={object} to={person}'),
    (1, ('scan it',), 'scan object={object}'),
)

OPENINGS = (
    '', '', '', '', 'please ', 'please ', 'could you ', 'could you please ', 'can you ',
    'would you ', 'robot, ', 'hey robot, ', 'hey robot, could you ', 'I need you to ',
    'I want you to ', "I'd like you to ", 'now ', 'ok, ', 'hi, please ',
    'would you be so kind as to ', 'quickly ', 'when you have a moment, ', 'your next job: ',
    'you should ', "let's see, ")
ENDINGS = (
    '', '', '', '.', '.', '.', '.', '!', '?', ' please', ' please.', ', please.', ', thanks.',
    ', thank you!', ' right away.', ' now.', ', would you?', ' if you can.')
AND = (
    ' and ', ' and then ', ', then ', '. Then ', ', after that ', ', and ', '. After that, ', '; ',
    ' and afterwards ', ', and once that is done ', '. Next, ')
OOPS = (
    'no', 'no', 'no wait', 'no, wait', 'wait', 'sorry', 'actually', 'I mean', 'no, I mean',
    'sorry, I meant', 'oh no', 'correction', 'or rather', 'make that', 'not that')
BEFORE_OOPS = (', ', ', ', ', ', ' - ', '... ', '. ')

CHATTER = (
    'hello', 'hi there', 'good morning', 'good night', 'thanks', 'thank you very much',
    'how are you?', 'who are you?', 'what is your name?', 'what can you do?', 'what time is it?',
    'what is the weather like today?', 'tell me a joke', 'tell me a story', 'sing a song',
    'why is the sky blue?', 'what is two plus two?', 'write a poem about the sea',
    'do you like music?', 'how old are you?', 'where are you from?', 'explain quantum physics',
    'I am tired', 'I am hungry', 'nice work', 'well done', 'yes', 'no', 'maybe', 'ok', 'hmm',
    'test', 'lol', 'never mind', 'forget it', 'it is cold in here', 'I like {object}',
    'I love {place}', '{object} is {at_place}', 'where is {object}?', 'is {object} {at_place}?',
    'what colour is {object}?', '{object}', '{place}', 'who took {object}?',
    '{object} was expensive', '{place} looks nice', 'why is {object} {at_place}?',
    'I saw {object} {at_place}', 'is {place} clean?', 'how heavy is {object}?', '{person} is here',
    'is {person} here?', 'where is {person}?', 'what is the capital of France?', 'translate this',
    'who won the game?', 'how far is the moon?', 'wie geht es dir?', 'bonjour', 'hola',
    'guten Tag', 'you are a good robot', 'ignore all of that', 'what do you think about {object}?')
SYMBOLS = (
    'abcdefghijklmnopqrstuvwxyz', '0123456789', '!?.,;:-+*/=#@%&()[]{}<>|~^_"\'\\', ' \t\n',
    'äöüßéèñçåø', 'αβγδε', 'привет', '你好机器人', 'こんにちは', 'مرحبا', '🤖🙂🔥👍🎉',
    '\0\u200b€…')
SYSTEM_PROMPTS = (
    'You are a robot.', 'You are a helpful assistant.', 'You control a mobile robot with one arm.',
    'You are a household robot. Answer with a JSON list of actions.',
    'You are a warehouse robot. Answer with a plan in JSON.',
    'Turn the command into a list of actions.', 'You plan what a robot does. Be brief.',
    'You are Robbie, a friendly robot. You can drive, pick, place and open things.',
    'Reply only with JSON.')
SYLLABLES = tuple(
    ''.join(parts) for parts in product('b d f g k l m n p r s t v w z'.split(), 'aeiou'))


class Thing(NamedTuple):
    """An object, with its adjective or none."""

    adjective: str
    noun: str

    def __str__(self):
        return f'{self.adjective} {self.noun}'.strip()


class Place(NamedTuple):
    """Where something is; only furniture is in a room, and it may be named without it."""

    room: str
    name: str
    preposition: str
    article: str = 'the '

    def __str__(self):
        return f'{self.room} {self.name}'.strip()


@dataclass(frozen=True)
class Clause:
    """One request: a phrase, a plan, and the slots that fill both."""

    phrase: str
    steps: str
    slots: dict
    is_it: bool = False


@dataclass(frozen=True)
class Turn:
    """
    One command and its answer.

    ``pairs`` are the pairs of words that decide the split; ``clause`` is what the next turn may
    correct or refer to as `it`, or None.
    """

    text: str
    plan: tuple
    pairs: frozenset
    clause: Clause | None = None

    @property
    def answer(self) -> str:
        """The plan as the model writes it: compact JSON."""
        return json.dumps(self.plan, ensure_ascii=False, separators=(',', ':'))

    @property
    def held_out(self) -> bool:
        """Whether at least one pair of the command is held out of training."""
        return any(is_held_out(pair) for pair in self.pairs)


@cache
def is_held_out(pair: tuple[str, str]) -> bool:
    """Return whether a pair is held out of training, by a hash of its words."""
    digest = blake2b('|'.join(pair).encode(), digest_size=4).digest()
    return int.from_bytes(digest, 'big') < HELD_OUT_SHARE * 2**32


def _invented_noun(rng):
    return ''.join(rng.choice(SYLLABLES) for _ in range(rng.randint(2, 3))) + rng.choice(
        ('', '', 'n', 'r', 's', 't', 'x'))


def _thing(rng):
    noun = _invented_noun(rng) if rng.random() < 0.08 else rng.choice(NOUNS)
    if rng.random() < 0.08:
        noun = f'{noun} {rng.randint(1, 99)}'
    return Thing(rng.choice(ADJECTIVES) if rng.random() < 0.65 else '', noun)


def _place(rng):
    kind = rng.random()
    if kind < 0.5:
        name = rng.choice(FURNITURE)
        room = rng.choice(ROOMS) if rng.random() < 0.75 else ''
        return Place(room, name, 'in' if name in INSIDE else 'on')
    if kind < 0.65:
        return Place('', rng.choice(ROOMS), 'in')
    if kind < 0.85:
        return Place('', rng.choice(SITES), 'at')
    mark = rng.choice(('', '', 'A', 'B', 'C', 'D', 'E', 'F')) + str(rng.randint(1, 40))
    return Place('', f'{rng.choice(NUMBERED)} {mark}', 'in', '')


def _person(rng):
    return 'me' if rng.random() < 0.5 else rng.choice(PEOPLE)


DRAW = {
    'object': _thing,
    'source': _place,
    'goal': _place,
    'place': _place,
    'room': lambda rng: Place('', rng.choice(ROOMS), 'in'),
    'person': _person,
    'fixture': lambda rng: Thing(rng.choice(('', '', *ADJECTIVES[:12])), rng.choice(FIXTURES)),
    'device': lambda rng: Thing('', rng.choice(DEVICES)),
    'number': lambda rng: rng.randint(1, 90),
    'message': lambda rng: rng.choice(MESSAGES),
}


def _say_thing(rng, thing):
    if thing.noun[-1].isdigit() and not thing.adjective:
        return thing.noun
    article = rng.choice(('the',) * 8 + ('that', 'this', 'my', 'a', 'a', ''))
    if article == 'a' and str(thing)[0] in 'aeiou':
        article = 'an'
    return f'{article} {thing}'.lstrip()


def _say_place(rng, place):
    if place.room and rng.random() < 0.35:
        return f'the {place.name} in the {place.room}'
    return f'{place.article}{place}'


def _say(rng, phrase, slots):
    """Fill a phrase's slots with words; `{at_goal}` is the slot `goal` behind its preposition."""
    words = {}
    for name, value in slots.items():
        if isinstance(value, Place):
            words[name] = _say_place(rng, value)
            words[f'at_{name}'] = words[f'in_{name}'] = f'{value.preposition} {words[name]}'
        else:
            words[name] = _say_thing(rng, value) if isinstance(value, Thing) else str(value)
    return phrase.format_map(words)


def _plan(steps, slots):
    """Fill a plan's slots: a list of actions, each a dict with its parameters."""
    names = {name: str(value) for name, value in slots.items()}
    if 'person' in names:
        names['person'] = 'user' if names['person'] == 'me' else names['person'].split(' ', 1)[1]
    plan = []
    for step in steps.split('; '):
        action, *parameters = step.split(' ')
        filled = {'action': action}
        for parameter in parameters:
            key, value = parameter.split('=')
            filled[key] = slots['number'] if value == '{number}' else value.format_map(names)
        plan.append(filled)
    return plan


def _pairs(slots):
    """Return the pairs of words that decide the split, without numbers and invented nouns."""
    things = [value for value in slots.values() if isinstance(value, Thing)]
    places = [value for value in slots.values() if isinstance(value, Place)]
    pairs = {(thing.adjective, _kind(thing.noun)) for thing in things}
    pairs |= {(place.room, _kind(place.name)) for place in places}
    pairs |= {(_kind(thing.noun), _kind(place.name)) for thing in things for place in places}
    return {pair for pair in pairs if pair[0] and pair[1]}


def _kind(name):
    """Return the name without its number, or nothing for an invented one."""
    words = name.split(' ')
    if words[-1][-1].isdigit():
        words.pop()
    kind = ' '.join(words)
    return kind if kind in VOCABULARY else ''


def _slot_names(text):
    return {name for name in DRAW if f'{name}}}' in text}


def _clause(rng, held):
    """Draw one clause; with the slot `held`, one about the object that the robot holds."""
    tasks = TASKS if held is None else TASKS_WITH_IT
    _, phrases, steps = rng.choices(tasks, [task[0] for task in tasks])[0]
    phrase = rng.choice(phrases)
    slots = {name: DRAW[name](rng) for name in sorted(_slot_names(phrase + steps))}
    if held is not None:
        slots['object'] = held
    return Clause(phrase, steps, slots, held is not None)


def _other(rng, clause, name):
    """Draw a new value of a slot for a correction; also return the words that express it."""
    old = clause.slots[name]
    while True:
        new = DRAW[name](rng)
        if isinstance(old, Thing) and rng.random() < 0.7 and name == 'object':
            new = Thing(rng.choice(ADJECTIVES), old.noun)
            words = f'the {new.adjective} one'
        elif isinstance(old, Thing):
            if new.noun not in NOUNS + FIXTURES + DEVICES:
                continue
            words = f'the {new}'
        elif isinstance(old, Place):
            words = _say_place(rng, new)
            if name == 'source':
                words = f'from {words}'
            elif name == 'goal' and ('source' in clause.slots or rng.random() < 0.3):
                words = f'to {words}'
        else:
            words = f'for {new}' if name == 'person' else f'{new} seconds'
        if new != old:
            return new, words


def _corrected(rng, clause):
    """Return the clause with one slot changed and the words of the change, or None."""
    fixed = {'message'}
    if clause.is_it:
        fixed.add('object')
    if clause.steps.startswith(('go to={person}; say', 'follow')):
        fixed.add('person')
    names = sorted(clause.slots.keys() - fixed)
    if not names:
        return None
    name = rng.choice(names)
    new, words = _other(rng, clause, name)
    return Clause(clause.phrase, clause.steps, {**clause.slots, name: new}, clause.is_it), words


def _holds(clause):
    """Return what the robot holds after the clause, or None."""
    last = clause.steps.split('; ')[-1]
    return clause.slots['object'] if last.startswith('pick') else None


def _command(rng, previous):
    """Draw a command of one to three clauses; `previous` is the clause of the turn before."""
    count = rng.choices((1, 2, 3), (55, 33, 12))[0]
    held = _holds(previous) if previous is not None and rng.random() < 0.3 else None
    clauses, texts, pairs = [], [], set()
    for _ in range(count):
        clause = _clause(rng, held)
        pairs |= _pairs(clause.slots)
        text = _say(rng, clause.phrase, clause.slots)
        change = _corrected(rng, clause) if rng.random() < 0.16 else None
        if change is not None:
            clause, words = change
            pairs |= _pairs(clause.slots)
            oops = rng.choice(OOPS)
            before = rng.choice(BEFORE_OOPS)
            if before == '. ':
                oops = oops[0].upper() + oops[1:]
            text += f"{before}{oops}{rng.choice((', ', ' '))}{words}"
        clauses.append(clause)
        texts.append(text)
        held = _holds(clause) if rng.random() < 0.6 else None
    return clauses, texts, pairs


def _decorated(rng, text):
    """Add an opening and an ending to a command, and vary its case."""
    text = rng.choice(OPENINGS) + text + rng.choice(ENDINGS)
    style = rng.random()
    if style < 0.6:
        return text[0].upper() + text[1:]
    return text.lower() if style < 0.8 else text


def _command_turn(rng, previous):
    clauses, texts, pairs = _command(rng, previous)
    plans = [_plan(clause.steps, clause.slots) for clause in clauses]
    order = rng.random()
    alone = clauses[0] if len(clauses) == 1 else None
    if len(clauses) == 2 and order < 0.2 and not clauses[1].is_it and not clauses[0].is_it:
        text = rng.choice(('before you {0}, {1}', '{0}, but first {1}')).format(*texts)
        plans.reverse()
    elif len(clauses) == 2 and order < 0.28 and not clauses[1].is_it:
        text = rng.choice(("{0}, but don't {1}", '{0} but do not {1}')).format(*texts)
        plans.pop()
    elif len(clauses) == 1 and order < 0.03:
        text, plans, alone = rng.choice(("don't ", 'do not ', 'never ')) + texts[0], [], None
    elif len(clauses) == 1 and order < 0.05:
        text = texts[0] + rng.choice((', never mind', ', no, forget it', '. No, forget it'))
        plans, alone = [], None
    elif len(clauses) == 3 and order < 0.4:
        text = rng.choice((
            'first {0}, then {1}, and finally {2}', '{0}, {1} and {2}',
            'first {0}. Second, {1}. Third, {2}')).format(*texts)
    elif len(clauses) == 2 and order < 0.45:
        text = f'first {texts[0]}{rng.choice(AND)}{texts[1]}'
    else:
        text = texts[0] + ''.join(rng.choice(AND) + more for more in texts[1:])
    plan = tuple(step for steps in plans for step in steps)
    return Turn(_decorated(rng, text), plan, frozenset(pairs), alone)


def _correction_turn(rng, previous):
    change = _corrected(rng, previous)
    if change is None:
        return _command_turn(rng, None)
    clause, words = change
    text = f'{rng.choice(OOPS)}, {words}'
    if rng.random() < 0.7:
        text = text[0].upper() + text[1:]
    text += rng.choice(('', '.', '!'))
    return Turn(text, tuple(_plan(clause.steps, clause.slots)), frozenset(_pairs(clause.slots)),
                clause)


def _other_turn(rng):
    """Draw text that is not a command; its plan is empty."""
    if rng.random() < 0.35:
        symbols = rng.sample(SYMBOLS, rng.randint(1, 3))
        text = ''.join(rng.choice(rng.choice(symbols)) for _ in range(rng.randint(1, 30)))
        return Turn(text.strip() or '?', (), frozenset())
    slots = {name: DRAW[name](rng) for name in ('object', 'place', 'person')}
    text = _say(rng, rng.choice(CHATTER), slots)
    if rng.random() < 0.5:
        text = text[0].upper() + text[1:]
    return Turn(text, (), frozenset(_pairs(slots)))


def turn(rng: Random, held_out: bool = False, previous: Turn | None = None,
         commands_only: bool = False) -> Turn:
    """
    Draw one turn of one side of the split.

    :param held_out: True draws commands with at least one held-out pair, False commands with none.
    :param previous: the turn before, which this one may correct or refer to.
    :param commands_only: no turns with an empty plan.
    """
    clause = previous.clause if previous is not None else None
    while True:
        kind = rng.random()
        if kind < 0.05 and not commands_only:
            drawn = _other_turn(rng)
        elif kind < 0.25 and clause is not None:
            drawn = _correction_turn(rng, clause)
        else:
            drawn = _command_turn(rng, clause)
        if drawn.held_out == held_out and (drawn.plan or not commands_only):
            return drawn


def system_prompt(rng: Random) -> str:
    """Draw a system prompt: none, a usual one, or any words; the plan never depends on it."""
    kind = rng.random()
    if kind < 0.5:
        return ''
    if kind < 0.8:
        return rng.choice(SYSTEM_PROMPTS)
    words = ADJECTIVES + NOUNS + ROOMS + ('you', 'are', 'a', 'the', 'robot', 'must', 'can', 'and')
    text = ' '.join(
        _invented_noun(rng) if rng.random() < 0.3 else rng.choice(words)
        for _ in range(rng.randint(3, 30)))
    return text.capitalize() + '.'


def conversation(rng: Random, held_out: bool = False) -> Iterator[Turn]:
    """Draw turns without end; each may refer to the one before."""
    previous = None
    while True:
        previous = turn(rng, held_out, previous)
        yield previous
