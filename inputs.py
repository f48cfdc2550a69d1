"""What a run reads: a checkpoint in the format in which Meta publishes Llama 3, and prompts."""

import base64
import json
import subprocess
import sys
import time
from argparse import ArgumentTypeError
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import tiktoken
import torch

from kernels import pack
from support.attention import runs_flash_attn

HERE = Path(__file__).resolve().parent
SMOLLM2 = HERE / "models" / "SmolLM2-135M-Instruct"
PROMPTS = HERE / "sharegpt-filtered.json"


@contextmanager
def or_exit(sentence):
    """End the program with this sentence if the `with` block fails because of the user's input."""
    try:
        yield
    except Exception as error:
        sys.exit(" ".join(f"{sentence} ({type(error).__name__}: {error}".split())[:250] + ").")


def at_least(least, kind=int):
    """A type for argparse: numbers from `least` on, and below 1e9."""

    def number(text):
        if not least <= kind(text) < 1e9:
            raise ArgumentTypeError(f"{text} is not a number from {least} to 1e9")
        return kind(text)

    return number


def writable(file):
    """A type for argparse: a file that can be written. Better to know before the run than after."""
    try:
        open(file, "a").close()
    except OSError as error:
        raise ArgumentTypeError(f"{file} cannot be written ({error.strerror})") from error
    return file


def block_size_for(args, usual):
    """args.block_size, or else the usual one or the kernel's; ends the program if that won't do."""
    unit = 256 if runs_flash_attn(args.device, getattr(torch, args.dtype)) else 1
    size = args.block_size or max(usual, unit)
    if size % unit:
        sys.exit(f"--block-size {size} does not work: this kernel takes multiples of {unit}.")
    return size


def load(args):
    """Returns (params, weights by Meta's names), the tokenizer and the chat markup of args.model.

    A folder of one shard as Meta publishes Llama 3 (original/); SmolLM2 is built if it is missing.
    Two things differ from the file: matrices that multiply the same vector are one (attention.wqkv,
    feed_forward.w13), and "output" is there even if it is the embeddings.
    """
    files = [Path(file).resolve() for file in (args.prompts, args.json, args.trace) if file]
    if len(set(files)) < len(files):
        sys.exit("--prompts, --json and --trace have to be different files.")
    build = [sys.executable, HERE / "models" / "smollm2.py"]
    if args.model == SMOLLM2 and not SMOLLM2.exists() and subprocess.run(build).returncode:
        sys.exit(1)
    with or_exit(f"{args.model} cannot be loaded as a Llama 3 checkpoint of one shard"):
        params = json.loads((args.model / "params.json").read_text())
        (shard,) = args.model.glob("consolidated.*.pth")
        w = torch.load(shard, mmap=args.device == "cuda", weights_only=True)
        to = (args.device, getattr(torch, args.dtype))
        w = {name.removesuffix(".weight"): weight.to(*to) for name, weight in w.items()}
        for i in range(params["n_layers"]):
            for name in ("attention.wqkv", "feed_forward.w13"):
                module, parts = name.split(".w")
                matrices = [w.pop(f"layers.{i}.{module}.w{part}") for part in parts]
                w[f"layers.{i}.{name}"] = torch.cat(matrices)
        for name in w:
            if w[name].dim() == 2 and name != "tok_embeddings":
                w[name] = pack(w[name])
        # The small models of Llama 3.2 have no output matrix: they use the embeddings.
        w.setdefault("output", pack(w["tok_embeddings"]))
        # A checkpoint whose tokenizer or chats are not Llama 3's says so in params.json.
        chat = params.get("chat") or json.loads((HERE / "models" / "llama3-chat.json").read_text())
        lines = (args.model / "tokenizer.model").read_bytes().splitlines()
        ranks = {base64.b64decode(token): int(rank) for token, rank in map(bytes.split, lines)}
        names = {"pat_str": chat["pattern"], "special_tokens": chat["special_tokens"]}
        return (params, w), tiktoken.Encoding("", mergeable_ranks=ranks, **names), chat


def read_turns(args, encoding, chat, n_turns):
    """The first Turn of args.n conversations, in which there are n_turns at most.

    The tokens have chat markup, which in a later turn ends the answer before it.
    """
    first, later, after = (
        encoding.encode(chat[end] + chat[start], allowed_special="all")
        for end, start in (("begin", "user"), ("end", "user"), ("end", "assistant"))
    )
    with or_exit(f"{args.prompts} is not a JSON file in ShareGPT's schema"):
        said = []  # What the human says in each conversation.
        conversations = json.loads(Path(args.prompts).read_text(encoding="utf-8-sig"))
        for turns in (c["conversations"] for c in conversations):
            if turns and turns[0]["from"] in ("human", "user") and turns[0]["value"]:
                said.append([t["value"] for t in turns if t["from"] in ("human", "user")])
        if skipped := len(conversations) - len(said):
            print(f"{skipped} conversations do not begin with a human: skipped.", file=sys.stderr)
        if not said:
            raise ValueError("no conversation begins with a human")
        # encode_ordinary: markup that a user typed stays text.
        turns = []
        for n in range(args.n):
            text, *others = said[n % len(said)][:n_turns]
            parts = [[*later, *encoding.encode_ordinary(other), *after] for other in others]
            prompt = [*first, *encoding.encode_ordinary(text), *after]
            turns.append(Turn((n, 0), text, prompt, list(zip(others, parts, strict=True))))
    if (longest := max(len(turn.prompt) for turn in turns)) >= args.max_seq_len:
        sys.exit(f"--max-seq-len {args.max_seq_len} is too short for a prompt of {longest} tokens.")
    return turns


def read_prompts(args, encoding, chat):
    """The first turns of args.n conversations: their texts, and their tokens with chat markup."""
    turns = read_turns(args, encoding, chat, 1)
    return [turn.text for turn in turns], [turn.prompt for turn in turns]


@dataclass(eq=False)
class Turn:
    """A request: one turn of a conversation, with all that was said before."""

    place: tuple  # Number of the conversation, number of the turn.
    text: str
    prompt: list
    later: list  # (text, tokens with chat markup) of the turns that will follow.

    def __post_init__(self):
        self.tokens = list(self.prompt)  # And the answer behind it.
        self.arrived = time.perf_counter()
        self.first_token = self.last_token = None  # Seconds after that.

    def longest(self, args):
        """The most tokens that the conversation can come to."""
        said = [self.prompt, *(tokens for _, tokens in self.later)]
        return sum(len(tokens) + args.max_new_tokens for tokens in said)

    def add(self, token):
        self.tokens.append(token)
        self.last_token = time.perf_counter() - self.arrived
        self.first_token = self.first_token or self.last_token

    def ended(self, stop, args):
        limit = min(len(self.prompt) + args.max_new_tokens, args.max_seq_len)
        answered = len(self.tokens) > len(self.prompt)
        return answered and (self.tokens[-1] in stop or len(self.tokens) >= limit)

    def following(self, stop, args):
        """The conversation's next turn as a list, empty after the last or where it is too long."""
        answered = self.tokens[:-1] if self.tokens[-1] in stop else self.tokens
        turns = [
            Turn((self.place[0], self.place[1] + 1), text, answered + tokens, self.later[1:])
            for text, tokens in self.later[:1]
        ]
        return [turn for turn in turns if len(turn.prompt) < args.max_seq_len]
