"""Batched Llama 3 with a contiguous KV cache whose rows get memory page by page as they grow.

    python llama3-virtual.py 49                                  the first 49 prompts, all at once
    python llama3-virtual.py 49 --page-kb 2048 --layout token    with pages as a GPU has them

Each request has a row of max_seq_len slots, as in llama3-naive.py, but of addresses only: the
operating system, or the CUDA driver, puts memory behind them where tokens are (vAttention). The
attention call is llama3-naive.py's. Pages are not shared: what all prompts begin with is short.

Not handled: checkpoints of more than one shard, several devices, top-p sampling.
"""

import mmap
import os
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections import deque
from itertools import accumulate, chain, groupby
from pathlib import Path

import torch
import torch.nn.functional as F

import owners
from inputs import PROMPTS, SMOLLM2, at_least, load, or_exit, read_prompts, writable
from kernels import linear
from pages import VirtualCache
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

add("--page-kb", metavar="KB", type=at_least(1), help="(a page of the system; CUDA: 2048)")
add("--layout", choices=["layer", "token"], help="pages by layer or token (layer; CUDA: token)")


def generate(model, cache, tokens, limits, stop, args, stats):
    """Continue each list in `tokens`, in place, until a stop token or its limit ends it."""
    k_cache, v_cache = cache.kv  # (L, B, max_seq_len, Hkv, D) each
    seq_len = cache.seq_len
    waiting, running = deque(range(len(tokens))), {}  # row: its request; the oldest comes first.

    def attend(layer, rows, q, k, v):
        return flash_attn_with_kvcache(
            q, k_cache[layer, rows], v_cache[layer, rows], k, v,
            cache_seqlens=seq_len[rows].to(q.device), causal=True,
        )  # fmt: skip

    while waiting or running:
        prefill = 0  # Tokens of newly admitted requests; 512 are enough for a step.
        with stats.clock("manager"):
            while not all(cache.grow(row, seq_len[row].item() + 1) for row in running):
                row, request = running.popitem()
                cache.release(row)
                waiting.appendleft(request)
                stats.preemptions += 1
            while waiting and prefill < 512 and cache.can_admit(len(tokens[waiting[0]])):
                request = waiting.popleft()
                running[cache.admit(len(tokens[request]))] = request
                prefill += len(tokens[request])
            new = [[] for _ in seq_len]
            for row, request in running.items():
                new[row] = tokens[request][seq_len[row] :]
        phase = "prefill" if prefill else "decode"
        with stats.clock(phase):
            logits = forward(model, new, seq_len, attend)
        with stats.clock("manager"):
            for row in running:  # While a GPU computes: pages for the token that it chooses.
                cache.grow(row, seq_len[row].item() + len(new[row]) + 1)
        with stats.clock(phase):
            chosen = choose(logits, args.temperature)
        stats.mark(running.values())
        with stats.clock("manager"):
            seq_len += torch.tensor([len(t) for t in new], dtype=torch.int32)
            stats.sample(len(running), len(waiting), *cache.usage())
            if args.trace:
                stats.trace(owners.pages(cache, running))
            for row, token in zip(sorted(running), chosen, strict=True):
                request = running[row]
                tokens[request].append(token)
                if len(tokens[request]) >= limits[request] or token in stop:
                    cache.release(row)
                    del running[row]


@torch.inference_mode()
def main(argv=None):
    args = arguments(argv)
    model, encoding, chat = load(args)
    texts, prompts = read_prompts(args, encoding, chat)
    stats = Stats(args, model[0])
    on_cuda = args.device == "cuda"
    page_bytes = 1024 * args.page_kb if args.page_kb else 2 << 20 if on_cuda else mmap.PAGESIZE
    by_token = args.layout == "token" if args.layout else on_cuda
    limits = [min(len(prompt) + args.max_new_tokens, args.max_seq_len) for prompt in prompts]
    rows = (args.n, args.max_seq_len, stats.shape, stats.dtype, args.device)
    with or_exit(f"{args.n} rows of {args.max_seq_len} slots in virtual memory cannot be had"):
        cache = VirtualCache(stats.budget, page_bytes, by_token, *rows)
    if (need := cache.groups_for(max(limits) - 1)) > cache.n_groups:
        size = f"{need * cache.group_bytes / 1e9:.4f} GB"
        sys.exit(f"A request may need {size} in pages, --kv-gb has {stats.budget / 1e9:.4f} GB.")
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
