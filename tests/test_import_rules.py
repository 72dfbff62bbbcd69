"""Who may import whom (docs/architecture.md), read from the source and never executed."""

import ast
import os
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FILES = sorted([*(ROOT / "v4jax").rglob("*.py"), *(ROOT / "kernels_pallas").rglob("*.py")])

KERNELS = {"kernels_pallas"}
BASE = {"v4jax.errors", "v4jax.config", "v4jax.dtypes", "v4jax.sharding", "v4jax.quant", "v4jax.cache"}
TEXT = {"v4jax.errors", "v4jax.chat", "v4jax.tokenizer"}
MODEL = BASE | {"v4jax.ops", "v4jax.parallel", "v4jax.compilation", "v4jax.model"}
STORED = MODEL | TEXT | {"v4jax.distributed", "v4jax.checkpoint", "v4jax.loading", "kernels_pallas.formats"}
USES = STORED | {"v4jax.host_memory", "v4jax.logits", "v4jax.train", "v4jax.serve"}

# Module → what it may import of this project; the longest prefix counts. Each may import itself.
ALLOWED = {
    "kernels_pallas": KERNELS,
    "v4jax": USES | {"v4jax.info"},  # __init__: imported when first used
    "v4jax.__main__": {"v4jax.cli"},
    "v4jax.errors": set(),
    "v4jax.config": {"v4jax.errors", "v4jax.hf_config"},  # for from_hf and to_hf, inside the methods
    "v4jax.hf_config": {"v4jax.errors", "v4jax.config"},
    "v4jax.dtypes": {"v4jax.errors", "v4jax.config"},
    "v4jax.sharding": {"v4jax.errors", "v4jax.config", "v4jax.dtypes", "v4jax.cache"},
    "v4jax.quant": {"v4jax.errors", "v4jax.config", "v4jax.dtypes", "kernels_pallas.formats"},
    "v4jax.cache": BASE - {"v4jax.cache"},
    "v4jax.chat": {"v4jax.errors"},
    "v4jax.tokenizer": TEXT,
    "v4jax.ops": KERNELS | {"v4jax.errors", "v4jax.quant", "v4jax.sharding"},
    "v4jax.distributed": {"v4jax.errors"},
    "v4jax.parallel": {"v4jax.cache", "v4jax.sharding"},
    "v4jax.compilation": {"v4jax.ops", "kernels_pallas.tpu"},
    "v4jax.model": MODEL | {"kernels_pallas.formats"},
    "v4jax.checkpoint": STORED - {"v4jax.loading"},
    "v4jax.checkpoint.verb": STORED | {"v4jax.verify"},
    "v4jax.loading": STORED,
    "v4jax.streaming": STORED,
    "v4jax.verify": STORED | {"v4jax.streaming", "v4jax.logits", "v4jax.peer"},
    "v4jax.logits": STORED | {"v4jax.streaming"},
    "v4jax.train": STORED | {"v4jax.train", "v4jax.host_memory", "v4jax.plotting"},
    "v4jax.serve": STORED | {"v4jax.serve", "v4jax.host_memory"},
    "v4jax.info": USES | KERNELS,
    "v4jax.plan": USES | KERNELS | {"v4jax.plan", "v4jax.cost", "v4jax.info", "v4jax.plotting"},
    "v4jax.host_memory": set(),
    "v4jax.plotting": set(),
    "v4jax.cost": STORED,
    "v4jax.peer": USES | {"v4jax.cost"},
    "v4jax.bench_products": {"v4jax.compilation", "v4jax.plan.costs", "v4jax.plan.products"},
    "v4jax.bench_sides": USES | {"v4jax.cost", "v4jax.peer", "v4jax.bench_products"},
    "v4jax.bench": USES | KERNELS | {"v4jax.cost", "v4jax.bench_sides"},
    "v4jax.bench_kernels": KERNELS | {"v4jax.errors", "v4jax.bench_kernels_report"},
    "v4jax.bench_kernels_report": {"v4jax.errors", "v4jax.plotting"},
    "v4jax.bench_verb": {"v4jax.bench", "v4jax.bench_kernels"},
    "v4jax.cli": {"v4jax", "kernels_pallas"},
}
KERNEL_DEPENDENCIES = {"jax", "numpy", "jaxtyping", "ml_dtypes"}
# What an extra of pyproject.toml brings: imported in one file, inside a function.
OPTIONAL = {
    "grain",
    "tensorboardX",
    "matplotlib",
    "starlette",
    "uvicorn",
    "torch",
    "transformers",
    "accelerate",
    "peft",
    "fsspec",
}


