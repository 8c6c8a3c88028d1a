"""The folder of a long synthesis, which is whole at every moment, so that whatever stops the work costs the parts in progress only.

* ``job.json``: all that decides the images.
* ``parts/part-00007.safetensors``: the impressions of part 7.
* ``state/stream-003-00011.safetensors``: what the synthesizer of stream 3 knew when part 11 was its next; the last two are kept.

A file appears whole or not at all, a part before the state after it. Where the second is missing, the part is mined again, from the
state before, and comes out the same.
"""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from fedimpr.errors import ConfigError
from fedimpr.impressions import Impressions
from fedimpr.synthesis.streams import Job
from sim.config import flat
from sim.results import replace_file

KEPT = 2  # states of a stream: a damaged last one must not cost the whole stream


class PartsFolder:
    """The files of one job.

    Args:
        path: of the folder; it need not be there yet.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @contextmanager
    def held(self, facts: Mapping[str, object]) -> Iterator[None]:
        """Own the folder for the length of a block, to mine what ``facts`` says, all that decides the images.

        Raises:
            ConfigError: the folder cannot be made, is owned by another process, or belongs to another job; then the differing keys are
                named.
        """
        try:
            for folder in ("parts", "state"):
                (self.path / folder).mkdir(parents=True, exist_ok=True)
            lock = (self.path / "lock").open("w")
        except OSError as error:
            raise ConfigError("output", str(self.path), f"a folder that can be written to ({error.strerror})") from error
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # goes with the process, however that ends
            except BlockingIOError as error:
                raise ConfigError("output", str(self.path), "a folder that no other process is mining into") from error
            self._claim(facts)
            yield

    def _claim(self, facts: Mapping[str, object]) -> None:
        path = self.path / "job.json"
        if path.exists():
            try:
                before, now = flat(json.loads(path.read_bytes())), flat(json.loads(json.dumps(facts)))
            except (OSError, ValueError) as error:
                raise ConfigError("output", str(self.path), f"a folder with a readable job.json ({error})") from error
            keys = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
            if keys:
                difference = "; ".join(f"{key}: {before.get(key)!r} then, {now.get(key)!r} now" for key in keys)
                raise ConfigError("output", str(self.path), f"a new folder, or one of the same job; this one differs in {difference}")
        elif any((self.path / "parts").iterdir()):
            raise ConfigError("output", str(self.path), "a new folder, or one of the same job; this one has parts and no job.json")
        else:
            replace_file(path, (json.dumps(facts, indent=1) + "\n").encode())

    def missing(self, job: Job, stream: int) -> list[int]:
        """The parts of a stream that are not there, or damaged."""
        return [part for part in job.parts_of(stream) if not _whole(self._part(part))]

    def before(self, stream: int, part: int) -> tuple[int, dict[str, Tensor]]:
        """The newest whole state of a stream that is not past ``part``: the part that it is the state before, and the state.

        Without one it is the stream's first part, and no state. States past it are removed: the stream is mined again from there.
        """
        states = self._states(stream)
        for following in sorted(states, reverse=True):
            path = states[following]
            if following <= part and _whole(path):
                return following, load_file(path)
            path.unlink()
        return stream, {}

    def write(self, part: int, made: Impressions, seconds: float, state: Mapping[str, Tensor], job: Job) -> None:
        """Keep a part, then the state that its stream's next part starts from.

        Args:
            part: its number.
            made: its impressions.
            seconds: that mining it took.
            state: of the synthesizer after it.
            job: that it belongs to.

        Raises:
            FedimprError: a file cannot be written.
        """
        tensors = {"images": made.images, "targets": made.targets, "labels": made.labels}
        replace_file(self._part(part), _file(tensors, teacher_passes=made.teacher_passes, note=made.note, seconds=seconds))
        stream = part % job.streams
        following = part + job.streams
        replace_file(self.path / "state" / f"stream-{stream:03d}-{following:05d}.safetensors", _file(state))
        states = self._states(stream)
        for old in sorted(states)[:-KEPT]:
            states[old].unlink()

    def read(self, part: int) -> tuple[Impressions, float]:
        """A part, on the CPU, and the seconds that mining it took."""
        with safe_open(str(self._part(part)), framework="pt") as file:
            notes = file.metadata()
            images, targets, labels = (file.get_tensor(name) for name in ("images", "targets", "labels"))
        return Impressions(images, targets, labels, int(notes["teacher_passes"]), notes["note"]), float(notes["seconds"])

    def _part(self, part: int) -> Path:
        return self.path / "parts" / f"part-{part:05d}.safetensors"

    def _states(self, stream: int) -> dict[int, Path]:
        """The states of a stream by the part that follows."""
        found = (self.path / "state").glob(f"stream-{stream:03d}-*.safetensors")
        return {int(path.stem.rpartition("-")[2]): path for path in found}


def _whole(path: Path) -> bool:
    """Whether the file is there in its full length."""
    try:
        with safe_open(str(path), framework="pt"):
            return True
    except (SafetensorError, OSError):
        return False


def _file(tensors: Mapping[str, Tensor], **notes: object) -> bytes:
    # Clones, because safetensors refuses tensors that share memory.
    plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    return save(plain, {key: str(value) for key, value in notes.items()})
