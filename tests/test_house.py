"""The house rules as tests: who may import whom, how long things may grow, and what never enters the tree."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src" / "attlas"

# A module imports only from lower ranks or from its own unit (a unit is a file or a package directly under attlas/).
RANK = {
    "_version": -1,  # rank 0 too, but leaves: the rest of rank 0 raises their errors
    "errors": -1,
    "shapes": 0,
    "registry": 0,
    "numerics": 0,
    "masks": 1,
    "scores": 1,
    "reference": 2,
    "kernels": 2,
    "ops": 3,
    "positions": 3,
    "cache": 4,
    "dist": 4,
    "compat": 4,
    "testing": 4,
    "nn": 5,
    "catalogue": 6,
    "models": 7,
    "engine": 8,
    "lab": 9,
    "serve": 9,
    "cli": 10,
    "__main__": 11,
}
KERNEL_SIBLINGS = {"cpu", "triton", "blocked", "adapters"}

# Third-party libraries beside torch, and the units that may import them: inside functions, except those of AT_THE_TOP.
ALLOWED = {
    "transformers": {"compat", "models", "lab"},
    "numpy": {"models", "lab"},
    "safetensors": {"models"},
    "gguf": {"models", "lab"},
    "tokenizers": {"models", "engine", "serve", "cli"},
    "jinja2": {"engine"},
    "llguidance": {"engine"},
    "fastapi": {"serve"},
    "starlette": {"serve"},
    "pydantic": {"serve"},
    "uvicorn": {"serve"},
    "prometheus_client": {"serve"},
    "llama_cpp": {"lab"},
    "plotly": {"lab"},
    "matplotlib": {"lab"},
    "typer": {"cli"},
    "rich": {"cli", "lab"},
    "triton": {"kernels"},
    "flash_attn": {"kernels"},
    "flashinfer": {"kernels"},
    "fla": {"kernels"},
}
SERVER = ("fastapi", "starlette", "pydantic", "uvicorn", "prometheus_client")
AT_THE_TOP = {("cli", "typer"), ("cli", "rich"), ("kernels", "triton"), *(("serve", library) for library in SERVER)}

MAX_LINES, MAX_KERNEL_LINES, MAX_FUNCTION_LINES, MAX_PARAMETERS = 400, 700, 80, 12
MARKS_OF_UNFINISHED_WORK = re.compile(r"\b(TO" + r"DO|FIX" + r"ME|XX" + r"X)\b")
MACHINE_PATHS = re.compile(r"(?<![\w.])/(wo" + r"rk|ro" + r"ot|tm" + r"p|ho" + r"me|opt)/[\w.]")
REGISTRY_HOSTS = re.compile(
    r"(py" + r"pi\.org|pythonho" + r"sted\.org|download\.pyto" + r"rch\.org|npm" + r"js\.org|deb" + r"ian\.org)"
)

Function = ast.FunctionDef | ast.AsyncFunctionDef


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def sources() -> list[Path]:
    return sorted(SOURCE.rglob("*.py"))


def files_of_tests() -> list[Path]:
    return sorted((ROOT / "tests").rglob("*.py"))


def unit(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def spot(path: Path, node: ast.AST | None = None) -> str:
    return f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 1)}"


def imports(path: Path) -> Iterator[tuple[str, ast.AST]]:
    """Every module named by an import statement, functions included; `from attlas import x` counts as attlas.x."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{spot(path, node)}: relative import"
            module = node.module or ""
            yield from ((f"attlas.{a.name}", node) for a in node.names) if module == "attlas" else [(module, node)]


