"""Tiers: what is shared, spilled, fetched and dropped, beside test_kvcache.py's state machine."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from kvcache import PagedCache, TieredCache, blocks_for, keys_of
from support.dram import DramStore
from support.prompts import Request
from test_kvcache import (
    BYTES_PER_TOKEN,
    CHAT,
    PAGED,
    TIERED,
    answers,
    assert_plain,
    make_checkpoint,
    plain_generate,
    record,
    run,
    text_of,
)


def tiered_cache(n_blocks=8, n_dram=8, block_size=4):
    return TieredCache(n_dram, n_blocks, block_size, 4, 64, (3, 2, 5), torch.float32, "cpu")


def fill(cache, tokens, advance=True):
    """Admit a request and write random keys and values. Returns its row, blocks, what they hold."""
    row = cache.admit(tokens)
    found = int(cache.positions()[row])
    ids = cache.block_table[row, : cache.n_owned[row]].tolist()
    for i in ids[found // cache.block_size :]:
        cache.kv[:, :, i] = torch.randn(cache.kv[:, :, i].shape)
    if advance:
        cache.advance({row: tokens[found:]})
    return row, ids, cache.kv[:, :, ids].clone()


def test_a_key_stands_for_the_whole_text_up_to_its_block():
    keys = keys_of([1, 2, 3, 4, 5, 6, 7], 3)
    assert len(set(keys)) == 2 == len(keys)
    assert keys_of([1, 2, 3, 4, 5, 6], 3, keys[:1]) == keys
    assert keys_of([9, 2, 3, 4, 5, 6], 3)[1] != keys[1] and keys_of([4, 5, 6], 3) != keys[1:]


def test_a_block_is_known_when_the_step_that_wrote_it_is_over():
    """Until then, who begins with the same blocks waits; others do not."""
    cache, tokens = tiered_cache(), list(range(9))
    row, _, _ = fill(cache, tokens, advance=False)
    assert cache.lookup(tokens) == [] and not cache.can_admit(tokens)
    assert cache.can_admit([99, *tokens]) and cache.can_admit(tokens[:3])
    cache.advance({row: tokens[:4]})  # Read in two steps: the second block is still to come.
    assert len(cache.lookup(tokens)) == 1 and not cache.can_admit(tokens)
    cache.advance({row: tokens[4:]})
    assert cache.can_admit(tokens) and cache.lookup(tokens) == keys_of(tokens, 4)
    assert len(cache.lookup([*tokens[:4], 99, 99, 99, 99, 99])) == 1


def test_nobody_waits_for_a_request_that_is_gone():
    cache, tokens = tiered_cache(), list(range(9))
    row, _, _ = fill(cache, tokens, advance=False)
    cache.release(row)
    assert cache.can_admit(tokens) and cache.lookup(tokens) == []


@pytest.mark.parametrize(("n", "found"), [(3, 0), (4, 0), (5, 4), (8, 4), (9, 8), (12, 8)])
def test_one_token_is_left_to_compute(n, found):
    """Also where all of the prompt is known, which ends on a block boundary or beside it."""
    cache, tokens = tiered_cache(), list(range(12))
    cache.release(fill(cache, tokens)[0])
    assert cache.positions()[cache.admit(tokens[:n])] == found


def test_a_shared_block_stays_while_one_of_its_users_runs():
    cache, tokens = tiered_cache(n_blocks=6), list(range(9))
    row, ids, held = fill(cache, tokens)
    other = cache.admit([*tokens[:8], 99])  # The same two blocks, and one of its own.
    assert [cache.pool.ref_count[i] for i in ids] == [3, 3, 1]  # The cache is a user, too.
    cache.release(row)
    third = cache.admit(list(range(100, 109)))  # Takes all blocks that are free.
    assert cache.n_free() == 0 and cache.block_table[other, :2].tolist() == ids[:2]
    assert torch.equal(cache.kv[:, :, ids[:2]], held[:, :, :2])
    cache.release(other)
    cache.admit(list(range(200, 209)))  # Now the two blocks leave HBM, and come back from DRAM.
    cache.release(third)
    row = cache.admit(tokens)
    assert cache.positions()[row] == 8 and cache.counts["fetched"] == 2
    assert torch.equal(cache.kv[:, :, cache.block_table[row, :2].tolist()], held[:, :, :2])


def test_spilling_begins_before_room_is_needed():
    """A free block for each row, as long as there are idle ones: the end of a text goes first."""
    cache, tokens = tiered_cache(n_blocks=5), list(range(12))
    cache.release(fill(cache, tokens)[0])
    keys = keys_of(tokens, 4)
    row, _, _ = fill(cache, [99])
    assert cache.counts["spilled"] == 0  # One of two is free.
    other, _, _ = fill(cache, [98])
    assert [key in cache.store.ids for key in keys] == [False, True, True]
    assert len(cache.pool.free_ids) == 2
    cache.release(row)
    cache.release(other)
    assert len(cache.lookup([*tokens, 0])) == 3


def test_the_least_recently_used_leave_first():
    cache = tiered_cache(n_blocks=4, n_dram=2)
    keys = {}
    for start in (0, 10, 20, 30):  # Each request leaves one block behind.
        tokens = list(range(start, start + 4))
        cache.release(fill(cache, tokens)[0])
        (keys[start],) = keys_of(tokens, 4)
    assert [key for key in keys.values() if key in cache.in_hbm] == list(keys.values())[1:]
    row, _, _ = fill(cache, [10, 11, 12, 13, 14])  # Uses the oldest that is left.
    cache.release(row)
    fill(cache, list(range(50, 62)))
    assert keys[10] in cache.store.ids or keys[10] in cache.in_hbm
    assert keys[0] not in cache.store.ids  # DRAM has room for two, and that was there first.


def test_copies_on_cuda_have_a_stream_beside_the_computation(monkeypatch):
    """The calls and their order, against a stand-in for torch.cuda."""
    calls = []

    class Stream:
        def __init__(self, name="link"):
            self.name = name

        def wait_stream(self, other):
            calls.append((self.name, "waits for", other.name))

    @contextmanager
    def stream(stream):
        calls.append((stream.name, "begins"))
        yield
        calls.append((stream.name, "ends"))

    store = DramStore(2, torch.zeros(3))
    compute = Stream("compute")
    cuda = SimpleNamespace(Stream=Stream, stream=stream, current_stream=lambda: compute)
    monkeypatch.setattr(torch, "cuda", cuda)
    store.stream, source = Stream(), torch.ones(3)
    monkeypatch.setattr(torch.Tensor, "copy_", lambda a, b, non_blocking: (
        calls.append(("copy", b is source, non_blocking))))  # fmt: skip
    store.dump("key", source)
    copied = [("link", "waits for", "compute"), ("link", "begins")]
    copied += [("copy", True, True), ("link", "ends")]
    assert calls == copied
    store.load(store.take(["key"]), [torch.zeros(3)])
    assert calls[4:6] == copied[:2] and calls[6:] == [
        ("copy", False, True), ("link", "ends"), ("compute", "waits for", "link")
    ]  # fmt: skip
    assert sorted(store.free_ids) == [0, 1]


def test_copies_elsewhere_leave_cuda_alone(monkeypatch):
    """Asked for the current stream, a card that --device cpu does not use would be set up."""
    store, target = DramStore(1, torch.zeros(3)), torch.zeros(3)
    monkeypatch.setattr(torch, "cuda", None)
    store.dump("key", torch.ones(3))
    store.load(store.take(["key"]), [target])
    assert target.tolist() == [1, 1, 1]


def test_rooms_are_not_used_again_before_their_copies_are_made(monkeypatch):
    """A stream as slow as can be: what is dumped is copied when somebody waits, not before."""
    late, copy = [], DramStore.copy
    monkeypatch.setattr(DramStore, "copy", lambda self, pairs: late.append(pairs))

    def wait(self):
        while late:
            copy(self, late.pop(0))

    monkeypatch.setattr(DramStore, "wait", wait)
    cache, tokens = tiered_cache(n_blocks=3), list(range(9))
    row, _, held = fill(cache, tokens)
    cache.release(row)
    cache.release(fill(cache, list(range(100, 109)))[0])  # Takes the place of all three blocks.
    row = cache.admit(tokens)
    assert cache.positions()[row] == 8
    assert torch.equal(cache.kv[:, :, cache.block_table[row, :2].tolist()], held[:, :, :2])


def test_a_preempted_request_computes_its_last_block_again_and_nothing_else(
    tmp_path, tiny, monkeypatch
):
    steps = record(monkeypatch, TieredCache, "advance")
    texts = [text_of(3 + n, seed=n) for n in range(12)]
    budget = ["--kv-gb", 80 * BYTES_PER_TOKEN / 1e9, "--block-size", 3]
    result = run(TIERED, tiny, tmp_path, texts, "--max-new-tokens", 60, *budget)
    assert_plain(result, tiny, texts, 60)
    once = sum(len(text) + 2 + 60 - 1 for text in texts)
    computed = sum(len(tokens) for (new,) in steps for tokens in new.values())
    assert result["preemptions"] > 10 and result["tiers"]["dropped"] == 0
    assert once < computed <= once + 3 * result["preemptions"]  # A full last block is one more.


@pytest.mark.parametrize("stop", [False, True])
def test_turns(tmp_path, tiny, stop):
    """Each turn is answered as the conversation so far would be, and finds it in the store."""
    said = [[text_of(n, seed=n + t) for t in range(3)] for n in (20, 9, 26, 31)] + [["one", "two"]]
    chat = {**CHAT, "end": "<|3|>"}
    first = plain_generate(tiny, [256, *said[0][0].encode(), 259, 257], 4) if stop else []
    chat["special_tokens"] = {**CHAT["special_tokens"], "<|unused|>": 258}
    chat["special_tokens"]["<|2|>"] = first[3] if stop else 258
    folder = make_checkpoint(tmp_path / "model", chat=chat)
    stops = {chat["special_tokens"]["<|2|>"]}
    expected, lengths, found = [], [], 0
    for conversation in said:
        history = [256]
        for text in conversation[:3]:
            prompt = [*history, *text.encode(), 259, 257]
            expected.append(plain_generate(folder, prompt, 12, stops))
            lengths.append(len(prompt))
            stored = [*prompt, *expected[-1]][:-1]  # The last token was never stored.
            history = [*prompt, *(t for t in expected[-1] if t not in stops), 259]
            found += len(stored) // 4 if text != conversation[-1] else 0
    assert stop == (len(expected[0]) == 4)
    for tight in (False, True):
        blocks = blocks_for(140, 4)
        options = ["--kv-gb", blocks * 4 * BYTES_PER_TOKEN / 1e9] if tight else []
        result = run(TIERED, folder, tmp_path, said, "--turns", 3, "--max-new-tokens", 12,
                     "--block-size", 4, *options)  # fmt: skip
        assert answers(result) == expected
        assert [r["prompt_tokens"] for r in result["responses"]] == lengths
        tiers = result["tiers"]
        assert result["requests"] == 14 and bool(tiers["fetched"]) == tight
        assert tiers["shared"] + tiers["fetched"] >= found > 0
        assert len(tiers["later_first_token_s"]) == 9
        assert all(seconds > 0 for seconds in result["time"]["first_token_s"])


def test_turns_on_smollm2(tmp_path, smollm2):
    """A tiny HBM, an unlimited one, and llama3-paged.py fed the same histories."""
    said = [["What is a KV cache?", "Why?"], ["Name three rivers.", "Which is long?", "And wide?"]]
    said += [["def add(a, b):\n    return", "Now in C."], ["What is a cat?", "And a dog?"]]
    options = ["--turns", 3, "--max-new-tokens", 12, "--block-size", 4]
    wide = run(TIERED, smollm2, tmp_path, said, *options)
    tight = run(TIERED, smollm2, tmp_path, said, *options, "--kv-gb", 0.01)
    assert answers(tight) == answers(wide) and not wide["tiers"]["fetched"]
    assert tight["tiers"]["fetched"] > 0 and tight["preemptions"] > 0
    argv = [4, "--model", smollm2, "--prompts", tmp_path / "prompts.json", "--dtype", "float32"]
    args = PAGED.parser.parse_args([str(a) for a in (*argv, "--device", "cpu", "--kv-gb", 1)])
    args.max_new_tokens = 12
    model, encoding, chat = PAGED.load(args)
    requests, answer = [], iter(answers(wide))
    for first in PAGED.read_requests(args, encoding, chat, 3):
        history = []
        for text, tokens in [(first.text, first.prompt), *first.later]:
            requests.append(Request((len(requests), 0), text, history + tokens, [], args))
            history = [*requests[-1].prompt, *(t for t in next(answer) if t not in chat["stop"])]
    stats = PAGED.Stats(args, model[0])
    longest = max(request.limit for request in requests)
    cache = PagedCache(2000, 4, len(requests), longest, stats.shape, stats.dtype, "cpu")
    with torch.inference_mode():
        PAGED.generate(model, cache, requests, chat, args, stats)
    assert [request.tokens[len(request.prompt) :] for request in requests] == answers(wide)


def test_equal_prompts_in_one_step_share_blocks(tmp_path, tiny):
    text = text_of(62)
    options = ["--max-new-tokens", 5, "--block-size", 16]
    result = run(TIERED, tiny, tmp_path, [text] * 3, *options)
    assert_plain(result, tiny, [text] * 3, 5)
    # 64 tokens: two of three find three blocks, and the fourth block is each one's own.
    assert result["tiers"]["shared"] == 2 * 3
    assert result["kv"]["peak_reserved_bytes"] == (3 + 3 * 2) * 16 * BYTES_PER_TOKEN
