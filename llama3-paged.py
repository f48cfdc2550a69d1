"""Batched Llama 3 with a paged KV cache: fixed-size blocks, taken when a request needs them.

    python llama3-paged.py 49                 answers the first 49 prompts, all at once
    python llama3-paged.py 49 --kv-gb 0.2     does it in less memory, some at a time

A request takes a block when its last one is full and gives all back when it ends. If none is free,
the youngest request is preempted: it loses its blocks, waits, and has them computed again.

Not handled: checkpoints of more than one shard, several devices, top-p sampling.
"""

import os
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections import deque
from itertools import accumulate, chain, groupby
from pathlib import Path

import torch
import torch.nn.functional as F

import owners
from inputs import PROMPTS, SMOLLM2, at_least, block_size_for, load, or_exit, read_prompts, writable
from kernels import linear
from kvcache import PagedCache, blocks_for
from stats import Stats
from support.attention import flash_attn_with_kvcache

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

add("--block-size", metavar="TOKENS", type=at_least(1), help="(32; flash-attn: 256)")


def generate(model, cache, tokens, limits, stop, args, stats):
    """Continue each list in `tokens`, in place, until a stop token or its limit ends it."""
    waiting, running = deque(range(len(tokens))), []  # Row r is of request running[r].

    def attend(layer, rows, q, k, v):
        places = {"cache_seqlens": seq_len[rows], "block_table": block_table[rows]}
        return flash_attn_with_kvcache(q, *cache.layer(layer), k, v, **places, causal=True)

    while waiting or running:
        with stats.clock("manager"):
            while not cache.can_grow():
                cache.release([len(running) - 1])
                waiting.appendleft(running.pop())
                stats.preemptions += 1
            cache.grow()
            # While there are prompts to read, a step has 1,024 new tokens, or two a row; what is
            # left of one is for the next step. (2,048: hardly faster, 30 MB more of memory.)
            size, stored = max(1024, 2 * len(running)), cache.positions().tolist()
            most = size - len(running) + 1
            new = [tokens[r][n : n + most] for r, n in zip(running, stored, strict=True)]
            left = size - sum(map(len, new))
            while waiting and left > 0 and cache.can_admit(len(tokens[waiting[0]])):
                running.append(waiting.popleft())
                cache.admit(len(tokens[running[-1]]))
                new.append(tokens[running[-1]][:left])
                left -= len(new[-1])
            seq_len, block_table = cache.tables()
        with stats.clock("prefill" if max(map(len, new)) > 1 else "decode"):
            chosen = choose(forward(model, new, seq_len, attend), args.temperature)
        with stats.clock("manager"):
            cache.advance([len(t) for t in new])
            stats.sample(len(running), len(waiting), *cache.usage())
            if args.trace:
                stats.trace(owners.blocks(cache, running))
            ended, stored = [], cache.positions().tolist()
            for row, (request, token) in enumerate(zip(running, chosen, strict=True)):
                if stored[row] == len(tokens[request]):  # All is read.
                    tokens[request].append(token)
                    stats.mark([request])
                    if len(tokens[request]) >= limits[request] or token in stop:
                        ended.append(row)
            cache.release(ended)
            running = [request for row, request in enumerate(running) if row not in ended]


@torch.inference_mode()
def main(argv=None):
    args = arguments(argv)
    model, encoding, chat = load(args)
    texts, prompts = read_prompts(args, encoding, chat)
    stats = Stats(args, model[0])
    size = block_size_for(args, 32)  # 16 waste half as much, but a step of 49 rows takes 3% longer.
    room = stats.budget // (size * stats.bytes_per_token)
    limits = [min(len(prompt) + args.max_new_tokens, args.max_seq_len) for prompt in prompts]
    if (need := blocks_for(max(limits) - 1, size)) > room:
        sys.exit(f"A request may need {need} blocks, --kv-gb has room for {room}.")
    with or_exit(f"{stats.budget / 1e9:.2f} GB for the KV cache (--kv-gb) cannot be had"):
        cache = PagedCache(room, size, args.n, max(limits), stats.shape, stats.dtype, args.device)
    stop = {chat["special_tokens"][name] for name in chat["stop"]}
    tokens = [list(prompt) for prompt in prompts]
    try:
        generate(model, cache, tokens, limits, stop, args, stats)
    finally:  # Ctrl-C, too, leaves the answers and statistics so far.
        stats.report(texts, prompts, tokens, encoding.decode, stop)


if __name__ == "__main__":
    try:
        main()
    except (KeyboardInterrupt, BrokenPipeError):  # Ctrl-C, or `| head` has seen enough.
        os._exit(130)
