"""Sparse VideoGen, version 1: every head sees a band, of tokens that stand frame by frame or place by place.

Follows arXiv 2502.01776 and github.com/svg-project/Sparse-VideoGen (attention.py, utils.py, inference.py, placement.py
of svg/models/wan and svg/models/hyvideo). A spatial head has its tokens in the sequence's order, where a band along the
diagonal holds neighbouring frames; a temporal head has them place by place, all frames of a place side by side, where
the same band holds neighbouring places at all times. At every call, the outputs of sampled queries tell for each head
which of the two is nearer to dense attention. What differs:

- The preset `learnt` is ours: it takes these errors from videos watched before, and none while a video is made.
- Queries are sampled from the whole video; there from its first 10,000 tokens alone (`sampled_from`), less than three
  frames of Wan or HunyuanVideo at 720p, to save the memory of masks that are held token by token.
- Masks are of blocks, which are kept where the band meets any of their pairs of tokens; there FlexAttention leaves out
  the other pairs. The same density setting computes a little more here.
- Text blocks are kept, in both directions, wherever text stands. There, padding after HunyuanVideo's text is apart from
  all else; here no text is known for padding.

As there: the masks that the choice is made by are those of one width, whatever the density. The first frame that all of
Wan's queries see is the first in the order of the head: for a temporal head, as many tokens of the first places.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Bool, Float, Int, Int32
from torch import Tensor

from calibatt.kernels.geometry import Geometry
from calibatt.kernels.mask import BlockMask, block_count
from calibatt.kernels.plan import Plan, TokenOrder
from calibatt.methods.ahead import sent
from calibatt.methods.base import Knob, Method
from calibatt.methods.blocks import block_ends, text_blocks, with_text
from calibatt.methods.energy import products
from calibatt.methods.learning import Learnt
from calibatt.methods.site import Site

# attention weights held at a time, 128 MiB in fp32: 64 queries of six heads of a 720p Wan video (75,600 tokens)
_CHUNK = 2**25
# the table of what was learnt: error of the spatial and of the temporal mask, for each head
_ERRORS = "errors"


@dataclass(frozen=True, slots=True, kw_only=True)
class SparseVideoGenConfig:
    """Settings of the masks and of the choice between them.

    Args:
        density: share of all pairs that the band and the text are made to hold; there it is called sparsity. Whole
            blocks and the sink come on top.
        dense_steps, dense_layers: share of the first steps and of the first layers that stay dense, rounded down.
        sink: whether all queries see as many tokens as a frame has, the first in the order of their head.
        rounding: whether the band's width is rounded up or down to whole key blocks.
        sampled_band: how far the band that the choice is made by reaches to either side, in frames; rounded down to
            whole key blocks, its own among them and kept in any case.
        choice: whether the errors are those of each call, or were learnt from other videos by step, layer and head.
        samples: queries that the choice is made by, the same for all heads; drawn with replacement.
        sampled_from: first tokens of the video that they are drawn from; None for all.
        seed: of the draw; the site adds to it.
        block: tokens of a query and of a key block.

    Raises:
        ValueError: a share is outside 0 to 1, nothing is sampled, or the sampled band is negative.
    """

    density: float
    dense_steps: float
    dense_layers: float
    sink: bool
    rounding: Literal["up", "down"]
    sampled_band: float
    choice: Literal["online", "learnt"] = "online"
    # --num_sampled_rows of the scripts
    samples: int = 64
    sampled_from: int | None = None
    seed: int = 0
    # FlexAttention's, which the repository's masks are made for
    block: tuple[int, int] = (128, 128)

    def __post_init__(self) -> None:
        if not all(0 <= share <= 1 for share in (self.density, self.dense_steps, self.dense_layers)):
            raise ValueError(f"svg's density, dense_steps and dense_layers are shares, 0 to 1: got {self}")
        if self.samples < 1 or (self.sampled_from is not None and self.sampled_from < 1):
            raise ValueError(f"svg needs at least one sample, from at least one token: got {self}")
        if self.sampled_band < 0:
            raise ValueError(f"svg needs a sampled band that is not negative: got {self}")


# wan_t2v_720p_svg.sh, which at first had 0.3 of the steps dense and a density of 0.25; the sink, the rounding and the
# sampled band are those of svg/models/wan/utils.py
_WAN = SparseVideoGenConfig(density=0.3, dense_steps=0.2, dense_layers=0.03, sink=True, rounding="up", sampled_band=2.0)
# the same masks at every step and layer, to compare masks rather than dense schedules
_NO_WARMUP = replace(_WAN, dense_steps=0.0, dense_layers=0.0)


class SparseVideoGen(Method):
    """One band for all heads; each head has its tokens in the order that changes its output less.

    The draw is that of the site: the same for both branches and all samples. Nothing is kept between calls.
    """

    name: ClassVar[str] = "svg"
    label: ClassVar[str] = "SVG"
    colour: ClassVar[str] = "#56B4E9"
    marker: ClassVar[str] = "s"
    headwise: ClassVar[bool] = True
    presets: ClassVar[Mapping[str, SparseVideoGenConfig]] = MappingProxyType(
        {
            "default": _WAN,
            # hyvideo_t2v_720p_svg.sh; the rest is that of svg/models/hyvideo/utils.py
            "hunyuan": SparseVideoGenConfig(
                density=0.25, dense_steps=0.1, dense_layers=0.03, sink=False, rounding="down", sampled_band=1.5
            ),
            "no-warmup": _NO_WARMUP,
            # a variant of ours: the errors are those of videos watched before
            "learnt": replace(_NO_WARMUP, choice="learnt"),
        }
    )
    knob: ClassVar[Knob | None] = Knob(field="density", low=0.0, high=1.0)
    without_dense: ClassVar[Mapping[str, Any]] = MappingProxyType({"dense_steps": 0.0, "dense_layers": 0.0})

    def __init__(self, config: SparseVideoGenConfig, learnt: Learnt | None = None) -> None:
        super().__init__(config, learnt)
        self.offline = learnt is not None
        self._sampled = OutputErrors.of(config)
        self._masks: dict[tuple[Geometry, torch.device], BlockMask] = {}
        self._orders: dict[tuple[Geometry, torch.device], Int32[Tensor, "orders tokens"]] = {}

    @classmethod
    def learner(cls, config: SparseVideoGenConfig) -> OutputErrors | None:
        """Learns the errors that the choice is made by; None where every call takes its own."""
        return OutputErrors.of(config) if config.choice == "learnt" else None

    def plan(
        self,
        q: Float[Tensor, "heads tokens head_dim"],
        k: Float[Tensor, "heads tokens head_dim"],
        v: Float[Tensor, "heads tokens head_dim"],
        site: Site,
    ) -> Plan:
        """The mask of the geometry over each head's own order, or dense in the first steps and layers.

        Raises:
            ValueError: other videos were watched.
        """
        config, geometry = self.config, site.geometry
        if site.in_warmup(config.dense_steps, config.dense_layers, whole=math.floor):
            return Plan.dense(geometry)
        key = (geometry, q.device)
        if key not in self._masks:
            self._masks[key] = band_mask(geometry, config, q.device)
            self._orders[key] = head_orders(geometry).to(q.device)
        if self.learnt is None:
            spatial, temporal = self._sampled.errors(q, k, v, site, self._orders[key])
        else:
            spatial, temporal = sent(self.learnt.at(_ERRORS, site), q.device)
        # of equal errors the first is taken, which is the spatial one
        order = self._orders[key][(temporal < spatial).long()]
        return Plan.masked(self._masks[key], geometry.heads, order=TokenOrder.of_all(order))


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputErrors:
    """What the two masks change in the outputs of sampled queries; as a learner, summed over the prompts.

    Args:
        samples, sampled_from, seed, sampled_band, sink: as in `SparseVideoGenConfig`.
        block_k: tokens of a key block.
    """

    samples: int
    sampled_from: int | None
    seed: int
    sampled_band: float
    sink: bool
    block_k: int

    @classmethod
    def of(cls, config: SparseVideoGenConfig) -> OutputErrors:
        """The learner that a config asks for."""
        return cls(
            samples=config.samples, sampled_from=config.sampled_from, seed=config.seed,
            sampled_band=config.sampled_band, sink=config.sink, block_k=config.block[1],
        )  # fmt: skip

    def errors(
        self,
        q: Float[Tensor, "heads tokens head_dim"],
        k: Float[Tensor, "heads tokens head_dim"],
        v: Float[Tensor, "heads tokens head_dim"],
        site: Site,
        orders: Int32[Tensor, "orders tokens"],
    ) -> Float[Tensor, "orders heads"]:
        """The errors of one call, of the mask in each order."""
        rows = self.rows(site, q.device)
        return mask_errors(q, k, v, rows, self.masks(site.geometry, rows, orders))

    def note(
        self,
        q: Float[Tensor, "heads tokens head_dim"],
        k: Float[Tensor, "heads tokens head_dim"],
        v: Float[Tensor, "heads tokens head_dim"],
        site: Site,
        prompt: int,
    ) -> Mapping[str, Tensor]:
        """`errors` of one call, spatial and temporal, by head."""
        return {_ERRORS: self.errors(q, k, v, site, head_orders(site.geometry).to(q.device))}

    def merge(self, notes: Sequence[Mapping[str, Tensor]]) -> Mapping[str, Tensor]:
        """`errors`: their sum over the prompts."""
        return {_ERRORS: torch.stack([note[_ERRORS] for note in notes]).sum(0)}

    def rows(self, site: Site, device: torch.device) -> Int[Tensor, "samples"]:
        """The queries that the choice is made by, all of the video."""
        video = site.geometry.video_tokens
        count = video if self.sampled_from is None else min(self.sampled_from, video)
        generator = site.generator(self.seed, device)
        return site.geometry.video_start + torch.randint(count, (self.samples,), generator=generator, device=device)

    def masks(
        self, geometry: Geometry, rows: Int[Tensor, "samples"], orders: Int32[Tensor, "orders tokens"]
    ) -> Bool[Tensor, "orders samples tokens"]:
        """Which keys some queries see in the masks that the choice is made by.

        These are of blocks too, square and counted from the first token of the video. Text is seen by all.

        Args:
            geometry: layout of the tokens.
            rows: the queries, of the video.
            orders: of the tokens; each has its mask.
        """
        # where each token stands
        places = orders.argsort(-1) - geometry.video_start
        blocks = places // self.block_k
        reach = max(1, int(self.sampled_band * geometry.frame_tokens // self.block_k))
        always = (places < 0) | (places >= geometry.video_tokens)
        if self.sink:
            always |= places < geometry.frame_tokens
        return ((blocks[:, rows, None] - blocks[:, None]).abs() < reach) | always[:, None]


def token_major_order(geometry: Geometry) -> Int32[Tensor, "1 tokens"]:
    """All frames of one place after the other, place by place, and the text where it is."""
    frames = geometry.grid[0]
    return with_text(geometry, torch.arange(geometry.video_tokens).view(frames, -1).T.flatten())


def head_orders(geometry: Geometry) -> Int32[Tensor, "orders tokens"]:
    """The order of a spatial head, which is the sequence's own, and of a temporal one."""
    return torch.cat((torch.arange(geometry.tokens, dtype=torch.int32)[None], token_major_order(geometry)))


