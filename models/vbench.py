"""VBench's prompts, for models that have none of their own: half of its dimensions to calibrate on, half to measure on.

The 946 prompts of the wheel `vbench` 0.1.5 (Apache-2.0) are in `vbench.json`, by the dimensions that their videos are
judged by.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from functools import cache
from pathlib import Path

_FILE = Path(__file__).with_name("vbench.json")
# Eight of the sixteen dimensions. Scenes of a style, moving or still, are the same sentences, and dimensions that are
# judged on the same videos have the same prompts: none of these is divided.
CALIBRATED = frozenset(
    {
        "appearance_style", "temporal_style", "overall_consistency", "aesthetic_quality", "imaging_quality",
        "temporal_flickering", "object_class", "color",
    }
)  # fmt: skip


@cache
def to_calibrate_on() -> tuple[str, ...]:
    """The prompts to learn from and to tune on, in an order that mixes the dimensions."""
    return _mixed(calibrated=True)


@cache
def to_measure_on() -> tuple[str, ...]:
    """The prompts to measure on, none of which is one to calibrate on, in an order that mixes the dimensions."""
    return _mixed(calibrated=False)


def choose(prompts: Sequence[str], count: int, what: str) -> tuple[str, ...]:
    """The first of them.

    Args:
        prompts: there are.
        count: how many are needed.
        what: they are for, for the message.

    Raises:
        ValueError: there are too few.
    """
    if count > len(prompts):
        raise ValueError(f"{count} prompts {what} are needed, and VBench has {len(prompts)}: give --prompts a file")
    return tuple(prompts[:count])


def _mixed(*, calibrated: bool) -> tuple[str, ...]:
    groups = json.loads(_FILE.read_text(encoding="utf-8"))["groups"]
    chosen = [group["prompts"] for group in groups if (group["dimensions"][0] in CALIBRATED) == calibrated]
    # two stand there twice
    prompts = list(dict.fromkeys(prompt for group in chosen for prompt in group))
    random.Random(0).shuffle(prompts)
    return tuple(prompts)
