"""The card of a calibration: what others have to know before they use it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from calibatt.methods.base import Foreseen
from calibatt.methods.catalogue import build, settings_beside
from calibatt.methods.learning import Learnt

# prompts that the card spells out; the file has all
_SHOWN_PROMPTS = 16


def card(learnt: Learnt, file: str, *, licence: str | None) -> str:
    """Markdown with the metadata that the Hub reads.

    Args:
        learnt: what was learnt.
        file: its name beside the card.
        licence: of the calibration, as the Hub names it; None leaves it open.
    """
    from huggingface_hub import ModelCardData

    own = learnt.provenance
    set_too = "".join(f", {name}={value!r}" for name, value in settings_beside(learnt).items())
    # a bar ends a cell
    table = "\n".join("| {} | {} |".format(name, value.replace("|", r"\|")) for name, value in about(learnt))
    shown = "\n".join(f"- {prompt}" for prompt in own.prompts[:_SHOWN_PROMPTS])
    rest = len(own.prompts) - _SHOWN_PROMPTS
    more = f"\n- and {rest} more, which the file has" if rest > 0 else ""
    data = ModelCardData(
        license=licence, library_name="calibatt", tags=["calibatt", "sparse-attention", "video-diffusion"]
    )
    return f"""---
{data.to_yaml()}
---
# A calibration of {learnt.method} for {own.origin.model}
What was learnt offline for sparse attention in one model at one size and number of steps: tables, no weights.

| | |
|---|---|
{table}

```python
import calibatt

learnt = calibatt.Calibration.from_pretrained("REPOSITORY")   # or a folder with this file and `{file}`
calibatt.sparsify(pipe, "{learnt.method}", preset="{learnt.preset}", calibration=learnt{set_too})
```
A pipeline of other weights, another noise schedule, size or number of steps is refused, with both sides named.

## Prompts
{shown}{more}
"""


def about(learnt: Learnt) -> list[tuple[str, str]]:
    """What was learnt, from what, and what it comes to: names and texts."""
    own, geometry = learnt.provenance, learnt.provenance.geometry
    text = f", up to {geometry.text_tokens} tokens of text" if geometry.text_tokens else ""
    versions = ", ".join(f"{name} {version}" for name, version in own.versions.items())
    return [
        ("method", f"{learnt.method}, preset {learnt.preset}"),
        ("settings", ", ".join(f"{name} = {value}" for name, value in learnt.settings.items())),
        ("density", _density(learnt, settings_beside(learnt))),
        ("model", own.origin.model),
        ("weights", f"`{own.origin.weights}`: all transformers, and adapters that are on with their scale"),
        ("scheduler", own.origin.scheduler),
        ("size", f"{geometry}{text}"),
        ("steps, layers, guidance", f"{own.steps}, {own.layers}, {own.guidance:g}"),
        *(
            ("transferred from", f"{stage.geometry}, {stage.steps} steps of {stage.scheduler}")
            for stage in own.transferred
        ),
        ("prompts", f"{len(own.prompts)}, from noise of seed {own.seed} on"),
        ("cost", f"{own.cost_ratio:.2f} times as long as the videos by themselves"),
        ("made", f"{own.created} with {versions}"),
        ("bytes", f"{learnt.nbytes():,}"),
    ]


def _density(learnt: Learnt, settings: Mapping[str, Any]) -> str:
    method = build(learnt.method, preset=learnt.preset, calibration=learnt, **settings)
    return f"{method.mean_density():.3f}" if isinstance(method, Foreseen) else "depends on the video"
