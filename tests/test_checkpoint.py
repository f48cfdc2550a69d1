"""Checkpoints: what params.json may leave out, and what does not belong together."""

import base64
import json

import pytest
import torch

from support.checkpoint import load
from test_kvcache import CHAT, PAGED, TIERED, answers, make_checkpoint, run, text_of


def change_params(folder, without=(), **changes):
    params = json.loads((folder / "params.json").read_text()) | changes
    params = {name: value for name, value in params.items() if name not in without}
    (folder / "params.json").write_text(json.dumps(params))


def change_weights(folder, change):
    w = torch.load(folder / "consolidated.00.pth", weights_only=True)
    change(w)
    torch.save(w, folder / "consolidated.00.pth")


def loaded(folder):
    return load(PAGED.parser.parse_args(["1", "--model", str(folder)]))


def test_what_llama_2_leaves_out_of_params(tmp_path):
    """As many KV heads as heads, base 10,000: as if two heads that share had the same each."""
    shared = make_checkpoint(tmp_path / "shared", rope_theta=1e4)
    each = make_checkpoint(tmp_path / "each")
    change_params(each, without=["n_kv_heads", "rope_theta", "norm_eps", "use_scaled_rope"])

    def repeat(w):
        for name in ("0.attention.wk", "0.attention.wv", "1.attention.wk", "1.attention.wv"):
            heads = w[f"layers.{name}.weight"].view(2, 16, 64)
            w[f"layers.{name}.weight"] = heads.repeat_interleave(2, 0).flatten(0, 1)
        w["rope.freqs"] = torch.ones(8)  # In Llama 2's folders, and of no use.

    change_weights(each, repeat)
    texts, options = [text_of(n, seed=n) for n in (3, 40)], ["--max-new-tokens", 20]
    result = run(PAGED, each, tmp_path, texts, *options)
    assert answers(result) == answers(run(PAGED, shared, tmp_path, texts, *options))
    assert result["kv"]["bytes_per_token"] == 2 * 2 * 4 * 16 * 4


def test_rope_scaling_factor(tmp_path):
    """That of params.json, or else 32 for the small models of Llama 3.2 and 8 for Llama 3.1."""
    folder = make_checkpoint(tmp_path / "model", scaled=True)
    (params, _), *_ = loaded(folder)
    assert params["rope_scaling_factor"] == 32
    change_params(folder, rope_scaling_factor=4)
    (params, _), *_ = loaded(folder)
    assert params["rope_scaling_factor"] == 4
    change_params(folder, ["rope_scaling_factor"], dim=4096, n_layers=1, n_heads=32, n_kv_heads=1)

    def widen(w):
        for name in list(w):
            if name.startswith("layers.1."):
                del w[name]
        sizes = {32: 128, 64: 4096, 96: 1, 264: 264}
        for name, weight in w.items():
            one = torch.zeros([1] * weight.dim(), dtype=torch.bfloat16)
            w[name] = one.expand([sizes[n] for n in weight.shape])

    change_weights(folder, widen)
    (params, _), *_ = loaded(folder)
    assert params["rope_scaling_factor"] == 8


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"n_layers": 1}, "9 weights that params.json has no place for: layers.1.attention.wq"),
        ({"n_layers": 3}, r"layers.2.attention.wq is \(64, 64\), in the weights None"),
        ({"n_heads": 8}, r"layers.0.attention.wk is \(16, 64\), in the weights \(32, 64\)"),
        ({"n_kv_heads": 1}, r"layers.0.attention.wk is \(16, 64\), in the weights \(32, 64\)"),
        ({"n_heads": 15, "n_kv_heads": 8}, "15 heads of size 4.26667 share 8 key heads"),
        ({"n_kv_heads": 3}, "4 heads of size 16 share 3 key heads"),
        ({"n_heads": 64, "n_kv_heads": 32}, "64 heads of size 1 share 32 key heads"),
        ({"dim": 128}, r"tok_embeddings is \(264, 128\), in the weights \(264, 64\)"),
        ({"vocab_size": 263}, "there are 263 tokens, 264 found"),
        ({"norm_eps": 0}, "norm_eps is 0"),
        ({"rope_theta": "large"}, "TypeError"),
    ],
)
def test_params_that_do_not_fit_the_weights(tmp_path, changes, words):
    folder = make_checkpoint(tmp_path / "model")
    change_params(folder, **changes)
    with pytest.raises(SystemExit, match=f"cannot be loaded as a Llama 3 checkpoint.*{words}"):
        loaded(folder)


