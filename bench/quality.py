"""What forgetting costs: sink + window and retrieval against full attention.

    python bench/quality.py                                 all parts, over an hour on two cores
    python bench/quality.py --only speed kept               some of them
    python bench/quality.py --only needle --lengths 1000 --depths 4

speed       milliseconds per decode step and bytes in HBM, as the context grows
kept        of full attention over 4,096 tokens: its mass on what a policy keeps, how often the
            greedy token is the same, the KL divergence of the next token's distribution
perplexity  of Python's manual (pydoc_data.topics), along the text
needle      one line with a number, in noise (RULER, niah_single): how often the model repeats it

A policy has its HBM for sink, window and what comes back: the window has a quarter of it where
blocks come back, the sink 16 tokens. Texts are read in chunks, each under the policy, so that a
token sees up to a chunk more; HBM has room for that besides. Full attention is a window that
nothing leaves. The JSON file is written after each case.
"""

import argparse
import json
import math
import random
import statistics
import time
from functools import partial
from pathlib import Path

import plot
import torch
import torch.nn.functional as F
from common import RESULTS, load_script, save

from kvcache import blocks_for
from support import attention
from window import RetrievalCache, WindowCache, bounds_of, choose, plan

PARTS = ("speed", "kept", "perplexity", "needle")
CASE = ("context", "policy", "share", "window", "tokens")  # What tells cases of a part apart.
SHARES, BUCKET, CONTEXT = (2, 4, 8, 16), 1024, 8192  # CONTEXT: SmolLM2's.
NOISE = "The hills are brown. A cart goes by. The bread is warm. Somebody hums. It is late. "
NEEDLE = "Remember: the code of the {key} is {number}. "
QUESTION, ANSWER = "Question: what is the code of the {key}?", "The code of the {key} is"


