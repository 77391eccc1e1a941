"""The rules of the house: functions from sources, {path in the repository: text}, to one line for each violation."""

from __future__ import annotations

import ast
import re
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping
from functools import cached_property
from itertools import chain
from pathlib import PurePosixPath
from typing import NamedTuple

PACKAGE = "iisan_fast"
INSTALLED_INSIDE = ("kernels", "cli", "benchmarks")  # top-level folders that are imported as iisan_fast.kernels, …
NEIGHBOURS = frozenset(
    (
        *(
            "checksums",
            "config",
            "devices",
            "doors",
            "errors",
            "files",
            "fingerprints",
            "precision",
            "printable",
            "progress",
            "recorded_json",
            "runtime",
        ),
        *(
            "intervals",
            "launcher",
            "setting_fields",
            "setting_sources",
            "settings_files",
            "stop_signals",
            "trusted_code",
            "verified",
            "workers",
        ),
    )
)
FLOORS = (  # from the lowest up; a room imports only from lower floors
    NEIGHBOURS,
    frozenset(("ranks",)),
    frozenset(("data",)),
    frozenset(("encoders",)),
    frozenset(("states", "captioning")),
    frozenset(("evaluation", "models")),
    frozenset(("training",)),
    frozenset(("state_sources",)),
    frozenset(("settings",)),
    frozenset(("demo",)),
    frozenset(("api",)),
    frozenset(("serving",)),
    frozenset(("benchmarks",)),
    frozenset(("cli",)),
)
WITH_DOORS = frozenset(
    (
        "config",
        "ranks",
        "data",
        "encoders",
        "states",
        "captioning",
        "evaluation",
        "models",
        "training",
        "serving",
        "kernels",
    )
)
LIBRARIES = {  # library: the rooms and modules that may import it
    "transformers": frozenset(("encoders", "captioning", "iisan_fast.models.tuned_encoder")),
    "lmdb": frozenset(("data", "states")),
    "click": frozenset(("cli",)),
}
# platformdirs names the user's cache folder, where the compiled C++ is kept; it is small and imports nothing else.
KERNEL_LIBRARIES = frozenset(("torch", "triton", "numpy", "platformdirs")) | sys.stdlib_module_names
FORMS = ("iisan_fast.kernels.reference", "iisan_fast.kernels.gpu", "iisan_fast.kernels.cpu")  # one file name an op
FILES_MAY_REPEAT = frozenset(("benchmarks", "cli"))  # their files are named after the rooms that they measure and call

Sources = Mapping[str, str]


class Import(NamedTuple):
    """One imported name, or a whole module (name None)."""

    path: str
    line: int
    importer: str
    module: str
    name: str | None
    bound: str  # the name that the import binds
    for_types: bool  # True under `if TYPE_CHECKING:`


class Tree:
    """Parsed sources."""

    def __init__(self, sources: Sources) -> None:
        self.sources = sources
        self.trees = {path: ast.parse(text, path) for path, text in sources.items()}
        self.modules = {path: module_of(path) for path in sources}
        self.paths = {module: path for path, module in self.modules.items()}
        self._exports: dict[str | None, list[str]] = {}

    @cached_property
    def imports(self) -> list[Import]:
        """Return all imports, also those inside functions and under TYPE_CHECKING."""
        return list(self._imports())

    def exports(self, module: str) -> list[str]:
        """Return the names in `__all__` of a module, in its order."""
        path = self.paths.get(module)
        if path not in self._exports:
            self._exports[path] = _all(self.trees[path]) if path else []
        return self._exports[path]

    def doors(self) -> list[tuple[str, str]]:
        """Return (path, module) of every package with an `__all__`."""
        return [
            (path, module)
            for path, module in self.modules.items()
            if path.endswith("/__init__.py") and self.exports(module)
        ]

    def _imports(self) -> Iterator[Import]:
        for path, tree in self.trees.items():
            for_types = _nodes_for_types(tree)
            for node in ast.walk(tree):
                if isinstance(node, ast.Import):
                    for alias in node.names:
                        bound = alias.asname or alias.name.partition(".")[0]
                        yield Import(path, node.lineno, self.modules[path], alias.name, None, bound, node in for_types)
                elif isinstance(node, ast.ImportFrom):
                    yield from self._from(path, node, node in for_types)

    def _from(self, path: str, node: ast.ImportFrom, for_types: bool) -> Iterator[Import]:
        importer = self.modules[path]
        source = node.module or ""
        if node.level:
            drop = node.level - path.endswith("/__init__.py")
            package = importer.split(".")[: len(importer.split(".")) - drop]
            source = ".".join([*package, *([source] if source else [])])
        for alias in node.names:
            whole = f"{source}.{alias.name}" in self.paths and alias.name not in self.exports(source)
            target = (f"{source}.{alias.name}", None) if whole else (source, alias.name)
            yield Import(path, node.lineno, importer, *target, alias.asname or alias.name, for_types)