def test_weights_that_do_not_fit_params(tmp_path):
    """Each one is looked at: when it is a row longer, when it is missing, and one too many."""
    folder = make_checkpoint(tmp_path / "model", tied=False)
    w = torch.load(folder / "consolidated.00.pth", weights_only=True)
    wrong = [{**w, name: torch.cat([weight, weight[:1]])} for name, weight in w.items()]
    for missing in w:
        if missing != "output.weight":  # In whose place the embeddings can be used.
            wrong.append({name: weight for name, weight in w.items() if name != missing})
    for some in (*wrong, {**w, "more.weight": w["norm.weight"]}):
        torch.save(some, folder / "consolidated.00.pth")
        with pytest.raises(SystemExit, match="cannot be loaded as a Llama 3 checkpoint"):
            loaded(folder)
    torch.save(w, folder / "consolidated.00.pth")
    loaded(folder)


def test_a_tokenizer_that_is_cut_off(tmp_path):
    """Anywhere: between two lines, in a token, in front of its rank and in the rank."""
    folder = make_checkpoint(tmp_path / "model")
    file = folder / "tokenizer.model"
    whole = file.read_bytes()
    for end in [0, 1, *range(1000, 1010), *range(len(whole) - 9, len(whole))]:
        file.write_bytes(whole[:end])
        with pytest.raises(SystemExit, match=r"tokenizer\.model does not belong"):
            loaded(folder)
    file.write_bytes(whole + b"\n")
    loaded(folder)


@pytest.mark.parametrize("line", [b"Qg== 65", b"QQ== 300", b"QQ== x", b"QQ== 65 65", b"Q 65"])
def test_a_tokenizer_with_a_wrong_line(tmp_path, line):
    """In place of the letter A: the letter B once more, other ranks, no base64."""
    folder = make_checkpoint(tmp_path / "model")
    file = folder / "tokenizer.model"
    right = base64.b64encode(b"A") + b" 65\n"
    assert right in file.read_bytes()
    file.write_bytes(file.read_bytes().replace(right, line + b"\n"))
    with pytest.raises(SystemExit, match=r"tokenizer\.model does not belong"):
        loaded(folder)


def test_a_tokenizer_without_a_letter(tmp_path):
    """tiktoken notices when the letter comes, and panics."""
    folder = make_checkpoint(tmp_path / "model")
    lines = (folder / "tokenizer.model").read_bytes()
    (folder / "tokenizer.model").write_bytes(lines.replace(b"QQ== 65\n", b"QUE= 65\n"))
    with pytest.raises(SystemExit, match="has a text that cannot be made into tokens"):
        run(PAGED, folder, tmp_path, ["an A"])


def test_a_tokenizer_of_other_weights(tmp_path):
    more = {**CHAT["special_tokens"], "<|8|>": 264}
    folder = make_checkpoint(tmp_path / "model", chat={**CHAT, "special_tokens": more})
    with pytest.raises(SystemExit, match="265 tokens, the weights know 264"):
        loaded(folder)


@pytest.mark.parametrize(
    ("scaled", "longest", "said"),
    [(False, 8192, 0), (False, 8193, 1), (True, 131072, 0), (True, 131073, 1)],
)
def test_texts_longer_than_the_model_was_trained_on(tmp_path, capsys, scaled, longest, said):
    """One line on stderr, once, and none with a window, where positions do not grow or are
    squeezed."""
    folder = make_checkpoint(tmp_path / "model", scaled=scaled)
    options = ["--max-seq-len", longest, "--max-new-tokens", 2]
    window, top_k = ["--window", 16], ["--window", 16, "--top-k", 16]
    for script, others, n in ((PAGED, [], said), (TIERED, window, 0), (TIERED, top_k, 0)):
        run(script, folder, tmp_path, ["a", "b"], *options, *others)
        err = capsys.readouterr().err
        assert err.count("\n") == err.count(f"up to {longest - 1} tokens") == n
