"""Keeps the import rules of docs/design.md, section 2, and a few that rest on the same parse.

`violations` reads every module's imports, also those inside functions and under TYPE_CHECKING, and
says what is wrong. It is tested on small trees first, so that it is known to be able to fail.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Lowest first; a floor never imports one above it.
FLOORS = (
    ("errors", "config", "environment", "protos"),
    ("client",),
    ("kv",),
    ("model",),
    ("checkpoints",),
    ("sched",),
    ("serving",),
    ("tools",),
)
RANK = {name: rank for rank, names in enumerate(FLOORS) for name in names}
NOT_THE_PACKAGE = {"tests", "docs", "build", "dist"}

WITHOUT_JAX = ("kv", "sched")
JAX_PACKAGES = {"jax", "jaxlib", "flax", "optax", "orbax"}
OF_MODEL_FOR_SCHED = "model.plan"
MAY_USE_PRIVATE_JAX = ("model.compile", "model.dispatch", "model.kernels")
PRIVATE_JAX = ("jax._src", "jax.experimental")
READS_ENVIRONMENT = "environment"
ENVIRONMENT = {"environ", "environb", "getenv", "getenvb", "putenv", "unsetenv"}


@dataclass
class Module:
    name: str  # dotted, below quire; "" is the root __init__
    is_package: bool
    absolute: list[str] = field(default_factory=list)  # quire.… imports, as written
    targets: set[str] = field(default_factory=set)  # modules below quire it imports
    runtime_targets: set[str] = field(default_factory=set)  # the same without TYPE_CHECKING
    outside: set[str] = field(default_factory=set)  # dotted names it takes from other packages
    runtime_outside: set[str] = field(default_factory=set)
    environment: bool = False
    names_of_root: set[str] = field(default_factory=set)  # what it takes from quire/__init__.py

    @property
    def floor(self) -> str:
        return self.name.split(".")[0]


def _within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def _python_files(root: Path) -> Iterator[Path]:
    for path in sorted(root.rglob("*.py")):
        top = path.relative_to(root).parts[0]
        if not top.startswith(".") and top not in NOT_THE_PACKAGE:
            yield path


def _walk(tree: ast.AST, typing_only: bool = False) -> Iterator[tuple[ast.AST, bool]]:
    """Every node, and whether it stands under `if TYPE_CHECKING:`."""
    for child in ast.iter_child_nodes(tree):
        yield child, typing_only
        if isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING"):
            for part in child.body:
                yield part, True
                yield from _walk(part, True)
            for part in child.orelse:
                yield part, typing_only
                yield from _walk(part, typing_only)
        else:
            yield from _walk(child, typing_only)


def _dotted(node: ast.AST) -> str | None:
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        base = _dotted(node.value)
        return base and f"{base}.{node.attr}"
    return None


def read_tree(root: Path) -> dict[str, Module]:
    """The package's modules by dotted name below quire."""
    sources: dict[str, tuple[Path, bool]] = {}
    for path in _python_files(root):
        parts = path.relative_to(root).with_suffix("").parts
        is_package = parts[-1] == "__init__"
        sources[".".join(parts[:-1] if is_package else parts)] = path, is_package
    modules = {name: Module(name, is_package) for name, (_, is_package) in sources.items()}
    for name, module in modules.items():
        _read_module(module, ast.parse(sources[name][0].read_text()), modules)
    return modules


def _read_module(module: Module, tree: ast.AST, modules: Iterable[str]) -> None:
    known = set(modules)
    package = module.name.split(".") if module.name else []
    if not module.is_package:
        package = package[:-1]
    aliases: dict[str, str] = {}  # local name -> what it stands for outside quire

    def inside(base: str, names: list[str], typing_only: bool) -> None:
        for name in names:
            full = f"{base}.{name}" if base else name
            target = full if full in known else base
            if target == "":
                module.names_of_root.add(name)
                continue
            module.targets.add(target)
            if not typing_only:
                module.runtime_targets.add(target)

    def outside(name: str, typing_only: bool) -> None:
        module.outside.add(name)
        if not typing_only:
            module.runtime_outside.add(name)

    for node, typing_only in _walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if _within(alias.name, "quire"):
                    module.absolute.append(alias.name)
                    base, _, last = alias.name.removeprefix("quire").lstrip(".").rpartition(".")
                    if last:
                        inside(base, [last], typing_only)
                else:
                    outside(alias.name, typing_only)
                    local = alias.asname or alias.name.split(".")[0]
                    aliases[local] = alias.name if alias.asname else local
        elif isinstance(node, ast.ImportFrom):
            names = [alias.name for alias in node.names]
            origin = node.module or ""
            if node.level:
                up = package[: len(package) - (node.level - 1)]
                inside(".".join([*up, origin] if origin else up), names, typing_only)
            elif _within(origin, "quire"):
                module.absolute.append(origin)
                inside(origin.removeprefix("quire").lstrip("."), names, typing_only)
            else:
                for alias in node.names:
                    outside(f"{origin}.{alias.name}", typing_only)
                    aliases[alias.asname or alias.name] = f"{origin}.{alias.name}"
    for node, _ in _walk(tree):
        if isinstance(node, ast.Attribute) and (dotted := _dotted(node)):
            first, _, rest = dotted.partition(".")
            if first in aliases:
                module.outside.add(f"{aliases[first]}.{rest}")
    module.environment = any(
        name.removeprefix("os.").split(".")[0] in ENVIRONMENT
        for name in module.outside
        if name.startswith("os.")
    )


