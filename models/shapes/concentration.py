"""How few keys hold most of the model's attention, beside published figures of large models.

    python -m calibatt.models.shapes.concentration --out DIR

The figure is of one head at one step: the smallest share of keys that holds 0.95 of a query's attention, mean over
queries. It is what SVOO learns (`methods/svoo.py`), and what the package `sparsevideo` has in tables for Wan and
HunyuanVideo; from a folder of those tables (`--profiles`) the published statistics can be made again.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from calibatt.methods.call import Call
from calibatt.methods.catalogue import build
from calibatt.methods.energy import needed_share
from calibatt.models.adapter import attached
from calibatt.models.device import working_dtype
from calibatt.models.generate import generate
from calibatt.models.identity import transformers_of, weights_digest
from calibatt.models.shapes.entry import SHAPES
from calibatt.models.shapes.pipeline import SHIFT, WEIGHTS, load_pipeline
from calibatt.models.shapes.scenes import held_out_captions

# DEFAULT_SPARSITY_THRESHOLD of the published tables
MASS = 0.95
# 21 of them
LEVELS = tuple(level / 20 for level in range(21))
# of the heads of one layer there are few: every other level
HEAD_LEVELS = LEVELS[::2]
OURS, PUBLISHED, PICTURE = "concentration.json", "concentration-published.json", "concentration.png"

# the tables of sparsevideo 0.1.0, by the models they are of; the first four are drawn
PROFILES: Mapping[str, str] = MappingProxyType(
    {
        "sparsity_wan_1.3B_t2v.csv": "Wan 2.1 1.3B",
        "sparsity_wan_14B_t2v.csv": "Wan 2.1 14B",
        "sparsity_wan22_A14B_t2v.csv": "Wan 2.2 A14B",
        "sparsity_hunyuan10_13B_t2v.csv": "HunyuanVideo",
        "sparsity_wan_14B_i2v.csv": "Wan 2.1 14B, image to video",
        "sparsity_wan22_A14B_i2v.csv": "Wan 2.2 A14B, image to video",
        "sparsity_hunyuan10_13B_i2v.csv": "HunyuanVideo, image to video",
    }
)
DRAWN = tuple(PROFILES.values())[:4]
_SOURCE = {
    "package": "sparsevideo 0.1.0, sdist on PyPI, github.com/Mutual-Luo/SparseVideo",
    "licence": "Apache-2.0",
    "folder": "src/sparsevideo/methods/svoo/sparsity_profiles",
    "how": "Step, layer and head each have one value. By the method's own repository, github.com/Mutual-Luo/SVOO "
    "(scripts/offline, svoo/sparsity), such tables are of the first attention call of each step, at 720p, 81 frames "
    "(HunyuanVideo: 129, its text among the tokens), over all queries, and keep the largest value over prompts; how "
    "many prompts is not said.",
}
_COLUMNS = ["Step", "Layer", "Head", "Sparsity"]
# colours that colour-blind readers can tell apart (Okabe and Ito), each with its own dashes, for some curves lie on
# others; our sizes are thicker, three shades of blue
_PUBLISHED_LOOKS = (("#E69F00", "--"), ("#D55E00", "-"), ("#111111", ":"), ("#009E73", "-."))
_SIZE_COLOURS: Mapping[str, str] = MappingProxyType({"quick": "#9ECAE9", "standard": "#3B8BC4", "large": "#08306B"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """Statistics of the figure over all steps, layers and heads of a model.

    Args:
        mean: of all values.
        quantiles: of all values, at LEVELS.
        by_step: mean over layers and heads, from the noisiest step on.
        by_layer: mean over steps and heads, from the first layer on.
        between_heads: variance of the heads' means over steps, as a share of the variance of all values; 1 where every
            head has one value at all steps.
    """

    mean: float
    quantiles: tuple[float, ...]
    by_step: tuple[float, ...]
    by_layer: tuple[float, ...]
    between_heads: float

    @classmethod
    def of(cls, shares: Float[Tensor, "steps layers heads"]) -> Summary:
        """Of all values of a model."""
        values = shares.double()
        variance = float(values.var(correction=0))
        levels = torch.tensor(LEVELS, dtype=torch.float64)
        return cls(
            mean=round(float(values.mean()), 5),
            quantiles=rounded(torch.quantile(values.flatten(), levels)),
            by_step=rounded(values.mean((1, 2))),
            by_layer=rounded(values.mean((0, 2))),
            between_heads=round(float(values.mean(0).var(correction=0)) / variance, 5) if variance else 1.0,
        )


class NeededShares:
    """Notes the figure at each call of the conditional branch.

    Args:
        queries: how many of each head's queries are looked at, evenly spaced; all where there are no more.
    """

    def __init__(self, queries: int) -> None:
        self._queries = queries
        self._seen: dict[tuple[int, int], Float[Tensor, " heads"]] = {}

    def saw(self, call: Call) -> None:
        """One call is over."""
        if call.site.branch == "cond":
            q, k = call.q[0], call.k[0]
            rows = evenly_spaced(q.shape[1], self._queries, q.device)
            self._seen[call.site.step, call.site.layer] = needed_share(q[:, rows], k, MASS)

    def shares(self) -> Float[Tensor, "steps layers heads"]:
        """All that was noted, on the CPU."""
        steps, layers = (1 + max(places) for places in zip(*self._seen, strict=True))
        return torch.stack(
            [torch.stack([self._seen[step, layer] for layer in range(layers)]) for step in range(steps)]
        ).cpu()


def evenly_spaced(tokens: int, count: int, device: torch.device) -> Int[Tensor, " rows"]:
    """So many indices of tokens, the first and the last among them; all where there are no more."""
    return torch.linspace(0, tokens - 1, min(tokens, count), dtype=torch.float64, device=device).round().long()


def measure(
    pipe: Any, size: str, captions: Sequence[str], *, queries: int, steps: int | None = None
) -> Float[Tensor, "captions steps layers heads"]:
    """The figure on dense videos of one size; the first caption's noise has seed 0, the next one's is one more.

    Args:
        pipe: of `load_pipeline`.
        size: name of a resolution.
        captions: in the model's grammar.
        queries: as for `NeededShares`.
        steps: of the generation; the size's own where None.
    """
    shares = []
    for seed, text in enumerate(captions):
        seen = NeededShares(queries)
        with attached(pipe, build("dense"), observers=[seen]):
            generate(SHAPES, pipe, prompt=text, resolution=size, seed=seed, steps=steps)
        shares.append(seen.shares())
    return torch.stack(shares)


def measure_weights(
    weights: Path, *, out: Path, sizes: Sequence[str], captions: int, queries: int, device: torch.device
) -> None:
    """Write concentration.json; sizes that the file has already, and that are not measured, stay as they are.

    Args:
        weights: folder of the transformer.
        out: where the file goes.
        sizes: names of resolutions.
        captions: how many, none of which were trained on.
        queries: as for `NeededShares`.
        device: to generate on.

    Raises:
        ValueError: a number is out of range, or the file that is there is of other weights or no such file.
        OSError: there are no weights.
    """
    texts = held_out_captions(captions, seed=0)
    if queries < 1:
        raise ValueError(f"the mean needs at least one query: got {queries}")
    dtype = working_dtype(device)
    pipe = load_pipeline(device=device, dtype=dtype, weights=weights)
    digest, path = weights_digest(transformers_of(pipe)), out / OURS
    facts: dict[str, Any] = {"mass": MASS, "levels": LEVELS, "weights": digest, "sizes": {}}
    if path.exists():
        facts = _read_facts(path)
        if facts.get("weights") != digest:
            raise ValueError(f"{path} is of other weights than {digest}: choose another --out")
    for size in sizes:
        shares = measure(pipe, size, texts, queries=queries)
        tokens = SHAPES.geometry(size).tokens
        facts["sizes"][size] = {
            "tokens": tokens,
            "captions": texts,
            "steps": shares.shape[1],
            "guidance": SHAPES.guidance,
            "shift": SHIFT,
            "branch": "cond",
            "queries": min(queries, tokens),
            "dtype": str(dtype).removeprefix("torch."),
            "device": device.type,
            # statistics are of each head's mean over captions; published ones of the largest over prompts
            **asdict(Summary.of(shares.mean(0))),
            "mean_of_largest": round(float(shares.amax(0).double().mean()), 5),
            "shares": [[[rounded(heads) for heads in step] for step in caption] for caption in shares],
        }
        facts["sizes"] = {name: facts["sizes"][name] for name in SHAPES.resolutions if name in facts["sizes"]}
        write(path, facts)
        print(f"{size}: mean {facts['sizes'][size]['mean']:.3f}", flush=True)


def read_profile(path: Path) -> Float[Tensor, "steps layers heads"]:
    """The figure for each step, layer and head, from a table that has it under the name of Sparsity.

    Args:
        path: a CSV file with the columns Step (from 1), Layer, Head (both from 0) and Sparsity.

    Raises:
        ValueError: it is no such table, or not a whole one.
        OSError: the file cannot be read.
    """
    try:
        with path.open(newline="", encoding="utf-8") as file:
            header, *lines = (line for line in csv.reader(file) if line)
    except (UnicodeDecodeError, csv.Error, ValueError):
        raise ValueError(f"{path}: this is no table in CSV") from None
    if header != _COLUMNS:
        raise ValueError(f"{path}: the columns should be {','.join(_COLUMNS)}: got {','.join(header)!r:.80}")
    try:
        values = {(int(step), int(layer), int(head)): float(share) for step, layer, head, share in lines}
    except ValueError:
        raise ValueError(f"{path}: a line is not three whole numbers and a share") from None
    if not all(0 <= share <= 1 for share in values.values()):
        raise ValueError(f"{path}: a share is not 0 to 1")
    places = sorted(values)
    lengths = [len({place[axis] for place in places}) for axis in range(3)]
    # distinct and as many as fit, from the first to the last possible one: every one of them
    whole = len(lines) == len(places) == math.prod(lengths) > 0
    if not whole or places[0] != (1, 0, 0) or places[-1] != (lengths[0], lengths[1] - 1, lengths[2] - 1):
        raise ValueError(f"{path}: steps from 1, layers and heads from 0 should each be there once")
    return torch.tensor([values[place] for place in places], dtype=torch.float64).view(*lengths)


def summarise_profiles(folder: Path) -> dict[str, Any]:
    """The published statistics: contents of concentration-published.json.

    Args:
        folder: has the tables of sparsevideo 0.1.0, under their own names (PROFILES).

    Raises:
        ValueError: a table is not as `read_profile` takes it.
        OSError: the folder or a table is not there.
    """
    missing = [name for name in PROFILES if not (folder / name).is_file()]
    if missing:
        raise OSError(
            f"{folder} has no {missing[0]}: unpack what `pip download sparsevideo==0.1.0 --no-deps --no-binary :all:` "
            f"brings, and name its {_SOURCE['folder']}"
        )
    models = {}
    for name, model in PROFILES.items():
        shares = read_profile(folder / name)
        steps, layers, heads = shares.shape
        models[model] = {
            "table": name, "steps": steps, "layers": layers, "heads": heads, **asdict(Summary.of(shares)),
            "late": late_heads(shares),
        }  # fmt: skip
    return {"source": _SOURCE, "mass": MASS, "levels": LEVELS, "head_levels": HEAD_LEVELS, "models": models}


def late_heads(shares: Float[Tensor, "steps layers heads"]) -> tuple[tuple[float, ...], ...]:
    """Of each layer, quantiles at HEAD_LEVELS of the heads' means over the second half of the steps."""
    late = shares[len(shares) // 2 :].double().mean(0)
    levels = torch.tensor(HEAD_LEVELS, dtype=torch.float64)
    return tuple(rounded(torch.quantile(heads, levels)) for heads in late)


def read_summaries(path: Path) -> dict[str, Summary]:
    """Statistics of a file of `measure_weights` or of `summarise_profiles`, by size or by model.

    Raises:
        ValueError: the file is no such one.
        OSError: there is none.
    """
    facts = _read_facts(path)
    try:
        summaries = {
            name: Summary(
                mean=float(one["mean"]),
                between_heads=float(one["between_heads"]),
                **{part: tuple(map(float, one[part])) for part in ("quantiles", "by_step", "by_layer")},
            )
            for name, one in (facts["sizes"] if "sizes" in facts else facts["models"]).items()
        }
        whole = all(len(one.quantiles) == len(LEVELS) and one.by_step and one.by_layer for one in summaries.values())
    except (KeyError, TypeError, ValueError, AttributeError):
        whole = False
    if not whole:
        raise ValueError(f"{path}: statistics are missing in it: measure into another folder")
    return summaries


def table(summaries: Mapping[str, Summary]) -> str:
    """Rows of Markdown, one a model: mean, quantiles, and means at the ends of layers and steps, all in per cent."""
    names = (
        "mean", "5 %", "50 %", "95 %", "first layer", "layers between", "last layer", "first step", "last step",
    )  # fmt: skip
    lines = [f"| | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for name, one in summaries.items():
        between = one.by_layer[1:-1] or one.by_layer
        values = (
            one.mean,
            *(one.quantiles[LEVELS.index(level)] for level in (0.05, 0.5, 0.95)),
            one.by_layer[0],
            sum(between) / len(between),
            one.by_layer[-1],
            one.by_step[0],
            one.by_step[-1],
        )
        lines.append(f"| {name} | {' | '.join(f'{100 * value:.1f}' for value in values)} |")
    return "\n".join(lines)


def draw(ours: Mapping[str, Summary], published: Mapping[str, Summary], path: Path) -> None:
    """Distribution over heads, mean by layer and mean by step, side by side; our sizes are the thick lines."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    looks: list[tuple[str, Summary, dict[str, Any]]] = [
        (f"shapes, {size}", one, {"color": _SIZE_COLOURS.get(size), "lw": 3}) for size, one in ours.items()
    ]
    looks += [
        (name, published[name], {"color": colour, "lw": 1.3, "ls": dashes})
        for name, (colour, dashes) in zip(DRAWN, _PUBLISHED_LOOKS, strict=True)
        if name in published
    ]
    figure, axes = plt.subplots(1, 3, figsize=(12, 4.6), layout="constrained")
    for name, one, look in looks:
        axes[0].plot(one.quantiles, LEVELS, label=name, **look)
        for axis, means in ((axes[1], one.by_layer), (axes[2], one.by_step)):
            axis.plot([place / max(1, len(means) - 1) for place in range(len(means))], means, **look)
    axes[0].set(xlabel="share of keys that holds 0.95 of the attention", ylabel="share of all heads at all steps")
    axes[1].set(xlabel="layer: first (0) to last (1)", ylabel="share of keys, mean over heads and steps")
    axes[2].set(xlabel="step: first (0) to last (1)", ylabel="share of keys, mean over heads and layers")
    for axis in axes:
        axis.grid(visible=True, alpha=0.3)
        axis.set(xlim=(-0.02, 1.02))
    for axis in axes[1:]:
        axis.set(ylim=(0, None))
    figure.legend(loc="outside upper center", ncols=len(looks), frameon=False, columnspacing=1.2)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def main() -> None:
    """Measure the shipped weights, or those of a folder, or summarise published tables; draw; print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the files; what it has already is added to")
    parser.add_argument(
        "--sizes", nargs="+", choices=list(SHAPES.resolutions), default=list(SHAPES.resolutions), help="default: all"
    )
    parser.add_argument("--captions", type=int, default=2, help="videos a size; default: 2")
    # against all queries, at the quick size, a head's share at one step is then off by 0.003 in the mean, 0.03 at most
    parser.add_argument("--queries", type=int, default=512, help="of each head, evenly spaced; default: 512")
    parser.add_argument("--weights", type=Path, default=WEIGHTS, help="folder of the transformer")
    parser.add_argument("--profiles", type=Path, help="summarise the tables of sparsevideo in this folder instead")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        if args.profiles is not None:
            facts = summarise_profiles(args.profiles)
            args.out.mkdir(parents=True, exist_ok=True)
            write(args.out / PUBLISHED, facts)
        else:
            args.out.mkdir(parents=True, exist_ok=True)
            measure_weights(
                args.weights, out=args.out, sizes=args.sizes, captions=args.captions, queries=args.queries,
                device=device,
            )  # fmt: skip
        ours = read_summaries(args.out / OURS) if (args.out / OURS).exists() else {}
        made = args.out / PUBLISHED
        published = read_summaries(made if made.exists() else WEIGHTS / PUBLISHED)
        draw(ours, published, args.out / PICTURE)
    except (ValueError, OSError) as problem:
        parser.error(str(problem))
    print(table({**ours, **published}))


def rounded(values: Float[Tensor, " values"]) -> tuple[float, ...]:
    """Numbers as they stand in the files, to five digits."""
    return tuple(round(value, 5) for value in values.tolist())


def _read_facts(path: Path) -> dict[str, Any]:
    """Contents of a file of ours.

    Raises:
        ValueError: it is no such file.
        OSError: it cannot be read.
    """
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        raise ValueError(f"{path}: this is no JSON: measure into another folder") from None
    measured = isinstance(facts, dict) and "weights" in facts and isinstance(facts.get("sizes"), dict)
    summarised = isinstance(facts, dict) and isinstance(facts.get("models"), dict)
    if not (measured or summarised):
        raise ValueError(f"{path}: this command did not write it: measure into another folder")
    return dict(facts)


def write(path: Path, facts: Mapping[str, Any]) -> None:
    """JSON, indented, with lists of numbers on one line each."""
    text = json.dumps(facts, indent=1, ensure_ascii=False)
    text = re.sub(
        r"\[[\s\d.,e-]+\]", lambda found: " ".join(found[0].split()).replace("[ ", "[").replace(" ]", "]"), text
    )
    path.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
