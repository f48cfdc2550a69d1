"""Batched Llama 3 with the usual KV cache: every request reserves max_seq_len slots up front.

    python llama3-naive.py 7                  answers the first 7 prompts
    python llama3-naive.py 8                  is refused: 8 reservations exceed the default budget
    diff llama3-naive.py llama3-paged.py      shows what paging changes

The batch is static: all requests start together and every row lives until the last one ends. The
statistics at the end show the price: most of the reserved slots never hold a token.

Not handled: checkpoints of more than one shard, several devices, top-p sampling.
"""

import os
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from itertools import accumulate, chain, groupby
from pathlib import Path

import torch
import torch.nn.functional as F

import owners
from inputs import PROMPTS, SMOLLM2, at_least, load, or_exit, read_prompts, writable
from kernels import linear
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


def generate(model, cache, tokens, limits, stop, args, stats):
    """Continue each list in `tokens`, in place, until a stop token or its limit ends it."""
    k_cache, v_cache = cache  # (L, B, max_seq_len, Hkv, D) each
    seq_len = torch.zeros(len(tokens), dtype=torch.int32)  # Tokens stored, new ones excluded.
    running = set(range(len(tokens)))

    def attend(layer, rows, q, k, v):
        return flash_attn_with_kvcache(
            q, k_cache[layer, rows], v_cache[layer, rows], k, v,
            cache_seqlens=seq_len[rows].to(q.device), causal=True,
        )  # fmt: skip

    while running:
        # A request that has ended keeps its row, which computes its last token over and over.
        new = [t[n:] for t, n in zip(tokens, seq_len.tolist(), strict=True)]
        with stats.clock("decode" if stats.samples else "prefill"):
            chosen = choose(forward(model, new, seq_len, attend), args.temperature)
        for row in running:
            seq_len[row] += len(new[row])
            tokens[row].append(chosen[row])
        stats.mark(running)
        used = sum(seq_len[list(running)].tolist())
        # The batch is static, so whoever has ended still counts as running.
        stats.sample(len(tokens), 0, len(tokens) * args.max_seq_len, used)
        if args.trace:
            stats.trace(owners.rows(stats.naive_fits, args.max_seq_len, seq_len, running))
        running = {r for r in running if tokens[r][-1] not in stop and len(tokens[r]) < limits[r]}


@torch.inference_mode()
def main(argv=None):
    args = arguments(argv)
    model, encoding, chat = load(args)
    texts, prompts = read_prompts(args, encoding, chat)
    stats = Stats(args, model[0])
    need = args.n * args.max_seq_len * stats.bytes_per_token
    if need > stats.budget:
        sys.exit(
            f"{args.n} requests would reserve {need / 1e9:.2f} GB for their keys and values; the "
            f"budget is {stats.budget / 1e9:.2f} GB (--kv-gb), where {stats.naive_fits} fit."
        )
    n_layers, n_kv_heads, head_dim = stats.shape
    shape = (2, n_layers, args.n, args.max_seq_len, n_kv_heads, head_dim)
    with or_exit(f"{need / 1e9:.2f} GB for the KV cache cannot be had"):
        cache = torch.empty(shape, dtype=stats.dtype, device=args.device)
    limits = [min(len(prompt) + args.max_new_tokens, args.max_seq_len) for prompt in prompts]
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
