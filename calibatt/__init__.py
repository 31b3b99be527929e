"""Sparse attention for video diffusion, measured on equal footing; and CalibAtt for one's own pipeline.

The public names, each loaded when first used (reports can be made where torch is not installed):

    attached        with attached(pipe, method, kernel): the pipeline's self-attention is theirs
    build           a method by name; METHODS is the catalogue
    calibrate       learn CalibAtt's masks for a pipeline; CalibrationConfig its settings
    Calibration     what was learnt: load, save
    learn           what another offline method learns from a pipeline's videos; save_learnt, load_learnt
    generate        one video from a prompt; save_video writes it to a file
    KERNELS, MODELS the other catalogues
    Geometry, Site, Plan, BlockMask, RowReuse, Task, Unsupported   what methods and kernels tell each other
"""

from __future__ import annotations

import importlib
from typing import Any

_HOMES = {
    "attached": "models.adapter",
    "build": "methods.catalogue",
    "METHODS": "methods.catalogue",
    "calibrate": "calibration.collect",
    "CalibrationConfig": "calibration.collect",
    "Calibration": "calibration.store",
    "learn": "calibration.learn",
    "save_learnt": "calibration.learn",
    "load_learnt": "calibration.learn",
    "generate": "models.generate",
    "save_video": "models.generate",
    "KERNELS": "kernels.catalogue",
    "MODELS": "models.catalogue",
    "Geometry": "kernels.geometry",
    "Site": "methods.site",
    "Plan": "kernels.plan",
    "BlockMask": "kernels.mask",
    "RowReuse": "kernels.plan",
    "Task": "kernels.base",
    "Unsupported": "kernels.base",
}

__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'calibatt' has no attribute {name!r}")
    return getattr(importlib.import_module(f"calibatt.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *_HOMES]
