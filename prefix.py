"""Blocks by the text they hold: the names with which llama3-tiered.py finds them again.

A name is a hash of a block's tokens and of the name of the block before it, so that equal names
mean equal text from the first token on. (As in vLLM's prefix caching and UCM's DRAM store)
"""

from array import array
from hashlib import blake2b


class Block:
    """What a block holds, tokens behind those of the Block `parent` (or of none), and where."""

    def __init__(self, parent, tokens):
        self.parent, self.tokens = parent, tuple(tokens)
        behind = parent.name if parent else b""
        self.name = blake2b(behind + array("q", tokens).tobytes(), digest_size=16).digest()
        # Its id in each tier, and a function that returns when the copy in DRAM is made.
        self.hbm = self.dram = self.wait = None


class PrefixStore(dict):
    """All Blocks by name. A chain is a list of Blocks, each the parent of the next."""

    def __init__(self, block_size):
        super().__init__()
        self.block_size = block_size

    def find(self, chain, tokens):
        """The Block of these tokens behind a chain, known or new; None if another has its name."""
        new = Block(chain[-1] if chain else None, tokens)
        block = self.get(new.name, new)
        return block if (block.parent, block.tokens) == (new.parent, new.tokens) else None

    def lookup(self, tokens):
        """The longest chain of known Blocks that begins `tokens`, and leaves the last to compute.

        The last Block may be one that is not full: of a request preempted at this very length.
        """
        chain, end = [], len(tokens) - 1
        for start in range(0, end, self.block_size):
            block = self.find(chain, tokens[start : min(start + self.block_size, end)])
            if not block or block.name not in self:
                break
            chain.append(block)
        return chain

    def extend(self, chain, tokens, last):
        """Add to the chain, and to the store, the Blocks that `tokens` fill; last: and the rest."""
        end = len(tokens) if last else len(tokens) // self.block_size * self.block_size
        for start in range(len(chain) * self.block_size, end, self.block_size):
            block = self.find(chain, tokens[start : min(start + self.block_size, end)])
            if not block:
                break
            self[block.name] = block
            chain.append(block)