def violations(sources: Sources) -> list[str]:
    """Return all violations of all rules."""
    tree = Tree(sources)
    return [line for rule in RULES for line in rule(tree)]


def arrows_up(tree: Tree) -> list[str]:
    """Return the imports of a room from its own floor or a higher one, and those of the kernels from any room."""
    lines = []
    for entry in tree.imports:
        importer, target = room_of(entry.importer), room_of(entry.module)
        if target in (None, importer, "kernels") or (target, entry.name) == ("api", "__version__"):
            continue
        if entry.importer == PACKAGE and target == "serving":  # the package's door, above the module api
            continue
        if importer == "kernels":
            lines.append(f"{entry.path}:{entry.line}: kernels import no room, found {target}")
            continue
        unplaced = [room for room in (importer, target) if floor_of(room) is None]
        if unplaced:
            lines.append(
                f"{entry.path}:{entry.line}: {unplaced[0]} has no floor; give it one in tests/helpers/house.py"
            )
        elif not (importer in NEIGHBOURS and target in NEIGHBOURS) and floor_of(target) >= floor_of(importer):
            lines.append(f"{entry.path}:{entry.line}: {importer} imports {target}, which is not below it")
    return lines


def reaches_past_doors(tree: Tree) -> list[str]:
    """Return the uses of another room's modules, or of names that its door does not export."""
    lines = []
    whole_rooms = defaultdict(dict)
    for entry in tree.imports:
        room = room_of(entry.module)
        if room not in WITH_DOORS or room == room_of(entry.importer):
            continue
        where = f"{entry.path}:{entry.line}"
        if entry.module != f"{PACKAGE}.{room}":
            lines.append(f"{where}: reaches past the door of {room}: {entry.module}")
        elif entry.name is None:
            whole_rooms[entry.path][entry.bound] = room
        elif entry.name not in tree.exports(f"{PACKAGE}.{room}"):
            lines.append(f"{where}: the door of {room} does not export {entry.name}")
    for path, rooms in whole_rooms.items():
        for node in ast.walk(tree.trees[path]):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in rooms:
                room = rooms[node.value.id]
                if node.attr not in tree.exports(f"{PACKAGE}.{room}"):
                    lines.append(f"{path}:{node.lineno}: the door of {room} does not export {node.attr}")
    return lines + _modules_in_strings(tree)


def exports_without_use(tree: Tree) -> list[str]:
    """Return the exports of rooms' doors that nothing outside the room uses."""
    used = set()
    for entry in tree.imports:
        room = room_of(entry.module)
        if room == room_of(entry.importer):
            continue
        used.add((room, entry.name))
        if entry.name is None:
            used |= {(room, name) for name in _attributes(tree.trees[entry.path], entry.bound)}
    return [
        f"{tree.paths[f'{PACKAGE}.{room}']}:1: nothing outside {room} uses {name}"
        for room in sorted(WITH_DOORS)
        for name in tree.exports(f"{PACKAGE}.{room}")
        if (room, name) not in used
    ]


def modules_named_like_exports(tree: Tree) -> list[str]:
    """Return the modules that bear the name of something that their package's door exports."""
    lines = []
    for _, module in tree.doors():
        for name in tree.exports(module):
            if f"{module}.{name}" in tree.paths:
                lines.append(f"{tree.paths[f'{module}.{name}']}:1: bears the name of an export of {module}")
    return lines


def doors_that_disagree(tree: Tree) -> list[str]:
    """Return the lazy doors whose `__all__` and imports under TYPE_CHECKING name different things."""
    lines = []
    for path, module in tree.doors():
        if "lazy_names(" not in tree.sources[path]:
            continue
        exported = tree.exports(module)
        homes = {entry.name: entry for entry in tree.imports if entry.path == path and entry.for_types}
        defined = {name for name in exported if _defines(tree, module, name)}
        differing = sorted({*exported} ^ {*homes, *defined})
        lines += [f"{path}:1: {name} is imported or exported, but not both" for name in differing]
        if len({*exported}) < len(exported):
            lines.append(f"{path}:1: __all__ names something twice")
        for name, entry in homes.items():
            if not _defines(tree, entry.module, name) and name not in tree.exports(entry.module):
                lines.append(f"{path}:{entry.line}: {entry.module} defines no {name}")
    return lines


def libraries_out_of_place(tree: Tree) -> list[str]:
    """Return the imports of a library by rooms that may not import it."""
    lines = []
    for entry in tree.imports:
        library = entry.module.partition(".")[0]
        room = room_of(entry.importer)
        where = f"{entry.path}:{entry.line}"
        if library == PACKAGE:
            continue
        if room == "kernels" and library not in KERNEL_LIBRARIES:
            lines.append(f"{where}: kernels import torch, triton, numpy and platformdirs alone, found {library}")
        if library in LIBRARIES and not LIBRARIES[library] & {room, entry.importer}:
            lines.append(f"{where}: {library} is not for {room or entry.importer}")
    return lines


