"""Installs an attention into a Diffusers pipeline, layer by layer, and takes it out again without a trace."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from inspect import signature
from typing import Any
from weakref import ref

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from calibatt.kernels.base import Attender
from calibatt.kernels.catalogue import DEFAULT
from calibatt.kernels.geometry import Geometry
from calibatt.methods.base import Planner
from calibatt.methods.call import Attention, Observer, SparseAttention
from calibatt.methods.catalogue import build
from calibatt.methods.learning import Learnt
from calibatt.methods.site import Branch, Site
from calibatt.models.catalogue import FAMILIES
from calibatt.models.entry import Family, Grid
from calibatt.models.identity import origin_of, transformers_of
from calibatt.models.parallel import Ranks, among, ranks_of
from calibatt.models.processor import AttentionProcessor, GridSeen, enrol
from calibatt.models.steps import counting, noise_level, step_index


@contextmanager
def installed(pipe: Any, attention: Attention) -> Iterator[None]:
    """While this context is open, an attention computes the pipeline's self-attention.

    Steps are read off the pipeline's scheduler, or counted as it takes them; branches off what the pipeline announces
    (`cache_context`), or off the order of its passes where the family knows it. On leaving, the processors, hooks and
    methods that were there before are back.

    Args:
        pipe: a Diffusers pipeline whose transformers are of a family in `models/families`; compiled or not.
        attention: called for every sample of every self-attention call.

    Raises:
        ValueError: the pipeline has no transformer that is known here, or is in a state that does not fit.
    """
    with ExitStack() as undo:
        _install(pipe, attention, undo)
        yield


@contextmanager
def attached(
    pipe: Any,
    method: Planner,
    kernel: Attender = DEFAULT,
    *,
    observers: Iterable[Observer] = (),
    trusted: bool = False,
) -> Iterator[None]:
    """While this context is open, the pipeline's self-attention is planned by a method and run by a kernel.

    Args:
        pipe: as for `installed`.
        method: asked for a plan at every self-attention call, once for each sample; reset at the start of each video.
        kernel: computes attention under that plan.
        observers: told of every call.
        trusted: do not check that what the method learnt was learnt from this pipeline's weights and noise schedule.

    Raises:
        CalibrationMismatch: the method learnt from other weights or another noise schedule.
        ValueError: as `installed`.
    """
    with installed(pipe, _checked(pipe, method, kernel, observers, trusted)):
        yield


def sparsify(
    pipe: Any,
    method: Planner | str,
    *,
    kernel: Attender = DEFAULT,
    preset: str = "default",
    calibration: Learnt | None = None,
    trusted: bool = False,
    **settings: Any,
) -> Any:
    """Give a pipeline's self-attention to a method, until `restore`.

    Args:
        pipe: as for `installed`.
        method: a name in the catalogue, or a method that is built.
        kernel: computes attention under its plans.
        preset, calibration, settings: as for `build`, where the method is a name.
        trusted: as for `attached`.

    Returns:
        The same pipeline.

    Raises:
        UnknownName: there is no such method or preset.
        CalibrationMismatch: the method learnt from other weights or another noise schedule.
        ValueError: as `build` and `installed`.
    """
    if isinstance(method, str):
        method = build(method, preset=preset, calibration=calibration, **settings)
    elif calibration is not None or settings or preset != "default":
        raise ValueError("preset, calibration and settings are for a method that is given by its name")
    with ExitStack() as undo:
        _install(pipe, _checked(pipe, method, kernel, (), trusted), undo)
        # nothing went wrong: the context stays open
        transformers_of(pipe)[0]._calibatt_undo = undo.pop_all()
    return pipe


def restore(pipe: Any) -> None:
    """Give a pipeline back as it was before `sparsify`.

    Raises:
        ValueError: it was not sparsified.
    """
    for transformer in transformers_of(pipe):
        undo = transformer.__dict__.pop("_calibatt_undo", None)
        if undo is not None:
            undo.close()
            return
    raise ValueError("this pipeline is not sparsified: there is nothing to restore")


def _checked(
    pipe: Any, method: Planner, kernel: Attender, observers: Iterable[Observer], trusted: bool
) -> SparseAttention:
    learnt = getattr(method, "learnt", None)
    if learnt is not None and not trusted:
        _family_of(pipe)
        learnt.check_origin(origin_of(pipe))
    return SparseAttention(method, kernel, observers=observers)


def _family_of(pipe: Any) -> Family:
    """The family of a pipeline's transformers.

    Raises:
        ValueError: there is no transformer, or one that no family has.
    """
    known = {family.transformer: family for family in FAMILIES}
    kinds = {type(transformer).__name__ for transformer in transformers_of(pipe)}
    if len(kinds) != 1 or not kinds <= known.keys():
        raise ValueError(
            f"{type(pipe).__name__} has {', '.join(sorted(kinds)) or 'no transformer'}: "
            f"this adapter knows {' and '.join(known)}"
        )
    return known[kinds.pop()]


def _install(pipe: Any, attention: Attention, undo: ExitStack) -> None:
    family = _family_of(pipe)
    transformers = transformers_of(pipe)
    _refuse_unfit(pipe, family, transformers)
    run = _Run(pipe, family, attention, ranks_of(family, transformers))
    undo.callback(run.close)
    number = enrol(run)
    for transformer in transformers:
        layers = family.attentions(transformer)
        run.layers = len(layers)
        for layer, module in enumerate(layers):
            undo.callback(partial(setattr, module, "processor", module.processor))
            module.processor = family.processor(run, number, layer, run.grid, module.processor)
        names = tuple(signature(type(transformer).forward).parameters)[1:]
        see = partial(_see_grid, run.grid, family.extents, family.patch(transformer.config), names)
        undo.callback(transformer.register_forward_pre_hook(see, with_kwargs=True).remove)
        announced = partial(run.announced, transformer, transformer.cache_context)
        undo.callback(_replace(transformer, "cache_context", announced))


def _refuse_unfit(pipe: Any, family: Family, transformers: list[Any]) -> None:
    """Refuse a pipeline in which attention cannot be replaced, or its steps not be told.

    Raises:
        ValueError: it is such a one; the message says what to do.
    """
    for transformer in transformers:
        for module in family.attentions(transformer):
            if isinstance(module.processor, AttentionProcessor):
                raise ValueError(
                    "calibatt is in this pipeline already: call restore(pipe), or leave the other `with` block, first"
                )
    _refuse_two_calls(pipe.scheduler)


def _refuse_two_calls(scheduler: Any) -> None:
    if scheduler.order != 1:
        raise ValueError(
            f"{type(scheduler).__name__} calls the model {scheduler.order} times a step: take a scheduler that calls "
            "it once, such as UniPCMultistepScheduler or FlowMatchEulerDiscreteScheduler"
        )


def _see_grid(
    grid: GridSeen, extents: Callable[[dict[str, Any]], Grid], patch: Grid, names: tuple[str, ...], module: Any,
    args: Any, kwargs: Any,
) -> None:  # fmt: skip
    """Note the grid of the pass that begins; where the whole transformer is compiled, so is this."""
    frames, rows, columns = extents({**dict(zip(names, args, strict=False)), **kwargs})
    grid.frames, grid.rows, grid.columns = frames // patch[0], rows // patch[1], columns // patch[2]


def _replace(owner: Any, name: str, value: Any) -> Callable[[], None]:
    """Set an attribute of one object; returns what brings back the one that was there, or that of its class."""
    before = vars(owner).get(name)
    setattr(owner, name, value)

    def back() -> None:
        if before is None:
            delattr(owner, name)
        else:
            setattr(owner, name, before)

    return back


class _Run:
    """Where a pipeline is, and what computes its attention; one for all layers of all its transformers."""

    def __init__(self, pipe: Any, family: Family, attention: Attention, ranks: Ranks | None) -> None:
        self.grid = GridSeen()
        self.layers = 0
        # weak: whoever forgets to restore a pipeline should not keep it in memory
        self._pipe = ref(pipe)
        self._family = family
        self._ranks = ranks
        self._attention = attention if ranks is None else among(ranks, attention)
        self._name: str | None = None
        self._timesteps: Tensor | None = None
        self._taken = 0
        self._release: Callable[[], None] | None = None
        self._step = -1
        self._pass = 0
        self._sigma = 1.0

    @contextmanager
    def announced(self, transformer: Any, cache_context: Any, name: str, **progress: Any) -> Iterator[None]:
        """Around the transformer's own `cache_context`, by which the pipeline says which pass begins.

        Args:
            transformer: that is called.
            cache_context: its own method.
            name: of the pass.
            progress: further keywords of that method.
        """
        for module in self._family.attentions(transformer):
            if getattr(module.processor, "owner", None) is not self:
                raise ValueError(
                    "another attention processor was set while calibatt was in the pipeline: call restore(pipe) first"
                )
        self._name = name
        try:
            with cache_context(name, **progress):
                yield
        finally:
            self._name = None

    def attend(
        self,
        q: Float[Tensor, "batch tokens heads head_dim"],
        k: Float[Tensor, "batch tokens heads head_dim"],
        v: Float[Tensor, "batch tokens heads head_dim"],
        text: Bool[Tensor, "batch text_tokens"] | None,
        layer: int,
        grid: tuple[int, int, int],
    ) -> Float[Tensor, "batch tokens heads head_dim"]:
        """Each sample's attention, without the padding of its text."""
        branches = self._advance(layer)
        batch = q.shape[0]
        if batch % len(branches):
            raise ValueError(f"a batch of {batch} has no equal parts for {len(branches)} branches of guidance")
        samples = batch // len(branches)
        outs = []
        for row in range(batch):
            q_row, k_row, v_row = (self._kept(x[row : row + 1], text, row).transpose(1, 2) for x in (q, k, v))
            site = self._site(q_row, layer, grid, branches[row // samples], row % samples)
            out = self._attention(q_row, k_row, v_row, site).transpose(1, 2)
            padding = q.shape[1] - out.shape[1]
            # to pad by nothing would be a copy
            outs.append(torch.nn.functional.pad(out, (0, 0, 0, 0, 0, padding)) if padding else out)
        return torch.cat(outs) if len(outs) > 1 else outs[0].contiguous()

    def _kept(self, x: Tensor, text: Tensor | None, row: int) -> Tensor:
        """A sample's tokens without padding."""
        if text is None or text[row].all():
            return x
        video = x.shape[1] - text.shape[1]
        return torch.cat((x[:, :video], x[:, video:][:, text[row]]), dim=1)

    def _advance(self, layer: int) -> tuple[Branch, ...]:
        """The branches of the pass that is under way, after noting whether a step, or a video, begins with it."""
        pipe = self._pipe()
        if pipe is None:
            raise ValueError("the pipeline that calibatt was put into is gone: keep it for as long as its transformer")
        timesteps = pipe.scheduler.timesteps
        if timesteps is None:
            raise ValueError(f"{type(pipe.scheduler).__name__} has no timesteps yet: call the whole pipeline")
        if timesteps is not self._timesteps:
            _refuse_two_calls(pipe.scheduler)
            if ranks_of(self._family, transformers_of(pipe)) != self._ranks:
                raise ValueError(
                    "parallelism was switched on while calibatt was in the pipeline: call restore(pipe), then sparsify"
                )
            self._timesteps, self._step = timesteps, -1
            self._count(pipe.scheduler)
            self._attention.start_video()
        step = step_index(pipe, self._taken)
        if step != self._step:
            self._step, self._pass = step, 0
            # once a step: it may have to be fetched from a GPU
            self._sigma = noise_level(pipe.scheduler, step)
        elif layer == 0:
            self._pass += 1
        name = self._name
        if name is None:
            passes = self._family.passes
            if self._pass >= len(passes):
                raise ValueError(
                    f"{type(pipe).__name__} calls its transformer without saying for which branch (cache_context): "
                    "calibatt cannot tell its passes apart"
                )
            name = passes[self._pass]
        branches = self._family.branches(pipe, name)
        if not branches:
            raise ValueError(f"{type(pipe).__name__} announces a pass named {name!r}, which is no branch of its family")
        return branches

    def _count(self, scheduler: Any) -> None:
        """Count the steps of a video that begins, where the scheduler does not itself (CogVideoX's)."""
        self.close()
        self._taken = 0
        if not hasattr(scheduler, "step_index"):
            self._release = _replace(scheduler, "step", counting(scheduler.step, self._took))

    def _took(self) -> None:
        self._taken += 1

    def close(self) -> None:
        """Give the scheduler back as it was."""
        if self._release is not None:
            self._release()
            self._release = None

    def _site(self, q: Tensor, layer: int, grid: tuple[int, int, int], branch: Branch, sample: int) -> Site:
        if min(grid) < 1:
            raise ValueError("call the whole transformer, not one of its layers: the layer cannot know its geometry")
        _, heads, part, head_dim = q.shape
        frames, rows, columns = grid
        tokens = part if self._ranks is None else part * self._ranks.size
        geometry = Geometry(
            grid=grid, heads=heads, head_dim=head_dim, text_tokens=tokens - frames * rows * columns,
            text_side=self._family.text_side or "last",
        )  # fmt: skip
        assert self._timesteps is not None
        return Site(
            geometry=geometry,
            step=self._step,
            steps=len(self._timesteps),
            sigma=self._sigma,
            branch=branch,
            layer=layer,
            layers=self.layers,
            sample=sample,
        )
