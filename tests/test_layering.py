"""Who may import whom: a module imports only from layers listed before its own."""

import ast
from pathlib import Path

PACKAGE = "ldm4ts_kernels"
ROOT = Path(__file__).parents[1] / PACKAGE
LAYERS = (
    (
        "reference",
        "graphs",
        "eight_bit",
        "caching_allocator",
        "caches",
        "kernels.primitives",
        "kernels.tuning",
    ),
    ("requirements", "optimizers", "storages", "kernels.autograd"),
    ("inputs", "memory_trace", "kernels.problem", "kernels.flops", "kernels.launch"),
    (
        "law_store",
        "kernels.flash_forward",
        "kernels.quantize",
        "kernels.row_terms",
        "kernels.query_splits",
    ),
    ("kernels.flash_backward",),
    ("kernels.flash", "kernels.int8_backward", "native"),
    ("kernels.int8", "native_int8", "wheels"),
    ("backends",),
    ("attention", "operators"),
    ("plugged_layer", "sdpa_override", "checkpointing"),
    ("processors", "context_parallel", "encoders", "layer_report"),
    ("dispatcher",),
    ("plugs",),
    ("acceleration", "diffusers_integration"),
    ("model",),
    ("model_memory",),
    ("training_memory", "data", "metrics", "averages", "batches"),
    ("vram", "checkpoints", "process", "peers", "run_lock", "exclusions"),
    ("sharding", "budget"),
    ("runs", "evaluation", "plots", "training_step"),
    ("run_file", "training_log", "ladder"),
    ("training",),
    ("forecasting", "progress", "doctor", "bench"),
    ("estimator",),
    ("panel",),
    ("train_flags",),
    ("commands",),
    ("machine_commands",),
    ("cli",),
)


def find_layer(module: str) -> tuple[int, str] | None:
    for depth, names in enumerate(LAYERS):
        for name in names:
            if f"{module}.".startswith(f"{name}."):
                return depth, name
    return None


def imports_of(path: Path) -> set[str]:
    """Return the package's own modules that a file imports, lazy imports included."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    prefix = f"{PACKAGE}."
    return {name.removeprefix(prefix) for name in found if name.startswith(prefix)}


def forbidden_imports(root: Path) -> list[str]:
    found = []
    for path in sorted(root.rglob("*.py")):
        if path.name == "__init__.py":
            continue
        module = ".".join(path.relative_to(root).with_suffix("").parts)
        own = find_layer(module)
        if own is None:
            found.append(f"{module} has no layer: add it to LAYERS")
            continue
        for imported in sorted(imports_of(path)):
            theirs = find_layer(imported)
            if theirs and theirs[0] >= own[0] and theirs[1] != own[1]:
                found.append(f"{module} may not import {imported}")
    return found


def test_imports_only_go_down():
    assert forbidden_imports(ROOT) == []


def test_an_import_that_goes_up_is_found(tmp_path):
    (tmp_path / "backends.py").write_text(f"from {PACKAGE}.attention import attention_fn\n")
    assert forbidden_imports(tmp_path) == ["backends may not import attention.attention_fn"]
