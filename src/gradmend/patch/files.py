"""Files: what `mend --patch` and `--write` read and write, and what they leave alone."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from gradmend.errors import TargetError
from gradmend.patch import Patch, patched
from gradmend.patch.proof import gives
from gradmend.setup import Batch, Setup
from gradmend.treatment import Treatment


@dataclass(frozen=True)
class Order:
    """A patch that was asked for.

    Args:
        file: to be patched.
        name: of the target in it.
        data: the bytes of the file before mending.
        out: where the diff goes; None writes none.
        write: changes the file itself.
    """

    file: str
    name: str
    data: bytes
    out: Path | None
    write: bool

    def fill(
        self, setup: Setup, treatment: Treatment, batch: Batch, typed: Sequence[str] = (), seed: int = 0
    ) -> list[str]:
        """Write the patch of a treatment; returns what was written and what is left, in lines.

        Args:
            setup: as the file makes it.
            treatment: of this setup.
            batch: to prove the patch on.
            typed: the parts of the setup that are not from the file.
            seed: with which the setup was made.

        Raises:
            TargetError: if the file has changed since, or the diff cannot be written.
        """
        if not treatment.changes:
            return ["No patch: nothing was changed."]

        def check(after: bytes, name: str) -> bool:
            return gives(after, self.file, name, treatment.setup, batch, seed)

        patch = patched(self.data, self.file, self.name, setup, treatment, typed, check)
        lines = ["", str(patch)]
        if patch.after == patch.before:
            return [*lines, "No patch: nothing of it can be written into the source."]
        lines += self._diff(patch) + self._file(patch)
        return lines + ([f"The target is {self.file}:{patch.name} then."] if patch.name != self.name else [])

    def _diff(self, patch: Patch) -> list[str]:
        if self.out is None:
            return []
        try:
            with self.out.open("xb") as stream:
                stream.write(patch.diff())
        except OSError as error:
            raise TargetError(f"The diff cannot be written: {error}") from error
        apply = [] if self.write else [f"To apply it: patch {_quoted(self.file)} {_quoted(str(self.out))}"]
        return [f"Wrote {self.out}.", *apply]

    def _file(self, patch: Patch) -> list[str]:
        if not self.write:
            return []
        path = Path(self.file)
        if path.read_bytes() != self.data:
            raise TargetError(
                f"{self.file} has changed since it was read, and stays as it is. Mend it again."
            )
        backup = keep(path)
        path.write_bytes(patch.after)
        return [f"Changed {self.file}; as it was before: {backup}."]


def order(target: str, out: Path | None, write: bool) -> Order:
    """Read the file of a target, and check that what is asked for can be written.

    Raises:
        TargetError: for a target that is no file, or a diff that exists.
    """
    file, colon, name = target.rpartition(":")
    if not colon or Path(file).suffix != ".py" or not Path(file).is_file():
        raise TargetError(
            f"{target!r} is no FILE.py:NAME, so there is no source to patch. Leave out --patch."
        )
    if out is not None and (out.exists() or not out.absolute().parent.is_dir()):
        why = "exists already" if out.exists() else "lies in no folder that exists"
        raise TargetError(f"{out} {why}. Give --patch another name, such as {_free(out).name}.")
    return Order(file, name, Path(file).read_bytes(), out, write)


def keep(path: Path) -> Path:
    """Copy a file to `file.bak`, or `.bak1`, `.bak2`, ..., whichever is free; returns where."""
    for number in count():
        backup = path.with_name(f"{path.name}.bak{number or ''}")
        try:
            backup.open("xb").close()
        except FileExistsError:
            continue
        return Path(shutil.copy2(path, backup))
    raise AssertionError


def _free(path: Path) -> Path:
    names = (path.with_name(f"{path.stem}{number}{path.suffix}") for number in count(2))
    return next(name for name in names if not name.exists())


def _quoted(name: str) -> str:
    return f'"{name}"' if " " in name else name
