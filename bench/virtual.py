"""What virtual memory under the kernel costs: mapping pages, and reading rows made of them.

    python bench/virtual.py                    all of it, two minutes on two cores

map      microseconds to map and to unmap a page, 60 at a time, of 4 KiB and of 2 MiB
layout   tokens that a page of 2 MiB holds, and by how much a request grows, if all of a token lies
         side by side, and if each layer's keys and values are apart (vAttention's tensors)
decode   a decode step of llama3-virtual.py, in both layouts, against one of llama3-naive.py
share    of the time of `llama3-virtual.py 49`, what its manager takes, mapping included
"""

import argparse
import json
import mmap
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from common import REPO, RESULTS, load_script, save

from pages import CudaPages, HostPages

MODELS = {"SmolLM2-135M": (30, 3, 64), "Llama-3-8B": (32, 8, 128)}  # Layers, K and V heads, D.


def mapping(page_kb, device, n=4096):
    """Microseconds to map and to unmap a page, of n pages of 4 KiB, or fewer that are larger."""
    n = max(60, n * 4 // page_kb // 60 * 60)
    size = (n, page_kb * 1024)
    pages = CudaPages(*size, n) if device == "cuda" else HostPages(*size)
    seconds = {"map": [], "unmap": []}
    for _ in range(5):
        for name in seconds:
            start = time.perf_counter()
            for first in range(0, n, 60):
                getattr(pages, name)(list(range(first, first + 60)))
            seconds[name].append(time.perf_counter() - start)
    return {name: 1e6 * statistics.median(values) / n for name, values in seconds.items()}


def layout(shape, page=2 << 20, itemsize=2):
    """Tokens a page and bytes that a request grows by, in both layouts."""
    L, Hkv, D = shape
    return {
        "by token": {"tokens": page / (2 * L * Hkv * D * itemsize), "step_bytes": page},
        "by layer": {"tokens": page / (Hkv * D * itemsize), "step_bytes": 2 * L * page},
    }


def decode(batch, context, rounds):
    """Seconds of a decode step of the naive script, and of the virtual one's layouts, in turn."""
    naive, virtual = (load_script(f"llama3-{name}") for name in ("naive", "virtual"))
    args = naive.parser.parse_args(["1"])
    model, _, _ = naive.load(args)
    params, dtype = model[0], getattr(torch, args.dtype)
    shape = params["n_layers"], params["n_kv_heads"], params["dim"] // params["n_heads"]
    slots = context + rounds + 1
    naive_kv = torch.zeros(2, shape[0], batch, slots, *shape[1:], dtype=dtype, device=args.device)
    caches, virtuals = {"naive": naive_kv}, {}
    page = (2 << 20) if args.device == "cuda" else mmap.PAGESIZE
    for name in ("layer", "token"):
        place = (name == "token", batch, slots, shape, dtype, args.device)
        virtuals[name] = cache = virtual.VirtualCache(1 << 33, page, *place)
        for _ in range(batch):
            cache.admit(context)
        caches[name] = cache.kv
    for kv in caches.values():
        kv[:, :, :, :context] = torch.randn_like(kv[:, :1, :1, :context])
    seconds = {name: [] for name in caches}
    for step in range(rounds):
        seq_len = torch.full((batch,), context + step, dtype=torch.int32)
        for name, (k_cache, v_cache) in caches.items():

            def attend(layer, some, q, k, v, seq_len=seq_len, k_cache=k_cache, v_cache=v_cache):
                return naive.flash_attn_with_kvcache(
                    q, k_cache[layer, some], v_cache[layer, some], k, v,
                    cache_seqlens=seq_len[some].to(q.device), causal=True,
                )  # fmt: skip

            start = time.perf_counter()
            logits = naive.forward(model, [[step + 1]] * batch, seq_len, attend)
            for row in range(batch if name in virtuals else 0):
                virtuals[name].grow(row, context + step + 2)
            naive.choose(logits, 0)
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values[2:]) for name, values in seconds.items()}


def share(n):
    """The manager's share of a run's time, and requests at once."""
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        command = [sys.executable, REPO / "llama3-virtual.py", n, "--json", file.name]
        subprocess.run([str(c) for c in command], check=True, stdout=subprocess.DEVNULL)
        result = json.loads(Path(file.name).read_text())
    seconds = result["time"]
    total = sum(seconds[f"{name}_s"] for name in ("manager", "prefill", "decode"))
    return {"share": seconds["manager_s"] / total, "at_once": result["max_batch"]["peak"]}


def print_tables(result):
    print("page KiB   map us   unmap us   pages/s")
    for case in result["map"]:
        per_second = 1e6 / case["map"]
        print(f"{case['page_kb']:8,}{case['map']:9.2f}{case['unmap']:11.2f}{per_second:10,.0f}")
    print("\nmodel          layout               tokens a 2 MiB page   a request grows by")
    for model, layouts in result["layout"].items():
        for name, case in layouts.items():
            print(f"{model:14} {name:20}{case['tokens']:20.1f}{case['step_bytes'] >> 20:17} MiB")
    print("\nA decode step: ms, and the speed over naive's")
    print("rows   context   naive   virtual, by layer   virtual, by token")
    for case in result["decode"]:
        row = f"{case['batch']:4}{case['context']:10,}{case['naive'] * 1000:8.1f}"
        for name in ("layer", "token"):
            row += f"{case[name] * 1000:14.1f}{case['naive'] / case[name]:6.2f}"
        print(row)
    case = result["share"]
    print(f"\nllama3-virtual.py 49: the manager took {case['share']:.2%} of the time.")


@torch.inference_mode()
def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--json", type=Path, default=RESULTS / "virtual.json", metavar="FILE")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    sizes = [2048] if device == "cuda" else [mmap.PAGESIZE // 1024, 2048]
    result = {
        "map": [{"page_kb": kb, **mapping(kb, device)} for kb in sizes],
        "layout": {name: layout(shape) for name, shape in MODELS.items()},
        "decode": [
            {"batch": batch, "context": context, **decode(batch, context, args.rounds)}
            for batch, context in ((1, 280), (7, 280), (7, 2000), (49, 280))
        ],
        "share": share(49),
    }
    save(args.json, result)
    print_tables(result)


if __name__ == "__main__":
    main()
