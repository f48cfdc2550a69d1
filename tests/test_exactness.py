"""Exactness beyond test_kvcache.py: stop tokens, preemption, the default model, what is refused."""

import pytest
import torch

from support import arguments
from test_kvcache import (
    BYTES_PER_TOKEN,
    CHAT,
    NAIVE,
    NAMES,
    PAGED,
    SCRIPTS,
    admit_greedily,
    answers,
    assert_plain,
    make_checkpoint,
    meta_frequencies,
    plain_generate,
    run,
    text_of,
    tiny_prompt,
)


def test_many_preemptions(tmp_path, tiny):
    """Twelve requests that all grow from little to most of the pool."""
    texts = [text_of(3 + n, seed=n) for n in range(12)]
    budget = ["--kv-gb", 80 * BYTES_PER_TOKEN / 1e9]
    result = run(PAGED, tiny, tmp_path, texts, "--max-new-tokens", 60, "--block-size", 3, *budget)
    assert result["preemptions"] > 20
    assert_plain(result, tiny, texts, 60)


@pytest.mark.parametrize("script", SCRIPTS, ids=NAMES)
def test_prompts_that_take_several_steps(tmp_path, tiny, script):
    """Of all of a step's 1,024 tokens, of one more, and of two steps and a part; two equal ones."""
    texts = [text_of(n - 2, seed=n) for n in (1024, 1025, 2100, 2100, 30)]
    result = run(script, tiny, tmp_path, texts, "--max-new-tokens", 4)
    assert_plain(result, tiny, texts, 4)


@pytest.mark.parametrize("script", SCRIPTS, ids=NAMES)
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
    _, encoding, chat = PAGED.load(PAGED.parser.parse_args(["1", "--model", str(smollm2)]))
    before, after = (
        encoding.encode(text, allowed_special="all")
        for text in (chat["begin"] + chat["user"], chat["end"] + chat["assistant"])
    )
    prompts = [before + encoding.encode_ordinary(text) + after for text in texts]
    options = ["--max-new-tokens", limit, "--kv-gb", 3]
    expected = answers(run(NAIVE, smollm2, tmp_path, texts, *options))
    for prompt, answer in zip(prompts, expected, strict=True):
        assert answer == plain_generate(smollm2, prompt, limit, chat["stop"], draft=answer)
    for block_size in (3, 16):
        result = run(PAGED, smollm2, tmp_path, texts, *options, "--block-size", block_size)
        assert answers(result) == expected
    admit_greedily(monkeypatch)
    options = ["--max-new-tokens", limit, "--block-size", 3, "--kv-gb", 0.004]
    result = run(PAGED, smollm2, tmp_path, texts * 4, *options)
    assert answers(result) == expected * 4 and result["preemptions"] >= 8


def test_rope_scaling_factors():
    """Llama 3.1 stretches long wavelengths 8 times, the small models of 3.2 stretch them 32."""
    for dim in (2048, 4096):
        params = {"dim": dim, "n_heads": dim // 128, "rope_theta": 5e5, "use_scaled_rope": True}
        params["rope_scaling_factor"] = 8 if dim == 4096 else 32
        positions = torch.tensor([1, 1000])
        angles = torch.outer(positions.double(), meta_frequencies(params))
        expected = torch.complex(angles.cos(), angles.sin()).to(torch.complex64)
        torch.testing.assert_close(PAGED.rotations(params, positions).squeeze(1), expected)


def test_temperature_depends_on_the_seed_alone(tmp_path, tiny):
    def sampled(seed):
        return answers(run(PAGED, tiny, tmp_path, ["abc"], "--temperature", 1, "--seed", seed))

    assert sampled(1) == sampled(1) != sampled(2)


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
    monkeypatch.setattr(arguments, "runs_flash_attn", lambda device, dtype: True)
    with pytest.raises(SystemExit, match="multiples of 256"):
        run(PAGED, tiny, tmp_path, ["a"], "--block-size", 16)
    assert run(PAGED, tiny, tmp_path, ["a"], "--max-new-tokens", 3)["kv"][
        "peak_reserved_bytes"
    ] == (256 * BYTES_PER_TOKEN)
