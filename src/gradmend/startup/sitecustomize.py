"""Python runs this when `gradmend run` has started it: the script is watched from its import of torch on.

The interpreter itself runs the script, so that its arguments, paths, tracebacks and exit code are its own.
What brought us here is taken away first: the script and its child processes see the environment as it was.
"""

from __future__ import annotations

import importlib
import os
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any


class _Torch(MetaPathFinder):
    """Finds torch as everyone does, and tells us when it has been imported."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        """Once, for torch."""
        if name != "torch":
            return None
        sys.meta_path.remove(self)
        spec = find_spec(name)
        loader: Any = None if spec is None else spec.loader
        if loader is not None:
            original = loader.exec_module

            def exec_module(module: ModuleType) -> None:
                del loader.exec_module
                original(module)
                _attach()

            loader.exec_module = exec_module
        return spec


def _attach() -> None:
    try:
        importlib.import_module("gradmend.attach").attach(_journal, _command, _treat, _report, _lang)
    except Exception as error:
        sys.stderr.write(f"gradmend: cannot watch this training: {type(error).__name__}: {error}\n")


def _restore_environment(original: str) -> None:
    if original:
        os.environ["PYTHONPATH"] = original
    else:
        del os.environ["PYTHONPATH"]
    here = os.path.dirname(os.path.abspath(__file__))
    sys.path[:] = [path for path in sys.path if path != here]


def _give_way() -> None:
    """Run the `sitecustomize` that Python would have run without us."""
    ours = sys.modules.pop(__name__)
    try:
        importlib.import_module(__name__)
    except ModuleNotFoundError:
        sys.modules[__name__] = ours


if "GRADMEND_COMMAND" in os.environ:
    _command, _journal = os.environ.pop("GRADMEND_COMMAND"), os.environ.pop("GRADMEND_JOURNAL")
    _treat = bool(os.environ.pop("GRADMEND_TREAT"))
    _report, _lang = os.environ.pop("GRADMEND_REPORT"), os.environ.pop("GRADMEND_LANG")
    _restore_environment(os.environ.pop("GRADMEND_PYTHONPATH"))
    sys.meta_path.insert(0, _Torch())
    _give_way()
