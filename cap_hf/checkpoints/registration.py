"""Makes transformers know compressed checkpoints, without importing transformers before somebody else does.

`import cap_hf` calls `register`. Where transformers' models are loaded already, the plug-in (`quantizer.py`) is
imported on the spot. Where they are not, a finder at the front of `sys.meta_path` waits for
`transformers.modeling_utils`, without which no `from_pretrained` of a model runs, and imports the plug-in as soon as
that module has been executed. So `import cap_hf` costs next to nothing, and either order of the two imports works.
"""

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

AWAITED = "transformers.modeling_utils"
PLUGIN = "cap_hf.checkpoints.quantizer"


class Follower(Loader):
    """Loads a module as its own loader does, and then the plug-in."""

    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        # From here on the module is its own loader's: what asks it for source or data finds what it would have found.
        module.__loader__ = self.loader
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        self.loader.exec_module(module)
        importlib.import_module(PLUGIN)


class Registration(MetaPathFinder):
    """Finds `transformers.modeling_utils` where the other finders find it, and has the plug-in follow it."""

    def __init__(self) -> None:
        self.searching = False

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != AWAITED or self.searching:
            return None
        # Python holds the module's lock here, so no other thread searches for it.
        self.searching = True
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self.searching = False
        if spec is not None and spec.loader is not None:
            spec.loader = Follower(spec.loader)
        return spec


def register() -> None:
    """Import the plug-in once transformers' models are there: now, or when they come."""
    if AWAITED in sys.modules:
        importlib.import_module(PLUGIN)
    elif not any(isinstance(finder, Registration) for finder in sys.meta_path):
        sys.meta_path.insert(0, Registration())
