"""The floors of the house, read from the imports: nothing flows back.

A floor imports floors below it and siblings in its own folder. The checks are functions of a folder,
so that each has its control: a planted fault in a made-up package, which it must find.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "qsae_jax"

FLOORS = [
    ["config", "devices", "errors", "files", "hosts", "hub", "mesh", "pages", "products", "store", "stats", "progress"],
    ["lm"],
    ["quant"],
    ["acts"],
    ["sae"],
    ["audit", "compare"],
    ["report", "asked", "recipe", "record", "arms", "sweep", "jobs", "questions", "study"],
    ["plan"],
    ["verbs", "comparison", "given", "dictionaries"],
    ["cli", "__main__"],
]
FLOOR = {part: floor for floor, parts in enumerate(FLOORS) for part in parts}

# On one floor a file may import its neighbours; a folder is a world of its own and is imported by no neighbour, but:
NEIGHBOURS = {("study", "report"): "a study ends by telling its results"}
# Edges that point down and are wrong all the same.
FORBIDDEN = {("sae", "lm"): "a dictionary takes any stream and knows no language model"}
# What imports JAX when it is imported.
JAX = {"jax", "jaxlib", "flax", "optax", "orbax", "chex", "equinox"}


def modules(package: Path) -> dict[str, Path]:
    """Dotted name -> file; the package's own `__init__`, the facade, has the package's name."""
    found = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(name: str, path: Path, known: dict[str, Path]) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of each import, wherever it stands; `from a import b` is a.b where that is a module."""
    here = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = here[: len(here) - node.level + 1] if node.level else []
            source = ".".join([*start, *([node.module] if node.module else [])])
            for alias in node.names:
                inner = f"{source}.{alias.name}"
                yield node.lineno, inner if inner in known else source


def graph(package: Path) -> dict[str, dict[str, int]]:
    """Module -> the modules it imports, the package's own and others', each with its line."""
    known = modules(package)
    return {name: {to: line for line, to in imports(name, path, known)} for name, path in known.items()}


def part(module: str) -> str:
    """qsae_jax.lm.tap -> lm; the facade and other packages -> ''."""
    return module.split(".")[1] if "." in module else ""


def fault(source: str, target: str, folders: set[str]) -> str | None:
    """Why one part may not import another; None when it may."""
    if source == target:
        return None
    if source not in FLOOR or target not in FLOOR:
        return None  # `homeless` tells
    if (source, target) in FORBIDDEN:
        return FORBIDDEN[source, target]
    if FLOOR[target] > FLOOR[source]:
        return f"upward, from floor {FLOOR[source]} to floor {FLOOR[target]}"
    if FLOOR[target] == FLOOR[source] and {source, target} & folders and (source, target) not in NEIGHBOURS:
        return f"sideways, between two of floor {FLOOR[source]}"
    return None


def homeless(package: Path) -> set[str]:
    """The parts that stand on no floor: give each one in FLOORS."""
    return {part(module) for module in modules(package)} - {"", *FLOOR}


def wrong_edges(package: Path) -> list[str]:
    """Each import that the floors do not allow. The facade imports what it likes and is imported by nobody."""
    edges, found = graph(package), []
    folders = {path.name for path in package.iterdir() if path.is_dir()}
    for source, targets in edges.items():
        if source == package.name:
            continue
        for target, line in targets.items():
            if target.split(".")[0] != package.name:
                continue
            why = "imports the facade" if target == package.name else fault(part(source), part(target), folders)
            if why:
                found.append(f"{source}:{line} -> {target}: {why}")
    return found


def cycle(package: Path) -> list[str]:
    """The modules of one import cycle, in order, or none. Depth first; grey is the path from the root."""
    edges, done = graph(package), set()

    def visit(module: str, grey: list[str]) -> list[str]:
        if module in grey:
            return [*grey[grey.index(module) :], module]
        if module in done or module not in edges:
            return []
        for target in edges[module]:
            if found := visit(target, [*grey, module]):
                return found
        done.add(module)
        return []

    return next((found for module in edges if (found := visit(module, []))), [])


def ways_to_jax(package: Path, start: str) -> list[str]:
    """Each way by which the modules under `start` come to JAX, through the package's own modules; the facade aside."""
    edges, ways, seen = graph(package), [], set()
    inside = [name for name in edges if part(name) == start]
    queue = [(name, name) for name in inside]
    while queue:
        module, way = queue.pop()
        if module in seen or module == package.name:
            continue
        seen.add(module)
        # To import a.b.c is to import a.b as well.
        above = {module.rsplit(".", 1)[0]: 0} if module.count(".") > 1 else {}
        for target in [*edges[module], *above]:
            if target.split(".")[0] in JAX:
                ways.append(f"{way} -> {target}")
            elif target in edges:
                queue.append((target, f"{way} -> {target}"))
    return ways


def test_floors():
    assert homeless(PACKAGE) == set()
    assert wrong_edges(PACKAGE) == []


def test_no_cycle():
    assert cycle(PACKAGE) == []


def test_report_imports_no_jax():
    assert ways_to_jax(PACKAGE, "report") == []


