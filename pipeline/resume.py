"""Where a killed stage goes on: checkpoints of what a loop changes, kept while it runs.

They are safetensors files in the `resume` folder of an unfinished stage (stage.py removes it with
the stage's end), written so seldom that they cost a set share of the time (--resume-cost). At no
time are there more than two of a loop; a digest inside each tells a torn or altered one, which is
passed over. A loop that goes on from one must give the bytes of an undisturbed one: whatever else
decides a step, such as its rows and its random bits, has to be a function of the step alone.
"""

import hashlib
import json
import os
import time
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from model import save_tensors, tensor_bytes

RESUME = "resume"  # folder in an unfinished stage that holds them; not part of the result
DISK_RATE = 5e8  # bytes digested and written in a second, until the first checkpoint is timed


class Checkpoints:
    """Of one loop: `tensors`, which it changes in place, and the lengths of the stage's logs
    (*.jsonl). folder: the unfinished stage's. cost: share of the time they may take."""

    def __init__(self, folder: Path, title: str, tensors: dict[str, Tensor], cost: float):
        self.folder, self.tensors, self.share = folder, tensors, cost
        self.title, self.name = title, title.replace(" ", "-")
        self.newest = None  # path of the newest good one
        self.cost = sum(t.nbytes for t in tensors.values()) / DISK_RATE  # seconds for one
        self.since = time.monotonic()  # end of the last one

    def restore(self) -> int:
        """How many steps the newest good checkpoint holds, 0 without one; tensors and logs are
        then as they were after these."""
        about = dict(step=0, logs={})
        for path in sorted(self._files(), reverse=True):
            if found := self._read(path):
                about, self.newest = found, path
                print(f"{self.title} goes on after step {about['step']}", flush=True)
                break
        for log in self.folder.glob("*.jsonl"):
            if log.name in about["logs"]:
                os.truncate(log, about["logs"][log.name])
            else:
                log.unlink()
        return about["step"]

    def keep(self, step: int):
        """Write a checkpoint of a finished step if it is time for one."""
        start = time.monotonic()
        if not self.share or (start - self.since) * self.share < self.cost * (1 - self.share):
            return
        for path in self._files():
            if path != self.newest:  # that one stays until the new one is whole
                path.unlink()
        logs = sorted(self.folder.glob("*.jsonl"))
        for log in logs:
            with open(log, "rb") as file:
                os.fsync(file.fileno())  # it must not be shorter than the checkpoint says
        about = json.dumps(dict(step=step, logs={log.name: log.stat().st_size for log in logs}))
        path = self.folder / RESUME / f"{self.name}-{step:09}.safetensors"
        try:
            save_tensors(path, self.tensors, dict(about=about, sha256=_digest(about, self.tensors)))
        except OSError as e:  # the stage itself may need no more room, so it goes on
            self.share = 0
            return print(f"no more checkpoints: {path}: {e.strerror}", flush=True)
        self.newest, self.since = path, time.monotonic()
        self.cost = self.since - start

    def _files(self) -> list[Path]:
        return list((self.folder / RESUME).glob(f"{self.name}-*.safetensors*"))

    def _read(self, path: Path) -> dict | None:
        """Fill the tensors; None, and they are untouched, if the file is not whole and ours."""
        try:
            with safe_open(path, framework="pt") as file:
                kept = {name: file.get_tensor(name) for name in file.keys()}  # mapped, not read
                about, digest = (file.metadata()[key] for key in ("about", "sha256"))
        except (OSError, SafetensorError, KeyError, TypeError):
            return None
        forms = ({k: (t.dtype, t.shape) for k, t in x.items()} for x in (kept, self.tensors))
        if next(forms) != next(forms) or _digest(about, kept) != digest:
            return None
        about = json.loads(about)
        if any(not (log := self.folder / name).is_file() or log.stat().st_size < size
               for name, size in about["logs"].items()):
            return None
        for name, tensor in self.tensors.items():
            tensor.copy_(kept[name])
        return about


def _digest(about: str, tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256(about.encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().to("cpu").contiguous()
        digest.update(name.encode())
        digest.update(tensor_bytes(tensor))
    return digest.hexdigest()
