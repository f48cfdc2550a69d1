"""A checkpoint in the format in which Meta publishes Llama 3, checked once, when it is loaded."""

import base64
import json
import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import tiktoken
import torch
import torch.nn.functional as F

# oneDNN keeps a compiled kernel of 0.5 MB for each shape that it meets, up to 1,024 of them, and
# ideep, between it and torch, keeps them again. A step needs five.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "16")
os.environ.setdefault("LRU_CACHE_CAPACITY", "8")

MODELS = Path(__file__).resolve().parent.parent / "models"
SMOLLM2 = MODELS / "SmolLM2-135M-Instruct"


@contextmanager
def or_exit(sentence):
    """End the program with this sentence if the `with` block fails because of the user's input."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # tiktoken's panics are no Exceptions.
        sys.exit(" ".join(f"{sentence} ({type(error).__name__}: {error}".split())[:250] + ").")


def load(args):
    """Returns (params, weights by Meta's names), the tokenizer and the chat markup of args.model.

    In the markup "stop" are the tokens that end an answer. args.model:
    A folder of one shard as Meta publishes Llama 3 (original/); SmolLM2 is built if it is missing.
    Besides dtype and layout, two things differ from the file: matrices of the same input are one
    (attention.wqkv, feed_forward.w13), and "output" is there even if it is the embeddings.
    """
    build = [sys.executable, MODELS / "smollm2.py"]
    if args.model == SMOLLM2 and not SMOLLM2.exists() and subprocess.run(build).returncode:
        sys.exit(1)
    with or_exit(f"{args.model} cannot be loaded as a Llama 3 checkpoint of one shard"):
        params = json.loads((args.model / "params.json").read_text())
        usual = {"n_kv_heads": params["n_heads"], "norm_eps": 1e-5, "rope_theta": 10000.0}
        params = {**usual, **params}
        # Llama 3.1's, and that of the small models of 3.2.
        params.setdefault("rope_scaling_factor", 8 if params["dim"] >= 4096 else 32)
        params["context"] = 131072 if params.get("use_scaled_rope") else 8192  # Tokens.
        (shard,) = args.model.glob("consolidated.*.pth")
        w = torch.load(shard, mmap=args.device == "cuda", weights_only=True)
        w = {name.removesuffix(".weight"): weight for name, weight in w.items()}
        check(params, w)
        to = (args.device, getattr(torch, args.dtype))
        w = {name: weight.to(*to) for name, weight in w.items()}
        for i in range(params["n_layers"]):
            for name in ("attention.wqkv", "feed_forward.w13"):
                module, parts = name.split(".w")  # attention, qkv
                matrices = [w.pop(f"layers.{i}.{module}.w{part}") for part in parts]
                w[f"layers.{i}.{name}"] = torch.cat(matrices)
        for name in w:
            if w[name].dim() == 2 and name != "tok_embeddings":
                w[name] = pack(w[name])
        # The small models of Llama 3.2 have no output matrix: they use the embeddings.
        if "output" not in w:
            w["output"] = pack(w["tok_embeddings"])
    with or_exit(f"{args.model / 'tokenizer.model'} does not belong to this checkpoint"):
        # A checkpoint whose tokenizer or chats are not Llama 3's says so in params.json.
        chat = params.get("chat") or json.loads((MODELS / "llama3-chat.json").read_text())
        lines = (args.model / "tokenizer.model").read_bytes().splitlines()
        ranks = {base64.b64decode(token): int(rank) for token, rank in map(bytes.split, lines)}
        ids = {*ranks.values(), *chat["special_tokens"].values()}
        if ids != set(range(len(w["tok_embeddings"]))):
            raise ValueError(f"{len(ids)} tokens, the weights know {len(w['tok_embeddings'])}")
        names = {"pat_str": chat["pattern"], "special_tokens": chat["special_tokens"]}
        encoding = tiktoken.Encoding("", mergeable_ranks=ranks, **names)
        chat["stop"] = {chat["special_tokens"][name] for name in chat["stop"]}
    if args.max_seq_len > params["context"] and not getattr(args, "window", None):
        print(f"This model was trained on texts of up to {params['context']} tokens: expect little "
              "sense from --max-seq-len beyond.", file=sys.stderr)  # fmt: skip
    return (params, w), encoding, chat


def check(params, w):
    """Raises ValueError where params.json and the weights (by name) do not belong together."""
    sizes = ("dim", "n_layers", "n_heads", "n_kv_heads")
    for name in (*sizes, "norm_eps", "rope_theta", "rope_scaling_factor"):
        if not params[name] > 0:
            raise ValueError(f"by params.json {name} is {params[name]}")
    dim, vocab = params["dim"], len(w["tok_embeddings"])
    H, Hkv = params["n_heads"], params["n_kv_heads"]
    if dim % (2 * H) or H % Hkv:
        raise ValueError(f"by params.json {H} heads of size {dim / H:g} share {Hkv} key heads")
    kv = dim // H * Hkv
    shapes = {"tok_embeddings": (vocab, dim), "norm": (dim,), "output": (vocab, dim)}
    for i in range(params["n_layers"]):
        hidden = len(w.get(f"layers.{i}.feed_forward.w1", ()))
        of_layer = {
            "attention.wq": (dim, dim), "attention.wk": (kv, dim), "attention.wv": (kv, dim),
            "attention.wo": (dim, dim), "attention_norm": (dim,), "ffn_norm": (dim,),
            "feed_forward.w1": (hidden, dim), "feed_forward.w2": (dim, hidden),
            "feed_forward.w3": (hidden, dim),
        }  # fmt: skip
        shapes |= {f"layers.{i}.{name}": shape for name, shape in of_layer.items()}
    for name, shape in shapes.items():
        found = tuple(w[name].shape) if name in w else None
        if found != shape and not (name == "output" and found is None):
            raise ValueError(f"by params.json {name} is {shape}, in the weights {found}")
    if others := [name for name in w if name not in shapes and name != "rope.freqs"]:
        raise ValueError(f"{len(others)} weights that params.json has no place for: {others[0]}")
    if params.get("vocab_size", -1) not in (-1, vocab):
        raise ValueError(f"by params.json there are {params['vocab_size']} tokens, {vocab} found")


def pack(weight):
    """The matrix as the CPU multiplies it fastest; a GPU takes it as it is.

    With instructions for bfloat16, in oneDNN's blocked layout: 1 to 8 rows take half as long as
    with the plain one, 49 three quarters, 2,048 nine tenths. Without, in float32, in twice the
    room: with AVX2, 1 row takes as long as in bfloat16, 49 less than half, 512 a seventh.
    """
    if weight.device.type != "cpu":
        return weight
    if weight.dtype == torch.bfloat16 and multiplies_bfloat16():
        return torch.ops.mkldnn._reorder_linear_weight(weight)
    return weight.float()


def multiplies_bfloat16():
    """Whether this CPU has instructions for that, and oneDNN to use them."""
    if not torch.backends.mkldnn.is_available():
        return False
    if torch.backends.cpu.get_cpu_capability() == "AVX512":  # Or oneDNN emulates them.
        return torch.cpu._is_avx512_bf16_supported()
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


def linear(x, weight):
    """x (rows, n_in) times the transpose of a weight (n_out, n_in) from pack(), in x's dtype."""
    if weight.is_mkldnn:
        return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    return F.linear(x.to(weight.dtype), weight).to(x.dtype)
