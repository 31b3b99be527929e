"""Every kernel there is, by name."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from calibatt.kernels.base import Kernel
from calibatt.kernels.default import Default
from calibatt.kernels.dense import SDPA_CUDNN, SDPA_FLASH, SDPA_MATH
from calibatt.kernels.flash import FA3, Flash4
from calibatt.kernels.flex import FLEX_DENSE, Flex
from calibatt.kernels.gluon_hopper import Gluon
from calibatt.kernels.names import Catalogue
from calibatt.kernels.split import Split
from calibatt.kernels.triton_sparse import Triton

_FA4, _GLUON = Flash4(), Gluon()
_EACH: Mapping[str, Kernel] = MappingProxyType(
    {
        kernel.name: kernel
        for kernel in (
            SDPA_FLASH, SDPA_CUDNN, SDPA_MATH, FA3, _FA4, FLEX_DENSE, Flex(), _GLUON, Split(_FA4, _GLUON), Triton()
        )
    }
)  # fmt: skip
DEFAULT = Default(_EACH)


def _fault(found: Any) -> str | None:
    """Why something is no kernel."""
    return None if isinstance(found, Kernel) else "it has no name, no refusal or no attend"


KERNELS: Catalogue[Kernel] = Catalogue("kernel", (DEFAULT, *_EACH.values()), fault=_fault)
