"""Which file may import which: a reader who goes down this list never meets a name that comes later."""
import ast
import sys

import pytest
from helpers import ROOT

ORDER = ["common", "toy.world", "toy.oracle", "magd", "model", "scale", "data", "pretrained", "sample", "metrics", "train", "tools",
         "experiments", "related"]
FILES = [path for folder in (".", *{name.split(".")[0] for name in ORDER}) for path in sorted((ROOT / folder).glob("*.py"))]


def place(module):
    """Where a module of ours stands in the order; None: not ours."""
    return next((k for k, name in enumerate(ORDER) if module == name or module.startswith(f"{name}.")), None)


def imports(node):
    """The modules that an import statement names."""
    return [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_run_one_way_and_stand_at_the_top(path):
    module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    tree = ast.parse(path.read_text())
    statements = [node for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom))]
    assert all(node in tree.body for node in statements), "an import inside a function; optional packages come by common.files.optional"
    for name in (name for node in statements for name in imports(node)):
        if place(name) is None:
            allowed = {"torch", "numpy", "PIL", "einops", "tqdm", *sys.stdlib_module_names}
            assert name.split(".")[0] in allowed, f"{name} is not one of the required packages"
        else:
            assert place(name) <= place(module), f"{module} imports {name}, which comes later"


def test_nobody_imports_in_a_circle():
    """Within one place of the order, too."""
    graph = {}
    for path in FILES:
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        nodes = [node for node in ast.parse(path.read_text()).body if isinstance(node, (ast.Import, ast.ImportFrom))]
        graph[module] = {name for node in nodes for name in imports(node)}
    while True:
        leaves = [module for module, names in graph.items() if not names & set(graph)]
        if not leaves:
            break
        for module in leaves:
            del graph[module]
    assert not graph, f"imports in a circle among {', '.join(graph)}"
