"""What the arms of one workload share. Its parts are handed in, so that a test can make one of parts that it knows."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from calibatt.bench.cells import Arm
from calibatt.bench.observers import Probe, ProbeTaker
from calibatt.bench.offline import Prepared
from calibatt.bench.tuning import Film
from calibatt.calibration.videos import Videos
from calibatt.kernels import oracle
from calibatt.kernels.base import Kernel, Unsupported
from calibatt.kernels.plan import Plan
from calibatt.methods.base import Planner
from calibatt.methods.call import Attention, SparseAttention
from calibatt.methods.catalogue import build
from calibatt.models.entry import Alignment


# without slots: cached_property keeps its values in the instance's dictionary
@dataclass(frozen=True, kw_only=True, eq=False)
class Context:
    """What the arms of one workload share.

    Args:
        name: of the workload, as it stands in progress lines and file names.
        device: where it runs.
        prompts: one for each round.
        probes: some attention calls of a dense video.
        checked_heads: heads on which outputs are compared with fp64.
        dense: the kernel of the baseline.
        kernel: what an arm runs on.
        method: builds an arm's method, or says why it does not apply.
        prepared: what an arm learns offline; None where it needs nothing.
        preparation_s: seconds that a method's offline part took; None where it has none, or was not measured here.
        film: makes one video.
        alignment: score of text alignment, where the model has one.
        guidance: of the videos.
        facts: the fields of a record that all arms share.
        log: shows a line.
        seed: of the first round's noise; that of round i is larger by i.
        faithful: whether it says something how near an arm comes to dense attention: not where weights are planted.
    """

    name: str
    device: torch.device
    prompts: tuple[str, ...]
    probes: tuple[Probe, ...]
    checked_heads: tuple[int, ...]
    dense: Kernel
    kernel: Callable[[Arm], Kernel]
    method: Callable[[Arm], Planner | Unsupported]
    prepared: Callable[[Arm], Prepared | None]
    preparation_s: Callable[[Planner], float | None]
    film: Film
    alignment: Alignment | None
    guidance: float
    facts: Mapping[str, Any]
    log: Callable[[str], None]
    seed: int = 0
    faithful: bool = True

    @cached_property
    def truth(self) -> tuple[Float[Tensor, "1 checked tokens head_dim"], ...]:
        """Dense attention of the probes in fp64, of the heads that are checked."""
        heads = list(self.checked_heads)
        return tuple(
            oracle.attend(
                probe.q[:, heads], probe.k[:, heads], probe.v[:, heads], Plan.dense(probe.site.geometry).of_heads(heads)
            )
            for probe in self.probes
        )

    def video(self, attention: Attention, round_: int) -> Float[Tensor, "3 frames height width"]:
        """A whole generation; the round fixes prompt and seed."""
        return self.film(attention, self.prompts[round_], self.seed + round_)


def take_probes(
    videos: Videos, kernel: Kernel, prompt: str, shares: Collection[float], *, seed: int
) -> tuple[Probe, ...]:
    """Inputs of some attention calls of a dense video, which also warms a pipeline up.

    Args:
        videos: make it.
        kernel: computes it.
        prompt: what it shows.
        shares: where in the video each call is, from 0, the first step and layer, to 1, the last of both.
        seed: of its noise.
    """
    last_step, last_layer = videos.steps - 1, videos.layers - 1
    taker = ProbeTaker({(round(last_step * share), round(last_layer * share)) for share in shares})
    videos.show(SparseAttention(build("dense"), kernel, observers=[taker]), prompts=(prompt,), seed=seed)
    return tuple(taker.probes)


def spread(count: int, most: int) -> tuple[int, ...]:
    """Indices of at most so many of a number of heads, evenly from the first to the last."""
    few = min(count, most)
    return tuple(round(i * (count - 1) / max(1, few - 1)) for i in range(few))