def repeated_names(tree: Tree) -> list[str]:
    """Return the public classes and the files of rooms that share a name with another."""
    classes, files = defaultdict(list), defaultdict(list)
    for path, module in tree.modules.items():
        for node in ast.walk(tree.trees[path]):
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                classes[node.name].append(f"{path}:{node.lineno}")
        package, _, name = module.rpartition(".")
        is_form = package in FORMS and any(f"{form}.{name}" in tree.paths for form in FORMS if form != package)
        if not path.endswith("/__init__.py") and room_of(module) not in FILES_MAY_REPEAT and not is_form:
            files[name].append(path)
    return [
        f"{places[0]}: {kind} {name} stands also in {', '.join(places[1:])}"
        for kind, group in (("class", classes), ("file", files))
        for name, places in group.items()
        if len(places) > 1
    ]


def cycles(tree: Tree) -> list[str]:
    """Return the modules that import each other in a circle, through doors as well."""
    homes = {
        (module, entry.name): entry.module
        for path, module in tree.doors()
        for entry in tree.imports
        if entry.path == path and entry.name and entry.for_types
    }
    doors = {module for _, module in tree.doors()}
    edges = defaultdict(set)
    for entry in tree.imports:
        if entry.importer not in doors and entry.module in tree.paths:
            edges[entry.importer].add(homes.get((entry.module, entry.name), entry.module))
    finished: set[str] = set()
    return [line for module in list(edges) for line in _circles(module, edges, [], finished)]


RULES = (
    arrows_up,
    reaches_past_doors,
    exports_without_use,
    modules_named_like_exports,
    doors_that_disagree,
    libraries_out_of_place,
    repeated_names,
    cycles,
)


def module_of(path: str) -> str:
    """Return the dotted name under which a file is imported."""
    parts = PurePosixPath(path).with_suffix("").parts
    parts = parts[:-1] if parts[-1] == "__init__" else parts
    return ".".join((PACKAGE, *parts) if parts[0] in INSTALLED_INSIDE else parts)


def room_of(module: str) -> str | None:
    """Return the room that a module belongs to; None for a library."""
    first, _, rest = module.partition(".")
    if first != PACKAGE:
        return None
    room = rest.partition(".")[0] or "api"
    return "cli" if room == "__main__" else room


def floor_of(room: str) -> int | None:
    """Return the number of a room's floor, from 0; None where it has none."""
    return next((number for number, rooms in enumerate(FLOORS) if room in rooms), None)


def _all(tree: ast.Module) -> list[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and any(isinstance(to, ast.Name) and to.id == "__all__" for to in node.targets):
            return list(ast.literal_eval(node.value))
    return []


def _nodes_for_types(tree: ast.Module) -> set[ast.AST]:
    """Return the nodes under `if TYPE_CHECKING:`."""
    blocks = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
    ]
    statements = chain.from_iterable(block.body for block in blocks)
    return {inner for statement in statements for inner in ast.walk(statement)}


def _defines(tree: Tree, module: str, name: str) -> bool:
    if module not in tree.paths:
        return False
    for node in tree.trees[tree.paths[module]].body:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and node.name == name:
            return True
        targets = node.targets if isinstance(node, ast.Assign) else [node.target] if hasattr(node, "target") else []
        names = [inner for target in targets for inner in ast.walk(target) if isinstance(inner, ast.Name)]
        if any(inner.id == name for inner in names):
            return True
    return False


def _attributes(tree: ast.Module, name: str) -> set[str]:
    """Return the attributes that are read from a name."""
    return {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == name
    }


def _modules_in_strings(tree: Tree) -> list[str]:
    """Return the strings that name a module of another room, which imports by name would follow."""
    lines = []
    for path, source in tree.trees.items():
        for node in ast.walk(source):
            if not (isinstance(node, ast.Constant) and isinstance(node.value, str)):
                continue
            if not re.fullmatch(rf"{PACKAGE}(\.\w+){{2,}}", node.value) or node.value not in tree.paths:
                continue
            if room_of(node.value) in WITH_DOORS - {room_of(tree.modules[path])}:
                lines.append(f"{path}:{node.lineno}: reaches past a door in a string: {node.value}")
    return lines


def _circles(module: str, edges: Mapping[str, set[str]], trail: list[str], finished: set[str]) -> Iterator[str]:
    if module in trail:
        yield f"{' -> '.join([*trail[trail.index(module) :], module])}: a circle"
        return
    if module in finished:
        return
    for target in sorted(edges.get(module, ())):
        yield from _circles(target, edges, [*trail, module], finished)
    finished.add(module)
