"""Every method there is, by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from types import MappingProxyType
from typing import Any

from calibatt.kernels.names import look_up
from calibatt.methods.adaspa import AdaSpa
from calibatt.methods.base import Method, PlanSource
from calibatt.methods.blasst import Blasst
from calibatt.methods.calibatt import CalibAtt
from calibatt.methods.compact import Compact
from calibatt.methods.dense import Dense
from calibatt.methods.draft import Draft
from calibatt.methods.jenga import Jenga
from calibatt.methods.learning import Learner, Learning, Learnt
from calibatt.methods.lite import Lite
from calibatt.methods.minference import MInference
from calibatt.methods.nabla import Nabla
from calibatt.methods.radial import Radial
from calibatt.methods.random_mask import RandomMask
from calibatt.methods.sage import Sage
from calibatt.methods.scaling import Scaling
from calibatt.methods.sparge import Sparge
from calibatt.methods.sta import SlidingTile
from calibatt.methods.svg import SparseVideoGen
from calibatt.methods.svg2 import Svg2
from calibatt.methods.svoo import Svoo
from calibatt.methods.xattention import XAttention

METHODS: Mapping[str, type[Method]] = MappingProxyType(
    {
        method.name: method
        for method in (
            Dense,
            Sage,
            CalibAtt,
            Radial,
            SlidingTile,
            SparseVideoGen,
            Svg2,
            Svoo,
            Sparge,
            XAttention,
            AdaSpa,
            MInference,
            Nabla,
            Draft,
            Jenga,
            Lite,
            Blasst,
            Scaling,
            Compact,
            RandomMask,
        )
    }
)


def build(
    name: str,
    *,
    preset: str = "default",
    source: PlanSource | Learnt | None = None,
    block: tuple[int, int] | None = None,
    **settings: Any,
) -> Method:
    """A method, ready to be attached to a pipeline.

    Args:
        name, preset: as `calibatt methods` lists them.
        source: the calibration of an offline method, or what a preset's own learner learnt.
        block: tokens of a query and of a key block, in place of the preset's; a method without blocks of its own, or a
            preset without, ignores it.
        settings: fields of the method's config, in place of the preset's.

    Raises:
        UnknownName: there is no such method or preset.
        ValueError: an offline method has no calibration, a preset that learns nothing learnt, or a setting does not
            exist.
    """
    kind, config = _configured(name, preset, block, settings)
    if kind.offline and not isinstance(source, PlanSource):
        raise ValueError(f"{name} needs a calibration: make one by `calibatt calibrate` and pass it as `source`")
    learns = isinstance(kind, Learning) and kind.learner(config) is not None
    if learns and not (isinstance(source, Learnt) and (source.method, source.preset) == (name, preset)):
        other = f", not that of {source.method}/{source.preset}" if isinstance(source, Learnt) else ""
        raise ValueError(f"{name}/{preset} learns from videos first: pass what it learnt as `source`{other}")
    method: Method = kind(config) if source is None else kind(config, source)
    return method


def learner(
    name: str, *, preset: str = "default", block: tuple[int, int] | None = None, **settings: Any
) -> Learner | None:
    """What a preset of a method learns by, new; None where it learns nothing of its own.

    Args:
        name, preset, block, settings: as for `build`.

    Raises:
        UnknownName: there is no such method or preset.
        ValueError: a setting does not exist.
    """
    kind, config = _configured(name, preset, block, settings)
    return kind.learner(config) if isinstance(kind, Learning) else None


def has_blocks(name: str, *, preset: str) -> bool:
    """Whether a preset of a method has a size of blocks to choose.

    Raises:
        UnknownName: there is no such method or preset.
    """
    _, config = _configured(name, preset, None, {})
    return getattr(config, "block", None) is not None


def _configured(name: str, preset: str, block: tuple[int, int] | None, settings: Mapping[str, Any]) -> tuple[Any, Any]:
    """The method's class and its config."""
    kind: Any = look_up(METHODS, name, "method")
    config = look_up(kind.presets, preset, f"preset of {name}")
    known = [field.name for field in fields(config)]
    unknown = [setting for setting in settings if setting not in known]
    if unknown:
        raise ValueError(f"{name} has no setting {', '.join(unknown)}: it has {', '.join(known) or 'none'}")
    blocks = {"block": block} if block is not None and getattr(config, "block", None) is not None else {}
    return kind, replace(config, **blocks, **settings)
