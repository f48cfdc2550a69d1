"""Sink, window and retrieval, beside what test_kvcache.py says of their answers."""

import math
import random
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from caches.retrieval import RetrievalCache, bounds_of, highest_scores
from kvcache import WindowCache, blocks_for
from test_kvcache import (
    BYTES_PER_TOKEN,
    TIERED,
    answers,
    assert_plain,
    plain_forward,
    plain_generate,
    read_checkpoint,
    run,
    text_of,
    tiny_prompt,
)


def test_a_window_that_nothing_leaves_is_full_attention(tmp_path, tiny):
    texts = [text_of(n, seed=n) for n in (5, 30, 47)]
    for options in ([], ["--sink", 7], ["--top-k", 16]):
        result = run(
            TIERED, tiny, tmp_path, texts, "--window", 69, "--max-new-tokens", 20, *options
        )
        assert_plain(result, tiny, texts, 20, {258})
        assert not result["tiers"]["dropped"]
    short = run(TIERED, tiny, tmp_path, ["a"], "--window", 9, "--top-k", 9, "--max-new-tokens", 2)
    assert_plain(short, tiny, ["a"], 2, {258})  # Under a block.


def test_a_window_takes_constant_memory(tmp_path, tiny):
    """Two at a time, since that is what the budget holds, however long they get."""
    texts = [text_of(n, seed=n) for n in (90, 5, 40, 200)]
    blocks = 2 * (2 + blocks_for(4 + 16 - 2 + 16, 4))
    result = run(TIERED, tiny, tmp_path, texts, "--sink", 8, "--window", 16, "--block-size", 4,
                 "--max-new-tokens", 300, "--ignore-stop",
                 "--kv-gb", (blocks + 0.5) * 4 * BYTES_PER_TOKEN / 1e9)  # fmt: skip
    assert [len(answer) for answer in answers(result)] == [300] * 4
    assert result["max_batch"]["peak"] == 2 and result["preemptions"] == 0
    assert result["kv"]["peak_reserved_bytes"] == blocks * 4 * BYTES_PER_TOKEN


def test_a_window_holds_as_many_tokens_as_planned():
    """In no text more; in some, as many."""
    rng, unused = random.Random(0), set()
    for size, sink, window, chunk in product((1, 3, 4), (0, 1, 6), (5, 6, 11), (1, 2, 4)):
        paged = (99, size, 1, 99, (1, 1, 2), torch.float32, "cpu")
        cache = WindowCache(sink, window, chunk, lambda keys, n: keys, *paged)
        row, prompt, most = cache.admit([]), rng.randrange(1, 99), 0
        while (stored := int(cache.positions()[row])) < 98:
            new = min(chunk, prompt - stored) if stored < prompt else 1
            most = max(most, blocks_for(int(cache.seq_len[row]) + new, size))
            cache.advance({row: [0] * new})
            assert len(set(cache.block_table[row, : cache.row_blocks].tolist())) == cache.row_blocks
        unused.add(cache.row_blocks - most)
    assert min(unused) == 0


