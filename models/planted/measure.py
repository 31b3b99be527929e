"""How few keys hold most of a planted model's attention, beside the published figures that it was fitted to.

    python -m calibatt.models.planted.measure --model wan2.1-1.3b --resolution 720p --out FILE

At a full size without a GPU: queries and keys of every layer are those of the latents of one noise as they are before
the first layer, which a planted model's layers add little to, and only some queries of each head are looked at.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from calibatt.kernels.names import look_up
from calibatt.methods.energy import needed_share
from calibatt.models.catalogue import MODELS
from calibatt.models.device import pick_device
from calibatt.models.entry import ModelEntry
from calibatt.models.planted.heads import Fit, late_shares, published
from calibatt.models.planted.pipeline import PROFILES, check_plantable, plant, planter
from calibatt.models.shapes.concentration import LEVELS, MASS, Summary, evenly_spaced, rounded, write

# shares of the steps that are over: at the first step, and in the second half, where published shares are flat
_STEPS = (0.0, 0.6)


def measure(
    entry: ModelEntry, transformer: Any, *, resolution: str, queries: int, steps: Sequence[float] = _STEPS
) -> Float[Tensor, "steps layers heads"]:
    """The share of keys that holds MASS of a query's attention, mean over queries, for every head.

    Args:
        entry: the model.
        transformer: planted.
        resolution: name of one of the model's.
        queries: how many of each head's are looked at, evenly spaced.
        steps: shares of the steps that are over.
    """
    latents = torch.randn(entry.latent_shape(resolution), generator=torch.Generator().manual_seed(0))
    latents = latents.to(next(transformer.parameters()))
    rows = evenly_spaced(entry.geometry(resolution).video_tokens, queries, latents.device)
    layers = planter(entry).queries_and_keys
    return torch.stack(
        [
            torch.stack([needed_share(q[:, rows], k, MASS).cpu() for q, k in layers(transformer, latents, step)])
            for step in steps
        ]
    )


def main() -> None:
    """Measure, and write what was measured beside what is published."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", required=True, help=f"one of {', '.join(PROFILES)}")
    parser.add_argument("--resolution", help="default: the model's first")
    parser.add_argument("--queries", type=int, default=32, help="of each head, evenly spaced; default: %(default)s")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="JSON")
    args = parser.parse_args()
    try:
        entry = look_up(MODELS, args.model, "model")
        check_plantable(entry)
        resolution = args.resolution or next(iter(entry.resolutions))
        geometry = entry.geometry(resolution)
        if args.queries < 1:
            raise ValueError(f"--queries {args.queries}: give a whole number from 1 up")
    except ValueError as problem:
        parser.error(str(problem))
    assert entry.untrained is not None
    device = pick_device(None)
    transformer = entry.untrained(geometry, entry.layers, device, torch.float32).pipe.transformer
    fitted = plant(entry, transformer)
    shares = measure(entry, transformer, resolution=resolution, queries=args.queries)
    write(args.out, _facts(entry, resolution, args.queries, fitted, shares))
    print(f"wrote {args.out}")


def _facts(
    entry: ModelEntry, resolution: str, queries: int, fitted: Fit, shares: Float[Tensor, "steps layers heads"]
) -> dict[str, Any]:
    figures = published(PROFILES[entry.name])
    wanted = torch.from_numpy(np.stack([late_shares(figures, layer, entry.heads) for layer in figures["late"]]))
    steps = figures["by_step"]
    return {
        "what": "of the queries and keys of every layer, made of noise as it is before the first layer; no video",
        "weights": "planted",
        "model": entry.name,
        "resolution": resolution,
        "tokens": entry.geometry(resolution).tokens,
        "queries": queries,
        "mass": MASS,
        "kinds": Counter(head.kind for layer in fitted.layers for head in layer),
        "levels": LEVELS,
        "late": _distribution(shares[1]),
        "late_published": _distribution(wanted),
        "mean_at_first_step": rounded(shares[:1].mean((1, 2)))[0],
        "mean_at_first_step_published": steps[0],
        "shares": [[rounded(heads) for heads in step] for step in shares],
    }


def _distribution(shares: Float[Tensor, "layers heads"]) -> dict[str, Any]:
    """Statistics of all heads, and the mean of each layer."""
    summary = Summary.of(shares[None])
    return {name: getattr(summary, name) for name in ("mean", "quantiles", "by_layer")}


if __name__ == "__main__":
    main()
