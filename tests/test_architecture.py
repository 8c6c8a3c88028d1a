"""The walls of the house: who may import whom, and what no room may do."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("fedimpr", "strategies", "sim", "tests", "benchmarks")
FILES = sorted(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))

# By room: the packages that it never imports.
FORBIDDEN = {
    "fedimpr": {"flwr", "ray", "hydra", "omegaconf", "yaml", "strategies", "sim", "tests", "benchmarks"},
    "strategies": {"ray", "hydra", "omegaconf", "yaml", "sim", "tests", "benchmarks"},
    "sim": {"tests", "benchmarks"},
}
PUBLIC_FLOWER = {"flwr.app", "flwr.clientapp", "flwr.clientapp.mod", "flwr.serverapp", "flwr.serverapp.strategy", "flwr.simulation"}
GLOBAL_SEEDING = {"torch.manual_seed", "torch.cuda.manual_seed_all", "np.random.seed", "numpy.random.seed", "random.seed"}


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imports(tree: ast.AST) -> Iterator[str]:
    """The modules that a file imports, anywhere in it; ``from a import b`` gives ``a``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield str(node.module)


def calls(tree: ast.AST) -> Iterator[str]:
    """The dotted names of what a file calls."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func)


def problems(path: str, text: str) -> list[str]:
    """What is wrong with a file of this project."""
    room, tree, found = path.split("/")[0], ast.parse(text), []
    for module in imports(tree):
        package = module.split(".")[0]
        if package in FORBIDDEN.get(room, ()):
            found.append(f"{path} imports {module}")
        if package == "torchvision" and path != "fedimpr/_torchvision.py":
            found.append(f"{path} imports torchvision; call fedimpr._torchvision.torchvision()")
        if package == "flwr" and module not in PUBLIC_FLOWER and path != "sim/_flwr.py":
            found.append(f"{path} imports {module}, which is private in Flower; put it into sim/_flwr.py")
        if module.startswith("ray._") and path != "sim/_ray.py":
            found.append(f"{path} imports {module}, which is private in Ray; put it into sim/_ray.py")
    for call in calls(tree):
        if room == "fedimpr" and call == "print":
            found.append(f"{path} prints")
        if call in GLOBAL_SEEDING and room in FORBIDDEN and path != "fedimpr/seeds.py":
            found.append(f"{path} calls {call}; randomness is an argument, see fedimpr/seeds.py")
    if len(text.splitlines()) >= 400:
        found.append(f"{path} has {len(text.splitlines())} lines; past 400 a file wants a wall")
    return found


@pytest.mark.parametrize("path", FILES, ids=name)
def test_the_walls_stand(path: Path) -> None:
    assert problems(name(path), path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("fedimpr/a.py", "import flwr.app"),
        ("fedimpr/a.py", "def f():\n    from sim.grid import LocalGrid"),
        ("fedimpr/a.py", "print(1)"),
        ("fedimpr/a.py", "import torchvision.transforms"),
        ("fedimpr/a.py", "torch.manual_seed(1)"),
        ("strategies/a.py", "from hydra import compose"),
        ("sim/a.py", "from flwr.common import log"),
        ("sim/a.py", "from ray._private.node import Node"),
        ("sim/a.py", "x = 1\n" * 400),
    ],
)
def test_each_wall_would_be_missed(path: str, text: str) -> None:
    assert len(problems(path, text)) == 1


def test_what_is_allowed_passes() -> None:
    assert problems("sim/_flwr.py", "from flwr.supercore.run import Run") == []
    assert problems("fedimpr/seeds.py", "torch.manual_seed(1)") == []
    assert problems("strategies/a.py", "from flwr.serverapp.strategy import Strategy\nfrom . import b\nprint(1)") == []


def test_there_are_files_to_look_at() -> None:
    assert {path.relative_to(ROOT).parts[0] for path in FILES} >= {"fedimpr", "strategies", "sim", "tests"}