def rotate(keys, by):
    """RoPE of keys (..., 6 or 8), whatever their layout, by positions (...)."""
    angles = by[..., None] * torch.tensor([1.0, 0.3, 0.1, 0.03])[: keys.shape[-1] // 2]
    pairs = torch.view_as_complex(keys.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten(-2)


def test_sinks_do_not_drift():
    """In bfloat16, after a thousand evictions, the sink is one rotation away from what it was."""
    paged = (9, 4, 1, 10**4, (2, 1, 4), torch.bfloat16, "cpu")
    cache = WindowCache(4, 8, 4, rotate, *paged)
    row = cache.admit([])
    sink = cache.block_table[row, :1].long()
    cache.kv[:, 0, sink] = stored = torch.randn(2, 1, 1, 4, 4).bfloat16()
    cache.advance({row: [0] * 4})
    for _ in range(1000):
        cache.advance({row: [0] * 4})
    n = cache.n_evicted[[row]]
    assert n > 3900 and torch.equal(cache.kv[:, 0, sink], rotate(stored, n).bfloat16())


@given(data=st.data())
@settings(max_examples=200, deadline=None, derandomize=True)
def test_a_bound_is_at_least_each_score_in_its_block(data):
    """In whole numbers, where nothing is rounded."""
    Hkv, T, n, size, D = (data.draw(st.integers(1, 4)) for _ in range(5))

    def numbers(*shape):
        count = math.prod(shape)
        values = data.draw(st.lists(st.integers(-9, 9), min_size=count, max_size=count))
        return torch.tensor(values, dtype=torch.float32).view(shape)

    q, keys = numbers(Hkv, T, D), numbers(Hkv, n, size, D)
    scores = torch.einsum("htd,hnsd->htns", q, keys)
    assert (highest_scores(q, bounds_of(keys))[..., None] >= scores).all()
    one = bounds_of(keys[:, :, :1])  # Of one key the score itself.
    assert torch.equal(highest_scores(q, one)[..., None], scores[..., :1])


def retrieval_cache(n_away, top_k, size=4, context=10**9):
    """A cache of one row from whose window n_away blocks have left, and what they held."""
    paged = (40, size, 1, (n_away + 2) * size, (3, 2, 6), torch.float32, "cpu")
    window = (size, size, size, rotate)  # A block each: sink, window and chunk.
    cache = RetrievalCache(2 * n_away, top_k * size, context, *window, *paged)
    row = cache.admit([])
    written = []
    for _ in range(n_away + 2):
        block = cache.block_table[row, int(cache.seq_len[row]) // size]
        cache.kv[:, :, block] = held = torch.randn(3, 2, 2, size, 6)
        written.append(held)
        cache.advance({row: [0] * size})
    return cache, written[1:]  # Without the sink.


@given(data=st.data())
@settings(max_examples=60, deadline=None, derandomize=True)
def test_what_is_fetched_is_what_left(data):
    """Any choices, of as many blocks as there are slots and fewer, in each layer others."""
    n, top_k = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 5))
    cache, written = retrieval_cache(n, top_k)
    assert cache.away[0].n == n
    recent = [[] for _ in range(3)]
    for _ in range(12):
        layer = data.draw(st.integers(0, 2))
        numbers = data.draw(st.lists(st.integers(0, n - 1), unique=True, max_size=min(n, top_k)))
        missing = len(set(numbers) - set(recent[layer]))
        before = cache.counts["fetched"]
        slots = cache.fetch(layer, 0, numbers)
        assert round(3 * (cache.counts["fetched"] - before)) == missing
        assert len(set(slots)) == len(numbers) and set(slots) <= set(cache.away[0].slots)
        hits = [i for i in numbers if i in recent[layer]]
        others = [i for i in recent[layer] if i not in numbers]
        recent[layer] = others + hits + [i for i in numbers if i not in hits]
        recent[layer] = recent[layer][-min(n, top_k) :]  # The least recently used are gone.
        for i, slot in cache.away[0].held[layer].items():
            assert torch.equal(cache.kv[layer][:, slot], written[i][layer])
        assert set(cache.away[0].held[layer]) == set(recent[layer])
    cache.release(0)
    assert cache.n_free() == 40 and not cache.away


@pytest.mark.parametrize("context", [10**9, 30])
@pytest.mark.parametrize("n", [7, 8, 30])
def test_the_blocks_chosen_are_those_with_the_most_attention(n, context):
    """Of the eight that by their bounds could have the most, wherever the keys are put."""
    torch.manual_seed(0)
    cache, written = retrieval_cache(n, 2, context=context)
    unlike = 0
    for layer in range(3):
        q = 3 * torch.randn(5, 4, 6)  # Five queries of four heads, two for each key head.
        could, has = torch.zeros(2, n)
        keys = torch.stack([block[layer, 0] for block in written[:n]])  # (n, 2, 4, 6)
        seen = q  # As the keys in DRAM see it.
        if context == 30:  # Block 0 is behind a sink of four tokens.
            keys = rotate(keys, -4 - 4 * torch.arange(n).view(n, 1, 1))
            seen = rotate(q, -cache.n_evicted)
        for t, h in product(range(5), range(4)):
            of_head = keys[:, h // 2]
            bound = torch.maximum(seen[t, h] * of_head.amax(1), seen[t, h] * of_head.amin(1))
            could = torch.maximum(could, (bound.sum(1) / math.sqrt(6)).softmax(0))
        best = could.topk(min(8, n)).indices
        for t, h in product(range(5), range(4)):
            scores = keys[best, h // 2] @ seen[t, h] / math.sqrt(6)
            has[best] = torch.maximum(has[best], scores.flatten().softmax(0).view(-1, 4).sum(1))
        assert set(cache.choose(layer, 0, q)) == set(has.topk(2).indices.tolist())
        unlike += set(has.topk(2).indices.tolist()) != set(could.topk(2).indices.tolist())
    assert unlike  # By the bounds alone it would be others.


def squeezed(n_prompt, sink, window, block_size, chunk, context):
    """What tokens see when everything that has left the window comes back, in a text that is longer
    than the model's context. As test_kvcache.in_window(): a function that returns key_at.

    The sink is `reach` before what is left of the text, or where it was; blocks are where they were
    until more than that has left, and then within the reach, moved again after a chunk.
    """
    n_sink = blocks_for(sink, block_size) * block_size
    reach = min(context // 4, context - n_sink - window - block_size - 2 * chunk)

    def places(T):
        rows, s, first, frame = [], torch.arange(T), 0, 0
        starts = (s - n_sink) // block_size * block_size
        while first < T:
            n_new = min(chunk, n_prompt - first) if first < n_prompt else 1
            n_left = max(0, (first + 1 - window) // block_size * block_size - n_sink)
            frame = n_left if n_left - max(frame, reach) > chunk else frame
            key_at = torch.where(s < n_sink, s + max(0, n_left - reach), s)
            if frame > reach:
                moved = n_sink + frame - reach + starts * (reach - block_size) // frame
                moved += s % block_size
                key_at = torch.where((s >= n_sink) & (s < n_sink + n_left), moved, key_at)
            for t in range(first, min(first + n_new, T)):
                rows.append(torch.where(s <= t, key_at, -1))
            first += n_new
        key_at = torch.stack(rows)
        distances = (key_at.diagonal()[:, None] - key_at)[key_at >= 0]
        assert distances.min() >= 0 and distances.max() < context
        return key_at

    return places


@pytest.mark.parametrize("block_size", [1, 3, 16])
@pytest.mark.parametrize(("sink", "window", "context"), [(0, 12, 80), (5, 7, 70), (16, 16, 100)])
def test_squeezed_positions(tmp_path, tiny, monkeypatch, block_size, sink, window, context):
    """Logits and tokens, with room for everything, prompts shorter and longer than the context."""
    logits, choose, load = [], TIERED.choose, TIERED.load
    monkeypatch.setattr(TIERED, "choose", lambda *a: logits.append(a[0].clone()) or choose(*a))

    def load_with_another_context(args):
        (params, w), *others = load(args)
        return ({**params, "context": context}, w), *others

    monkeypatch.setattr(TIERED, "load", load_with_another_context)
    texts, limit = [text_of(n, seed=n) for n in (3, 110)], 45
    options = ["--sink", sink, "--window", window, "--block-size", block_size, "--top-k", 200]
    options += ["--max-new-tokens", limit, "--ignore-stop"]
    result = run(TIERED, tiny, tmp_path, texts, *options)
    assert result["tiers"]["spilled"] > 60 // block_size and not result["tiers"]["dropped"]
    for prompt, answer in zip(map(tiny_prompt, texts), answers(result), strict=True):
        places = squeezed(len(prompt), sink, window, block_size, window, context)
        assert answer == plain_generate(tiny, prompt, limit, (), places, answer)
    logits.clear()
    (answer,) = answers(run(TIERED, tiny, tmp_path, texts[1:], *options))
    tokens = tiny_prompt(texts[1]) + answer[:-1]
    key_at = squeezed(112, sink, window, block_size, window, context)(len(tokens))
    expected = plain_forward(*read_checkpoint(tiny), tokens, key_at)[-limit:]
    torch.testing.assert_close(torch.cat(logits[-limit:]), expected, atol=2e-4, rtol=1e-4)
    large = ["--window", context - 12]
    with pytest.raises(SystemExit, match=f"takes all of the context's {context}"):
        run(TIERED, tiny, tmp_path, texts, *options, *large)
    text = text_of(context - limit - 2, seed=1)  # That is all of the context.
    result = run(TIERED, tiny, tmp_path, [text], *options, *large)
    assert_plain(result, tiny, [text], limit)
    assert result["tiers"]["spilled"] >= (11 - sink) // block_size


def test_memory_set_aside_for_retrieval(tmp_path, tiny):
    """Exactly enough for two requests in either tier runs two; a block less runs one."""
    texts = [text_of(90, seed=n) for n in range(3)]
    need = (1 + blocks_for(4 + 10 - 2 + 10, 4)) + 6  # Sink and window; 24 tokens that come back.
    need_dram = 24 * 5 / 4  # The 24 blocks that may leave, bounds included.
    options = ["--max-new-tokens", 20, "--ignore-stop", "--block-size", 4]
    options += ["--sink", 4, "--window", 10, "--top-k", 24]
    gb = 4 * BYTES_PER_TOKEN / 1e9
    for hbm, dram, at_once in ((2, 2, 2), (2, 9, 2), (1.99, 9, 1), (9, 1.96, 1)):
        # (Numbers of blocks are rounded down.)
        tiers = ["--kv-gb", (hbm * need + 0.01) * gb, "--dram-gb", (dram * need_dram + 0.01) * gb]
        result = run(TIERED, tiny, tmp_path, texts, *options, *tiers)
        assert result["max_batch"]["peak"] == at_once
        assert result["kv"]["peak_reserved_bytes"] == at_once * need * 4 * BYTES_PER_TOKEN
    for tier, blocks in (("--kv-gb", need), ("--dram-gb", need_dram)):
        with pytest.raises(SystemExit, match="no room for the 111 tokens"):
            run(TIERED, tiny, tmp_path, texts, *options, tier, (blocks - 0.01) * gb)


def test_retrieval_on_smollm2_remembers_what_a_window_forgets(tmp_path, smollm2):
    """A needle that has left the window long before the question."""
    noise = "The hills are brown. A cart goes by. The bread is warm. Somebody hums. It is late. "
    text = noise * 3 + "Remember: the code of the safe is 7318264. " + noise * 40
    text += "Question: what is the code of the safe?"
    options = ["--sink", 16, "--window", 128, "--max-new-tokens", 24, "--kv-gb", 0.1]
    forgets = run(TIERED, smollm2, tmp_path, [text], *options)["responses"][0]
    finds = run(TIERED, smollm2, tmp_path, [text], *options, "--top-k", 256)["responses"][0]
    assert finds["prompt_tokens"] > 900
    assert "7318264" in finds["text"] and "7318264" not in forgets["text"]
