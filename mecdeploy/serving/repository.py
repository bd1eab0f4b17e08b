"""Where models come from, and which version of each is served now."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from mecdeploy.errors import UserError
from mecdeploy.serving.models import ServedModel

FILE = "model.onnx"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Stamp:
    """One state of a file on disk: what differs once its content may differ."""

    path: Path
    version: str | None
    modified: int
    size: int
    inode: int


@dataclass(frozen=True, kw_only=True)
class Source:
    """A name and what is served under it: a file, or a folder of versions, <number>/model.onnx."""

    name: str
    path: Path

    def newest(self) -> Stamp | None:
        """The file of the highest version as it is now; None if there is none."""
        try:
            files = {None: self.path} if not self.path.is_dir() else _versions(self.path)
            version, path = max(files.items(), key=lambda entry: int(entry[0] or 0))
            state = path.stat()
        except (ValueError, OSError):
            return None
        return Stamp(path=path, version=version, modified=state.st_mtime_ns, size=state.st_size, inode=state.st_ino)


def find_sources(models: Iterable[str]) -> list[Source]:
    """What NAME=PATH or PATH stand for. Raises UserError for a path without a model, and for a name given twice.

    A path is a model file, a run folder with its model.onnx, a folder of versions (<number>/model.onnx), or a folder of
    such folders. Without NAME, the file's own name is taken, or its folder's if that is model.onnx.
    """
    sources: dict[str, Source] = {}
    for model in models:
        for source in _sources(model):
            if not _NAME.fullmatch(source.name):
                raise UserError(
                    f"{source.path}: a model cannot be called {source.name!r} (letters, digits, '.', '_' and '-'); "
                    "give it a name, as in NAME=PATH."
                )
            if source.name in sources:
                raise UserError(
                    f"{source.path} and {sources[source.name].path} would both be served as {source.name!r}; give one "
                    "another name, as in NAME=PATH."
                )
            sources[source.name] = source
    return list(sources.values())


def _sources(model: str) -> list[Source]:
    name, separator, rest = model.partition("=")
    named = bool(separator) and "/" not in name
    path = Path(rest if named else model)
    if path.is_file():
        stem = path.stem if path.name != FILE else path.absolute().parent.name
        return [Source(name=name if named else stem, path=path)]
    if (path / FILE).is_file():
        return [Source(name=name if named else path.absolute().name, path=path / FILE)]
    if _versions(path):
        return [Source(name=name if named else path.absolute().name, path=path)]
    folders = [folder for folder in sorted(path.iterdir()) if _versions(folder)] if path.is_dir() else []
    if folders and named:
        raise UserError(f"{path} holds {len(folders)} models, with names of their own; leave out {name}=.")
    if folders:
        return [Source(name=folder.name, path=folder) for folder in folders]
    if path.is_dir():
        raise UserError(f"{path} holds neither {FILE}, nor <number>/{FILE}, nor folders of that kind.")
    raise UserError(f"{path}: no such model file; write one with `mecdeploy export`.")


def _versions(folder: Path) -> dict[str, Path]:
    """Version -> its file, of a model's folder in Triton's layout; empty for anything else."""
    if not folder.is_dir():
        return {}
    found = {child.name: child / FILE for child in folder.iterdir() if re.fullmatch(r"[1-9][0-9]{0,17}", child.name)}
    return {version: file for version, file in found.items() if file.is_file()}


class Slot:
    """A name and the version that it stands for now. Another one takes its place in one assignment."""

    def __init__(self, source: Source, threads: int, report: Callable[[str], None]) -> None:
        """Load the newest version; raises UserError if there is none that can be served. report: "loaded", "failed"."""
        self.source, self._threads, self._report = source, threads, report
        stamp = source.newest()
        if stamp is None:
            raise UserError(f"{source.path}: no such model file; write one with `mecdeploy export`.")
        self.model = self._load(stamp)
        self._loaded = self._seen = stamp
        self._failed: Stamp | None = None

    def look(self) -> ServedModel | None:
        """Another version, loaded and run once, if there is one on disk; the present one is untouched.

        A file is loaded once it is the same at two looks, for it may still be being written. One that cannot be served
        is reported and left alone until it changes.
        """
        stamp = self.source.newest()
        if stamp is None or stamp in (self._loaded, self._failed):
            return None
        if stamp != self._seen:
            self._seen = stamp
            return None
        try:
            model = self._load(stamp)
        except Exception as error:  # whatever it is, the old version goes on
            self._failed = stamp
            self._report("failed")
            log.error("model %s: %s; version %s goes on", self.source.name, error, self.model.version)
            return None
        if self.source.newest() != stamp:
            return None
        self._loaded, self._failed = stamp, None
        self._report("loaded")
        return model

    def _load(self, stamp: Stamp) -> ServedModel:
        return ServedModel(stamp.path, name=self.source.name, version=stamp.version, threads=self._threads)


async def watch(slots: Iterable[Slot], seconds: float, switch: Callable[[Slot, ServedModel], None]) -> None:
    """Look for new versions until cancelled; `switch` puts one in its place."""
    while True:
        await asyncio.sleep(seconds)
        for slot in slots:
            model = await asyncio.to_thread(slot.look)
            if model is not None:
                log.info("model %s: version %s takes the place of %s", model.name, model.version, slot.model.version)
                switch(slot, model)