def named_modules(path: Path) -> Iterator[tuple[str, ast.AST]]:
    """Modules that are named by strings ("attlas.nn.heads:Attention"), as tables and lazy loaders do."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            found = re.fullmatch(r"(attlas(\.\w+)+)(:\w+)?", node.value)
            if found:
                yield found[1], node


def functions(path: Path) -> Iterator[Function]:
    return (node for node in ast.walk(tree(path)) if isinstance(node, Function))


def tracked() -> list[Path]:
    """Files of the project: as git lists them (new ones included), or, outside a checkout, all that is not a build product."""
    git = shutil.which("git")
    if git and (ROOT / ".git").exists():
        call = [git, "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        names = subprocess.run(call, capture_output=True, check=True, text=True).stdout.split("\0")
        return [ROOT / name for name in names if name and (ROOT / name).is_file()]
    hidden = {".venv", "build", "dist", "__pycache__"}
    return [p for p in ROOT.rglob("*") if p.is_file() and not hidden.intersection(p.relative_to(ROOT).parts)]


def assert_none(bad: list[str], rule: str) -> None:
    assert not bad, f"{rule}\n  " + "\n  ".join(bad)


def test_imports_point_only_to_lower_ranks():
    bad = []
    for path in sources():
        me = unit(path)
        if me == "__init__":
            continue
        for name, node in [*imports(path), *named_modules(path)]:
            top, *rest = name.split(".")
            if top != "attlas":
                continue
            other = rest[0] if rest else "the attlas package itself"
            if other != me and RANK.get(other, 99) >= RANK[me]:
                bad.append(f"{spot(path, node)} {me} -> {other}")
    assert_none(bad, "a module imports only from lower ranks, or from its own package:")


def test_every_unit_has_a_rank():
    unranked = {unit(p) for p in sources()} - RANK.keys() - {"__init__"}
    assert not unranked, f"give {sorted(unranked)} a rank"


def test_kernel_siblings_do_not_import_each_other():
    bad = []
    for path in (SOURCE / "kernels").rglob("*.py"):
        mine = path.relative_to(SOURCE / "kernels").parts[0]
        for name, node in [*imports(path), *named_modules(path)]:
            found = re.match(r"attlas\.kernels\.(\w+)", name)
            if found and found[1] in KERNEL_SIBLINGS and found[1] != mine:
                bad.append(f"{spot(path, node)} {mine} -> {found[1]}")
    assert_none(bad, "kernels/{cpu,triton,blocked,adapters} are leaves:")


def test_optional_libraries_stay_where_they_belong():
    bad = []
    for path in sources():
        me = unit(path)
        at_top = set(map(id, tree(path).body))
        for name, node in imports(path):
            library = name.split(".")[0]
            if library in {"attlas", "torch"} or library in sys.stdlib_module_names:
                continue
            if me not in ALLOWED.get(library, set()):
                bad.append(f"{spot(path, node)} {library} in {me}")
            elif id(node) in at_top and (me, library) not in AT_THE_TOP:
                bad.append(f"{spot(path, node)} {library}: import it inside the function that needs it")
    assert_none(bad, "ranks 0 to 8 need torch and the standard library alone:")


def needed_by_torch() -> set[str]:
    """Import names of torch and of everything that torch itself requires."""
    todo, seen = ["torch"], set()
    while todo:
        name = re.sub(r"[-_.]+", "-", todo.pop()).lower()
        if name in seen:
            continue
        seen.add(name)
        try:
            lines = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue
        todo += [re.split(r"[^\w.-]", line, maxsplit=1)[0] for line in lines if "extra ==" not in line]
    provided = metadata.packages_distributions()
    return {module for module, dists in provided.items() if {re.sub(r"[-_.]+", "-", d).lower() for d in dists} & seen}


COLD = """
import importlib.machinery, sys, warnings