def module_name(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def is_within(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


def rule_of(module: str) -> str:
    return max((name for name in ALLOWED if is_within(module, name)), key=len)


def imports(tree: ast.AST) -> Iterator[str]:
    """Every imported module; `from package import name` gives `package.name`, whether that is a module or not."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"relative import of {node.module}"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def runtime_imports(tree: ast.Module, *, top_level: bool = False) -> Iterator[str]:
    """What running the file may import: not `if TYPE_CHECKING`, and at the top level nothing inside functions."""
    waiting: list[ast.AST] = list(tree.body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield from imports(node)
        is_typing = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        is_function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        if not is_typing and not (top_level and is_function):
            waiting.extend(ast.iter_child_nodes(node))


@pytest.fixture(scope="module")
def trees() -> dict[Path, ast.Module]:
    return {file: ast.parse(file.read_text(encoding="utf-8")) for file in FILES}


def test_imports_go_down_only(trees):
    wrong = []
    for file, tree in trees.items():
        module = module_name(file)
        rule = rule_of(module)
        for target in set(imports(tree)):
            if not is_within(target, "v4jax") and not is_within(target, "kernels_pallas"):
                continue
            allowed = ALLOWED[rule] | ({rule} if rule != "v4jax" else set())
            if not any(is_within(target, name) for name in allowed):
                wrong.append(f"{module} → {target}")
    assert not wrong, "\n".join(sorted(wrong))


def test_kernels_know_only_jax_and_numpy(trees):
    wrong = []
    for file, tree in trees.items():
        if file.is_relative_to(ROOT / "kernels_pallas"):
            allowed = KERNEL_DEPENDENCIES | KERNELS | set(sys.stdlib_module_names)
            wrong += [f"{module_name(file)} → {name}" for name in imports(tree) if name.split(".")[0] not in allowed]
    assert not wrong, "\n".join(wrong)


def test_nothing_uses_the_private_parts_of_jax():
    wrong = [str(file.relative_to(ROOT)) for file in FILES if "jax._src" in file.read_text(encoding="utf-8")]
    assert not wrong


def test_optional_packages_are_imported_inside_functions_of_one_file_each(trees):
    owners = defaultdict(set)
    for file, tree in trees.items():
        for name in runtime_imports(tree):
            owners[name.split(".")[0]].add(module_name(file))
        eager = {name.split(".")[0] for name in runtime_imports(tree, top_level=True)} & OPTIONAL
        assert not eager, f"{module_name(file)} imports {eager} when it is imported"
    shared = {name: owners[name] for name in OPTIONAL if len(owners[name]) > 1}
    assert not shared


def test_the_command_line_and_the_package_start_without_heavy_imports(trees):
    light = {"tyro", "rich", "jax", "numpy", "flax"}
    for name in ("v4jax/__init__.py", "v4jax/cli.py"):
        assert not {module.split(".")[0] for module in runtime_imports(trees[ROOT / name], top_level=True)} & light


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    variables = os.environ | {"PYTHONPATH": str(ROOT)} | environment
    return subprocess.run([sys.executable, "-c", code], env=variables, capture_output=True, text=True, check=False)


def test_importing_starts_no_backend():
    # A backend of this name cannot start, so that whatever asks for one fails.
    modules = ["v4jax", *(module_name(file) for file in FILES if file.name not in ("__init__.py", "__main__.py"))]
    found = python("; ".join(f"import {module}" for module in modules), JAX_PLATFORMS="nonexistent")
    assert found.returncode == 0, found.stderr


def test_every_public_name_is_there():
    found = python("import v4jax; [getattr(v4jax, name) for name in dir(v4jax)]", JAX_PLATFORMS="nonexistent")
    assert found.returncode == 0, found.stderr


def test_public_names_are_lazy_and_match_what_type_checkers_see(trees):
    import v4jax

    body = next(node for node in trees[ROOT / "v4jax/__init__.py"].body if isinstance(node, ast.If)).body
    seen = {node.names[0].asname: node.module for node in body if isinstance(node, ast.ImportFrom)}
    assert seen == v4jax._PUBLIC
    assert set(dir(v4jax)) == {*seen, "__version__"}
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        v4jax.nothing  # noqa: B018
    found = python("import sys, v4jax; assert not {'jax', 'flax', 'tokenizers'} & set(sys.modules), 'not lazy'")
    assert found.returncode == 0, found.stderr
