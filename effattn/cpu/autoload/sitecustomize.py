"""Begins the emulation of a GPU in every Python process that `effattn cpu` starts, at the end of `import torch`.

The command puts this folder first on PYTHONPATH, where Python looks for a module of this name when it starts. A process
that never imports torch is left alone, and a sitecustomize that stood here before us is imported as ever.
"""

import importlib.util
import os
import sys


class _AfterTorch:
    """Finds torch as the others do, and adds to its loading."""

    def find_spec(self, name, path=None, target=None):
        if name != "torch":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            load = spec.loader.exec_module

            def exec_module(module):
                load(module)
                try:
                    from effattn.cpu import checked_process, compat
                except ImportError as error:
                    raise ImportError(
                        f"`effattn cpu` started {sys.executable}, where effattn cannot be imported ({error}): "
                        "install effattn there, or name the Python of the environment that has it"
                    ) from error
                compat.activate_from_environment()
                checked_process.begin_from_environment()

            spec.loader.exec_module = exec_module
        return spec


def _begin():
    here = os.path.dirname(os.path.abspath(__file__))
    sys.path[:] = [entry for entry in sys.path if not entry or os.path.abspath(entry) != here]
    if "EFFATTN_CPU_AS_CUDA" in os.environ:
        sys.meta_path.insert(0, _AfterTorch())
    # The one that we stand before.
    ours = sys.modules.pop("sitecustomize", None)
    try:
        import sitecustomize  # noqa: F401
    except ModuleNotFoundError as error:
        if error.name != "sitecustomize":
            raise
        if ours is not None:
            sys.modules["sitecustomize"] = ours


_begin()
