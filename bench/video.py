"""What a run knows of the videos that it has made, of those before it was stopped too."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from pydantic import TypeAdapter, ValidationError, with_config

from calibatt.bench.failure import Failure
from calibatt.bench.record import STRICT, Telemetry, first_problem


@with_config(STRICT)
@dataclass(slots=True, kw_only=True)
class Video:
    """What was found out about one video.

    Args:
        seconds: of the generation.
        phases: seconds of its parts, where they were timed.
        energy_j: of the GPU, where there is one.
        telemetry: what was read meanwhile.
        peak_memory_bytes: of the GPU, likewise.
        alignment: where the model has one.
        psnr_db, ssim: against the dense video of its round, where there is one.
        density, plan_memory_bytes: of its plans, where they were looked at.
        method_error, error_calls: of the dense video of the first round, and the calls that it is pooled over.
    """

    seconds: float
    phases: dict[str, float]
    energy_j: float | None = None
    telemetry: Telemetry | None = None
    peak_memory_bytes: int | None = None
    alignment: float | None = None
    psnr_db: float | None = None
    ssim: float | None = None
    density: float | None = None
    plan_memory_bytes: int | None = None
    method_error: float | None = None
    error_calls: int | None = None


# of every arm, under its name, its video in a round, or why it has no more
Round = Mapping[str, Video | Failure]


@with_config(STRICT)
@dataclass(frozen=True, slots=True, kw_only=True)
class Rounds:
    """Rounds that follow each other, of all arms of a suite on a workload.

    Args:
        first: number of the first of them.
        rounds: what came of each.
    """

    first: int
    rounds: list[dict[str, Video | Failure]]

    def to_json(self) -> dict[str, Any]:
        """As it stands in a file."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Any) -> Rounds:
        """What a file has.

        Raises:
            ValueError: it is something else; the message is one line.
        """
        try:
            return _ROUNDS.validate_json(json.dumps(value))
        except ValidationError as error:
            raise ValueError(first_problem(error)) from None


_ROUNDS = TypeAdapter(Rounds)


def in_order(kept: Sequence[Rounds]) -> list[Round]:
    """The rounds from the first on without a gap: one that could not be written is made again, and what follows it."""
    found: list[Round] = []
    for some in kept:
        if some.first == len(found):
            found += some.rounds
    return found
