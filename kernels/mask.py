"""Which blocks of queries and keys are computed: bits of blocks of one size, or of sizes that differ."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from jaxtyping import Bool, Float, Int, Int32, UInt8
from torch import Tensor

_M = TypeVar("_M", bound="Mask")

# rows of bits are padded to whole 32-bit words, so that a kernel can read them as int32
_ROW_BYTES = 4


def block_count(tokens: int, block: int) -> int:
    """Blocks that cover the tokens, a shorter last one included."""
    return -(-tokens // block)


def block_sizes(tokens: int, block: int, device: torch.device | str = "cpu") -> Int[Tensor, "blocks"]:
    """Real tokens in each block: `block` everywhere, fewer in the last one."""
    starts = torch.arange(0, tokens, block, device=device)
    return (tokens - starts).clamp(max=block)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Mask(ABC):
    """Which blocks of one self-attention are computed, per head, kept as bits; what a block is, a subclass says.

    Args:
        bits: one bit a block, little-endian within the byte; key blocks run along the bytes, padded to 32-bit words.
            A first dimension of 1 is a mask that all heads share.
        tokens: length of the sequence.

    Raises:
        ValueError: the bits are not those of these blocks.
    """

    bits: UInt8[Tensor, "mask_heads q_blocks row_bytes"]
    tokens: int

    def __post_init__(self) -> None:
        expected = (self.q_blocks, row_bytes(self.k_blocks))
        if self.bits.dtype != torch.uint8 or self.bits.ndim != 3 or tuple(self.bits.shape[1:]) != expected:
            raise ValueError(
                f"{self.tokens} tokens in {self.q_blocks}×{self.k_blocks} blocks need uint8 bits "
                f"[heads, {expected[0]}, {expected[1]}]: got {self.bits.dtype} {list(self.bits.shape)}"
            )

    @property
    @abstractmethod
    def block(self) -> tuple[int, int] | None:
        """Tokens of a query block and of a key block; None where they differ from block to block."""

    @property
    @abstractmethod
    def q_blocks(self) -> int:
        """Query blocks."""

    @property
    @abstractmethod
    def k_blocks(self) -> int:
        """Key blocks."""

    @abstractmethod
    def sizes(self) -> tuple[Int[Tensor, "size_heads q_blocks"], Int[Tensor, "size_heads k_blocks"]]:
        """Tokens of each query block and of each key block, of each head or for all (1)."""

    @abstractmethod
    def each(self: _M, change: Callable[[Tensor], Tensor]) -> _M:
        """The mask with all its tensors changed alike; heads are their first dimension."""

    @abstractmethod
    def tensors(self) -> list[Tensor]:
        """What it is made of."""

    @property
    def heads(self) -> int:
        """Heads the mask tells apart (1: shared by all)."""
        return self.bits.shape[0]

    def keep(self) -> Bool[Tensor, "mask_heads q_blocks k_blocks"]:
        """Unpack to one boolean a block."""
        return unpacked(self.bits, self.k_blocks)

    def seen(self, head: int, queries: Int[Tensor, "rows"]) -> Bool[Tensor, "rows tokens"]:
        """Which keys some queries of one head attend to, token by token."""
        of_keys = _block_of_each(self.of_heads([head]).sizes()[1], self.tokens)
        return self.seen_blocks(head, queries)[:, of_keys]

    def seen_blocks(self, head: int, queries: Int[Tensor, "rows"]) -> Bool[Tensor, "rows k_blocks"]:
        """Which key blocks some queries of one head attend to."""
        own = self.of_heads([head])
        of_queries = _block_of_each(own.sizes()[0], self.tokens)
        return own.keep()[0, of_queries[queries]]

    def density(self) -> Float[Tensor, "mask_heads"]:
        """Kept fraction of the query-key products of each head, counted on real tokens."""
        rows, columns = (sizes.double() for sizes in self.sizes())
        return torch.einsum("hqk,hq,hk->h", self.keep().double(), rows, columns) / self.tokens**2

    def of_heads(self: _M, heads: Sequence[int]) -> _M:
        """The mask of some heads, in this order."""
        return self if self.heads == 1 else self.each(lambda part: part[list(heads)])

    def to(self: _M, device: torch.device | str) -> _M:
        """The same mask on another device; the host waits for what comes to it."""
        away = torch.device(device).type != "cpu"
        return self.each(lambda part: part.to(device, non_blocking=away))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class BlockMask(Mask):
    """Blocks of one size; the last of each axis may be shorter than the others.

    Args:
        block_q, block_k: tokens of a query block and of a key block.
    """

    block_q: int
    block_k: int

    @property
    def block(self) -> tuple[int, int]:
        """Tokens of a query block and of a key block."""
        return self.block_q, self.block_k

    @property
    def q_blocks(self) -> int:
        """Query blocks."""
        return block_count(self.tokens, self.block_q)

    @property
    def k_blocks(self) -> int:
        """Key blocks."""
        return block_count(self.tokens, self.block_k)

    @classmethod
    def from_keep(
        cls, keep: Bool[Tensor, "mask_heads q_blocks k_blocks"], *, tokens: int, block_q: int, block_k: int
    ) -> BlockMask:
        """Pack a boolean mask.

        Args:
            keep: the kept blocks, head by head; one mask for all heads, or one for each.
            tokens: of the sequence.
            block_q, block_k: tokens of a query and of a key block.

        Raises:
            ValueError: the mask has another number of blocks than the tokens need.
        """
        expected = (block_count(tokens, block_q), block_count(tokens, block_k))
        if keep.ndim != 3 or tuple(keep.shape[1:]) != expected:
            raise ValueError(f"{tokens} tokens make {expected[0]}×{expected[1]} blocks: got {list(keep.shape)}")
        return cls(bits=packed(keep), tokens=tokens, block_q=block_q, block_k=block_k)

    @classmethod
    def from_lists(
        cls,
        indices: Int32[Tensor, "mask_heads q_blocks listed"],
        counts: Int32[Tensor, "mask_heads q_blocks"],
        *,
        tokens: int,
        block_q: int,
        block_k: int,
    ) -> BlockMask:
        """Pack per-row lists of kept key blocks; entries past a row's count are ignored.

        Args:
            indices: key blocks of each query block.
            counts: how many of them are kept.
            tokens: of the sequence.
            block_q, block_k: tokens of a query and of a key block.
        """
        keep = torch.zeros(*counts.shape, block_count(tokens, block_k) + 1, dtype=torch.bool, device=counts.device)
        listed = torch.arange(indices.shape[-1], device=counts.device) < counts.unsqueeze(-1)
        # entries past the count go to one extra column, which is cut off
        keep.scatter_(-1, torch.where(listed, indices.long(), keep.shape[-1] - 1), True)
        return cls.from_keep(keep[..., :-1], tokens=tokens, block_q=block_q, block_k=block_k)

    def sizes(self) -> tuple[Int[Tensor, "1 q_blocks"], Int[Tensor, "1 k_blocks"]]:
        """Tokens of each query block and of each key block, the same for all heads."""
        rows, columns = (block_sizes(self.tokens, size, self.bits.device)[None] for size in self.block)
        return rows, columns

    def each(self, change: Callable[[Tensor], Tensor]) -> BlockMask:
        """The mask with its bits changed."""
        return replace(self, bits=change(self.bits))

    def tensors(self) -> list[Tensor]:
        """The bits."""
        return [self.bits]

    def lists(self) -> tuple[Int32[Tensor, "mask_heads q_blocks k_blocks"], Int32[Tensor, "mask_heads q_blocks"]]:
        """Per query block: the kept key blocks, ascending, then the others; and how many are kept."""
        return listed(self.keep())

    def without(self, other: BlockMask) -> BlockMask:
        """The blocks that are kept here and not there, of masks of the same blocks.

        Raises:
            ValueError: the masks are of other tokens or blocks.
        """
        self.check_alike(other)
        return replace(self, bits=self.bits & ~other.bits)

    def check_alike(self, other: BlockMask) -> None:
        """Refuse a mask of other tokens or blocks.

        Raises:
            ValueError: naming both.
        """
        mine, others = ((mask.tokens, mask.block_q, mask.block_k) for mask in (self, other))
        if mine != others:
            raise ValueError(
                f"masks of {mine} and {others} (tokens, tokens of a query and of a key block) do not match"
            )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class VariableBlockMask(Mask):
    """Blocks of any size, head by head, as FlashInfer's for variable block sparsity: clusters that lie side by side.

    Args:
        q_sizes, k_sizes: tokens of each query block and of each key block, in the order in which they lie; a block may
            be empty. Those of a head add up to all tokens, which is not checked: to look is to wait for the device.
    """

    q_sizes: Int32[Tensor, "mask_heads q_blocks"]
    k_sizes: Int32[Tensor, "mask_heads k_blocks"]

    def __post_init__(self) -> None:
        Mask.__post_init__(self)
        for sizes in (self.q_sizes, self.k_sizes):
            if sizes.dtype != torch.int32 or sizes.ndim != 2 or len(sizes) != self.heads:
                raise ValueError(
                    f"a mask of {self.heads} heads has int32 sizes [{self.heads}, blocks]: "
                    f"got {sizes.dtype} {list(sizes.shape)}"
                )

    @classmethod
    def from_keep(
        cls,
        keep: Bool[Tensor, "mask_heads q_blocks k_blocks"],
        *,
        q_sizes: Int[Tensor, "mask_heads q_blocks"],
        k_sizes: Int[Tensor, "mask_heads k_blocks"],
        tokens: int,
    ) -> VariableBlockMask:
        """Pack a boolean mask.

        Args:
            keep: the kept blocks, head by head; one mask for all heads, or one for each.
            q_sizes, k_sizes: tokens of each block.
            tokens: of the sequence.

        Raises:
            ValueError: the mask has other heads or another number of blocks than there are sizes.
        """
        expected = (*q_sizes.shape, k_sizes.shape[-1])
        if tuple(keep.shape) != expected or len(k_sizes) != len(q_sizes):
            raise ValueError(
                f"sizes {list(q_sizes.shape)} and {list(k_sizes.shape)} of blocks need a mask {list(expected)}: "
                f"got {list(keep.shape)}"
            )
        return cls(bits=packed(keep), tokens=tokens, q_sizes=q_sizes.to(torch.int32), k_sizes=k_sizes.to(torch.int32))

    @property
    def block(self) -> None:
        """Blocks differ in size."""

    @property
    def q_blocks(self) -> int:
        """Query blocks, empty ones too."""
        return self.q_sizes.shape[-1]

    @property
    def k_blocks(self) -> int:
        """Key blocks, empty ones too."""
        return self.k_sizes.shape[-1]

    def sizes(self) -> tuple[Int32[Tensor, "mask_heads q_blocks"], Int32[Tensor, "mask_heads k_blocks"]]:
        """Tokens of each query block and of each key block."""
        return self.q_sizes, self.k_sizes

    def each(self, change: Callable[[Tensor], Tensor]) -> VariableBlockMask:
        """The mask with bits and sizes changed alike."""
        return replace(self, bits=change(self.bits), q_sizes=change(self.q_sizes), k_sizes=change(self.k_sizes))

    def tensors(self) -> list[Tensor]:
        """Bits and sizes."""
        return [self.bits, self.q_sizes, self.k_sizes]

    def cover(self, block: tuple[int, int]) -> BlockMask:
        """The blocks of one size that hold any pair of tokens of kept blocks: what other kernels can compute.

        Args:
            block: tokens of a query and of a key block.
        """
        block_q, block_k = block
        # a block without tokens is in no other, though it stands between some that are
        keep = self.keep() & (self.q_sizes > 0)[:, :, None] & (self.k_sizes > 0)[:, None]
        # blocks lie side by side: those that another holds are a range, and kept pairs of two ranges are counted by
        # differences of running sums, with no need of products over all pairs
        counts = torch.nn.functional.pad(keep.cumsum(1, dtype=torch.int32).cumsum(2, dtype=torch.int32), (1, 0, 1, 0))
        first, last = _held(self.q_sizes, self.tokens, block_q)
        rows = counts.take_along_dim(last[:, :, None], 1) - counts.take_along_dim(first[:, :, None], 1)
        first, last = _held(self.k_sizes, self.tokens, block_k)
        pairs = rows.take_along_dim(last[:, None], 2) - rows.take_along_dim(first[:, None], 2)
        return BlockMask.from_keep(pairs > 0, tokens=self.tokens, block_q=block_q, block_k=block_k)


def listed(
    keep: Bool[Tensor, "mask_heads q_blocks k_blocks"],
) -> tuple[Int32[Tensor, "mask_heads q_blocks k_blocks"], Int32[Tensor, "mask_heads q_blocks"]]:
    """Per query block: the kept key blocks, ascending, then the others; and how many are kept."""
    indices = torch.argsort(keep.logical_not().to(torch.uint8), dim=-1, stable=True)
    return indices.to(torch.int32), keep.sum(-1, dtype=torch.int32)


def row_bytes(k_blocks: int) -> int:
    """Bytes of a row of bits of so many key blocks."""
    return block_count(k_blocks, 8 * _ROW_BYTES) * _ROW_BYTES


def _block_of_each(sizes: Int[Tensor, "1 blocks"], tokens: int) -> Int[Tensor, "tokens"]:
    """The block that each token is in."""
    return torch.arange(sizes.shape[1], device=sizes.device).repeat_interleave(sizes[0], output_size=tokens)


def _bit_weights(device: torch.device) -> UInt8[Tensor, "8"]:
    return 2 ** torch.arange(8, dtype=torch.uint8, device=device)


def packed(keep: Bool[Tensor, "mask_heads q_blocks k_blocks"]) -> UInt8[Tensor, "mask_heads q_blocks row_bytes"]:
    """One bit a block, as `Mask.bits` has them."""
    padded = torch.zeros(*keep.shape[:2], row_bytes(keep.shape[2]) * 8, dtype=torch.uint8, device=keep.device)
    padded[..., : keep.shape[2]] = keep
    bits: Tensor = padded.unflatten(-1, (-1, 8)) * _bit_weights(keep.device)
    return bits.sum(-1, dtype=torch.uint8)


def unpacked(
    bits: UInt8[Tensor, "mask_heads q_blocks row_bytes"], k_blocks: int
) -> Bool[Tensor, "mask_heads q_blocks k_blocks"]:
    """One boolean a block, of bits as `packed` makes them."""
    kept: Tensor = bits.unsqueeze(-1).bitwise_and(_bit_weights(bits.device)).ne(0)
    return kept.flatten(-2)[..., :k_blocks]


def _held(
    sizes: Int[Tensor, "mask_heads blocks"], tokens: int, block: int
) -> tuple[Int[Tensor, "mask_heads others"], Int[Tensor, "mask_heads others"]]:
    """The first block with a token in each block of one size, and the one after the last."""
    ends = sizes.cumsum(-1)
    starts = torch.arange(0, tokens, block, device=sizes.device).expand(len(sizes), -1).contiguous()
    last = (starts + block).clamp(max=tokens) - 1
    # a token at place i is in the first block that ends after it
    return torch.searchsorted(ends, starts, right=True), torch.searchsorted(ends, last, right=True) + 1
