"""The KV groups of random engines: what each holds, in numbers that name whatever they were computed from.

All groups have their blocks in one pool, as in vLLM: a block belongs to one group at a time, and what another
group has left there reads as wrong.

    group     a block holds                     computing token t reads
    full      a number for each token           those of all tokens before
    window    the same                          those of the last tokens before
    chunk     the same                          those before in the chunk of t
    state     one number, of the last token     that of token t - 1, in the block of the last step
              computed into it
    ring      a number for each of the last     those of the tokens before that are not compressed yet;
              tokens of a request               no cache keeps it
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from vllm.v1.kv_cache_interface import (
    ChunkedLocalAttentionSpec,
    CircularBufferSpec,
    FullAttentionSpec,
    MambaSpec,
    SlidingWindowSpec,
    get_mamba_prefill_checkpoint_position,
    is_mamba_prefill_checkpoint_valid,
)

GARBAGE = -1
ONE_TOKEN = 64
"""More than there are tokens in the vocabulary."""
SPECS = {
    "full": (FullAttentionSpec, None),
    "window": (SlidingWindowSpec, "sliding_window"),
    "chunk": (ChunkedLocalAttentionSpec, "attention_chunk_size"),
    "ring": (CircularBufferSpec, None),
}


@dataclass(frozen=True)
class Group:
    """One KV group."""

    kind: str
    tokens: int
    """Of a block."""
    reach: int = 0
    """Tokens of the window or the chunk, or those compressed together. Of a state, how far into a step
    it can be kept, in multiples of this; 0: at the end of steps alone."""
    drafts: bool = False
    """Whether it is of a model that proposes tokens: what it has of a token depends on the next one, too."""

    def spec(self, page_words):
        """Make vLLM's description of it."""
        if self.kind == "state":
            return MambaSpec(
                block_size=self.tokens, shapes=((page_words,),), dtypes=(torch.int64,),
                mamba_cache_mode="align", num_prefill_checkpoint_blocks=int(self.reach > 0),
                prefill_checkpoint_alignment=self.reach or None,
            )  # fmt: skip
        kind, reach = SPECS[self.kind]
        return kind(
            block_size=self.tokens, num_kv_heads=1, head_size=page_words // self.tokens // 2,
            dtype=torch.int64, **({reach: self.reach} if reach else {}),
        )  # fmt: skip

    def first_token(self, computed):
        """Give the first token whose KV is read when the one after `computed` is computed."""
        if self.kind == "window":
            return max(0, computed - self.reach + 1)
        if self.kind in ("chunk", "ring"):
            return computed // self.reach * self.reach
        return 0

    def most_blocks(self, tokens, batch):
        """Give how many blocks a request of so many tokens may need, with steps of up to `batch` tokens."""
        if self.kind in ("state", "ring"):
            return 4
        held = tokens if self.kind == "full" else min(tokens, self.reach + 2 * batch)
        return -(-held // self.tokens) + 1


@dataclass(frozen=True)
class Mix:
    """The groups of one model."""

    groups: tuple[Group, ...]
    match_tokens: int = 0
    """Where vLLM's own cache may find a prefix within a block: at multiples of this. 0: nowhere."""

    @property
    def page_words(self):
        """Numbers of one block: alike in all groups."""
        return 2 * math.lcm(*(group.tokens for group in self.groups))

    @property
    def alignment(self):
        return math.lcm(*(group.tokens for group in self.groups))

    @property
    def hash_tokens(self):
        return self.match_tokens or math.gcd(*(group.tokens for group in self.groups))

    @property
    def is_sparse(self):
        """Whether vLLM may keep fewer blocks of some group than there are."""
        return any(group.kind in ("window", "state") for group in self.groups)

    @property
    def drafts(self):
        return any(group.drafts for group in self.groups)

    @property
    def has_states(self):
        return any(group.kind == "state" for group in self.groups)


FULL = Group("full", 4)
WINDOW = Group("window", 4, 12)
STATE = Group("state", 8)

MIXES = {
    "full": Mix((FULL,)),
    "window": Mix((WINDOW,)),
    "state": Mix((STATE,)),
    "full and window": Mix((FULL, WINDOW)),
    "full and a window that ends in a block": Mix((FULL, Group("window", 4, 7))),
    "large full and window": Mix((Group("full", 8), WINDOW)),
    "full and large window": Mix((FULL, Group("window", 8, 17))),
    "full and chunk": Mix((FULL, Group("chunk", 4, 16))),
    "full and state": Mix((Group("full", 8), STATE)),
    "full and a state kept within steps": Mix((Group("full", 8), Group("state", 8, 4))),
    "full and state, found within blocks": Mix((Group("full", 8), STATE), match_tokens=4),
    "two windows, a state and full": Mix(
        (Group("window", 4, 9), STATE, Group("full", 8), Group("window", 8, 24))
    ),
    "three states and full": Mix((STATE, STATE, STATE, Group("full", 8))),
    "six windows and full": Mix((*[Group("window", 4, 12)] * 6, FULL)),
    "full and ring": Mix((Group("ring", 4, 2), FULL)),
    "full and a draft's full": Mix((FULL, Group("full", 4, drafts=True))),
    "window, full and a draft's window": Mix((WINDOW, FULL, Group("window", 4, 12, drafts=True))),
}


@dataclass
class Part:
    """What a step computes of one request."""

    name: str
    tables: list[list[int]]
    """Its blocks, by group."""
    start: int
    """The first token that is computed."""
    end: int
    """Behind the last one."""
    stop: int
    """Behind the last token of the request: those from there on were proposed, and are rejected."""
    right: np.ndarray
    """What is right, for all tokens of the request."""
    tokens: np.ndarray
    """All tokens of the request."""
    ahead: int = 0
    """Tokens from `stop` on that are proposed for the next step."""
    unsure: bool = False
    """Whether the drafting model goes over the last token again in the next step."""
    again: bool = False
    """Whether it did not have the last token of the step before as it should."""


class Tokens:
    """The KV of an attention group: a number for each token, as many times as a page has room for.

    That of a drafting model ends in the token that follows. It cannot be known from a block's hash which one
    follows the last token of the block: vLLM's own cache takes any, and so do we.
    """

    goes_on = False
    """Whether it reads what it goes on from before it writes."""

    def __init__(self, number, group, pool):
        self.group = group
        self.kv = pool.reshape(len(pool), group.tokens, -1)
        self.salt = number * 7919 * ONE_TOKEN

    def right(self, part, start, stop):
        """Give what is to be read of tokens."""
        right = part.right[start:stop]
        if self.group.drafts:
            right = right // ONE_TOKEN * ONE_TOKEN + part.tokens[start + 1 : stop + 1]
        return (right + self.salt)[:, None]

    def find(self, table, start, stop):
        at = np.arange(start, stop)
        return np.array(table)[at // self.group.tokens], at % self.group.tokens

    def write(self, part, table, *, fails):
        start, stop, last = part.start, part.stop, part.end
        if self.group.drafts:
            start, stop, last = start - part.again, stop - part.unsure, max(last, stop + part.ahead)
        blocks, slots = self.find(table, start, last)
        self.kv[blocks, slots] = GARBAGE
        if not fails:
            right = self.right(part, start, stop)
            self.kv[blocks[: stop - start], slots[: stop - start]] = right

    def bring(self, part, table, *, fails):
        """Write what is loaded from elsewhere into the blocks that there are."""
        blocks, slots = self.find(table, part.start, part.stop)
        right, there = self.right(part, part.start, part.stop), blocks > 0
        self.kv[blocks[there], slots[there]] = GARBAGE if fails else right[there]

    def read(self, part, table):
        """Give which tokens are not as they should be, and how many were looked at."""
        start = self.group.first_token(part.start)
        stop = part.stop - (self.group.drafts and part.unsure)
        blocks, slots = self.find(table, start, stop)
        there, right = self.kv[blocks, slots], self.right(part, start, stop)
        wrong = (there != right).any(1)
        if self.group.drafts and wrong.any():
            ends = slots == self.group.tokens - 1
            wrong &= ~(ends & (there // ONE_TOKEN == right // ONE_TOKEN).all(1))
        return (start + np.flatnonzero(wrong | (blocks == 0))).tolist(), len(blocks)


class States:
    """The states of a group, in whichever block vLLM has them: see `vllm.v1.worker.mamba_utils`."""

    goes_on = True

    def __init__(self, number, group, pool, mix):
        self.group, self.mix, self.kv = group, mix, pool
        self.salt = number * 7919 * ONE_TOKEN
        self.columns = {}
        """Where in its table a request has the state of its last step."""
        self.wrong = []

    def carry(self, part, table):
        """Copy the state of the last step to where this one keeps it."""
        size = self.group.tokens
        last = self.columns.get(part.name, (part.start - 1) // size)
        self.columns[part.name] = column = -(-part.end // size) - 1
        if last not in (-1, column):
            self.kv[table[column]] = self.kv[table[last]]

    def write(self, part, table, *, fails):
        """Go on from the state that is there."""
        block = table[self.columns[part.name]]
        there = part.start == 0 or (self.kv[block] == part.right[part.start - 1] + self.salt).all()
        self.wrong = [] if there and block else [part.start - 1]
        self.kv[block] = GARBAGE if fails else part.right[part.stop - 1] + self.salt
        self._keep_within(part, table, fails=fails)

    def bring(self, part, table, *, fails):
        block = table[part.stop // self.group.tokens - 1]
        self.kv[block] = GARBAGE if fails else part.right[part.stop - 1] + self.salt

    def _keep_within(self, part, table, *, fails):
        position = get_mamba_prefill_checkpoint_position(
            part.stop, self.mix.alignment, drop_eagle_block=False
        )
        if self.group.reach and is_mamba_prefill_checkpoint_valid(
            part.start, part.stop, position, self.mix.hash_tokens, self.group.tokens, self.group.reach
        ):
            block = table[-(-part.stop // self.group.tokens) - 2]
            if block:
                self.kv[block] = GARBAGE if fails else part.right[position - 1] + self.salt

    def forget(self, name):
        self.columns.pop(name, None)


class Ring:
    """The tokens of a request that are yet to be compressed with those that follow, in one block."""

    goes_on = True

    def __init__(self, number, group, pool):
        self.group = group
        self.kv = pool.reshape(len(pool), group.tokens, -1)
        self.salt = number * 7919 * ONE_TOKEN
        self.wrong = []

    def write(self, part, table, *, fails):
        start, size = self.group.first_token(part.start), self.group.tokens
        there = self.kv[table[0], np.arange(start, part.start) % size]
        wrong = (there != (part.right[start : part.start] + self.salt)[:, None]).any(1)
        self.wrong = (start + np.flatnonzero(wrong)).tolist()
        at = np.arange(max(part.start, part.stop - size), part.stop)
        self.kv[table[0], at % size] = GARBAGE if fails else (part.right[at] + self.salt)[:, None]

    def bring(self, part, table, *, fails):
        """Nothing is compressed yet of what comes after whole blocks."""


class Memory:
    """The pool, and what the layers of every group read and write there.

    Args:
        mix: The groups.
        blocks: Of the pool, with the one at 0 that stands for none.
    """

    def __init__(self, mix, blocks):
        self.mix = mix
        self.pool = torch.zeros(blocks, mix.page_words, dtype=torch.int64)
        numbers = self.pool.numpy()
        self.layers = {}
        self.groups = []
        for number, group in enumerate(mix.groups):
            is_state = group.kind == "state"
            if is_state:
                self.groups.append(States(number, group, numbers, mix))
            else:
                self.groups.append((Ring if group.kind == "ring" else Tokens)(number, group, numbers))
            layer = self.pool.view(torch.int8) if is_state else self.pool
            shape = (blocks, 1, 1, -1) if is_state else (blocks, 1, group.tokens, -1)
            self.layers[f"layer.{number}"] = layer.view(shape)
        self.states = [group for group in self.groups if isinstance(group, States)]

    def zero(self, blocks):
        self.pool.numpy()[blocks] = 0

    def copy(self, source, target):
        self.pool.numpy()[target] = self.pool.numpy()[source]

    def forget(self, name):
        for group in self.states:
            group.forget(name)

    def bring(self, part, *, fails):
        """Have another connector load tokens of a request."""
        for group, table in zip(self.groups, part.tables, strict=True):
            group.bring(part, table, fails=fails)

    def step(self, parts, *, fails=False):
        """Compute a step: all of it is written before anything is read.

        Returns:
            How many slots were read.

        Raises:
            AssertionError: If one holds something else than it should.
        """
        for part in parts:
            for group, table in zip(self.groups, part.tables, strict=True):
                if isinstance(group, States):
                    group.carry(part, table)
        found = []
        for part in parts:
            for group, table in zip(self.groups, part.tables, strict=True):
                group.write(part, table, fails=fails)
            found.append({at: each.wrong for at, each in enumerate(self.groups) if each.goes_on})
        return 0 if fails else sum(map(self.read, parts, found))

    def read(self, part, wrong):
        """Read what attention reads for one request; `wrong`: in groups that were read before."""
        slots = len(wrong)
        for number, (group, table) in enumerate(zip(self.groups, part.tables, strict=True)):
            if not group.goes_on:
                wrong[number], read = group.read(part, table)
                slots += read
        if wrong := {number: tokens for number, tokens in wrong.items() if tokens}:
            kinds = {number: self.mix.groups[number].kind for number in wrong}
            raise AssertionError(f"{part.name} reads wrong KV at {wrong} of {part.start}; groups: {kinds}")
        return slots