def _imported_at_runtime(start: str, modules: dict[str, Module]) -> dict[str, str]:
    """Every module that importing `start` may run, with the one that leads to it.

    Importing a.b.c also runs a/__init__ and a.b/__init__.
    """
    found = {start: ""}
    queue = [start]
    while queue:
        name = queue.pop()
        parents = {".".join(name.split(".")[:i]) for i in range(1, name.count(".") + 1)}
        for target in sorted((modules[name].runtime_targets | parents) & modules.keys()):
            if target not in found:
                found[target] = name
                queue.append(target)
    return found


def _cycle(modules: dict[str, Module]) -> list[str] | None:
    """Some cycle of imports, or None."""
    done: set[str] = set()

    def visit(name: str, path: list[str]) -> list[str] | None:
        if name in path:
            return [*path[path.index(name) :], name]
        if name in done:
            return None
        for target in sorted(modules[name].targets & modules.keys()):
            if found := visit(target, [*path, name]):
                return found
        done.add(name)
        return None

    for name in sorted(modules):
        if found := visit(name, []):
            return found
    return None


def violations(root: Path) -> list[str]:
    """What in the tree at `root` breaks the rules, a sentence each."""
    modules = read_tree(root)
    wrong: list[str] = []
    for name, m in modules.items():
        if name == "":
            if m.runtime_targets:
                wrong.append(f"__init__.py imports {sorted(m.runtime_targets)}: it must be lazy")
            continue
        if m.floor not in RANK:
            wrong.append(f"{name} is on no floor: name its folder in FLOORS or move it")
            continue
        for target in sorted(m.targets):
            floor = target.split(".")[0]
            if RANK.get(floor, len(FLOORS)) > RANK[m.floor]:
                wrong.append(f"{name} imports {target}, a floor above its own")
            if m.floor == "sched" and floor == "model" and target != OF_MODEL_FOR_SCHED:
                wrong.append(f"{name} imports {target}; sched may use only {OF_MODEL_FOR_SCHED}")
        for used in sorted(m.names_of_root - {"__version__"}):
            wrong.append(f"{name} takes {used} from quire/__init__.py, which stands above it")
        if m.absolute and not _within(name, "protos.v1"):  # the stubs are generated
            wrong.append(f"{name} imports {m.absolute[0]}: across folders imports are relative")
        if m.environment and name != READS_ENVIRONMENT:
            wrong.append(f"{name} uses the environment; only {READS_ENVIRONMENT}.py may")
        for used in sorted(m.outside):
            private = any(_within(used, p) for p in PRIVATE_JAX)
            if private and not any(_within(name, p) for p in MAY_USE_PRIVATE_JAX):
                wrong.append(f"{name} uses {used}; only {MAY_USE_PRIVATE_JAX} may")
        if m.floor in WITHOUT_JAX:
            for reached, via in _imported_at_runtime(name, modules).items():
                used = {u.split(".")[0] for u in modules[reached].runtime_outside} & JAX_PACKAGES
                if used:
                    by = f" (by way of {reached}, from {via})" if via else ""
                    wrong.append(f"{name} imports {', '.join(sorted(used))}{by}")
    if cycle := _cycle(modules):
        wrong.append("imports go in a circle: " + " -> ".join(cycle))
    return wrong


def test_the_package_keeps_its_rules() -> None:
    assert violations(ROOT) == []


CLEAN = {
    "__init__.py": """
        from typing import TYPE_CHECKING
        if TYPE_CHECKING:
            from quire.serving.llm import LLM
        def __getattr__(name): ...
    """,
    "errors.py": "",
    "config.py": "from .errors import x",
    "environment.py": "import os\nfrom .errors import x\nos.environ.get('HOME')",
    "kv/__init__.py": "",
    "kv/pages.py": "import numpy\nfrom ..errors import x",
    "model/__init__.py": "",
    "model/plan.py": "import numpy\nfrom .ladder import Ladder",
    "model/ladder.py": "from ..errors import x",
    "model/compile.py": "from jax.experimental import topologies",
    "model/kernels/__init__.py": "",
    "model/kernels/gpu.py": "import jax\njax.experimental.pallas",
    "model/runner.py": "import jax\nfrom . import plan\nfrom .kernels.gpu import f\njax.jit(f)",
    "checkpoints/__init__.py": "",
    "checkpoints/load.py": "from ..model import runner",
    "protos/__init__.py": "",
    "protos/v1/__init__.py": "",
    "protos/v1/a_pb2.py": "",
    "protos/v1/a_pb2_grpc.py": "from quire.protos.v1 import a_pb2",
    "sched/__init__.py": "",
    "sched/loop.py": "from ..model.plan import Plan\nfrom ..kv import pages\nfrom .queue import Q",
    "sched/queue.py": "",
    "serving/__init__.py": "",
    "serving/llm.py": "from ..sched.loop import Loop\nfrom ..checkpoints.load import load",
    "tools/__init__.py": "",
    "tools/cli.py": "from .. import __version__\ndef main():\n    from ..serving.llm import LLM",
    "tests/test_x.py": "import quire.serving.llm, os\nos.environ['X'] = '1'",
    "docs/conf.py": "import os\nos.getenv('X')",
}


