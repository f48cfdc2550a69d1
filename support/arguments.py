"""The command line that all scripts share, and how a user's mistake ends a run: in one sentence."""

import os
import signal
import sys
from argparse import ArgumentParser, ArgumentTypeError, RawDescriptionHelpFormatter
from pathlib import Path

import torch

from support.attention import runs_flash_attn
from support.checkpoint import SMOLLM2
from support.prompts import PROMPTS


def at_least(least, kind=int):
    """A type for argparse: numbers from `least` on, and below 1e9."""

    def number(text):
        if not least <= kind(text) < 1e9:
            raise ArgumentTypeError(f"{text} is not a number from {least} to 1e9")
        return kind(text)

    return number


def writable(file):
    """A type for argparse: a file that can be written. Better to know before the run than after."""
    try:
        open(file, "a").close()
    except OSError as error:
        raise ArgumentTypeError(f"{file} cannot be written ({error.strerror})") from error
    return file


def shared_arguments(description):
    """A parser of what every script takes."""
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    parser = ArgumentParser(description=description, formatter_class=RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: {message}; see --help.\n")
    add, whole, number = parser.add_argument, at_least(1), at_least(0, float)
    add("n", metavar="REQUESTS", type=whole, help="after the last prompt, the first comes again")
    add("--model", metavar="DIR", type=Path, default=SMOLLM2, help="Llama 3 as Meta publishes it")
    add("--prompts", metavar="FILE", default=PROMPTS, help="ShareGPT's schema")
    add("--kv-gb", metavar="GB", type=number, help="cache budget (1.4; CUDA: 90%% of free)")
    add("--max-seq-len", metavar="LEN", type=whole, default=8192, help="prompt + answer (8192)")
    add("--max-new-tokens", metavar="LEN", type=whole, default=256, help="of an answer (256)")
    add("--rate", metavar="R", type=at_least(0.001, float), help="arrivals a second (all at once)")
    add("--temperature", metavar="X", type=number, default=0.0, help="0, the default, is greedy")
    add("--seed", metavar="S", type=int, default=0, help="for --rate, and temperatures above 0")
    add("--device", choices=devices, default=devices[-1], help="the last of these by default")
    add("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    add("--json", metavar="FILE", type=writable, help="write statistics and answers there, too")
    add("--trace", metavar="FILE", type=writable, help="who has which memory, for bench/replay.py")
    return parser


def parse(parser, argv):
    """The arguments, where they make sense; ends the program where they do not."""
    args = parser.parse_args(argv)
    files = [Path(file).resolve() for file in (args.prompts, args.json, args.trace) if file]
    if len(set(files)) < len(files):
        parser.error("--prompts, --json and --trace have to be different files")
    torch.manual_seed(args.seed % 2**63)
    return args


def block_size_for(args, usual):
    """args.block_size, or else the usual one or the kernel's; ends the program if that won't do."""
    unit = 256 if runs_flash_attn(args.device, getattr(torch, args.dtype)) else 1
    size = args.block_size or max(usual, unit)
    if size % unit:
        sys.exit(f"--block-size {size} does not work: this kernel takes multiples of {unit}.")
    return size


def run(main):
    """Run a script. Ctrl-C and `kill` end it with the answers so far, `| head` when it has seen
    enough; none of them with a traceback."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # It raises KeyboardInterrupt.
    try:
        main()
    except (KeyboardInterrupt, BrokenPipeError):
        os._exit(130)