class Finder(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.split(".")[0] in {blocked!r} else super().find_spec(name, path, target)

sys.meta_path = [Finder if f is importlib.machinery.PathFinder else f for f in sys.meta_path]
warnings.filterwarnings("ignore", message="Failed to initialize NumPy")
{body}
"""


def run_cold(body: str) -> subprocess.CompletedProcess[str]:
    """Run `body` in a new interpreter that finds nothing but torch, what torch requires, the standard library and attlas."""
    allowed = needed_by_torch() | {"attlas"}
    blocked = {m for m in metadata.packages_distributions() if m not in allowed and m not in sys.stdlib_module_names}
    return subprocess.run([sys.executable, "-c", COLD.format(blocked=blocked, body=body)], capture_output=True, text=True)


def test_core_works_with_torch_alone():
    done = run_cold(
        "import torch, attlas\n"
        "mixer = attlas.build('causal', dim=20, num_heads=2)\n"
        "y = mixer(torch.randn(3, 7, 20))\n"
        "assert y.shape == (3, 7, 20)\n"
        "y.sum().backward()\n"
        "assert 'numpy' not in sys.modules\n"
        "print('works')"
    )
    assert done.stdout.strip() == "works", done.stderr


def test_importing_attlas_loads_nothing_else():
    done = run_cold("import attlas\nprint('torch' in sys.modules, len([m for m in sys.modules if m.startswith('attlas.')]))")
    torch_loaded, loaded = done.stdout.split()
    assert torch_loaded == "False" and int(loaded) <= 2, done.stdout + done.stderr


def test_the_compiler_is_not_imported_at_start():
    done = run_cold(
        "import importlib, pkgutil, attlas.catalogue.index, attlas.nn, attlas.ops\n"
        "for module in pkgutil.iter_modules(attlas.nn.__path__, 'attlas.nn.'):\n"
        "    importlib.import_module(module.name)\n"
        "print('torch._dynamo' in sys.modules)"
    )
    assert done.stdout.strip() == "False", "torch._dynamo takes seconds to import; leave it to those who compile\n" + done.stderr


def test_cli_without_its_extra_says_how_to_install_it():
    done = run_cold("from attlas.cli import main\nsys.exit(main())")
    assert done.returncode == 2
    assert "attlas[cli]" in done.stderr and len(done.stderr.strip().splitlines()) == 1, done.stderr


def test_files_stay_short():
    bad = []
    for path in [*sources(), *files_of_tests()]:
        limit = MAX_KERNEL_LINES if "kernels" in path.parts else MAX_LINES
        lines = len(path.read_text(encoding="utf-8").splitlines())
        if lines > limit:
            bad.append(f"{spot(path)} has {lines} lines, at most {limit}")
    assert_none(bad, "split the file by subject:")


def test_functions_fit_on_a_screen():
    bad = []
    for path in [*sources(), *files_of_tests()]:
        for node in functions(path):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            if lines > MAX_FUNCTION_LINES:
                bad.append(f"{spot(path, node)} {node.name} has {lines} lines")
    assert_none(bad, f"a function has at most {MAX_FUNCTION_LINES} lines:")


def parameters(node: Function) -> list[str]:
    return [a.arg for a in [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs] if a.arg not in ("self", "cls")]


def test_functions_take_at_most_a_dozen_parameters():
    bad = []
    for path in sources():
        if unit(path) == "kernels":  # launchers behind ops/: they take what their kernels take
            continue
        for node in functions(path):
            public = not node.name.startswith("_") or node.name == "__init__"
            if public and len(parameters(node)) > MAX_PARAMETERS:
                bad.append(f"{spot(path, node)} {node.name} takes {len(parameters(node))}")
    assert_none(bad, f"a public function takes at most {MAX_PARAMETERS} parameters:")


def test_ops_swallow_no_keywords():
    bad = [f"{spot(p, n)} {n.name}" for p in (SOURCE / "ops").rglob("*.py") for n in functions(p) if n.args.kwarg]
    assert_none(bad, "no **kwargs in ops/, so a mistyped argument is an error:")


def is_name(node: ast.stmt, face: bool) -> bool:
    if isinstance(node, ast.Import | ast.ImportFrom):
        return True
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
        return True
    if isinstance(node, ast.Assign | ast.AnnAssign):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        return face or all(isinstance(t, ast.Name) and t.id == "__all__" for t in targets)
    if isinstance(node, ast.If):
        return ast.unparse(node.test).endswith("TYPE_CHECKING") and all(is_name(n, face) for n in node.body)
    return face and isinstance(node, ast.FunctionDef) and node.name in ("__getattr__", "__dir__")


def test_init_files_hold_names_only():
    bad = []
    for path in SOURCE.rglob("__init__.py"):
        face = path.parent == SOURCE  # the public face alone may hold the lazy table and its loader
        bad += [spot(path, node) for node in tree(path).body if not is_name(node, face)]
    assert_none(bad, "an __init__ re-exports names and does nothing else:")


def test_every_package_has_an_init():
    folders = {p.parent for p in sources()} - {SOURCE}
    assert_none([str(f.relative_to(ROOT)) for f in sorted(folders) if not (f / "__init__.py").exists()], "no __init__.py in:")


def test_no_test_is_skipped():
    forbidden = {"sk" + "ip", "sk" + "ipif", "x" + "fail", "import" + "orskip", "Sk" + "ipTest"}
    bad = []
    for path in files_of_tests():
        for node in ast.walk(tree(path)):
            name = node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""
            if name in forbidden:
                bad.append(f"{spot(path, node)} {name}")
    assert_none(bad, "a test runs or is not there:")


@pytest.mark.parametrize(
    ("rule", "pattern"),
    [
        ("unfinished work", MARKS_OF_UNFINISHED_WORK),
        ("a path of one machine", MACHINE_PATHS),
        ("a registry's host", REGISTRY_HOSTS),
    ],
)
def test_tree_holds_no(rule: str, pattern: re.Pattern[str]):
    bad = []
    for path in tracked():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        bad += [f"{path.relative_to(ROOT)}:{text.count(chr(10), 0, m.start()) + 1} {m[0]}" for m in pattern.finditer(text)]
    assert_none(bad, f"{rule} in a tracked file:")


@pytest.mark.parametrize(
    ("pattern", "caught", "passed"),
    [
        (MARKS_OF_UNFINISHED_WORK, "# TO" + "DO: later", "todo list"),
        (MACHINE_PATHS, "see /ro" + "ot/x", "a/tm" + "p/x and https://host/wo" + "rk/x"),
        (REGISTRY_HOSTS, "https://py" + "pi.org/simple", "a registry"),
    ],
)
def test_patterns_catch_what_they_should(pattern: re.Pattern[str], caught: str, passed: str):
    assert pattern.search(caught)
    assert not pattern.search(passed)


def test_dependency_list_is_torch_alone():
    pyproject = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    found = re.search(r"^dependencies = \[(.*?)\]", pyproject, flags=re.M | re.S)
    assert found and re.fullmatch(r'"torch[^",]*"', found[1].strip()), found
