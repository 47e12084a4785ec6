"""The picture in docs/architecture.md: which room of the package imports from which."""

import ast
from collections import defaultdict
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "cap_hf"
# The house, from the top floor down; rooms of one floor stand beside each other and know nothing of one another.
FLOORS: tuple[tuple[str, ...], ...] = (
    ("commands",),
    ("pages",),
    ("hub", "recovery", "stepwise", "tracking"),
    ("compressor",),
    ("collection",),
    ("method",),
    ("inference",),
    ("checkpoints",),
    ("data",),
    ("distributed",),
    ("masks",),
    ("targets", "kernels", "memory"),
    ("models", "towers"),
    ("budget", "config", "report", "extras", "outputs", "failures", "unmasking", "notices"),
    ("patterns",),
    ("errors",),
)
ROOMS = [room for floor in FLOORS for room in floor]


def modules() -> dict[str, Path]:
    """Return the path of every module of the package, by its dotted name; `__init__` files are left out."""
    paths = sorted(path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py")
    return {".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts): path for path in paths}


def imports(path: Path) -> set[str]:
    """Return every module that a file imports, anywhere in it: `from a import b` counts as `a.b`."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                raise ValueError(f"{path}:{node.lineno}: imports in this package name the whole module")
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def room_of(module: str) -> str | None:
    """Return the room that a dotted name lies in; `cap_hf` for what the package itself gives out, None for others."""
    package, _, rest = module.partition(".")
    if package != PACKAGE.name:
        return None
    room = rest.split(".")[0]
    exists = (PACKAGE / room).is_dir() or (PACKAGE / f"{room}.py").is_file()
    return room if room and exists else package


def edges() -> dict[tuple[str, str], set[str]]:
    """Return the imports between rooms: `(from, to)` -> the modules that do so."""
    found = defaultdict(set)
    for module, path in modules().items():
        own = room_of(module)
        for imported in imports(path):
            other = room_of(imported)
            if other is not None and other != own:
                found[own, other].add(module)
    return dict(found)


def render() -> str:
    """Return a table: each room, from the top floor down, with the rooms that it imports from."""
    found = edges()
    lines = ["| room | imports from |", "| --- | --- |"]
    present = {room_of(module) for module in modules()}
    for room in (room for room in ROOMS if room in present):
        lower = [f"`{other}`" for other in ROOMS if (room, other) in found]
        lines.append(f"| `{room}` | {', '.join(lower) or 'none'} |")
    return "\n".join(lines)
