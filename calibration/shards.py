"""Units of a calibration: a file for the notes of each prompt's video, so that a run can be resumed, and split."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from calibatt.calibration.files import (
    TensorFile,
    UnusableCalibration,
    described,
    naming,
    raw,
    reading,
    replacing,
)
from calibatt.methods.facts import one_line
from calibatt.methods.learning import Learner

SCHEMA = "calibatt-unit-1"
_MANIFEST, _LOCK = "run.json", "run.lock"
# of a unit's own tensors; a learner's have a prefix
_SECONDS, _CHECKSUMS, _NOTES = "seconds", "checksums", "notes."
_CHECKSUM_BYTES = hashlib.sha256().digest_size


class Units:
    """The notes of one run's videos, in a folder that no other run shares.

    A unit is of one prompt, or of some whose videos are made side by side; it goes by the first of them. Opening it
    makes the folder, or finds what an earlier process of the same run left there.

    Args:
        folder: of the units; what else lies there is left alone.
        run: all that the notes depend on, as JSON values, with `steps` and `layers`.
        groups: indices of the prompts of each unit.

    Raises:
        UnusableCalibration: the folder holds the units of another run.
        OSError: it cannot be written.
    """

    def __init__(self, folder: Path, run: Mapping[str, Any], groups: Sequence[range]) -> None:
        self.folder = folder
        # where units are merged to
        self.aside = folder / ".merged"
        self.groups = {group.start: group for group in groups}
        self.sites = (int(run["steps"]), int(run["layers"]))
        text = json.dumps(run, sort_keys=True)
        self._run = hashlib.sha256(text.encode()).hexdigest()
        manifest = folder / _MANIFEST
        with naming(folder):
            folder.mkdir(parents=True, exist_ok=True)
        with self.alone():
            if manifest.exists():
                _check_same(manifest, json.loads(text))
            else:
                with replacing(manifest) as file, naming(manifest):
                    file.write(text.encode())

    @contextmanager
    def alone(self) -> Iterator[None]:
        """While this context is open, other processes wait to open or to merge these units."""
        from filelock import FileLock

        lock = FileLock(self.folder / _LOCK)
        with naming(self.folder / _LOCK):
            lock.acquire()
        try:
            yield
        finally:
            lock.release()
            # another process may have merged and removed the units in the meantime
            if not (self.folder / _MANIFEST).exists() and not self.finished():
                self.remove()

    def finished(self) -> list[int]:
        """The units that are complete, by their first prompts."""
        return [prompt for prompt in self.groups if self._path(prompt).exists()]

    def videos(self) -> tuple[int, int]:
        """Of how many videos the notes are complete, and of how many they are wanted."""
        return sum(len(self.groups[prompt]) for prompt in self.finished()), sum(map(len, self.groups.values()))

    def seconds(self) -> float:
        """What the videos took whose notes are complete, notes included.

        Raises:
            UnusableCalibration: a unit is damaged, or of another run.
        """
        total = 0.0
        for prompt in self.finished():
            with self._reading(prompt) as unit:
                total += unit.seconds()[0].item()
        return total

    @contextmanager
    def claimed(self, prompts: Sequence[int]) -> Iterator[None]:
        """While this context is open, no other process may work on these units; a dead one holds none.

        A run that has finished no video by then leaves nothing behind.

        Raises:
            UnusableCalibration: another process is at work on one of them.
        """
        with ExitStack() as locks:
            self._claim(prompts, locks)
            try:
                yield
            finally:
                if prompts and not self.finished():
                    # others' locks are theirs to keep
                    with suppress(UnusableCalibration):
                        self._claim([prompt for prompt in self.groups if prompt not in prompts], locks)
                        self.remove()

    def _claim(self, prompts: Iterable[int], locks: ExitStack) -> None:
        from filelock import FileLock, Timeout

        for prompt in prompts:
            try:
                locks.enter_context(FileLock(self._lock(prompt), timeout=0))
            except Timeout:
                raise UnusableCalibration(
                    f"another process is at work on prompt {prompt} in {self.folder}: wait until it has ended"
                ) from None

    @contextmanager
    def writing(self, prompt: int) -> Iterator[UnitWriter]:
        """A new unit, which is there when the context ends, and not when it fails.

        Raises:
            OSError: it cannot be written.
        """
        path = self._path(prompt)
        metadata = {"schema": SCHEMA, "run": self._run, "prompt": str(prompt)}
        with replacing(path) as file:
            yield UnitWriter(file, path, sites=self.sites, metadata=metadata)

    def merged(self, learner: Learner) -> Iterator[Mapping[str, Tensor]]:
        """What the notes of all units come to, site by site, layer by layer; memory holds one site's notes.

        Raises:
            UnusableCalibration: a unit is missing, damaged, or of another run.
        """
        with ExitStack() as opened:
            units = [opened.enter_context(self._reading(prompt)) for prompt in self.groups]
            for site in range(math.prod(self.sites)):
                notes = [unit.notes(site) for unit in units]
                try:
                    merged = learner.merge(notes)
                except (LookupError, RuntimeError, TypeError, ValueError) as error:
                    raise UnusableCalibration(
                        f"the units in {self.folder} do not hold the notes that are expected: {one_line(error)}"
                    ) from None
                yield merged

    def cost_ratio(self) -> float:
        """The time of all videos over that of the same videos without notes.

        Raises:
            UnusableCalibration: as `merged`.
        """
        with ExitStack() as opened:
            units = [opened.enter_context(self._reading(prompt)) for prompt in self.groups]
            total, watching = torch.stack([unit.seconds() for unit in units]).sum(0).tolist()
        return float(total / (total - watching))

    def remove(self) -> None:
        """Delete the units and, where nothing else lies there, the folder."""
        for prompt in self.groups:
            self._path(prompt).unlink(missing_ok=True)
            self._lock(prompt).unlink(missing_ok=True)
        # the last: of a process that was killed while it merged
        for name in (_MANIFEST, _LOCK, self.aside.name, f".{self.aside.name}.partial"):
            (self.folder / name).unlink(missing_ok=True)
        # it stays where something else lies in it
        with suppress(OSError):
            self.folder.rmdir()

    @contextmanager
    def _reading(self, prompt: int) -> Iterator[_Unit]:
        path = self._path(prompt)
        if not path.exists():
            raise UnusableCalibration(f"prompt {prompt} of {self.videos()[1]} has no notes yet: {path} is missing")
        with reading(path, SCHEMA) as (file, metadata):
            if (metadata.get("run"), metadata.get("prompt")) != (self._run, str(prompt)):
                raise UnusableCalibration(f"{path} holds the notes of another run or prompt: delete it")
            yield _Unit(file, path, sites=self.sites, metadata=metadata)

    def _path(self, prompt: int) -> Path:
        return self.folder / f"prompt-{prompt:04d}.safetensors"

    def _lock(self, prompt: int) -> Path:
        return self.folder / f"prompt-{prompt:04d}.lock"


class UnitWriter:
    """Writes one unit, site by site, with a checksum for each.

    Args:
        file: to write to.
        path: for messages.
        sites: steps and layers.
        metadata: of the file.
    """

    def __init__(self, file: BinaryIO, path: Path, *, sites: tuple[int, int], metadata: Mapping[str, str]) -> None:
        self._file = file
        self._path = path
        self._sites = sites
        self._metadata = metadata
        self._layout: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
        self._content: TensorFile | None = None

    def put(self, site: int, notes: Mapping[str, Tensor]) -> None:
        """Write the notes of a site, counted layer by layer, step by step.

        Raises:
            ValueError: their names, shapes or dtypes are not those of the first.
            OSError: they cannot be written.
        """
        layout = {name: (note.dtype, tuple(note.shape)) for name, note in notes.items()}
        content = self._begun(layout)
        if layout != self._layout:
            raise ValueError(
                f"notes are {layout}, those before {self._layout}: a learner must note the same at every site"
            )
        for name, note in notes.items():
            content.put(_NOTES + name, note, site)
        content.put(_CHECKSUMS, _checksum(self._metadata, site, notes), site)

    def finish(self, *, total: float, watching: float) -> None:
        """Write the seconds that the whole video took, and those of them that notes took.

        Raises:
            OSError: they cannot be written.
        """
        content = self._begun({})
        seconds = torch.tensor([total, watching], dtype=torch.float64)
        content.put(_SECONDS, seconds)
        last = math.prod(self._sites)
        content.put(_CHECKSUMS, _checksum(self._metadata, last, {_SECONDS: seconds}), last)

    def _begun(self, layout: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> TensorFile:
        if self._content is None:
            self._layout = dict(layout)
            whole = {_NOTES + name: (dtype, (*self._sites, *shape)) for name, (dtype, shape) in layout.items()}
            whole[_SECONDS] = (torch.float64, (2,))
            # one more than there are sites, for the seconds
            whole[_CHECKSUMS] = (torch.uint8, (math.prod(self._sites) + 1, _CHECKSUM_BYTES))
            self._content = TensorFile(self._file, self._path, whole, self._metadata)
        return self._content


class _Unit:
    """A unit that is being read."""

    def __init__(self, file: Any, path: Path, *, sites: tuple[int, int], metadata: Mapping[str, str]) -> None:
        self._file = file
        self._path = path
        self._sites = sites
        self._metadata = metadata
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        self._names = [name.removeprefix(_NOTES) for name in shapes if name.startswith(_NOTES)]
        expected = {_SECONDS: (2,), _CHECKSUMS: (math.prod(sites) + 1, _CHECKSUM_BYTES)}
        wrong = [name for name, shape in expected.items() if shapes.get(name) != shape]
        wrong += [name for name in self._names if shapes[_NOTES + name][:2] != sites]
        if wrong:
            raise self._damaged()

    def notes(self, site: int) -> dict[str, Tensor]:
        """The notes of a site."""
        step, layer = divmod(site, self._sites[1])
        notes = {name: self._file.get_slice(_NOTES + name)[step, layer] for name in self._names}
        self._check(site, notes)
        return notes

    def seconds(self) -> Tensor:
        """Of the whole video, and those of them that notes took."""
        seconds: Tensor = self._file.get_tensor(_SECONDS)
        self._check(math.prod(self._sites), {_SECONDS: seconds})
        total, watching = seconds.tolist()
        if not 0 <= watching < total < math.inf:
            raise self._damaged()
        return seconds

    def _check(self, row: int, content: Mapping[str, Tensor]) -> None:
        kept = self._file.get_slice(_CHECKSUMS)[row]
        if not torch.equal(kept, _checksum(self._metadata, row, content)):
            raise self._damaged()

    def _damaged(self) -> UnusableCalibration:
        return UnusableCalibration(f"{self._path} was changed or damaged after it was written: delete it and run again")


def _checksum(metadata: Mapping[str, str], row: int, content: Mapping[str, Tensor]) -> Tensor:
    """SHA-256 over what a unit says at one place, whose it is and where that is."""
    digest = hashlib.sha256(f"{metadata['run']} {metadata['prompt']} {row}\n".encode())
    for name, tensor in sorted(content.items()):
        digest.update(described(name, tensor))
        digest.update(raw(tensor))
    return torch.frombuffer(bytearray(digest.digest()), dtype=torch.uint8)


def _check_same(manifest: Path, run: Mapping[str, Any]) -> None:
    """Refuse the folder of another run, naming the first thing that differs."""
    try:
        found = json.loads(manifest.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise UnusableCalibration(f"{manifest} cannot be read: delete {manifest.parent}, or use another folder")
    for field in (*run, *(found.keys() - run.keys())):
        if found.get(field) != run.get(field):
            raise UnusableCalibration(
                f"{manifest.parent} holds the notes of a run with another {field}: delete it, or use another folder"
            )
