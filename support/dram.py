"""Keys of blocks, and blocks in DRAM by their keys: UCM's DRAM store in small.

(Its dump, load and wait: https://github.com/ModelEngine-Group/unified-cache-management)
"""

from array import array
from collections import OrderedDict
from contextlib import nullcontext
from hashlib import blake2b

import torch


def keys_of(tokens, block_size, keys=()):
    """The key of each full block of a text; `keys` are those of its first ones.

    A key is a hash of the block's tokens and of its parent's key, the block before it: so it stands
    for all of the text up to the block's end, as the keys and values in the block do. (As in vLLM's
    prefix caching and UCM's DRAM store)
    """
    keys = list(keys)
    for start in range(len(keys) * block_size, len(tokens) - block_size + 1, block_size):
        own = array("q", tokens[start : start + block_size]).tobytes()
        parent = keys[-1] if keys else b""
        keys.append(blake2b(parent + own, digest_size=16).digest())
    return keys


class DramStore:
    """Room for n_blocks like `block`, a tensor. When it is full, what was dumped first is dropped:
    the least recently used, since what is used leaves.

    On CUDA, copies follow each other in a stream of their own, beside the computation; elsewhere
    they are made at once.
    """

    def __init__(self, n_blocks, block):
        # On a CPU this takes no room until it is written to.
        self.blocks = torch.empty(n_blocks, *block.shape, dtype=block.dtype)
        self.free_ids, self.ids = list(range(n_blocks)), OrderedDict()  # key: id
        self.stream = None
        if block.is_cuda and n_blocks:
            # pin_memory=True would round the size up to a power of two.
            register = torch.cuda.cudart().cudaHostRegister
            torch.cuda.check_error(register(self.blocks.data_ptr(), self.blocks.nbytes, 0))
            self.stream = torch.cuda.Stream()

    def dump(self, key, source):
        """Start to copy a block into the store. Returns how many blocks are dropped for it.

        If the store has no room at all, that is this one.
        """
        full = not self.free_ids
        if full and not self.ids:
            return 1
        if full:
            self.free_ids.append(self.ids.popitem(last=False)[1])
        self.ids[key] = self.free_ids.pop()
        self.copy([(self.blocks[self.ids[key]], source)])
        return int(full)

    def take(self, keys):
        """Forget these keys; returns their blocks' ids, which nothing overwrites until load()."""
        return [self.ids.pop(key) for key in keys]

    def forget(self, key):
        """Drop this block, if it is here."""
        if key in self.ids:
            self.free_ids.append(self.ids.pop(key))

    def load(self, ids, targets):
        """Copy blocks that were taken into these tensors. Then their room is free."""
        self.copy([(target, self.blocks[i]) for i, target in zip(ids, targets, strict=True)])
        self.wait()
        self.free_ids += ids

    def copy(self, pairs):
        """Start to copy each (target, source)."""
        if self.stream:
            self.stream.wait_stream(torch.cuda.current_stream())  # Which has written the sources.
        with torch.cuda.stream(self.stream) if self.stream else nullcontext():
            for target, source in pairs:
                target.copy_(source, non_blocking=True)

    def wait(self):
        """Let what the GPU computes from now on wait until all copies are made."""
        if self.stream:
            torch.cuda.current_stream().wait_stream(self.stream)
