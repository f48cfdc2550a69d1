"""Batched Llama 3 with the usual KV cache: every request reserves max_seq_len slots up front.

    python llama3-naive.py 7                  answers the first 7 prompts
    python llama3-naive.py 8                  is refused: 8 reservations exceed the default budget
    diff llama3-naive.py llama3-paged.py      shows what paging changes

The batch is static: its requests start together and every row lives until the last one ends. Who
comes later (--rate) waits for the next batch. The statistics at the end show the price: most of the
reserved slots never hold a token.

Not handled: checkpoints of more than one shard, several devices, top-p sampling.
"""

import sys
from collections import deque

import torch
import torch.nn.functional as F

from support import trace
from support.arguments import parse, run, shared_arguments
from support.attention import flash_attn_with_kvcache
from support.checkpoint import linear, load, or_exit
from support.prompts import arrive, read_requests
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


def generate(model, cache, requests, chat, args, stats):
    """Answer all requests, in batches of those that have arrived, as many as there are rows."""
    k_cache, v_cache = cache  # (L, B, max_seq_len, Hkv, D) each
    coming, waiting, running = deque(requests), deque(), set()  # Rows that have not ended.

    def attend(layer, some, q, k, v):
        # k and v are stored in slots seq_len, seq_len + 1, ... of their rows. Then each query
        # attends to all that is stored there, up to its own token.
        return flash_attn_with_kvcache(
            q, k_cache[layer, some], v_cache[layer, some], k, v,
            cache_seqlens=seq_len[some].to(q.device), causal=True,
        )  # fmt: skip

    while coming or waiting or running:
        with stats.clock("idle"):
            arrive(coming, waiting, running)
        if not running:  # The next batch.
            n_rows = min(len(waiting), k_cache.shape[1])
            batch = [waiting.popleft() for _ in range(n_rows)]
            running = set(range(n_rows))
            seq_len = torch.zeros(n_rows, dtype=torch.int32)  # Tokens stored, new ones excluded.
        # A request that has ended keeps its row, which computes its last token over and over, as
        # its seq_len stands still.
        first = seq_len.tolist()
        new = [request.tokens[n:] for request, n in zip(batch, first, strict=True)]
        with stats.clock("decode" if any(first) else "prefill"):
            chosen = choose(forward(model, new, first, attend), args.temperature)
        for row in running:
            seq_len[row] += len(new[row])
        # The batch is static: who has ended still reserves a row, but uses nothing.
        used = sum(seq_len[list(running)].tolist())
        stats.sample(new, n_rows, len(waiting), n_rows * args.max_seq_len, used)
        if args.trace:
            cells = trace.rows(stats.naive_fits, args.max_seq_len, batch, seq_len, running)
            stats.trace(cells, waiting)
        for row in list(running):
            batch[row].add(chosen[row])
            if batch[row].ended(chat["stop"]):
                running.remove(row)


@torch.inference_mode()
def main(argv=None):
    args = parse(parser, argv)
    model, encoding, chat = load(args)
    requests = read_requests(args, encoding, chat)
    stats = Stats(args, model[0])
    rows = min(args.n, max(1, stats.naive_fits)) if args.rate else args.n
    need = rows * args.max_seq_len * stats.bytes_per_token
    if need > stats.budget:
        sys.exit(
            f"{rows} requests would reserve {need / 1e9:.2f} GB for their keys and values; the "
            f"budget is {stats.budget / 1e9:.2f} GB (--kv-gb), where {stats.naive_fits} fit."
        )
    n_layers, n_kv_heads, head_dim = stats.shape
    shape = (2, n_layers, rows, args.max_seq_len, n_kv_heads, head_dim)
    with or_exit(f"{need / 1e9:.2f} GB for the KV cache cannot be had"):
        cache = torch.empty(shape, dtype=stats.dtype, device=args.device)
    try:
        generate(model, cache, requests, chat, args, stats)
    finally:  # Ctrl-C, too, leaves the answers and statistics so far.
        stats.report(requests, encoding.decode, chat["stop"])


if __name__ == "__main__":
    run(main)
