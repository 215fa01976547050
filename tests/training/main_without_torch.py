"""`python -m jaxalign.main` without PyTorch, which TensorBoard's writer would import: longer than a whole tiny run."""

import runpy
import sys


class NoTorch:
    """The first to be asked where a module is."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        if name == "torch":
            raise ModuleNotFoundError(name)


if __name__ == "__main__":
    sys.meta_path.insert(0, NoTorch)
    runpy.run_module("jaxalign.main", run_name="__main__")
