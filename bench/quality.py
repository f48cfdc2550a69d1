"""What forgetting costs, and compressing: each cache against full attention.

    python bench/quality.py                                 all parts, over an hour on two cores
    python bench/quality.py --only kept needle --lengths 1000 --depths 4   some of them
    python bench/quality.py --only needle --lengths 32768 --depths 3     beyond the model's context

speed       a decode step as the context grows, and of several rows: milliseconds, those of
            attention, bytes in HBM; for full attention, milliseconds to copy these bytes
kept        of full attention over 4,096 tokens: how often the greedy token is the same, the KL
            divergence (nats) of the next token's distribution, bytes in HBM over 4,096
perplexity  of Python's manual (pydoc_data.topics), along the text
needle      one line with a number, in noise (RULER, niah_single): how often the model repeats it

A policy has its HBM for sink, window and what comes back: the window has a quarter of it where
blocks come back, the sink 16 tokens. Texts are read in chunks, so that a token sees up to a chunk
more; HBM has room for that besides. The JSON file is written after each case.
"""

import math
import random
import statistics
import time
from argparse import Namespace
from collections import deque
from contextlib import redirect_stdout
from copy import deepcopy
from functools import partial
from pydoc_data.topics import topics

import torch
import torch.nn.functional as F
from common import arguments, earlier, in_turn, load_script, median, save, table

from caches.codecs import MiniCache
from caches.compressed import CODECS, CompressedCache
from caches.retrieval import RetrievalCache
from kvcache import PagedCache, blocks_for
from support import attention
from support.arguments import run
from support.report import Stats

SHARES, BUCKET, CONTEXT = (2, 4, 8, 16), 1024, 8192  # CONTEXT: SmolLM2's.
GOLDEN = (5**0.5 - 1) / 2  # Its multiples, modulo 1, lie well spread, however many there are.
NOISE = "The hills are brown. A cart goes by. The bread is warm. Somebody hums. It is late. "
NEEDLE = "Remember: the code of the {key} is {number}. "
QUESTION, ANSWER = "Question: what is the code of the {key}?", "The code of the {key} is"
COMPRESSED = {name: {"compress": name} for name in CODECS}  # Policies that keep all, in less.


def policies(hbm):
    """The two ways to spend this many tokens of HBM, as arguments of llama3-tiered.py."""
    window = hbm // 4
    return {
        "sink + window": {"sink": 16, "window": hbm - 16},
        "retrieval": {"sink": 16, "window": window, "top_k": hbm - window - 16},
    }


class OneForTwo(MiniCache):
    """Instead of merging two layers, the second one reads the first one's keys and values."""

    def encode(self, kv):
        kv = kv.clone()
        kv[:, self.first + 1 :: 2] = kv[:, self.first :: 2]
        return super().encode(kv)


