"""Batched Llama 3 with two tiers of KV cache: blocks in HBM, and DRAM below it.

    python llama3-tiered.py 49 --turns 3 --kv-gb 0.2            chats that outgrow HBM
    python llama3-tiered.py 4 --window 512 --sink 16            texts of any length: see window.py

Blocks outlive their requests. When HBM is full, those not used for the longest time move to DRAM;
a later turn of the chat, a prompt that begins like another, and a request that was preempted find
them there, and only what is new is computed. Without CUDA, both tiers are pools in memory.

Not handled: checkpoints of more than one shard, several devices, top-p sampling.
"""

import os
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections import deque
from functools import partial
from itertools import accumulate, chain, groupby
from pathlib import Path

import torch
import torch.nn.functional as F

import owners
from inputs import PROMPTS, SMOLLM2, at_least, block_size_for, load, or_exit, read_turns, writable
from kernels import linear
from kvcache import TieredCache
from stats import Stats
from support.attention import flash_attn_with_kvcache
from window import RetrievalCache, WindowCache, plan

# Throughout this program
#     B  requests in the batch, one row each       H    query heads
#     T  new tokens of a request in this step      Hkv  key and value heads, H / Hkv share one
#     N  new tokens of all requests, concatenated  D    size of a head

# --- Arguments ------------------------------------------------------------------------------------

DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
parser.error = lambda message: parser.exit(2, f"{parser.prog}: {message}; see --help.\n")
add = parser.add_argument
add("n", metavar="REQUESTS", type=at_least(1), help="after the last prompt, the first comes again")
add("--model", metavar="DIR", type=Path, default=SMOLLM2, help="Llama 3 as Meta publishes it")
add("--prompts", metavar="FILE", default=PROMPTS, help="ShareGPT's schema")
add("--kv-gb", metavar="GB", type=at_least(0, float), help="cache budget (1.4; CUDA: 90%% of free)")
add("--max-seq-len", metavar="LEN", type=at_least(1), default=8192, help="prompt + answer (8192)")
add("--max-new-tokens", metavar="LEN", type=at_least(1), default=256, help="of an answer (256)")
add("--temperature", metavar="X", type=float, default=0.0, help="0, the default, is greedy")
add("--seed", metavar="S", type=int, default=0, help="for temperatures above 0")
add("--device", choices=DEVICES, default=DEVICES[-1], help="the last of these by default")
add("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
add("--json", metavar="FILE", type=writable, help="write statistics and answers there, too")
add("--trace", metavar="FILE", type=writable, help="who has which memory, for bench/replay.py")


def arguments(argv):
    """The arguments, where they make sense; ends the program where they do not."""
    args = parser.parse_args(argv)
    torch.manual_seed(args.seed % 2**63)
    return args


# --- Llama 3 --------------------------------------------------------------------------------------


def rotations(params, positions):
    """RoPE: e^(i angle) for each pair of dimensions at positions (N,), as (N, 1, D / 2)."""
    D = params["dim"] // params["n_heads"]
    exponents = torch.arange(0, D, 2, dtype=torch.float64, device=positions.device) / D
    frequencies = params["rope_theta"] ** -exponents  # radians per position
    if params.get("use_scaled_rope"):
        # Llama 3.1: what turns less than once in the 8,192 positions of pre-training is slowed
        # down, what turns more than four times is kept, and what lies between is blended.
        kept = ((8192 * frequencies / (2 * torch.pi) - 1) / (4 - 1)).clamp(0, 1)
        factor = 8 if params["dim"] >= 4096 else 32  # 3.1's, and that of the small models of 3.2.
        frequencies = frequencies * (kept + (1 - kept) / factor)
    angles = positions[:, None, None] * frequencies
    return torch.polar(torch.ones_like(angles), angles).to(torch.complex64)


def forward(model, new, seq_len, attend):
    """Logits (B, vocab) after each row's new tokens, which follow the seq_len (B,) stored ones.

    new: a list of tokens for each row, an empty one for a row that takes no part. attend(layer,
    rows, q, k, v) stores the keys and values of these rows (a slice) and attends to all of theirs.
    """
    params, w = model
    H, Hkv, eps = params["n_heads"], params["n_kv_heads"], params["norm_eps"]
    lengths = [len(tokens) for tokens in new]
    places = [range(n, n + T) for n, T in zip(seq_len.tolist(), lengths, strict=True)]
    tokens, positions, ends = (
        torch.tensor(list(numbers), device=w["norm"].device)
        for numbers in (chain(*new), chain(*places), accumulate(filter(None, lengths)))
    )
    # One attention call for each run of neighbouring rows with equally many new tokens.
    calls = [(T, list(rows)) for T, rows in groupby(range(len(new)), lengths.__getitem__) if T]
    sizes = [T * len(rows) for T, rows in calls]
    rotation = rotations(params, positions)
    x = w["tok_embeddings"][tokens]  # (N, dim)
    for i in range(params["n_layers"]):
        name = f"layers.{i}."
        y = F.rms_norm(x, x.shape[1:], w[name + "attention_norm"], eps)
        qkv = linear(y, w[name + "attention.wqkv"]).unflatten(1, (H + 2 * Hkv, -1))
        # RoPE in Meta's layout: neighbouring dimensions of q and k are one complex number.
        pairs = torch.view_as_complex(qkv[:, : H + Hkv].float().unflatten(2, (-1, 2)))
        qkv[:, : H + Hkv] = torch.view_as_real(pairs * rotation).flatten(2)  # (N, H + 2 Hkv, D)
        attended = []
        for (T, rows), part in zip(calls, qkv.split(sizes), strict=True):
            q, k, v = part.unflatten(0, (-1, T)).split([H, Hkv, Hkv], 2)  # (rows, T, heads, D)
            attended.append(attend(i, slice(rows[0], rows[-1] + 1), q, k, v).flatten(0, 1))
        x += linear(torch.cat(attended).flatten(1), w[name + "attention.wo"])
        y = F.rms_norm(x, x.shape[1:], w[name + "ffn_norm"], eps)
        gate, up = linear(y, w[name + "feed_forward.w13"]).chunk(2, dim=1)
        x += linear(F.silu(gate).mul_(up), w[name + "feed_forward.w2"])
        del pairs, gate, up  # Or the next layer would have them in memory beside its own.
    return linear(F.rms_norm(x[ends - 1], x.shape[1:], w["norm"], eps), w["output"])


def choose(logits, temperature):
    """The next token of each row, as a list."""
    if not temperature > 0:
        return logits.max(dim=1).indices.tolist()  # argmax takes 4 times as long in bfloat16.
    return (logits.double() / temperature).softmax(dim=1).multinomial(1).flatten().tolist()


# --- KV cache -------------------------------------------------------------------------------------

add("--block-size", metavar="TOKENS", type=at_least(1), help="(16; flash-attn: 256)")
add("--dram-gb", metavar="GB", type=at_least(0, float), default=4.0, help="blocks in DRAM (4)")
add("--turns", metavar="T", type=at_least(1), default=1, help="human turns of a conversation (1)")
add("--link-gbs", metavar="X", type=at_least(0.001, float), help="on a CPU: copy like a slow link")
add("--window", metavar="LEN", type=at_least(1), help="keep only the last LEN tokens")
add("--sink", metavar="LEN", type=at_least(0), default=0, help="and the first LEN tokens")
add("--top-k", metavar="LEN", type=at_least(0), default=0, help="and LEN of the others, from DRAM")
add("--ignore-stop", action="store_true", help="an answer ends at its limit only")


def generate(model, cache, turns, stop, args, stats):
    """Answer the turns and those that follow, which join the list, until a stop token or limit."""
    waiting, running = deque(turns), []  # Row r is of turn running[r].
    chunk = cache.chunk if args.window else args.max_seq_len  # New tokens of a row in a step.

    def attend(layer, rows, q, k, v):
        lengths, table = seq_len[rows], block_table[rows]
        if args.top_k:
            lengths, table = cache.retrieve(layer, rows, q, lengths, table)
        places = {"cache_seqlens": lengths, "block_table": table}
        return flash_attn_with_kvcache(q, *cache.layer(layer), k, v, **places, causal=True)

    while waiting or running:
        prefill = 0  # Tokens of newly admitted turns; 512 are enough for a step.
        with stats.clock("manager"):
            while not cache.can_grow():
                waiting.appendleft(running.pop())
                cache.commit(len(running), waiting[0].tokens[:-1], last=True)
                cache.release([len(running)])
                stats.preemptions += 1
            cache.grow()
            while waiting and prefill < 512 and cache.can_admit(waiting[0].tokens):
                tokens = waiting[0].tokens
                prefill += len(tokens) - cache.admit(tokens)
                # This step writes them, in each layer row after row: the next may start with them.
                cache.commit(len(running), tokens)
                running.append(waiting.popleft())
            first = cache.positions()
            new = [t.tokens[p : p + chunk] for t, p in zip(running, first.tolist(), strict=True)]
            if args.window:
                cache.slide([len(tokens) for tokens in new])
            seq_len, block_table = cache.tables()
        with stats.clock("prefill" if max(map(len, new)) > 1 else "decode"):
            chosen = choose(forward(model, new, first, attend), args.temperature)
        with stats.clock("manager"):
            cache.advance([len(t) for t in new])
            stats.sample(len(running), len(waiting), *cache.usage())
            if args.trace:
                stats.trace(owners.tiers(cache, running, waiting))
            stored = cache.positions().tolist()
            for turn, token, n in zip(running, chosen, stored, strict=True):
                if n == len(turn.tokens):  # If not, the next step reads on.
                    turn.add(token)
            ended = [row for row, turn in enumerate(running) if turn.ended(stop, args)]
            for row in ended:
                cache.commit(row, running[row].tokens[:-1])
                waiting.extend(following := running[row].following(stop, args))
                turns.extend(following)
            cache.release(ended)
            cache.spill()
            running = [turn for row, turn in enumerate(running) if row not in ended]


def make_cache(args, params, stats, longest):
    """The cache that the arguments ask for; ends the program where that has no room.

    longest: the most tokens, prompt and answer, that a request may come to.
    """
    size = block_size_for(args, 16)  # Small: what is shared, fetched and forgotten is whole blocks.
    block_bytes = size * stats.bytes_per_token
    room, n_dram = stats.budget // block_bytes, int(args.dram_gb * 1e9) // block_bytes
    window = args.window or longest
    chunk = min(512, window)  # New tokens of a row in a step: into a window, texts come in chunks.
    need, most, sink, far, top_k = plan(longest - 1, args.sink, window, chunk, args.top_k, size)
    if need > room:
        sys.exit(f"A request may need {need} blocks, --kv-gb has room for {room}.")
    if top_k and far > n_dram:
        sys.exit(f"A request may need {far} blocks in DRAM, --dram-gb has room for {n_dram}.")
    paged = (room, size, args.n, most, stats.shape, stats.dtype, args.device)
    window = (need, sink, window, chunk, partial(rotations, params))
    with or_exit("So much memory (--kv-gb, --dram-gb) cannot be had"):
        if args.top_k:
            return RetrievalCache(n_dram, top_k, far, *window, *paged)
        if args.window:
            return WindowCache(*window, *paged)
        return TieredCache(n_dram, args.link_gbs, *paged)


@torch.inference_mode()
def main(argv=None):
    args = arguments(argv)
    if args.link_gbs if args.window else args.sink or args.top_k:
        parser.error("--sink and --top-k need a --window, --link-gbs takes none")
    endless = args.window and not args.top_k  # With top-k, keys keep their positions.
    args.max_seq_len = 10**9 if endless else args.max_seq_len
    model, encoding, chat = load(args)
    turns = read_turns(args, encoding, chat, args.turns)
    longest = min(args.max_seq_len, max(turn.longest(args) for turn in turns))
    args.max_seq_len = longest if endless else args.max_seq_len
    stats = Stats(args, model[0])
    cache = make_cache(args, model[0], stats, longest)
    stop = set() if args.ignore_stop else {chat["special_tokens"][name] for name in chat["stop"]}
    try:
        generate(model, cache, turns, stop, args, stats)
    finally:  # Ctrl-C, too, leaves the answers and statistics so far.
        turns.sort(key=lambda turn: turn.place)
        stats.times = {i: (t.first_token, t.last_token) for i, t in enumerate(turns)}
        later = [t.first_token for t in turns if t.place[1] > 0]
        size = cache.block_size * stats.bytes_per_token
        stats.tiers = {**cache.counts, "block_bytes": size, "later_first_token_s": later}
        texts, prompts, tokens = zip(*((t.text, t.prompt, t.tokens) for t in turns), strict=True)
        stats.report(texts, prompts, tokens, encoding.decode, stop)
        if cache.counts["dropped"] and args.dram_gb and not args.window:
            print("DRAM was full (--dram-gb): what it dropped was computed again.", file=sys.stderr)


if __name__ == "__main__":
    try:
        main()
    except (KeyboardInterrupt, BrokenPipeError):  # Ctrl-C, or `| head` has seen enough.
        os._exit(130)
