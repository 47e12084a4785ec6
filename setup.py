"""Compile the C++ kernels into a wheel where that can be done; all else is in setup.cfg.

Without PyTorch and GCC in the environment that builds, as in pip's own, the wheel is one of Python alone, whose kernels
are compiled at the first use. CAP_HF_BUILD_KERNELS=1 makes that an error, 0 leaves the kernels out.
"""

import os
import shutil
import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

sys.path.insert(0, str(Path(__file__).parent))
from cap_hf.kernels import libraries

VARIABLE = "CAP_HF_BUILD_KERNELS"


class BuildWithKernels(build_py):
    """Copies the libraries that `WheelWithKernels` has compiled; an editable install never comes here with any."""

    def run(self) -> None:
        # What an earlier build has left there: libraries, and modules that are gone since.
        shutil.rmtree(Path(self.build_lib) / "cap_hf", ignore_errors=True)
        super().run()
        folder = Path(self.build_lib) / "cap_hf" / "kernels" / libraries.FOLDER.name
        for library in getattr(self.distribution, "kernels", []):
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copy(library, folder)


class WheelWithKernels(bdist_wheel):
    """Compiles the libraries first: with them the wheel is for one platform, and still for every Python."""

    def run(self) -> None:
        wanted = os.environ.get(VARIABLE, "")
        folder = Path(self.get_finalized_command("build").build_base) / "kernels"
        folder.mkdir(parents=True, exist_ok=True)
        self.distribution.kernels = []
        if wanted != "0":
            try:
                self.distribution.kernels = libraries.compile_all(folder)
            except libraries.ObstacleError as obstacle:
                if wanted:
                    raise SystemExit(f"The kernels cannot be compiled, as {VARIABLE} asks: {obstacle}") from None
                print(f"The wheel has no compiled kernels, they are compiled at the first use: {obstacle}")
        if self.distribution.kernels:
            # What setuptools asks before it takes a wheel for one platform.
            self.root_is_pure = False
            self.distribution.has_ext_modules = lambda: True
        super().run()

    def get_tag(self) -> tuple[str, str, str]:
        # The libraries know nothing of Python.
        return ("py3", "none", super().get_tag()[2])


setup(cmdclass={"bdist_wheel": WheelWithKernels, "build_py": BuildWithKernels})
