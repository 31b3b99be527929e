"""Sparse attention for video diffusion, measured on equal footing; and CalibAtt for one's own pipeline.

The public names, each loaded when first used (reports can be made where torch is not installed):

    sparsify, restore   sparsify(pipe, "radial"): the pipeline's self-attention is a method's, until restored
    attached            the same within a with block
    build               a method by name; METHODS is the catalogue
    capturing           while it is open, inputs of a pipeline's attention are written to files, to be measured
    calibrate           what a method learns from a pipeline's videos
    Calibration         what was learnt: load, save, from_pretrained, push_to_hub
    generate            one video from a prompt; save_video writes it to a file
    KERNELS, MODELS     the other catalogues; ModelEntry and Resolution describe a model
    Method, Knob, Learner, Learnt   what a method is made of
    SparseAttention     a method and a kernel as the attention of a model
    Geometry, Site, Plan, BlockMask, RowReuse, Task, Unsupported   what methods and kernels tell each other
"""

from __future__ import annotations

import importlib
from typing import Any

_HOMES = {
    "sparsify": "models.adapter",
    "restore": "models.adapter",
    "attached": "models.adapter",
    "build": "methods.catalogue",
    "METHODS": "methods.catalogue",
    "capturing": "calibration.captures",
    "calibrate": "calibration.collect",
    "Calibration": "calibration.artifact",
    "generate": "models.generate",
    "save_video": "models.generate",
    "KERNELS": "kernels.catalogue",
    "MODELS": "models.catalogue",
    "ModelEntry": "models.entry",
    "Resolution": "models.entry",
    "Method": "methods.base",
    "Knob": "methods.base",
    "Learner": "methods.learning",
    "Learnt": "methods.learning",
    "SparseAttention": "methods.call",
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
