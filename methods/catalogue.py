"""Every method there is, by name."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, fields, replace
from typing import Any

from calibatt.kernels.geometry import Geometry
from calibatt.kernels.names import Catalogue, look_up
from calibatt.methods.adaspa import AdaSpa
from calibatt.methods.base import Fit, Method
from calibatt.methods.blasst import Blasst
from calibatt.methods.budget.method import Budget
from calibatt.methods.calibatt.method import CalibAtt
from calibatt.methods.compact import Compact
from calibatt.methods.dense import Dense
from calibatt.methods.dfs import Dfs
from calibatt.methods.draft import Draft
from calibatt.methods.ear import Ear
from calibatt.methods.facts import read_facts
from calibatt.methods.jenga import Jenga
from calibatt.methods.learning import Learner, Learnt, settings_of
from calibatt.methods.lite import Lite
from calibatt.methods.looks import look_fault
from calibatt.methods.losa import Losa
from calibatt.methods.minference import MInference
from calibatt.methods.nabla import Nabla
from calibatt.methods.pisa import Pisa
from calibatt.methods.radial import Radial
from calibatt.methods.random_mask import RandomMask
from calibatt.methods.sage import Sage
from calibatt.methods.scaling import Scaling
from calibatt.methods.sol import Sol
from calibatt.methods.sparge import Sparge
from calibatt.methods.sta import SlidingTile
from calibatt.methods.svg import SparseVideoGen
from calibatt.methods.svg2 import Svg2
from calibatt.methods.svoo import Svoo
from calibatt.methods.xattention import XAttention


def _fault(found: Any) -> str | None:
    """Why something is no method that can be built and shown."""
    if not (isinstance(found, type) and issubclass(found, Method)):
        return "it is no subclass of calibatt.Method"
    missing = [name for name in ("name", "label", "colour", "marker", "presets") if not hasattr(found, name)]
    if missing:
        return f"its class has no {missing[0]}"
    if "default" not in found.presets:
        return "it has no preset 'default'"
    return look_fault(found.colour, found.marker)


METHODS: Catalogue[type[Method]] = Catalogue(
    "method",
    (
        Dense,
        Sage,
        CalibAtt,
        Budget,
        Radial,
        SlidingTile,
        SparseVideoGen,
        Svg2,
        Ear,
        Svoo,
        Sparge,
        XAttention,
        AdaSpa,
        Losa,
        MInference,
        Nabla,
        Draft,
        Jenga,
        Dfs,
        Sol,
        Pisa,
        Lite,
        Blasst,
        Scaling,
        Compact,
        RandomMask,
    ),
    fault=_fault,
)


def build(
    name: str,
    *,
    preset: str = "default",
    calibration: Learnt | None = None,
    block: tuple[int, int] | None = None,
    **settings: Any,
) -> Method:
    """A method, ready to be attached to a pipeline.

    Args:
        name, preset: as `calibatt methods` lists them.
        calibration: what was learnt offline, for a preset that needs it.
        block: tokens of a query and of a key block, in place of the preset's; a preset without blocks ignores it.
        settings: fields of the method's config, in place of the preset's.

    Raises:
        UnknownName: there is no such method or preset.
        ValueError: a setting does not exist or makes no sense; the calibration is missing, not needed, another
            method's, or was learnt under other settings.
    """
    method_class, config = _configured(name, preset, block, settings)
    source = method_class.learns_from(config)
    if calibration is None:
        if source is None:
            return method_class(config)
        raise ValueError(
            f"{name}/{preset} needs a calibration: make one by `calibatt calibrate --method {source}` and pass it as "
            "`calibration`"
        )
    if source is None:
        raise ValueError(f"{name}/{preset} learns nothing: leave out the calibration of {calibration.method}")
    if calibration.method != source:
        raise ValueError(f"{name}/{preset} needs a calibration of {source}: this one is of {calibration.method}")
    config = method_class.settled(config, calibration)
    if (own := method_class.learner(config)) is not None:
        _check_settings(f"{name}/{preset}", settings_of(own), calibration.settings)
    return method_class(config, calibration)


def learner(
    name: str, *, preset: str = "default", block: tuple[int, int] | None = None, **settings: Any
) -> Learner | None:
    """What a preset of a method learns by; None where it learns nothing of its own.

    Args:
        name, preset, block, settings: as for `build`.

    Raises:
        UnknownName: there is no such method or preset.
        ValueError: a setting does not exist or makes no sense.
    """
    method_class, config = _configured(name, preset, block, settings)
    return method_class.learner(config)


def fit_of(
    name: str,
    *,
    geometry: Geometry,
    steps: int,
    preset: str = "default",
    block: tuple[int, int] | None = None,
    **settings: Any,
) -> Fit:
    """How a preset of a method is fitted to a model.

    Args:
        name, preset, block, settings: as for `build`.
        geometry, steps: of the model's videos.

    Raises:
        UnknownName: there is no such method or preset.
        ValueError: a setting does not exist or makes no sense; the method has nothing that can be fitted.
    """
    method_class, config = _configured(name, preset, block, settings)
    found = method_class.fit(config, geometry, steps)
    if found is None:
        raise ValueError(f"{name} has no settings that are fitted to a model")
    return found


def learns_from(name: str, preset: str = "default", **settings: Any) -> str | None:
    """The method whose calibration a preset needs: its own name, or another's; None where it needs none.

    Args:
        name, preset, settings: as for `build`.

    Raises:
        UnknownName: there is no such method or preset.
        ValueError: a setting does not exist or makes no sense.
    """
    method_class, config = _configured(name, preset, None, settings)
    return method_class.learns_from(config)


def has_blocks(name: str, *, preset: str = "default") -> bool:
    """Whether a preset of a method has a size of blocks to choose.

    Raises:
        UnknownName: there is no such method or preset.
    """
    _, config = _configured(name, preset, None, {})
    return getattr(config, "block", None) is not None


def settings_from(name: str, preset: str, given: Iterable[str]) -> dict[str, Any]:
    """Settings of a method from texts, as a command line has them.

    Args:
        name, preset: as for `build`.
        given: each `NAME=VALUE`, a field of the method's config and its value: JSON, or else a text.

    Raises:
        UnknownName: there is no such method or preset.
        ValueError: one is not of that form, does not exist, is given twice, is of another type, or makes no sense.
    """
    values: dict[str, Any] = {}
    for text in given:
        key, equal, value = text.partition("=")
        if not (key and equal):
            raise ValueError(f"setting {text!r}: give NAME=VALUE")
        if key in values:
            raise ValueError(f"setting {key}: give it once")
        values[key] = _value(value)
    return _typed(name, preset, values)


def setting_text(name: str, value: Any) -> str:
    """A setting as `settings_from` reads it: the same text for the same value."""
    bare = isinstance(value, str) and value.isidentifier() and _value(value) == value
    return f"{name}={value if bare else json.dumps(value, separators=(',', ':'), default=asdict)}"


def settings_beside(learnt: Learnt) -> dict[str, Any]:
    """What a method is to be built with on a calibration, beside its preset: settings that were others when learning.

    Raises:
        UnknownName: there is no such method or preset.
        ValueError: a setting is of another type than the method has, or makes no sense.
    """
    _, config = _preset(learnt.method, learnt.preset, ())
    shared = {field.name for field in fields(config)} & learnt.settings.keys()
    found = _typed(learnt.method, learnt.preset, {name: learnt.settings[name] for name in sorted(shared)})
    return {name: value for name, value in found.items() if value != getattr(config, name)}


def _typed(name: str, preset: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as the method's config has them, from values as JSON has them."""
    _, config = _preset(name, preset, values)
    read = read_facts(type(config), json.dumps({**asdict(config), **values}))
    return {key: getattr(read, key) for key in values}


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _check_settings(arm: str, own: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Refuse what was learnt under other settings, naming the first that differs."""
    for field in (*own, *(given.keys() - own.keys())):
        if own.get(field) != given.get(field):
            raise ValueError(
                f"{arm} has {field} {own.get(field)}, its calibration was learnt with {given.get(field)}: "
                "set the same or calibrate again"
            )


def _preset(name: str, preset: str, settings: Collection[str]) -> tuple[type[Method], Any]:
    """The method's class and a preset, which has settings of these names."""
    method_class = look_up(METHODS, name, "method")
    config = look_up(method_class.presets, preset, f"preset of {name}")
    known = [field.name for field in fields(config)]
    unknown = [setting for setting in settings if setting not in known]
    if unknown:
        raise ValueError(f"{name} has no setting {', '.join(unknown)}: it has {', '.join(known) or 'none'}")
    return method_class, config


def _configured(
    name: str, preset: str, block: tuple[int, int] | None, settings: Mapping[str, Any]
) -> tuple[type[Method], Any]:
    """The method's class and its config."""
    method_class, config = _preset(name, preset, settings)
    blocks = {"block": block} if block is not None and getattr(config, "block", None) is not None else {}
    return method_class, replace(config, **blocks, **settings)
