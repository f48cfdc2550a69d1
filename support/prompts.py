"""The requests of a run: prompts out of a file in ShareGPT's schema, their answers, their order."""

import json
import random
import sys
import time
from pathlib import Path

from support.checkpoint import or_exit

PROMPTS = Path(__file__).resolve().parent.parent / "sharegpt-filtered.json"


class Request:
    """A prompt and its answer: one turn of a conversation, with all that was said before."""

    def __init__(self, place, text, prompt, later, args):
        self.place, self.text = place, text  # place: conversation and turn, counted from 0.
        self.prompt, self.tokens = prompt, list(prompt)  # tokens: the answer behind it, too.
        self.later = later  # (text, tokens with chat markup) of the turns that will follow.
        self.limit = min(len(prompt) + args.max_new_tokens, args.max_seq_len)  # Of tokens.
        self.arrived = time.perf_counter()
        self.first_token = self.last_token = None  # Seconds after that.

    def add(self, token):
        self.tokens.append(token)
        self.last_token = time.perf_counter() - self.arrived
        self.first_token = self.first_token or self.last_token

    def ended(self, stop):
        """Whether the answer that has begun is complete."""
        return self.tokens[-1] in stop or len(self.tokens) >= self.limit

    def longest(self, args):
        """The most tokens that the conversation can come to."""
        said = [self.prompt, *(tokens for _, tokens in self.later)]
        return sum(len(tokens) + args.max_new_tokens for tokens in said)

    def following(self, stop, args):
        """The conversation's next turn, or None after the last or where it is too long."""
        if not self.later:
            return None
        answered = self.tokens[:-1] if self.tokens[-1] in stop else self.tokens
        text, tokens = self.later[0]
        if len(answered) + len(tokens) >= args.max_seq_len:
            return None
        place = (self.place[0], self.place[1] + 1)
        return Request(place, text, answered + tokens, self.later[1:], args)


def humans(row):
    """What the human says in a conversation of ShareGPT's schema, or of OpenAI's, turn by turn.

    Turns of the system and of the model are left out. Raises ValueError where it is neither.
    """
    turns = row.get("conversations", row.get("messages")) if isinstance(row, dict) else None
    if not isinstance(turns, list):
        raise ValueError('it has no list of "conversations"')
    said = []
    for turn in turns:
        speaker = turn.get("from", turn.get("role")) if isinstance(turn, dict) else None
        text = turn.get("value", turn.get("content")) if isinstance(turn, dict) else None
        if not isinstance(speaker, str) or not isinstance(text, str):
            raise ValueError('a turn is not {"from": who, "value": text}')
        if not said and speaker not in ("human", "user", "system"):
            raise ValueError(f"it begins with {speaker}, not with a human")
        if speaker in ("human", "user"):
            said.append(text)
    if not said or not said[0]:
        raise ValueError("no human says anything first")
    return said


def conversations(file):
    """What the human says in each conversation of a JSON file, or of one with an object a line.

    Those that cannot be read are skipped, with one line on stderr. Raises ValueError if all are.
    """
    text = Path(file).read_text(encoding="utf-8-sig")
    by_line = text.lstrip().startswith("{")  # splitlines() would cut at U+2028, too.
    rows = [line for line in text.split("\n") if line.strip()] if by_line else json.loads(text)
    if not isinstance(rows, list):
        raise ValueError(f"a list of conversations is wanted, this is a {type(rows).__name__}")
    found, wrong = [], []
    for number, row in enumerate(rows, 1):
        try:
            found.append(humans(json.loads(row) if by_line else row))
        except ValueError as error:
            wrong.append(f"number {number}: {error}")
    if not found:
        raise ValueError("; ".join([f"none of {len(rows)} conversations can be used", *wrong[:1]]))
    if wrong:
        print(f"{len(wrong)} of {len(rows)} conversations skipped, {wrong[0]}.", file=sys.stderr)
    return found


def read_requests(args, encoding, chat, n_turns=1):
    """The first turns of args.n conversations, of which n_turns at most will be asked.

    Tokens have chat markup; a later turn begins with what ends the answer before it. With
    args.rate, requests arrive one by one at random, so many a second on average (Poisson).
    """
    first, later, after = (
        encoding.encode(chat[end] + chat[start], allowed_special="all")
        for end, start in (("begin", "user"), ("end", "user"), ("end", "assistant"))
    )
    with or_exit(f"{args.prompts} is not a JSON file in ShareGPT's schema"):
        said = conversations(args.prompts)
    requests = []
    with or_exit(f"{args.prompts} has a text that cannot be made into tokens"):
        for n in range(args.n):
            text, *others = said[n % len(said)][:n_turns]
            # encode_ordinary: markup that a user typed stays text.
            parts = [[*later, *encoding.encode_ordinary(other), *after] for other in others]
            prompt = [*first, *encoding.encode_ordinary(text), *after]
            following = list(zip(others, parts, strict=True))
            requests.append(Request((n, 0), text, prompt, following, args))
    if (longest := max(len(request.prompt) for request in requests)) >= args.max_seq_len:
        sys.exit(f"--max-seq-len {args.max_seq_len} is too short for a prompt of {longest} tokens.")
    draw, delay = random.Random(args.seed), 0.0
    for request in requests if args.rate else []:
        delay += draw.expovariate(args.rate)
        request.arrived += delay
    return requests


def arrive(coming, waiting, running):
    """Move the requests that have arrived by now from one deque to the other. If none waits or
    runs, sleep until the first one is here."""
    while coming and (not (waiting or running) or coming[0].arrived <= time.perf_counter()):
        time.sleep(max(0, coming[0].arrived - time.perf_counter()))
        waiting.append(coming.popleft())


def next_tokens(running, positions, chunk=1024):
    """The new tokens of a step: {row: list of tokens}. Prompts first.

    While a prompt is not read to its end, a step reads prompts, 1,024 tokens in all and `chunk` of
    a row at most, and rows with a single new token wait. running: {row: request}; positions: where
    in its text each row goes on. (The order of vLLM's first scheduler)
    """
    unread = {row: r.tokens[positions[row] :][:chunk] for row, r in running.items()}
    new, n = {}, 0
    for row, tokens in unread.items():
        if len(tokens) > 1 and n + len(tokens) <= 1024:
            new[row] = tokens
            n += len(tokens)
    return new or unread