class Bench:
    """The model, and one text at a time that goes through it under a policy."""

    def __init__(self, *options):
        attention.flash_attn_kernel = None  # It does not take blocks of 16 tokens and fewer.
        self.script = load_script("llama3-tiered")
        # Room for 8,680 of SmolLM2's tokens: find() copies caches.
        self.args = self.script.parser.parse_args(["1", "--kv-gb", "0.2", *options])
        self.model, self.encoding, self.chat = self.script.load(self.args)
        with redirect_stdout(None):
            self.stats = Stats(self.args, self.model[0])
        self.attention_s = 0.0  # Spent in attention; on CUDA, calls return before it is computed.

    def cache(self, n, rows=1, **policy):
        """A cache whose rows are for texts of n tokens. No policy: full attention."""
        args = Namespace(**{**vars(self.args), **policy})
        place = (self.stats.shape, self.stats.dtype, args.device)
        if codec := policy.get("compress"):
            cache = CompressedCache(codec, rows * blocks_for(n, 32), 32, rows, n, *place)
        elif policy:  # Of one row.
            cache = self.script.make_cache(args, self.model[0], self.stats, n)
        else:
            cache = PagedCache(rows * blocks_for(n, 16), 16, rows, n, *place)
        for _ in range(rows):
            cache.admit([0] * n)
        return cache

    def step(self, cache, tokens, each=True):
        """Logits (T, vocab) after each of these tokens, or (1, vocab) after the last.

        They are the next ones of the only row, or one of each row."""
        first = cache.positions().tolist()
        seq_len, block_table = cache.tables(range(rows := len(first)))

        def attend(layer, some, q, k, v):
            start = time.perf_counter()
            # For logits after each, a token is a request to the model; to attention, a row is one.
            q, k, v = (x.flatten(0, 1).unflatten(0, (rows, -1)) for x in (q, k, v))
            places = {"cache_seqlens": seq_len, "block_table": block_table}
            if isinstance(cache, RetrievalCache):
                places = cache.retrieve(layer, [0], q, **places)
            if isinstance(cache, CompressedCache):
                attended = cache.attend(layer, q, k, v, **places)
            else:
                pair = cache.layer(layer)
                attended = attention.flash_attn_with_kvcache(q, *pair, k, v, **places, causal=True)
            self.attention_s += time.perf_counter() - start
            return attended

        new = [[token] for token in tokens] if each else [tokens]
        places = [first[i % rows] + i // rows for i in range(len(new))]
        logits = self.script.forward(self.model, new, places, attend)
        cache.advance({row: tokens[row::rows] for row in range(rows)})
        return logits

    def read(self, cache, tokens, chunk=None, each=True):
        """Logits after each token, or the last, of each chunk in turn."""
        chunk = chunk or getattr(cache, "chunk", 512)
        for start in range(0, len(tokens), chunk):
            yield self.step(cache, tokens[start : start + chunk], each).float()

    def logits(self, tokens, chunk=None, **policy):
        """Logits (T, vocab) after each token of a text, and the cache that is left."""
        cache = self.cache(len(tokens), **policy)
        return torch.cat(list(self.read(cache, tokens, chunk))), cache

    def manual(self, n):
        """The first n tokens of Python's manual."""
        text = "\n".join(topics[name] for name in sorted(topics))
        return self.encoding.encode_ordinary(text[: 10 * n])[:n]


# --- Speed ----------------------------------------------------------------------------------------


def timed(bench, call):
    """Milliseconds of a call, and of attention in it."""
    bench.attention_s, start = 0.0, time.perf_counter()
    call().flatten()[0].item()  # On CUDA, this waits for the result.
    ms = 1000 * (time.perf_counter() - start)
    return {"ms": ms, "attention_ms": 1000 * bench.attention_s}


def decode_steps(bench, n, rows, ways, rounds=15):
    """{policy: medians of a decode step of its rows}, behind n tokens of random numbers each."""
    caches = {name: bench.cache(n + 3 + rounds, rows, **way) for name, way in ways.items()}
    for cache in caches.values():
        size, chunk = cache.block_size, getattr(cache, "chunk", 512)
        for start in range(0, n, chunk):
            stored, new = int(cache.seq_len[0]), min(chunk, n - start)
            ids = cache.block_table[:, stored // size : blocks_for(stored + new, size)].flatten()
            cache.kv[:, :, ids] = torch.randn_like(cache.kv[:, :, ids])
            cache.advance({row: [0] * new for row in range(rows)})

    def step(name):
        tokens = random.choices(range(200), k=rows)
        return timed(bench, partial(bench.step, caches[name], tokens))

    in_turn(caches, 3, step)  # Warms up.
    figures = in_turn(caches, rounds, step)
    for name, cache in caches.items():
        size = figures[name]["hbm_bytes"] = int(cache.usage()[1] * bench.stats.bytes_per_token)
        if not ways[name]:
            here = cache.kv.flatten().view(torch.uint8)[:size]
            copy = partial(here.clone().copy_, here)
            figures[name]["copy_ms"] = median([timed(bench, copy) for _ in range(rounds)])["ms"]
    return figures


def speed(bench, args):
    """Contexts that grow, all in HBM or 1,024 tokens of them; several rows, all in HBM."""
    whole = {"full": {}, "int8": COMPRESSED["int8"], "int4": COMPRESSED["int4"]}
    for n, rows in [*((1024 * 2**i, 1) for i in range(8)), (280, 49), (4096, 8)]:
        ways = {**whole, **policies(1024)} if rows == 1 else whole
        ways = {name: ways[name] for name in ways if name in (args.policies or ways)}
        for name, figures in decode_steps(bench, n, rows, ways).items():
            yield {"context": n, "rows": rows, "policy": name, **figures}


# --- What is kept of full attention ---------------------------------------------------------------


def kept(bench, args):
    """Over the second half of 4,096 tokens of the manual."""
    tokens, half = bench.manual(4096), 2048
    full, _ = bench.logits(tokens)
    full = full[half:].log_softmax(1)
    cases = {(name, s): p for s in args.shares for name, p in policies(4096 // s).items()}
    cases |= {(name, None): policy for name, policy in COMPRESSED.items()}
    for (name, share), policy in cases.items():
        logits, cache = bench.logits(tokens, 16, **policy)
        here = logits[half:].log_softmax(1)
        same = (here.argmax(1) == full.argmax(1)).float().mean()
        kl = (full.exp() * (full - here)).sum(1).mean()
        size = cache.usage()[1] / len(tokens) * bench.stats.bytes_per_token
        case = {"policy": name, "share": share, "bytes_a_token": size}
        yield {**case, "same": float(same), "kl": float(kl)}


# --- Perplexity -----------------------------------------------------------------------------------


def losses(bench, tokens, chunk=None, **policy):
    """The mean negative log likelihood (nats) of each BUCKET tokens along the text."""
    cache, nats = bench.cache(len(tokens), **policy), []
    for logits in bench.read(cache, tokens[:-1], chunk):
        after = torch.tensor(tokens[len(nats) + 1 :][: len(logits)])
        nats += F.cross_entropy(logits.cpu(), after, reduction="none").tolist()
    return [statistics.mean(nats[start : start + BUCKET]) for start in range(0, len(nats), BUCKET)]


def perplexity(bench, args):
    """The losses of BUCKET tokens each; full attention as far as the model's context goes."""
    tokens, cases = bench.manual(args.tokens), {("full", None): {}}
    CODECS["one layer for two"] = OneForTwo
    for window in args.windows:
        cases |= {
            ("window", window): {"window": window},
            ("4 sinks + window", window): {"window": window, "sink": 4, "block_size": 4},
            ("retrieval", window): policies(window + 16)["retrieval"],
        }
    cases |= {(name, None): {"compress": name} for name in CODECS}
    for (name, window), policy in cases.items():
        if name in (args.policies or [name]):
            text, chunk = tokens if window else tokens[:CONTEXT], 32 if policy else None
            nats = losses(bench, text, chunk, **policy)
            yield {"policy": name, "window": window, "nats": nats}


# --- Needle ---------------------------------------------------------------------------------------


def needle_prompt(bench, n, depth, seed):
    """A chat of about n tokens with its answer, where its needle begins, and the number."""
    draw = random.Random(seed)
    key = draw.choice(["boat", "lamp", "river", "chair", "cloud", "stone", "train"])
    number = str(draw.randrange(10**6, 10**7))
    chat, encode = bench.chat, partial(bench.encoding.encode, allowed_special="all")
    head, line = encode(chat["begin"] + chat["user"]), encode(NOISE)
    needle = encode(NEEDLE.format(key=key, number=number))
    end = encode(QUESTION.format(key=key)) + encode(chat["end"] + chat["assistant"])
    end += encode(ANSWER.format(key=key))
    lines = (n - 10 - len(head + needle + end)) // len(line)
    after = lines - round(depth * lines)
    before = head + line * (lines - after)
    return before + needle + line * after + end, len(before), number


def answer(bench, cache, tokens):
    """The model's next ten tokens after these, as text."""
    new = [int(deque(bench.read(cache, tokens, each=False), maxlen=1)[0].argmax())]
    while len(new) < 10:
        new.append(int(bench.step(cache, new[-1:]).argmax()))
    return bench.encoding.decode(new)


def find(bench, n, prompts, policy):
    """Whether each number is in the model's answer, for prompts in the order of their needles.

    What is before a needle is read once, in the chunks of a whole text; answers go on from copies.
    """
    cache = bench.cache(n, **policy)
    chunk, start = getattr(cache, "chunk", 512), 0
    for tokens, begin, number in prompts:
        end = begin // chunk * chunk
        deque(bench.read(cache, tokens[start:end], each=False), maxlen=0)
        yield number in answer(bench, deepcopy(cache), tokens[end:])
        start = end


def needle(bench, args):
    """Needles spread over the text; those that FILE has are not looked for again. Beyond the
    model's context, HBM has room for 4,096 tokens. seconds: of the first, at the beginning."""
    for n in args.lengths:
        rooms = {s: n // s for s in args.shares} if n <= CONTEXT else {n // 4096: 4096}
        cases = {(name, s): p for s, hbm in rooms.items() for name, p in policies(hbm).items()}
        if n <= CONTEXT:
            cases |= {("full", 1): {}, **{(name, None): p for name, p in COMPRESSED.items()}}
        for (name, share), policy in cases.items():
            if name not in (args.policies or [name]):
                continue
            case = {"tokens": n, "policy": name, "share": share}
            known = (old for old in args.needles if case.items() <= old.items())
            case |= next(known, {"depths": [], "found": []})
            depths = {round(i * GOLDEN % 1, 3): i for i in range(args.depths)}
            depths = {d: i for d, i in sorted(depths.items()) if d not in case["depths"]}
            prompts = [needle_prompt(bench, n, depth, seed) for depth, seed in depths.items()]
            start = time.perf_counter()
            for depth, found in zip(depths, find(bench, n, prompts, policy), strict=True):
                case["depths"].append(depth)
                case["found"].append(found)
                case.setdefault("seconds", time.perf_counter() - start)
                yield case


# --- Tables ---------------------------------------------------------------------------------------


def print_tables(result):
    print("\nA decode step; HBM for 1,024 tokens (sink + window, retrieval) or for all")
    table(result.get("speed", []))
    print("\nAgainst full attention, 4,096 tokens, of which HBM has room for one in `share`")
    table(result.get("kept", []))
    print(f"\nPerplexity of Python's manual: its first {CONTEXT:,} tokens, those behind them")
    rows, n = [], CONTEXT // BUCKET
    for case in result.get("perplexity", []):
        row = {"policy": case["policy"], "HBM": case["window"]}
        for name, nats in (("first", case["nats"][:n]), ("behind", case["nats"][n:])):
            row[name] = math.exp(statistics.mean(nats)) if nats else None
        rows.append(row)
    table(rows)
    print("\nNeedles found")
    cases = sorted(result.get("needle", []), key=lambda case: (case["tokens"], case["policy"]))
    for case in cases:
        case["found"] = f"{sum(case['found'])} of {len(case.pop('depths'))}"
        if seconds := case.pop("seconds", None):
            case["s / 1000"] = seconds * 1000 / case["tokens"]
    table(cases)


PARTS = {"speed": speed, "kept": kept, "perplexity": perplexity, "needle": needle}
CASE = ("context", "rows", "policy", "share", "window", "tokens")  # What tells them apart.


@torch.inference_mode()
def main():
    parser = arguments(__doc__, "quality")
    add, parts = parser.add_argument, ", ".join(PARTS)
    add("--only", nargs="+", choices=PARTS, default=[*PARTS], metavar="PART", help=parts)
    add("--tokens", type=int, default=20480, help="of the manual, for perplexity (20480)")
    add("--lengths", nargs="+", type=int, default=(1000, 2000, 4000, 7500), metavar="N")
    add("--shares", nargs="+", type=int, default=SHARES, metavar="S", help="HBM for 1/S of a text")
    add("--windows", nargs="+", type=int, default=(256, 512, 1024), help="for perplexity")
    add("--policies", nargs="+", metavar="NAME", help="some only, but for kept")
    add("--depths", type=int, default=20, help="needles for each length (20)")
    args = parser.parse_args()
    result = earlier(args.json)
    bench, args.needles = None if args.show else Bench(), result.get("needle", [])
    for part in [] if args.show else args.only:
        for case in PARTS[part](bench, args):
            names = {name: case[name] for name in CASE if name in case}
            others = [old for old in result.get(part, []) if not names.items() <= old.items()]
            result[part] = [*others, case]  # Measured again, it replaces what was there.
            save(args.json, {part: result[part] for part in PARTS if part in result})
            print(part, case, flush=True)
    print_tables(result)


if __name__ == "__main__":
    run(main)
