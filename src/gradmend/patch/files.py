"""Files: what `mend --patch` and `--write` read and write, and what they leave alone."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from shlex import quote

from gradmend.errors import TargetError
from gradmend.patch import UNPROVED, Patch, patched
from gradmend.patch.proof import gives
from gradmend.patch.source import Source
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

        given = (self.data, self.file, self.name, setup, treatment, typed)
        patch = patched(*given, check)
        if UNPROVED in patch.left and not gives(self.data, self.file, self.name, setup, batch, seed):
            unlike = "no proof: the file makes another model each time it runs"
            patch = patched(*given)
            patch = replace(patch, left=(*patch.left, unlike))
        lines = ["", str(patch)]
        if patch.after == patch.before:
            return [*lines, "No patch: nothing of it can be written into the source."]
        lines += self._diff(patch) + self._file(patch)
        return lines + ([f"The target is {self.file}:{patch.name} then."] if patch.name != self.name else [])

    def _diff(self, patch: Patch) -> list[str]:
        if self.out is None:
            return []
        with _system_errors("The diff cannot be written"), self.out.open("xb") as stream:
            stream.write(patch.diff())
        apply = [] if self.write else [f"To apply it: patch {quote(self.file)} {quote(str(self.out))}"]
        return [f"Wrote {self.out}.", *apply]

    def _file(self, patch: Patch) -> list[str]:
        if not self.write:
            return []
        path = Path(self.file)
        with _system_errors(f"{self.file} cannot be changed"):
            if path.read_bytes() != self.data:
                raise TargetError(f"{self.file} has changed since, and stays as it is now. Mend it again.")
            backup = keep(path)
            path.write_bytes(patch.after)
        return [f"Changed {self.file}; as it was before: {backup}."]


@contextlib.contextmanager
def _system_errors(what: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise TargetError(f"{what}: {error}") from error


def order(target: str, out: Path | None, write: bool) -> Order:
    """Read the file of a target, and check that what is asked for can be written.

    Raises:
        TargetError: for a target that is no file, or a diff that exists.
    """
    file, _, name = target.rpartition(":")
    if Path(file).suffix != ".py":
        raise TargetError(
            f"{target!r} has no source to patch: that takes FILE.py:NAME. Leave out the option."
        )
    if out is not None and (out.exists() or not out.absolute().parent.is_dir()):
        why = "exists already" if out.exists() else "lies in no folder that exists"
        raise TargetError(f"{out} {why}. Type another name, such as --patch {_free(out).name}")
    data = Path(file).read_bytes() if Path(file).is_file() else b""
    with contextlib.suppress(SyntaxError, ValueError):  # Python's own message says more
        compile(data, file, "exec", dont_inherit=True)
        Source(data, file)
    return Order(file, name, data, out, write)


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
