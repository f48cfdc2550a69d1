"""The memory of a KV cache: blocks, block tables, statistics.

A block has room for the keys and values of block_size tokens in all layers. A request owns whole
blocks, anywhere in the pool, and its row of the block table names them in order: token t is in slot
t % block_size of block table[row, t // block_size]. (PagedAttention, Kwon et al. 2023, section 4)
"""

import json
import math
import mmap
import subprocess
import sys
import textwrap
import time
from contextlib import contextmanager
from pathlib import Path

import torch

# --- Blocks ---------------------------------------------------------------------------------------


class OutOfBlocks(Exception):
    """OutOfBlocks(need, free, total): more were asked for than are free. None was taken."""


def blocks_for(n_tokens, block_size):
    """How many blocks hold n_tokens."""
    return -(-n_tokens // block_size)


class BlockPool:
    """Which of the blocks 0 .. n_blocks - 1 are free. Ids only, no tensors."""

    def __init__(self, n_blocks):
        self.free_ids = list(reversed(range(n_blocks)))  # A stack: freed last, taken first.
        self.ref_count = [0] * n_blocks  # Rows that name each block: 0 or 1, while none is shared.

    def alloc(self, n):
        """Take n blocks and return their ids. Raises OutOfBlocks before it takes anything."""
        if n > len(self.free_ids):
            raise OutOfBlocks(n, len(self.free_ids), len(self.ref_count))
        ids = [self.free_ids.pop() for _ in range(n)]
        for block in ids:
            self.ref_count[block] = 1
        return ids

    def free(self, ids):
        """Drop one reference to each block; the last one makes it free."""
        for block in ids:
            assert self.ref_count[block] > 0, f"block {block} is free already"
            self.ref_count[block] -= 1
            if self.ref_count[block] == 0:
                self.free_ids.append(block)


class PagedCache:
    """Keys and values of a batch whose requests come and go: rows 0 .. n_rows - 1, oldest first.

    In each step the caller calls grow() and admit(), so that all new tokens have slots, runs the
    model over tables(), and calls advance(). While no request comes or goes, that is a few
    operations on vectors with one number per row, however long the rows are.
    """

    def __init__(self, n_blocks, block_size, max_rows, max_seq_len, shape, dtype, device):
        """Take the memory of n_blocks * block_size tokens. shape: (layers, K and V heads, D)."""
        L, Hkv, D = shape
        # A layer's blocks lie side by side, so that attention reads them where they are, and in a
        # block the keys of one head: a matrix. All finite, as attention by block asks for.
        size = (L, 2, n_blocks, Hkv, block_size, D)
        if torch.device(device).type == "cpu":  # The system's zeros take no room until written to.
            memory = mmap.mmap(-1, math.prod(size) * dtype.itemsize)
            self.kv = torch.frombuffer(memory, dtype=dtype).view(size)
        else:
            self.kv = torch.zeros(size, dtype=dtype, device=device)
        self.block_size, self.pool = block_size, BlockPool(n_blocks)
        width = blocks_for(max_seq_len, block_size)
        self.block_table = torch.zeros(max_rows, width, dtype=torch.int32, device=device)
        # The lengths that the manager looks at in each step stay on the CPU.
        self.seq_len = torch.zeros(max_rows, dtype=torch.int32)  # Tokens stored, new ones excluded.
        self.n_owned = torch.zeros(max_rows, dtype=torch.int32)  # Blocks that the row has.
        self.n_rows = 0

    def layer(self, i):
        """k_cache and v_cache of a layer, (n_blocks, block_size, Hkv, D) each, for the kernel."""
        return self.kv[i, 0].transpose(1, 2), self.kv[i, 1].transpose(1, 2)

    def can_admit(self, n_tokens):
        """Whether there are blocks for n_tokens, and one for each row to grow into before long."""
        return blocks_for(n_tokens, self.block_size) + self.n_rows <= len(self.pool.free_ids)

    def admit(self, n_tokens):
        """Add an empty row with blocks for n_tokens. Raises OutOfBlocks before any change."""
        ids = self.pool.alloc(blocks_for(n_tokens, self.block_size))
        self.block_table[self.n_rows, : len(ids)] = self.block_table.new_tensor(ids)
        self.seq_len[self.n_rows], self.n_owned[self.n_rows] = 0, len(ids)
        self.n_rows += 1

    def full_rows(self):
        """The rows without a slot for one more token."""
        seq_len, n_owned = self.seq_len[: self.n_rows], self.n_owned[: self.n_rows]
        return (seq_len >= n_owned * self.block_size).nonzero().flatten()

    def can_grow(self):
        """Whether there is a block for each full row."""
        return len(self.full_rows()) <= len(self.pool.free_ids)

    def grow(self):
        """Give each full row a block, all at once. Raises OutOfBlocks before any change."""
        rows = self.full_rows()
        ids = self.pool.alloc(len(rows))
        if ids:
            self.block_table[rows, self.n_owned[rows]] = self.block_table.new_tensor(ids)
            self.n_owned[rows] += 1

    def tables(self):
        """seq_len (n_rows,) and block_table (n_rows, blocks of the longest row) for the kernel."""
        width = int(self.n_owned[: self.n_rows].max())
        seq_len = self.seq_len[: self.n_rows].to(self.block_table.device)
        return seq_len, self.block_table[: self.n_rows, :width]

    def advance(self, n_new):
        """Count the tokens that the model has stored: n_new[row] for each row."""
        self.seq_len[: self.n_rows] += torch.tensor(n_new, dtype=torch.int32)

    def release(self, rows):
        """Free the blocks of these rows at once; the rows behind them move up."""
        for row in rows:
            self.pool.free(self.block_table[row, : self.n_owned[row]].tolist())
        first = min(rows, default=self.n_rows)
        keep = [row for row in range(first, self.n_rows) if row not in rows]
        for state in (self.block_table, self.seq_len, self.n_owned):
            state[first : first + len(keep)] = state[keep]
        self.n_rows = first + len(keep)

    def usage(self):
        """Slots reserved, and slots that hold a token."""
        taken = len(self.pool.ref_count) - len(self.pool.free_ids)
        return taken * self.block_size, int(self.seq_len[: self.n_rows].sum())


# --- Statistics -----------------------------------------------------------------------------------

REPORT = """
Requests           {requests}: {prompt_tokens:,} prompt tokens, {generated_tokens:,} generated
Time               {prefill_s:.1f} s prefill, {decode_s:.1f} s decode: {tokens_per_s:.0f} tokens/s
Manager            {manager_s:.3f} s in {steps} steps, {share:.2%} of it; {preemptions} preemptions
Max batch          {peak} in this run, {fits} would fit on average, naive fits {naive_fits}
Reserved           {gb[peak_reserved_bytes]:.3f} GB of {gb[budget_bytes]:.3f} GB at the peak
Used               {gb[peak_used_bytes]:.3f} GB
Fragmented         {fragmented_of_reserved:.2%} of reserved; mean {mean_fragmented_of_reserved:.2%}
Fragmented Memory: {gb[fragmented_bytes]:.2f} GB ({fragmented_of_budget:.2%})"""


class Stats:
    """The budget of the KV cache and what a run makes of it, in bytes (1e9 to a GB) and seconds.

    reserved: no other request can have it. used: it holds a token of a request that still runs.
    fragmented: reserved - used. Sampled once a step, before anything is freed.
    """

    def __init__(self, args, params):
        head_dim, self.dtype = params["dim"] // params["n_heads"], getattr(torch, args.dtype)
        self.args, self.shape = args, (params["n_layers"], params["n_kv_heads"], head_dim)
        self.bytes_per_token = size = 2 * math.prod(self.shape) * self.dtype.itemsize
        free = torch.cuda.mem_get_info()[0] if args.device == "cuda" else 0
        self.budget = int(1e9 * args.kv_gb if args.kv_gb is not None else 0.9 * free or 1.4e9)
        self.naive_fits = self.budget // (args.max_seq_len * size)
        self.samples = []  # (requests running, bytes reserved, bytes used) of each step
        self.seconds = {"prefill": 0.0, "decode": 0.0, "manager": 0.0}
        self.preemptions = 0
        fits = f"{self.budget // size:,} tokens or {self.naive_fits} rows of {args.max_seq_len:,}"
        print(f"KV cache: {self.budget / 1e9:.2f} GB, {size:,} bytes a token: {fits}.", flush=True)

    @contextmanager
    def clock(self, name):
        """Add the time that the `with` block takes to seconds[name]."""
        start = time.perf_counter()
        yield
        self.seconds[name] += time.perf_counter() - start

    def sample(self, running, waiting, reserved, used):
        """Note how many requests run and wait in this step, slots reserved and used; show it."""
        self.samples.append((running, reserved * self.bytes_per_token, used * self.bytes_per_token))
        if sys.stderr.isatty():
            done = self.args.n - running - waiting
            line = f"step {len(self.samples)}: {done} done, {running} running, {waiting} waiting"
            print(f"\r\033[K{line}", end="", file=sys.stderr, flush=True)

    def report(self, texts, prompts, tokens, decode, stop):
        """Print the answers to `texts`, then the statistics; both go into --json FILE as well.

        tokens: each prompt and the answer behind it. decode: tokens to text, without those in stop.
        """
        answers = [both[len(prompt) :] for prompt, both in zip(prompts, tokens, strict=True)]
        seconds = self.seconds["prefill"] + self.seconds["decode"] or 1
        samples = self.samples or [(0, 0, 0)]
        # Of the steps that reserve most, the one that uses most of it.
        _, reserved, used = max(samples, key=lambda sample: sample[1:])
        waste = [1 - u / r for _, r, u in samples if r] or [0]
        fits = self.budget * sum(n for n, _, _ in samples) // (sum(r for _, r, _ in samples) or 1)
        args, git = self.args, f'git -C "{Path(__file__).parent}" rev-parse --short HEAD'
        # fmt: off
        result = {
            "script": Path(sys.argv[0]).name, "model": args.model.resolve().name,
            "device": torch.cuda.get_device_name() if args.device == "cuda" else args.device,
            "dtype": args.dtype, "torch": torch.__version__,
            "commit": subprocess.getoutput(f"{git} 2>/dev/null"),
            "args": vars(args), "requests": args.n, "prompt_tokens": sum(map(len, prompts)),
            "generated_tokens": sum(map(len, answers)), "preemptions": self.preemptions,
            "kv": {
                "bytes_per_token": self.bytes_per_token, "budget_bytes": self.budget,
                "peak_reserved_bytes": reserved, "peak_used_bytes": used,
                "fragmented_bytes": reserved - used,
                "fragmented_of_reserved": (reserved - used) / (reserved or 1),
                "fragmented_of_budget": (reserved - used) / self.budget,
                "mean_fragmented_of_reserved": sum(waste) / len(waste),
            },
            "max_batch": {
                "peak": max(n for n, _, _ in samples), "fits": fits, "naive_fits": self.naive_fits,
            },
            "time": {
                **{f"{name}_s": value for name, value in self.seconds.items()},
                "tokens_per_s": sum(map(len, answers)) / seconds, "steps": len(self.samples),
            },
            "responses": [
                {"prompt_tokens": len(prompt), "tokens": answer,
                 "text": decode([token for token in answer if token not in stop]).strip()}
                for prompt, answer in zip(prompts, answers, strict=True)
            ],
        }
        # fmt: on
        if args.json:
            Path(args.json).write_text(json.dumps(result, indent=1, default=str))
        sys.stdout.reconfigure(errors="replace")  # Whatever the terminal can show.
        print(end="\r\033[K" if sys.stderr.isatty() else "", file=sys.stderr)
        for i, response in enumerate(result["responses"]):
            lines = [textwrap.fill(line, 100) for line in response["text"].splitlines()]
            print(f"\n[{i + 1}] {' '.join(texts[i].split())[:95]}\n", *lines, sep="\n")
        flat = {**result, **result["kv"], **result["max_batch"], **result["time"]}
        gb = {key: value / 1e9 for key, value in result["kv"].items()}
        share = self.seconds["manager"] / seconds
        print(REPORT.format(**flat, gb=gb, share=share), flush=True)
