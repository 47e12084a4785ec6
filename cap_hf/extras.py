"""Packages that only some of the work needs: one way to import them, and one line where they are missing."""

import importlib
import importlib.util
from types import ModuleType

from cap_hf.errors import CAPError, reason


def check(package: str, extra: str) -> None:
    """Raise the CAPError of `need` about a package that is not installed, without the seconds that an import takes."""
    root = package.partition(".")[0]
    if importlib.util.find_spec(root) is None:
        raise CAPError(f"{root} is not installed: pip install 'cap_hf[{extra}]'")


def need(package: str, extra: str) -> ModuleType:
    """Import a package that an extra of cap_hf installs; `package` may name a submodule.

    Raises:
        CAPError: the package is not installed, or does not go with the others that are.
    """
    check(package, extra)
    root = package.partition(".")[0]
    try:
        return importlib.import_module(package)
    except Exception as error:  # a library that is not there, a version of another package
        raise CAPError(
            f"{root} is installed and cannot be imported ({reason(error)}): pip install --upgrade 'cap_hf[{extra}]'"
        ) from error