class Bench:
    """The model, and one text at a time that goes through it under a policy."""

    def __init__(self, argv=("1",)):
        attention.flash_attn_kernel = None  # It does not take blocks of 16 tokens and fewer.
        self.script = load_script("llama3-tiered")
        # The logits of all tokens, not only of the last of each row.
        self.script.accumulate = lambda lengths: range(1, sum(lengths) + 1)
        args = self.script.parser.parse_args(argv)
        (self.params, self.w), self.encoding, self.chat = self.script.load(args)
        self.device, self.dtype = args.device, getattr(torch, args.dtype)
        layers, heads, dim = (self.params[name] for name in ("n_layers", "n_kv_heads", "dim"))
        self.shape = (layers, heads, dim // self.params["n_heads"])

    def cache(self, longest, chunk, window=None, sink=0, top_k=0, block_size=16):
        """Room for a text of `longest` tokens. No window: for all of them."""
        window = window or longest
        blocks, most, sink, far, top_k = plan(longest, sink, window, chunk, top_k, block_size)
        policy = (blocks, sink, window, chunk, partial(self.script.rotations, self.params))
        paged = (blocks, block_size, 1, most, self.shape, self.dtype, self.device)
        if top_k:
            cache = RetrievalCache(far, top_k, far, *policy, *paged)
        else:
            cache = WindowCache(*policy, *paged)
        cache.admit([])
        return cache

    def step(self, cache, tokens, watch=None):
        """Logits (T, vocab) after each of these tokens. watch(layer, q, cache) sees the queries."""
        cache.slide([len(tokens)])
        seq_len, block_table = cache.tables()

        def attend(layer, rows, q, k, v):
            places = seq_len, block_table
            if isinstance(cache, RetrievalCache):
                places = cache.retrieve(layer, rows, q, *places)
            out = self.script.flash_attn_with_kvcache(
                q, *cache.layer(layer), k, v,
                cache_seqlens=places[0], block_table=places[1], causal=True,
            )  # fmt: skip
            if watch:
                watch(layer, q[0])
            return out

        logits = self.script.forward((self.params, self.w), [tokens], cache.positions(), attend)
        cache.advance([len(tokens)])
        return logits

    def read(self, cache, tokens):
        """Logits after each token, in chunks."""
        for start in range(0, len(tokens), cache.chunk):
            yield self.step(cache, tokens[start : start + cache.chunk]).float()

    def manual(self, n):
        """The first n tokens of Python's manual."""
        from pydoc_data.topics import topics

        text = "\n".join(topics[name] for name in sorted(topics))
        return self.encoding.encode_ordinary(text[: 10 * n])[:n]

    # --- Perplexity ---

    def perplexity(self, tokens, **policy):
        """The mean negative log likelihood (nats) of each BUCKET tokens along the text."""
        cache, losses = self.cache(len(tokens), policy.pop("chunk", 32), **policy), []
        for logits in self.read(cache, tokens[:-1]):
            after = torch.tensor(tokens[len(losses) + 1 :][: len(logits)])
            losses += F.cross_entropy(logits.cpu(), after, reduction="none").tolist()
        return [
            statistics.mean(losses[start : start + BUCKET])
            for start in range(0, len(losses), BUCKET)
        ]

    # --- Needle ---

    def needle_prompt(self, n, depth, seed):
        """A chat of about n tokens with the needle at this depth (0 to 1), and the number."""
        draw = random.Random(seed)
        key = draw.choice(["boat", "lamp", "river", "chair", "cloud", "stone", "train"])
        number = str(draw.randrange(10**6, 10**7))
        encode = self.encoding.encode_ordinary
        head, tail, answer = (
            self.encoding.encode(text, allowed_special="all")
            for text in (
                self.chat["begin"] + self.chat["user"],
                self.chat["end"] + self.chat["assistant"],
                ANSWER.format(key=key),
            )
        )
        needle = encode(NEEDLE.format(key=key, number=number))
        question = encode(QUESTION.format(key=key)) + tail + answer
        line = encode(NOISE)
        lines = (n - len(head + needle + question)) // len(line)
        before = round(depth * lines)
        prompt = head + line * before + needle + line * (lines - before) + question
        return prompt, number

    def finds(self, prompt, number, **policy):
        """Whether the answer has the number; the share of wanted blocks that HBM had, GB moved."""
        cache = self.cache(len(prompt) + 12, **policy)
        *_, logits = self.read(cache, prompt)
        token, answer = int(logits[-1].argmax()), []
        for _ in range(10):
            answer.append(token)
            token = int(self.step(cache, [token])[-1].argmax())
        moved = cache.counts["fetched"] + cache.counts["spilled"]
        wanted = cache.counts["fetched"] + cache.counts["shared"]
        hits = cache.counts["shared"] / wanted if wanted else None
        gb = moved * cache.kv[:, :, 0].nbytes / 1e9
        return number in self.encoding.decode(answer), hits, gb

    # --- What is kept of full attention ---

    def mass(self, tokens, n_queries, **policy):
        """The share of full attention's weight on what a policy would keep, for the last queries.

        Mean over queries, heads and layers. Whole blocks, chosen for each query by itself.
        """
        window, sink, top_k = (policy.get(name, 0) for name in ("window", "sink", "top_k"))
        cache = self.cache(len(tokens), 512)
        H, Hkv = self.params["n_heads"], self.params["n_kv_heads"]
        shares = []

        def watch(layer, q):
            for t in range(len(q)):
                seen = int(cache.seq_len[0]) + t + 1
                keys = cache.kv[layer, 0, cache.block_table[0].long()]  # (blocks, Hkv, 16, D)
                flat = keys.transpose(0, 1).flatten(1, 2)[:, :seen].float()  # (Hkv, seen, D)
                query = q[t].view(Hkv, H // Hkv, -1).float() * q.shape[-1] ** -0.5
                weights = (query @ flat.transpose(1, 2)).softmax(2)
                first = (seen - window) // 16  # The window's first block.
                kept = torch.zeros(-(-seen // 16), dtype=torch.bool, device=q.device)
                kept[: sink // 16], kept[first:] = True, True
                if top_k:
                    middle = keys[sink // 16 : first].float()
                    bounds, n = bounds_of(middle).transpose(0, 1), min(top_k // 16, len(middle))
                    chosen = choose(query, bounds, middle.__getitem__, n)
                    kept[[sink // 16 + number for number in chosen]] = True
                shares.append(float(weights[:, :, kept.repeat_interleave(16)[:seen]].sum(2).mean()))

        for _ in self.read(cache, tokens[:-n_queries]):
            pass
        self.step(cache, tokens[-n_queries:], watch)
        return statistics.mean(shares)

    # --- Speed ---

    def decode_ms(self, n, rounds=15, **policy):
        """Milliseconds of a decode step behind n tokens of random numbers, and bytes in HBM."""
        cache = self.cache(n + rounds + 8, 512, **policy)
        for start in range(0, n, 512):
            size = min(512, n - start)
            cache.slide([size])
            owned = cache.block_table[0, : cache.n_owned[0]].long()
            new = owned[-blocks_for(size, 16) :]
            cache.kv[:, :, new] = torch.randn_like(cache.kv[:, :, new])
            cache.advance([size])
        seconds = []
        for _ in range(rounds):
            start = time.perf_counter()
            self.step(cache, [random.randrange(1000, 40000)]).sum().item()
            seconds.append(time.perf_counter() - start)
        return statistics.median(seconds[3:]) * 1000, self.hbm_bytes(cache)

    def hbm_bytes(self, cache):
        """What the text takes in HBM: its blocks there, and the bounds of those that have left."""
        blocks = (len(cache.pool.ref_count) - cache.pool.n_free()) * cache.kv[:, :, 0].nbytes
        if not isinstance(cache, RetrievalCache):
            return blocks
        bounds = cache.away[0].bounds[:, :, : len(cache.away[0].dram)]
        return blocks + bounds.numel() * bounds.element_size()


def policies(hbm):
    """The two ways to spend this many tokens of HBM."""
    window = hbm // 4
    return {
        "sink + window": {"sink": 16, "window": hbm - 16},
        "retrieval": {"sink": 16, "window": window, "top_k": hbm - window - 16},
    }


def speed(bench, args):
    """HBM for 1,024 tokens against a context that grows: medians of three rounds, in turn."""
    cases = [
        (1024 * 2**i, name, policy)
        for i in range(7)
        for name, policy in {"full": {}, **policies(1024)}.items()
    ]
    rounds = [[bench.decode_ms(n, **policy) for n, _, policy in cases] for _ in range(3)]
    for (n, name, _), times in zip(cases, zip(*rounds, strict=True), strict=True):
        ms, hbm = (statistics.median(values) for values in zip(*times, strict=True))
        yield {"context": n, "policy": name, "ms": ms, "hbm_bytes": hbm}


def kept(bench, args):
    """4,096 tokens of the manual; all but the mass over the second half."""
    tokens, half = bench.manual(4096), 2048
    full = torch.cat(list(bench.read(bench.cache(4096, 512), tokens)))[half:].log_softmax(1)
    for share in args.shares:
        for name, policy in policies(4096 // share).items():
            logits = torch.cat(list(bench.read(bench.cache(4096, 16, **policy), tokens)))[half:]
            same = (logits.argmax(1) == full.argmax(1)).float().mean()
            kl = (full.exp() * (full - logits.log_softmax(1))).sum(1).mean()
            mass = bench.mass(tokens, 32, **policy)
            yield {
                "policy": name,
                "share": share,
                "mass": mass,
                "same": float(same),
                "kl": float(kl),
            }


def perplexity(bench, args):
    """The losses of BUCKET tokens each; full attention as far as the model's context goes."""
    tokens = bench.manual(args.tokens)
    yield {"policy": "full", "window": None, "nats": bench.perplexity(tokens[:CONTEXT], chunk=512)}
    for window in (256, 512, 1024):
        for name, policy in {
            "window": {"window": window},
            "1 sink + window": {"window": window, "sink": 1, "block_size": 1},
            "4 sinks + window": {"window": window, "sink": 4, "block_size": 4},
            "16 sinks + window": {"window": window, "sink": 16},
            "retrieval": policies(window + 16)["retrieval"],
        }.items():
            nats = bench.perplexity(tokens, **policy)
            yield {"policy": name, "window": window, "nats": nats}


def needle(bench, args):
    """Needles at depths from the beginning to the end of the text."""
    for n in args.lengths:
        cases = {("full", 1): {}}
        cases |= {(name, s): p for s in args.shares for name, p in policies(n // s).items()}
        for (name, share), policy in cases.items():
            found = []
            for i in range(args.depths):
                prompt, number = bench.needle_prompt(n, i / max(1, args.depths - 1), i)
                chunk = min(512, policy.get("window", 512))
                found.append(bench.finds(prompt, number, chunk=chunk, **policy))
            recall, hits, gb = (list(values) for values in zip(*found, strict=True))
            case = {"tokens": n, "policy": name, "share": share, "found": recall}
            if name == "retrieval":
                case |= {"hit_rate": statistics.mean(hits), "gb_moved": statistics.mean(gb)}
            yield case


# --- Tables ----------------------------------------------------------------------------


def print_tables(result):
    by_name = {"full": [], "sink + window": [], "retrieval": []}
    for case in result.get("speed", []):
        by_name[case["policy"]].append(case)
    if by_name["full"]:
        print("\nA decode step; HBM for 1,024 tokens, or for all (full): milliseconds, MB of HBM")
        print("context" + "".join(f"{name:>20}" for name in by_name))
        for cases in zip(*by_name.values(), strict=True):
            row = "".join(f"{case['ms']:12.1f}{case['hbm_bytes'] / 1e6:8.1f}" for case in cases)
            print(f"{cases[0]['context']:7,}{row}")
    if result.get("kept"):
        print("\nAgainst full attention, 4,096 tokens: mass kept, same greedy token, KL (nats)")
        print(" HBM  policy            mass    same      KL")
    for case in result.get("kept", []):
        print(f"1/{case['share']:<3} {case['policy']:14}{case['mass']:8.1%}{case['same']:8.1%}"
              f"{case['kl']:8.3f}")  # fmt: skip
    if result.get("perplexity"):
        print(f"\nPerplexity of Python's manual: its first {CONTEXT:,} tokens, those behind them")
        print(f"{'policy':18}{'HBM':>7}{'first':>8}{'behind':>8}")
    for case in result.get("perplexity", []):
        nats, n = case["nats"], CONTEXT // BUCKET
        first, behind = (
            f"{math.exp(statistics.mean(some)):8.2f}" if some else f"{'-':>8}"
            for some in (nats[:n], nats[n:])
        )
        print(f"{case['policy']:18}{case['window'] or '-':>7}{first}{behind}")
    if result.get("needle"):
        print("\nNeedles found; blocks wanted that HBM had; GB moved a prompt")
        print("tokens   HBM  policy         found       hits      GB")
    order = {"full": 0, "sink + window": 1, "retrieval": 2}
    cases = result.get("needle", [])
    for case in sorted(cases, key=lambda c: (c["tokens"], order[c["policy"]], c["share"])):
        more = f"{case['hit_rate']:8.1%}{case['gb_moved']:8.2f}" if "hit_rate" in case else ""
        share, found = f"1/{case['share']}", case["found"]
        print(f"{case['tokens']:6,}{share:>6}  {case['policy']:14}"
              f"{sum(found):3} of {len(found):2}{more}")  # fmt: skip


@torch.inference_mode()
def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--only", nargs="+", choices=PARTS, default=PARTS, metavar="PART", help=", ".join(PARTS))
    add("--tokens", type=int, default=20480, help="of the manual, for perplexity (20480)")
    add("--lengths", nargs="+", type=int, default=(1000, 2000, 4000, 7500), metavar="N")
    add("--shares", nargs="+", type=int, default=SHARES, metavar="S", help="HBM for 1/S of a text")
    add("--depths", type=int, default=20, help="needles for each length (20)")
    add("--json", type=Path, default=RESULTS / "quality.json", metavar="FILE")
    add("--show", type=Path, metavar="FILE", help="print and draw an earlier result")
    args = parser.parse_args()
    file = args.show or args.json
    result = json.loads(file.read_text()) if file.exists() else {}
    bench = None if args.show else Bench()
    for part in () if args.show else args.only:
        for case in globals()[part](bench, args):
            names = {name: case[name] for name in CASE if name in case}
            others = (c for c in result.get(part, []) if not names.items() <= c.items())
            result[part] = [*others, case]  # Measured again, it replaces what was there.
            save(args.json, {part: result[part] for part in PARTS if part in result})
            print(part, case, flush=True)
    print_tables(result)
    if all(part in result for part in PARTS):
        plot.draw("quality", file)


if __name__ == "__main__":
    main()