# The controls.

SOUND = {
    "__init__.py": "from qsae_jax.lm import load_lm\nfrom qsae_jax.sae.model import SAE\n",
    "errors.py": "import jax\n",
    "store.py": "from .errors import Refused\nimport numpy\n",
    "stats.py": "import numpy\n",
    "lm/__init__.py": "from .load import load_lm\n",
    "lm/load.py": "from qsae_jax.store import save\nfrom . import tap\n",
    "lm/tap.py": "import jax.numpy as jnp\n",
    "quant/fake.py": "from qsae_jax.lm.tap import Point\n",
    "acts/stream.py": "from qsae_jax import lm, store\n",
    "sae/model.py": "from flax import nnx\nfrom qsae_jax.acts import stream\n",
    "audit/survival.py": "from ..sae import model\n",
    "compare/match.py": "from ..sae.model import SAE\n",
    "report/__init__.py": "",
    "report/tables.py": "from qsae_jax.stats import auc\nfrom . import page\n",
    "report/page.py": "import jinja2\n",
    "study.py": "from qsae_jax.report.page import write\nfrom qsae_jax.audit import survival\n",
    "cli.py": "def main():\n    from qsae_jax import study\n",
}


@pytest.fixture
def plant(tmp_path):
    """Writes a sound package, with faults planted in it: plant({file: text, to be added to that file})."""

    def write(faults: dict[str, str] | None = None) -> Path:
        package = tmp_path / "qsae_jax"
        for file in [*SOUND, *(faults or {})]:
            path = package / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(SOUND.get(file, "") + (faults or {}).get(file, ""))
        return package

    return write


def test_a_sound_package_has_no_fault(plant):
    package = plant()
    assert homeless(package) == set() and wrong_edges(package) == [] and cycle(package) == []
    assert ways_to_jax(package, "report") == []
    assert len(graph(package)) == len(SOUND)


@pytest.mark.parametrize(
    "file, text, edge",
    [
        ("lm/load.py", "from qsae_jax.quant import fake\n", "qsae_jax.lm.load:3 -> qsae_jax.quant.fake: upward"),
        ("quant/fake.py", "import qsae_jax.sae.model\n", "qsae_jax.quant.fake:2 -> qsae_jax.sae.model: upward"),
        ("store.py", "def f():\n    from .lm.tap import Point\n", "qsae_jax.store:4 -> qsae_jax.lm.tap: upward"),
        ("sae/model.py", "from ..lm.tap import Point\n", "qsae_jax.sae.model:3 -> qsae_jax.lm.tap: a dictionary"),
        ("compare/match.py", "from ..audit import survival\n", "-> qsae_jax.audit.survival: sideways"),
        ("report/page.py", "from qsae_jax import study\n", "-> qsae_jax.study: sideways"),
        ("stats.py", "from qsae_jax import SAE\n", "qsae_jax.stats:2 -> qsae_jax: imports the facade"),
        ("stats.py", "from . import SAE\n", "qsae_jax.stats:2 -> qsae_jax: imports the facade"),
    ],
)
def test_a_planted_edge_is_found(plant, file, text, edge):
    (found,) = wrong_edges(plant({file: text}))
    assert edge in found


def test_a_part_on_no_floor_is_found(plant):
    assert homeless(plant({"extra.py": "from .stats import auc\n", "more/__init__.py": ""})) == {"extra", "more"}


@pytest.mark.parametrize(
    "faults, found",
    [
        ({"lm/tap.py": "from .load import load_lm\n"}, ["qsae_jax.lm.load", "qsae_jax.lm.tap", "qsae_jax.lm.load"]),
        ({"lm/tap.py": "from qsae_jax.lm import x\n"}, ["qsae_jax.lm", "qsae_jax.lm.load", "qsae_jax.lm.tap"]),
        ({"errors.py": "from . import store\n"}, ["qsae_jax.errors", "qsae_jax.store", "qsae_jax.errors"]),
    ],
)
def test_a_planted_cycle_is_found(plant, faults, found):
    assert set(cycle(plant(faults))) == set(found)


@pytest.mark.parametrize(
    "faults, way",
    [
        ({"report/page.py": "import jax\n"}, "qsae_jax.report.page -> jax"),
        ({"report/page.py": "from flax import nnx\n"}, "qsae_jax.report.page -> flax"),
        ({"stats.py": "from jax import numpy\n"}, "-> qsae_jax.stats -> jax"),
        ({"stats.py": "from .store import save\n"}, "-> qsae_jax.store -> qsae_jax.errors -> jax"),
        ({"report/page.py": "def f():\n    from .deep import x\n", "report/deep/x.py": "import optax\n"}, "-> optax"),
        (
            {"stats.py": "from .acts.tokens import n\n", "acts/tokens.py": "", "acts/__init__.py": "import jax\n"},
            "-> qsae_jax.acts.tokens -> qsae_jax.acts -> jax",
        ),
    ],
)
def test_a_planted_jax_import_is_found_in_report(plant, faults, way):
    (found,) = ways_to_jax(plant(faults), "report")
    assert way in found