def band_width(geometry: Geometry, config: SparseVideoGenConfig) -> int:
    """How far apart in their order two tokens of the band may stand.

    Of L tokens, a band that reaches w to either side leaves out two triangles of (L − w)² / 2 pairs, so that one of a
    share s has w = L (1 − √(1 − s)). The share is what the density leaves beside the rows and columns of text;
    where that is nothing, tokens still see themselves, and in the repository only text.
    """
    tokens, block = geometry.tokens, config.block[1]
    share = max(0.0, config.density - 2 * geometry.text_tokens / tokens)
    blocks = tokens * (1 - math.sqrt(1 - share)) / block
    return block * (math.ceil(blocks) if config.rounding == "up" else math.floor(blocks))


def band_mask(geometry: Geometry, config: SparseVideoGenConfig, device: torch.device | str = "cpu") -> BlockMask:
    """The mask, shared by all heads, over blocks of tokens in either order.

    Blocks are kept that hold a pair of tokens at most the band's width apart, the text's, and with a sink those that
    hold one of the video's first keys. HunyuanVideo's pairs are less than the width apart, which is the same in square
    blocks, but for a width of 0: that would keep nothing.

    Args:
        geometry: layout of the tokens.
        config: density, sink, rounding and block.
        device: of the mask.
    """
    tokens, (block_q, block_k) = geometry.tokens, config.block
    first_q, last_q = block_ends(tokens, block_q, device)
    first_k, last_k = block_ends(tokens, block_k, device)
    apart = torch.maximum(first_k - last_q[:, None], first_q[:, None] - last_k)
    keep = (apart <= band_width(geometry, config)) | text_blocks(geometry, config.block, device)
    if config.sink:
        start = geometry.video_start
        keep[:, start // block_k : block_count(start + geometry.frame_tokens, block_k)] = True
    return BlockMask.from_keep(keep[None], tokens=tokens, block_q=block_q, block_k=block_k)


def mask_errors(
    q: Float[Tensor, "heads tokens head_dim"],
    k: Float[Tensor, "heads tokens head_dim"],
    v: Float[Tensor, "heads tokens head_dim"],
    rows: Int[Tensor, "samples"],
    masks: Bool[Tensor, "masks samples tokens"],
) -> Float[Tensor, "masks heads"]:
    """What each mask changes in some outputs of each head: squares summed over the channels, mean over the queries.

    Computed in fp32, some heads at a time.

    Args:
        q, k, v: what attention sees.
        rows: queries, some maybe twice.
        masks: keys that these see; each sees some.
    """
    errors = q.new_empty(len(masks), len(q), dtype=torch.float32)
    at_once = max(1, _CHUNK // masks[0].numel())
    for first in range(0, len(q), at_once):
        heads = slice(first, first + at_once)
        scores = products(q[heads, rows], k[heads]) / math.sqrt(q.shape[-1])
        weights, values = scores.softmax(-1), v[heads].float()
        for mask, error in zip(masks, errors, strict=True):
            change = (weights - scores.masked_fill(~mask, -math.inf).softmax(-1)) @ values
            error[heads] = change.square().sum(-1).mean(-1)
    return errors
