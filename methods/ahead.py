"""Plans that follow from the site alone: few lie on the device at a time, and the next one is made ahead of its use."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from calibatt.kernels.geometry import Geometry
from calibatt.kernels.plan import Plan
from calibatt.methods.site import Site

# masks of one step of Wan 14B at 720p are 72 MB, and the second branch of guidance asks for those of the first
LIMIT_BYTES = 100_000_000
_Key = tuple[int, int, Geometry, torch.device]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Made:
    """A plan, and the event after which it may be read; None on a CPU."""

    plan: Plan
    ready: Any


class SitePlans:
    """Makes plans when they are asked for, and the plan of the layer or step behind; keeps those that were used last.

    On a GPU they are made on a stream of their own, while the current one computes.

    Args:
        make: a plan from step, layer, geometry and device. What it sends to a GPU goes by `sent`.
        limit_bytes: that plans may take together on a device; at least one is kept.
    """

    def __init__(
        self, make: Callable[[int, int, Geometry, torch.device], Plan], *, limit_bytes: int = LIMIT_BYTES
    ) -> None:
        self._make = make
        self._limit = limit_bytes
        # those that were used last stand last
        self._kept: OrderedDict[_Key, _Made] = OrderedDict()
        self._streams: dict[torch.device, Any] = {}

    def at(self, site: Site, device: torch.device) -> Plan:
        """The plan for a site, the same for all branches and samples.

        Raises:
            ValueError: what was learnt for it, or for the next one, cannot be used.
        """
        made = self._found((site.step, site.layer, site.geometry, device))
        if made.ready is not None:
            current = torch.cuda.current_stream(device)
            current.wait_event(made.ready)
            for tensor in made.plan.tensors():
                # its memory is not given away before what reads it now has ended
                tensor.record_stream(current)
        step, layer = divmod(site.step * site.layers + site.layer + 1, site.layers)
        if step < site.steps:
            self._found((step, layer, site.geometry, device))
        return made.plan

    def nbytes(self) -> int:
        """Memory of the plans that are kept; what several share counts once."""
        tensors = (tensor for made in self._kept.values() for tensor in made.plan.tensors())
        return sum({(tensor.data_ptr(), tensor.nbytes): tensor.nbytes for tensor in tensors}.values())

    def _found(self, key: _Key) -> _Made:
        if key not in self._kept:
            self._kept[key] = self._made(*key)
            while len(self._kept) > 1 and self.nbytes() > self._limit:
                self._kept.popitem(last=False)
        self._kept.move_to_end(key)
        return self._kept[key]

    def _made(self, step: int, layer: int, geometry: Geometry, device: torch.device) -> _Made:
        cuda = device.type == "cuda"
        if cuda and device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)
        with torch.cuda.stream(self._streams[device]) if cuda else nullcontext():
            plan = self._make(step, layer, geometry, device)
            return _Made(plan=plan, ready=self._streams[device].record_event() if cuda else None)


def sent(part: Tensor, device: torch.device) -> Tensor:
    """A tensor of the CPU on a device: to a GPU from pinned memory, which the host does not wait for."""
    # pinning keeps strides, and nothing can be written to an expanded tensor
    part = part.contiguous()
    return part.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else part.to(device)
