"""python -m pytest runs this file, what must hold, and tests/, one file per subject.

The oracles are a forward pass without a cache, and lists of what every block should contain.
"""

import base64
import importlib.util
import json
import math
import mmap
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kvcache import BlockPool, OutOfBlocks, PagedCache, TieredCache, blocks_for, keys_of

HERE = Path(__file__).resolve().parent
SMOLLM2 = HERE / "models" / "SmolLM2-135M-Instruct"


def load_by_path(path):
    """The module in a file whose name cannot be imported."""
    spec = importlib.util.spec_from_file_location(path.stem.replace("-", "_"), path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


NAMES = ["naive", "virtual", "paged", "tiered"]
SCRIPTS = [load_by_path(HERE / f"llama3-{name}.py") for name in NAMES]
NAIVE, VIRTUAL, PAGED, TIERED = SCRIPTS
PAGE = mmap.PAGESIZE

# --- The oracle: Llama 3 without a cache ----------------------------------------------------------


def plain_forward(params, w, tokens, key_at=None):
    """Logits (T, vocabulary) after each token, by full attention in float32, head by head.

    key_at (T, T): which position each query sees each key at, below 0 if it does not see it.
    """
    H, Hkv, eps = params["n_heads"], params["n_kv_heads"], params["norm_eps"]
    T, D, plain = len(tokens), params["dim"] // H, key_at is None
    visible = torch.ones(T, T, dtype=torch.bool).tril() if plain else key_at >= 0
    mask = torch.zeros(T, T).masked_fill(~visible, -math.inf)
    key_at, query_at = (torch.arange(T),) * 2 if plain else (key_at, key_at.diagonal())

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
            scores = qh @ kh.T if plain else (kh @ qh[..., None]).squeeze(-1)
            scores = scores / math.sqrt(D) + mask
            heads.append(scores.softmax(-1) @ v[:, g * D : g * D + D])
        x = x + torch.cat(heads, dim=1) @ layer["o"].T
        y = norm(x, w[f"layers.{i}.ffn_norm.weight"])
        w1, w2, w3 = (w[f"layers.{i}.feed_forward.w{n}.weight"] for n in (1, 2, 3))
        x = x + (torch.nn.functional.silu(y @ w1.T) * (y @ w3.T)) @ w2.T
    output = w.get("output.weight", w["tok_embeddings.weight"])
    return norm(x, w["norm.weight"]) @ output.T


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


def read_checkpoint(folder):
    """A checkpoint's params.json, and its weights in float32."""
    w = torch.load(folder / "consolidated.00.pth", weights_only=True)
    return json.loads((folder / "params.json").read_text()), {n: x.float() for n, x in w.items()}


def plain_generate(folder, prompt, limit, stop=(), places=None, draft=()):
    """The greedy answer to `prompt`, at most `limit` tokens. places(T): plain_forward's key_at.

    draft: what the answer may be. As far as it is, one pass finds it, and else one pass a token.
    """
    params, w = read_checkpoint(folder)
    answer, read = [], [*prompt, *draft]
    while True:
        logits = plain_forward(params, w, read, places and places(len(read)))
        for following in logits[len(prompt + answer) - 1 :]:
            best = following.topk(2)
            assert best.values[0] - best.values[1] > 1e-4, "a near tie: rounding decides this token"
            answer.append(best.indices[0].item())
            if len(answer) == limit or answer[-1] in stop:
                return answer
            if read[: len(prompt + answer)] != prompt + answer:
                break
        read = prompt + answer


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


def assert_plain(result, folder, texts, limit, stop=()):
    """Each answer is the oracle's."""
    for text, answer in zip(texts, answers(result), strict=True):
        assert answer == plain_generate(folder, tiny_prompt(text), limit, stop, draft=answer)


# --- Blocks ---------------------------------------------------------------------------------------


def test_alloc_takes_nothing_when_it_raises():
    pool = BlockPool(5)
    pool.alloc(3)
    with pytest.raises(OutOfBlocks) as raised:
        pool.alloc(3)
    assert raised.value.args == (3, 2, 5)
    assert len(pool.alloc(2)) == 2


def test_a_block_is_free_when_its_last_user_leaves():
    pool = BlockPool(2)
    (block,) = pool.alloc(1)
    pool.share([block])
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
        self.rows, self.written = {}, 0  # rows: the numbers that each row's slots should hold.

    def store(self, n_new):
        """What a model does: write each row's new tokens where the tables say, then advance."""
        seq_len, table = self.cache.tables(list(n_new))
        for i, (row, n) in enumerate(n_new.items()):
            for t in range(int(seq_len[i]), int(seq_len[i]) + n):
                self.written += 1
                self.rows[row].append(self.written)
                block = table[i, t // self.BLOCK_SIZE]
                self.cache.kv[:, :, block, :, t % self.BLOCK_SIZE] = self.written
        self.cache.advance({row: [0] * n for row, n in n_new.items()})

    @precondition(lambda self: len(self.rows) < self.MAX_ROWS)
    @rule(n=st.integers(1, 20), read=st.integers(1, 20))
    def admit(self, n, read):
        """A prompt of which the first step reads a part, or all."""
        need, free = -(-n // self.BLOCK_SIZE), len(self.cache.pool.free_ids)
        assert self.cache.can_admit([0] * n) == (need + len(self.rows) <= free)
        if need <= free:
            row = self.cache.admit([0] * n)
            assert row not in self.rows
            self.rows[row] = []
            self.store({row: min(n, read)})
        else:
            with pytest.raises(OutOfBlocks):
                self.cache.admit([0] * n)

    @precondition(lambda self: self.rows and max(map(len, self.rows.values())) < self.MAX_LEN)
    @rule()
    def decode(self):
        while not self.cache.can_grow():  # Preempt the youngest.
            with pytest.raises(OutOfBlocks):
                self.cache.grow()
            row, _ = self.rows.popitem()
            self.cache.release(row)
        self.cache.grow()
        if self.rows:
            self.store(dict.fromkeys(self.rows, 1))

    @precondition(lambda self: self.rows)
    @rule(data=st.data())
    def release(self, data):
        row = data.draw(st.sampled_from(list(self.rows)))
        self.cache.release(row)
        del self.rows[row]

    @invariant()
    def blocks_are_partitioned_and_contents_intact(self):
        cache, owned = self.cache, []
        for row, expected in self.rows.items():
            assert cache.positions()[row] == len(expected)
            ids = cache.block_table[row, : cache.n_owned[row]].tolist()
            owned += ids
            slots = torch.tensor(expected, dtype=torch.float64).view(-1, 1, 1, 1, 1)
            held = cache.kv[:, :, ids].permute(2, 4, 0, 1, 3, 5).flatten(0, 1)[: len(expected)]
            assert (held == slots).all()
        assert sorted(owned + cache.pool.free_ids) == list(range(self.N_BLOCKS))
        assert all(cache.pool.ref_count[i] == (i in owned) for i in range(self.N_BLOCKS))
        used = sum(map(len, self.rows.values()))
        assert cache.usage() == (len(owned) * self.BLOCK_SIZE, used)

    def teardown(self):
        for row in self.rows:
            self.cache.release(row)
        assert sorted(self.cache.pool.free_ids) == list(range(self.N_BLOCKS))


class TieredCacheMachine(RuleBasedStateMachine):
    """Requests over two letters, so that many begin alike, in a tiny HBM and a tinier DRAM.

    The model of a slot: a number for each text that ends there, which no other text has.
    """

    N_BLOCKS, N_DRAM, BLOCK_SIZE, MAX_ROWS, MAX_LEN = 9, 5, 2, 5, 16

    def __init__(self):
        super().__init__()
        size = (self.N_BLOCKS, self.BLOCK_SIZE, self.MAX_ROWS, self.MAX_LEN)
        self.cache = TieredCache(self.N_DRAM, *size, (2, 2, 1), torch.float64, "cpu")
        self.rows, self.numbers, self.texts = {}, {}, {}
        # rows: of each row the tokens stored; texts: of each key the text that it stands for.

    def number(self, tokens):
        return self.numbers.setdefault(tuple(tokens), len(self.numbers) + 1)

    def write(self, new):
        """What a model does with new[row] tokens of each row, and advance."""
        seq_len, table = self.cache.tables(list(new))
        for i, (row, tokens) in enumerate(new.items()):
            for t, token in enumerate(tokens, int(seq_len[i])):
                self.rows[row].append(token)
                block = table[i, t // self.BLOCK_SIZE]
                self.cache.kv[:, :, block, :, t % self.BLOCK_SIZE] = self.number(self.rows[row])
        self.cache.advance(new)
        for tokens in self.rows.values():
            for n, key in enumerate(keys_of(tokens, self.BLOCK_SIZE), 1):
                self.texts[key] = tokens[: n * self.BLOCK_SIZE]

    @precondition(lambda self: len(self.rows) < self.MAX_ROWS)
    @rule(tokens=st.lists(st.integers(0, 1), min_size=1, max_size=12), fork=st.booleans(),
          data=st.data())  # fmt: skip
    def admit(self, tokens, fork, data):
        """Some begin like one that runs; some are read a part at a time."""
        if fork and self.rows:
            other = self.rows[data.draw(st.sampled_from(list(self.rows)))]
            tokens = [*other, *tokens][: self.MAX_LEN - 1]
        known = len(self.cache.lookup(tokens)) * self.BLOCK_SIZE
        if not self.cache.can_admit(tokens):
            return
        row = self.cache.admit(tokens)
        assert int(self.cache.positions()[row]) == known < len(tokens)
        self.rows[row] = tokens[:known]
        self.write({row: tokens[known : data.draw(st.integers(known + 1, len(tokens)))]})

    @precondition(lambda self: self.rows and max(map(len, self.rows.values())) < self.MAX_LEN)
    @rule(tokens=st.lists(st.integers(0, 1), min_size=5, max_size=5))
    def decode(self, tokens):
        """One more token of each row: the prompt's next if it is not read to its end."""
        while not self.cache.can_grow():
            with pytest.raises(OutOfBlocks):
                self.cache.grow()
            self.release(list(self.rows)[-1])
        self.cache.grow()
        new = {}
        for token, (row, stored) in zip(tokens, self.rows.items(), strict=False):
            new[row] = self.cache.texts[row][len(stored) :][:1] or [token]
        if new:
            self.write(new)

    @precondition(lambda self: self.rows)
    @rule(data=st.data())
    def end(self, data):
        self.release(data.draw(st.sampled_from(list(self.rows))))

    def release(self, row):
        self.cache.release(row)
        del self.rows[row]

    @rule(n=st.integers(1, 9))
    def make_room(self, n):
        if n <= self.cache.n_free():
            self.cache.pool.free(self.cache.alloc(n))

    @invariant()
    def every_block_is_in_one_place_and_holds_its_text(self):
        cache, users = self.cache, Counter(self.cache.in_hbm.values())
        for row, tokens in self.rows.items():
            ids = cache.block_table[row, : cache.n_owned[row]].tolist()
            users.update(ids)
            held = cache.kv[:, :, ids].permute(2, 4, 0, 1, 3, 5).flatten(0, 1)[: len(tokens)]
            numbers = [self.number(tokens[: t + 1]) for t in range(len(tokens))]
            assert cache.positions()[row] == len(tokens)
            assert (held == torch.tensor(numbers).view(-1, 1, 1, 1, 1)).all()
        assert users == Counter(dict(enumerate(cache.pool.ref_count)))
        assert sorted([*cache.pool.free_ids, *users]) == list(range(self.N_BLOCKS))
        idle = {key: block for key, block in cache.in_hbm.items() if users[block] == 1}
        assert dict(cache.idle) == idle
        store = cache.store
        assert sorted([*store.free_ids, *store.ids.values()]) == list(range(self.N_DRAM))
        assert not set(cache.in_hbm) & set(store.ids)
        places = [(key, cache.kv[:, :, block]) for key, block in cache.in_hbm.items()]
        places += [(key, store.blocks[block]) for key, block in store.ids.items()]
        for key, held in places:
            text = self.texts[key]
            first = len(text) - self.BLOCK_SIZE
            numbers = [self.number(text[: t + 1]) for t in range(first, len(text))]
            assert (held == torch.tensor(numbers).view(-1, 1)).all()
        in_use = [block for block in users if users[block] > 1 or block not in idle.values()]
        reserved = len(in_use) * self.BLOCK_SIZE
        owned = [cache.n_owned[row] * self.BLOCK_SIZE - len(t) for row, t in self.rows.items()]
        assert cache.usage() == (reserved, reserved - sum(map(int, owned)))

    def teardown(self):
        for row in list(self.rows):
            self.release(row)
        assert self.cache.n_free() == self.N_BLOCKS and not self.cache.computing


TestPagedCache, TestTieredCache = PagedCacheMachine.TestCase, TieredCacheMachine.TestCase
TestPagedCache.settings = TestTieredCache.settings = settings(
    max_examples=260, stateful_step_count=40, deadline=None, derandomize=True
)


# --- Exactness ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "variant", [{}, {"tied": False, "scaled": True}, {"n_layers": 1, "norm_eps": 0.1}]
)
def test_naive_equals_plain_forward(tmp_path, variant):
    folder = make_checkpoint(tmp_path / "model", seed=1, **variant)
    texts = [text_of(n, seed=n) for n in (1, 14, 15, 16, 61)]
    result = run(NAIVE, folder, tmp_path, texts, "--max-seq-len", 90, "--max-new-tokens", 20)
    assert_plain(result, folder, texts, 20)


def admit_greedily(monkeypatch):
    """Keep no spare blocks, so that admissions end in preemptions as often as they can."""
    monkeypatch.setattr(
        PagedCache,
        "can_admit",
        lambda self, tokens: blocks_for(len(tokens), self.block_size) <= self.n_free(),
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
        blocks = blocks_for(max(lengths) + limit, block_size) + 1
        options = ["--kv-gb", blocks * block_size * BYTES_PER_TOKEN / 1e9]
    result = run(PAGED, tiny, tmp_path, texts, "--max-new-tokens", limit,
                 "--block-size", block_size, "--max-seq-len", 700, *options)  # fmt: skip
    assert_plain(result, tiny, texts, limit)
    if tight:
        assert result["kv"]["peak_reserved_bytes"] <= result["kv"]["budget_bytes"]
        assert result["preemptions"] >= 10


@pytest.mark.parametrize("block_size", [1, 3, 16])
@pytest.mark.parametrize("dram_blocks", [0, 7, 10_000])
def test_tiered_equals_plain_forward(tmp_path, tiny, monkeypatch, block_size, dram_blocks):
    """Hardly room for the longest, prompts that begin alike, and DRAM for nothing to everything."""
    texts = [text_of(n, seed=n % 2) for n in (5, 6, 17, 30, 31, 33, 40, 14, 46, 47)]
    blocks = blocks_for(48 + 40, block_size) + 1
    block_gb = block_size * BYTES_PER_TOKEN / 1e9
    monkeypatch.setattr(TieredCache, "can_admit", lambda self, tokens: (
        blocks_for(len(tokens), self.block_size) <= self.n_free()))  # fmt: skip
    result = run(TIERED, tiny, tmp_path, texts, "--max-new-tokens", 40, "--block-size", block_size,
                 "--kv-gb", blocks * block_gb, "--dram-gb", dram_blocks * block_gb)  # fmt: skip
    assert_plain(result, tiny, texts, 40, {258})
    assert result["preemptions"] >= 5 and result["tiers"]["shared"] > 0
    assert result["kv"]["peak_reserved_bytes"] <= result["kv"]["budget_bytes"]
    assert bool(result["tiers"]["dropped"]) == (dram_blocks <= 7)
    assert bool(result["tiers"]["fetched"]) == bool(dram_blocks)


@pytest.mark.parametrize("page_kb", [PAGE // 1024, PAGE // 512])
@pytest.mark.parametrize("tight", [False, True])
def test_virtual_equals_plain_forward(tmp_path, tiny, monkeypatch, page_kb, tight):
    """Prompts that end just before, at and after a page; tight: hardly room for the longest."""
    page = page_kb * 1024 // BYTES_PER_TOKEN
    lengths = [page - 1, page, page + 1, 5, 33, 40, 2 * page, 2 * page + 1] * 6
    texts, limit, options = [text_of(n - 2, seed=n) for n in lengths], 40, []
    if tight:
        monkeypatch.setattr(VIRTUAL.VirtualCache, "can_admit", lambda self, tokens: (
            self.pages_for(len(tokens)) <= self.n_free()))  # fmt: skip
        n_pages = blocks_for(max(lengths) + limit, page) + 1
        options = ["--kv-gb", n_pages * page * BYTES_PER_TOKEN / 1e9]
    options += ["--max-new-tokens", limit, "--page-kb", page_kb]
    result = run(VIRTUAL, tiny, tmp_path, texts, *options)
    assert_plain(result, tiny, texts, limit)
    if tight:
        assert result["kv"]["peak_reserved_bytes"] <= result["kv"]["budget_bytes"]
        assert result["preemptions"] >= 10


def in_window(n_prompt, sink, window, block_size, chunk=None):
    """A function of T that returns plain_forward's key_at. Seen are the sink's blocks, and those
    with one of the `window` tokens that end with the first token of the step: prompts in chunks,
    then each token. What is seen has consecutive positions (StreamingLLM).
    """

    def places(T):
        t = torch.arange(T)
        first = torch.where(t < n_prompt, t // (chunk or window) * (chunk or window), t)[:, None]
        last_of_block = t // block_size * block_size + block_size - 1
        kept = (last_of_block > first - window) | (t < -(-sink // block_size) * block_size)
        seen = kept & (t <= t[:, None])
        return torch.where(seen, seen.cumsum(1) - 1, -1)

    return places


@pytest.mark.parametrize("block_size", [1, 3, 16])
@pytest.mark.parametrize(("sink", "window"), [(0, 12), (1, 7), (4, 20), (16, 32), (5, 33)])
def test_sink_and_window_equal_recomputed_attention(
    tmp_path, tiny, monkeypatch, block_size, sink, window
):
    """Logits and tokens, with prompts shorter and longer than sink and window, many evictions."""
    logits, choose = [], TIERED.choose
    monkeypatch.setattr(TIERED, "choose", lambda *a: logits.append(a[0].clone()) or choose(*a))
    texts, limit = [text_of(n, seed=n) for n in (3, 38, 90)], 60
    options = ["--sink", sink, "--window", window, "--block-size", block_size]
    options += ["--max-new-tokens", limit, "--ignore-stop", "--max-seq-len", 50]
    result = run(TIERED, tiny, tmp_path, texts, *options)
    for prompt, answer in zip(map(tiny_prompt, texts), answers(result), strict=True):
        places = in_window(len(prompt), sink, window, block_size)
        assert answer == plain_generate(tiny, prompt, limit, (), places, answer)
    assert result["tiers"]["dropped"] > 100 // block_size
    logits.clear()
    (answer,) = answers(run(TIERED, tiny, tmp_path, texts[1:2], *options))
    tokens = tiny_prompt(texts[1]) + answer[:-1]
    key_at = in_window(40, sink, window, block_size)(len(tokens))
    expected = plain_forward(*read_checkpoint(tiny), tokens, key_at)[-limit:]
    torch.testing.assert_close(torch.cat(logits[-limit:]), expected, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("block_size", [1, 3, 16])
def test_retrieval_of_everything_is_full_attention(tmp_path, tiny, block_size, capsys):
    """Several requests at once: by row and by block, prompts in chunks, rows that come and go."""
    texts = [text_of(n, seed=n) for n in (3, 14, 38, 61, 90, 22, 41)]
    options = ["--sink", 4, "--window", 10, "--top-k", 200, "--block-size", block_size]
    for gb in ([], ["--kv-gb", 500 * BYTES_PER_TOKEN / 1e9]):
        result = run(TIERED, tiny, tmp_path, texts, "--max-new-tokens", 40, *options, *gb)
        assert_plain(result, tiny, texts, 40, {258})
        tiers = result["tiers"]
        assert tiers["dropped"] == 0 and tiers["spilled"] > 0
        # Each one once, but for what leaves when a request ends.
        assert tiers["spilled"] - len(texts) <= round(tiers["fetched"]) <= tiers["spilled"]
        hits, misses = tiers["shared"], tiers["fetched"]
        row = f"{hits:,.0f} in HBM ({hits / (hits + misses):.1%}), {misses:,.0f} in DRAM"
        assert f"Blocks found       {row}" in capsys.readouterr().out and hits > misses


# --- Statistics -----------------------------------------------------------------------------------


@pytest.mark.parametrize("script", SCRIPTS, ids=NAMES)
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
    assert rows["Max batch"] == f"5 at once, {batch['fits']} would fit on average, naive fits 7"
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
    "no window": ["2", "--window", "0"],
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


@pytest.mark.parametrize("script", NAMES)
def test_interrupted_run_reports(tmp_path, script):
    endless = make_checkpoint(tmp_path / "model", chat={**CHAT, "stop": []})
    prompts = write_prompts(tmp_path / "prompts.json", ["hello"])
    command = [sys.executable, HERE / f"llama3-{script}.py", "3", "--model", endless]
    command += ["--prompts", prompts, "--json", tmp_path / "out.json", "--max-new-tokens", "8000"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # Not so after "&".
    )  # fmt: skip
    first = process.stdout.readline()  # Printed just before the first step.
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert first.startswith("KV cache") and process.returncode == 130 and "Traceback" not in err
    assert out.splitlines()[-1].startswith("Fragmented Memory: ")
    assert 0 < json.loads((tmp_path / "out.json").read_text())["generated_tokens"] < 24000
