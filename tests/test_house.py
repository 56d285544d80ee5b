"""What keeps each file readable: short files and functions, honest names, no torch, no pickle."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "qsae_jax"

FILE_LINES = 260  # one idea, read in one sitting
FUNCTION_LINES = 45  # seen whole on one screen; the docstring is not counted
# 'lm/model.py' or 'lm/model.py:LM.__call__' -> why it has to be longer.
LONGER: dict[str, str] = {}

# They say nothing of what is inside, so everything ends there.
EMPTY_NAMES = {"utils", "util", "helpers", "helper", "common", "base", "manager", "misc"}
# Run time is JAX alone, and a file that somebody sends us must not run code.
NO_IMPORT = {
    **dict.fromkeys(["torch", "transformers", "datasets"], "no PyTorch stack at run time"),
    **dict.fromkeys(["pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"], "a pickle runs code when read"),
}


def parsed(package: Path) -> Iterator[tuple[str, str, ast.Module]]:
    """(path within the package, text, tree) of each module."""
    for path in sorted(package.rglob("*.py")):
        text = path.read_text()
        yield path.relative_to(package).as_posix(), text, ast.parse(text, str(path))


def functions(node: ast.AST, prefix: str = "") -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    """(dotted name, node) of each function, methods and inner ones included."""
    for child in ast.iter_child_nodes(node):
        inner = prefix
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            inner = f"{prefix}{child.name}."
            if not isinstance(child, ast.ClassDef):
                yield inner[:-1], child
        yield from functions(child, inner)


def function_lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """From `def` to the last line, without the docstring."""
    lines = node.end_lineno - node.lineno + 1
    if ast.get_docstring(node) is not None:
        lines -= node.body[0].end_lineno - node.body[0].lineno + 1
    return lines


def too_long(package: Path) -> dict[str, int]:
    """File, or file:function -> its lines, where they are too many."""
    found = {}
    for file, text, tree in parsed(package):
        if (lines := len(text.splitlines())) > FILE_LINES:
            found[file] = lines
        for name, node in functions(tree):
            if (lines := function_lines(node)) > FUNCTION_LINES:
                found[f"{file}:{name}"] = lines
    return found


def empty_names(package: Path) -> list[str]:
    files = (path.relative_to(package) for path in sorted(package.rglob("*.py")))
    return [file.as_posix() for file in files if {part.strip("_") for part in file.with_suffix("").parts} & EMPTY_NAMES]


def refused_imports(package: Path) -> list[str]:
    """Imports of what is not to be there, wherever they stand, and NumPy's way to unpickle."""
    found = []
    for file, _, tree in parsed(package):
        for node in ast.walk(tree):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module or ""]
            elif isinstance(node, ast.keyword) and node.arg == "allow_pickle" and ast.unparse(node.value) != "False":
                found.append(f"{file}:{node.value.lineno} allow_pickle: a pickle runs code when read")
            for name in names:
                if why := NO_IMPORT.get(name.split(".")[0]):
                    found.append(f"{file}:{node.lineno} {name}: {why}")
    return found


def test_files_and_functions_are_short():
    assert {name: lines for name, lines in too_long(PACKAGE).items() if name not in LONGER} == {}


def test_every_exception_is_still_needed():
    assert set(LONGER) - set(too_long(PACKAGE)) == set()


def test_names_say_what_is_inside():
    assert empty_names(PACKAGE) == []


def test_no_torch_and_no_pickle():
    assert refused_imports(PACKAGE) == []


# The controls.


@pytest.fixture
def module(tmp_path):
    """Writes one module of a made-up package, and gives the package."""

    def write(text: str, file: str = "lm/tap.py") -> Path:
        path = tmp_path / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return tmp_path

    return write


def test_a_long_file_is_found(module):
    assert too_long(module("x = 1\n" * 260)) == {}
    assert too_long(module("x = 1\n" * 261)) == {"lm/tap.py": 261}


def test_a_long_function_is_found_and_its_docstring_not_counted(module):
    def write(lines: int) -> str:
        body = "        x = 1\n" * (lines - 1)
        return f'class LM:\n    @jit\n    def run(self):\n        """One\n        two.\n        """\n{body}'

    assert too_long(module(write(45))) == {}
    assert too_long(module(write(46))) == {"lm/tap.py:LM.run": 46}


def test_an_inner_function_is_found(module):
    inner = "".join(f"            x = {i}\n" for i in range(45))
    text = f"def outer():\n    if True:\n        def inner():\n{inner}"
    assert too_long(module(text)) == {"lm/tap.py:outer": 48, "lm/tap.py:outer.inner": 46}


@pytest.mark.parametrize("file", ["utils.py", "lm/common.py", "helpers/tap.py", "sae/_base.py", "manager/__init__.py"])
def test_an_empty_name_is_found(module, file):
    assert empty_names(module("", file)) == [file]


def test_a_telling_name_is_not(module):
    assert empty_names(module("", "lm/based.py")) == []


@pytest.mark.parametrize(
    "text, found",
    [
        ("import torch\n", "lm/tap.py:1 torch"),
        ("def f():\n    from torch.nn import Linear\n", "lm/tap.py:2 torch.nn"),
        ("import numpy, pickle\n", "lm/tap.py:1 pickle"),
        ("import joblib as j\n", "lm/tap.py:1 joblib"),
        ("from transformers import AutoModel\n", "lm/tap.py:1 transformers"),
        ("numpy.load(f, allow_pickle=True)\n", "lm/tap.py:1 allow_pickle"),
        ("numpy.load(f, allow_pickle=trust)\n", "lm/tap.py:1 allow_pickle"),
    ],
)
def test_a_refused_import_is_found(module, text, found):
    (line,) = refused_imports(module(text))
    assert line.startswith(found)


def test_an_allowed_import_is_not(module):
    text = "import jax\nfrom . import torch\nimport torchless\nload(f, allow_pickle=False)\n"
    assert refused_imports(module(text)) == []
