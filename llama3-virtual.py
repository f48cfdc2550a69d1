"""Batched Llama 3 with a contiguous KV cache whose rows get memory page by page as they grow.

    python llama3-virtual.py 49                   the first 49 prompts, all at once
    python llama3-virtual.py 49 --page-kb 2048    with pages as a GPU has them

Each request has a row of max_seq_len slots, as in llama3-naive.py, but of addresses only: the
operating system, or the CUDA driver, puts memory behind them where tokens are (vAttention). The
attention call has no block table, as there. Nothing is shared.

Not handled: checkpoints of more than one shard, several devices, top-p sampling.
"""

import mmap
import sys
from collections import deque

import torch
import torch.nn.functional as F

from caches.virtual import VirtualCache
from support import trace
from support.arguments import at_least, parse, run, shared_arguments
from support.attention import flash_attn_with_kvcache
from support.checkpoint import linear, load, or_exit
from support.prompts import arrive, next_tokens, read_requests
from support.report import Stats

# Throughout this program
#     B  requests in a call                        H    query heads
#     T  new tokens of a request in this step      Hkv  key and value heads, H / Hkv share one
#     N  new tokens of all requests, concatenated  D    size of a head


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
        frequencies = frequencies * (kept + (1 - kept) / params["rope_scaling_factor"])
    angles = positions[:, None, None] * frequencies
    return torch.polar(torch.ones_like(angles), angles).to(torch.complex64)


def forward(model, new, first, attend):
    """Logits (B, vocab) after the last of each request's new tokens.

    new: a list of tokens for each, first: where in its text they begin. attend(layer, some, q, k,
    v) stores k and v of some of the requests (a slice); q attends to all that these have stored.
    """
    params, w = model
    H, Hkv, eps = params["n_heads"], params["n_kv_heads"], params["norm_eps"]
    device, lengths = w["norm"].device, [len(tokens) for tokens in new]
    tokens = torch.tensor([t for tokens in new for t in tokens], device=device)  # (N,)
    places = [torch.arange(n, n + T) for n, T in zip(first, lengths, strict=True)]
    positions = torch.cat(places).to(device)  # (N,)
    last = torch.tensor(lengths, device=device).cumsum(0) - 1  # (B,)
    # Attention takes all requests at once if T is the same for all, else one at a time.
    same = min(lengths) == max(lengths)
    calls = [slice(0, len(new))] if same else [slice(i, i + 1) for i in range(len(new))]
    sizes = [sum(lengths[some]) for some in calls]
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
        for some, part in zip(calls, qkv.split(sizes), strict=True):
            part = part.unflatten(0, (some.stop - some.start, -1))  # (B, T, H + 2 Hkv, D)
            q, k, v = part.split([H, Hkv, Hkv], 2)
            attended.append(attend(i, some, q, k, v).flatten(0, 1))
        x += linear(torch.cat(attended).flatten(1), w[name + "attention.wo"])
        y = F.rms_norm(x, x.shape[1:], w[name + "ffn_norm"], eps)
        gate, up = linear(y, w[name + "feed_forward.w13"]).chunk(2, dim=1)
        x += linear(F.silu(gate).mul_(up), w[name + "feed_forward.w2"])
        del pairs, gate, up  # Or the next layer would have them in memory beside its own.
    return linear(F.rms_norm(x[last], x.shape[1:], w["norm"], eps), w["output"])


def choose(logits, temperature):
    """The next token of each row, as a list."""
    if temperature < 1e-6:
        return logits.max(dim=1).indices.tolist()  # argmax takes 4 times as long in bfloat16.
    return (logits.double() / temperature).softmax(dim=1).multinomial(1).flatten().tolist()


# --- KV cache -------------------------------------------------------------------------------------

parser = shared_arguments(__doc__)
add = parser.add_argument
add("--page-kb", metavar="KB", type=at_least(1), help="(a page of the system; CUDA: 2048)")


def generate(model, cache, requests, chat, args, stats):
    """Answer all requests."""
    coming, waiting, running = deque(requests), deque(), {}  # row: its request, oldest first.

    def attend(layer, some, q, k, v):
        # As in llama3-naive.py; cache_batch_idx says which rows these are: rarely all of them.
        places = {"cache_seqlens": seq_len[some], "cache_batch_idx": rows[some]}
        return flash_attn_with_kvcache(q, *cache.layer(layer), k, v, **places, causal=True)

    while coming or waiting or running:
        with stats.clock("idle"):
            arrive(coming, waiting, running)
        with stats.clock("manager"):
            while not cache.can_grow():  # Preempt the youngest.
                row, request = running.popitem()
                cache.release(row)
                waiting.appendleft(request)
                stats.preemptions += 1
            cache.grow()
            while waiting and cache.can_admit(waiting[0].tokens):
                request = waiting.popleft()
                running[cache.admit(request.tokens)] = request
            first = cache.positions().tolist()
            new = next_tokens(running, first)
            seq_len, rows = cache.tables(list(new))
        with stats.clock("prefill" if max(map(len, new.values())) > 1 else "decode"):
            logits = forward(model, list(new.values()), [first[row] for row in new], attend)
            chosen = choose(logits, args.temperature)
        with stats.clock("manager"):
            cache.advance(new)
            stats.sample(new.values(), len(running), len(waiting), *cache.usage())
            if args.trace:
                stats.trace(trace.pages(cache, running), waiting)
            for (row, tokens), token in zip(new.items(), chosen, strict=True):
                request = running[row]
                if first[row] + len(tokens) < len(request.tokens):
                    continue  # The next step reads on.
                request.add(token)
                if request.ended(chat["stop"]):
                    cache.release(row)
                    del running[row]


@torch.inference_mode()
def main(argv=None):
    args = parse(parser, argv)
    model, encoding, chat = load(args)
    requests = read_requests(args, encoding, chat)
    stats = Stats(args, model[0])
    on_cuda = args.device == "cuda"
    page_bytes = 1024 * args.page_kb if args.page_kb else 2 << 20 if on_cuda else mmap.PAGESIZE
    rows = (args.n, args.max_seq_len, stats.shape, stats.dtype, args.device)
    with or_exit(f"{args.n} rows of {args.max_seq_len} slots cannot be had"):
        cache = VirtualCache(stats.budget, page_bytes, *rows)
    longest = max(request.limit for request in requests) - 1  # Nobody attends to the last token.
    if not cache.can_admit(range(longest)):  # So many tokens, whichever they are.
        sys.exit(f"--kv-gb has too few pages for the {longest} tokens of a request.")
    try:
        generate(model, cache, requests, chat, args, stats)
    finally:  # Ctrl-C, too, leaves the answers and statistics so far.
        stats.report(requests, encoding.decode, chat["stop"])


if __name__ == "__main__":
    run(main)