def plant(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = text.strip("\n").splitlines()
        indent = min((len(x) - len(x.lstrip()) for x in lines if x.strip()), default=0)
        path.write_text("\n".join(line[indent:] for line in lines))


def test_a_tree_that_keeps_the_rules_passes(tmp_path: Path) -> None:
    plant(tmp_path, CLEAN)
    assert violations(tmp_path) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kv/pages.py": "from ..model.plan import Plan"}, "kv.pages imports model.plan, a floor"),
        ({"errors.py": "from . import kv"}, "errors imports kv, a floor above"),
        (
            {"model/runner.py": "from ..checkpoints import load"},
            "imports checkpoints.load, a floor",
        ),
        ({"sched/queue.py": "def f():\n    from ..serving import llm"}, "imports serving.llm, a"),
        (
            {
                "checkpoints/load.py": """
                    from typing import TYPE_CHECKING
                    if TYPE_CHECKING:
                        from ..sched.loop import Loop
                """
            },
            "checkpoints.load imports sched.loop, a floor above",
        ),
        ({"model/runner.py": "import quire.serving.llm"}, "model.runner imports serving.llm, a"),
        ({"serving/llm.py": "from quire.sched.loop import Loop"}, "imports are relative"),
        ({"serving/llm.py": "import quire.sched.loop"}, "imports are relative"),
        ({"sched/queue.py": "from ..model.ladder import Ladder"}, "sched may use only model.plan"),
        ({"sched/queue.py": "from ..model import runner"}, "sched may use only model.plan"),
        ({"sched/queue.py": "import jax.numpy as jnp"}, "sched.queue imports jax"),
        ({"kv/pages.py": "def f():\n    from jax import jit"}, "kv.pages imports jax"),
        ({"model/ladder.py": "import jax"}, "sched.loop imports jax (by way of model.ladder"),
        ({"model/__init__.py": "import flax"}, "sched.loop imports flax (by way of model,"),
        ({"serving/llm.py": "import os\nx = os.environ['A']"}, "serving.llm uses the environment"),
        ({"tools/cli.py": "from os import getenv as g"}, "tools.cli uses the environment"),
        ({"tools/cli.py": "import os as o\no.getenv('A')"}, "tools.cli uses the environment"),
        ({"model/runner.py": "import jax._src.core"}, "model.runner uses jax._src.core"),
        ({"model/runner.py": "from jax import experimental"}, "model.runner uses jax.experimental"),
        ({"tools/cli.py": "import jax\njax.experimental.io"}, "tools.cli uses jax.experimental"),
        ({"__init__.py": "from quire.serving.llm import LLM"}, "it must be lazy"),
        ({"__init__.py": "def f():\n    from .sched import loop"}, "it must be lazy"),
        ({"sched/loop.py": "from .. import LLM"}, "takes LLM from quire/__init__.py"),
        ({"extras/__init__.py": ""}, "extras is on no floor"),
        ({"helpers.py": ""}, "helpers is on no floor"),
        ({"sched/queue.py": "from .loop import Loop"}, "a circle: sched.loop -> sched.queue -> "),
        ({"sched/queue.py": "from . import queue"}, "a circle: sched.queue -> sched.queue"),
    ],
)
def test_each_violation_is_seen(tmp_path: Path, changes: dict[str, str], message: str) -> None:
    plant(tmp_path, CLEAN | changes)
    found = violations(tmp_path)
    assert any(message in v for v in found), found


def loaded_by(code: str) -> set[str]:
    """Top-level modules in sys.modules after `code` ran in a fresh interpreter."""
    code += "\nimport sys\nprint('\\n'.join({m.split('.')[0] for m in sys.modules}))"
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    return set(done.stdout.split())


def test_sched_and_kv_load_no_jax() -> None:
    names = [n for n in read_tree(ROOT) if n.split(".")[0] in WITHOUT_JAX]
    assert len(names) > 2
    loaded = loaded_by("\n".join(f"import quire.{name}" for name in names))
    assert "quire" in loaded and not loaded & JAX_PACKAGES


def test_import_quire_loads_no_jax() -> None:
    loaded = loaded_by("import quire")
    assert "quire" in loaded and not loaded & (JAX_PACKAGES | {"torch", "transformers", "numpy"})


def test_help_loads_no_jax() -> None:
    loaded = loaded_by(
        "from quire.tools.cli import main\n"
        "import sys\nsys.argv = ['quire', '--help']\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code, end.code\n"
    )
    assert "quire" in loaded and not loaded & (JAX_PACKAGES | {"torch", "transformers", "grpc"})
