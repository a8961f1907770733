"""Write build/torch-cuda, which `kernels.get_local_kernel` loads without this package installed.

    python torch-ext/assemble.py [--output build] [--backend cuda]

A Hub kernel goes by a name that differs from build to build, so that two of them may be loaded at
once. So the modules of ldm4ts_kernels/kernels, which are self-contained, are written with relative
imports and their operators in a namespace of that name; nothing else in them changes.
"""

import argparse
import base64
import hashlib
import json
import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "ldm4ts_kernels"


def read_sources() -> dict[str, str]:
    """Return the files of a build, before they are named: the kernels, and the shim over them."""
    kernels = sorted((ROOT / PACKAGE / "kernels").glob("*.py"))
    sources = {file.name: file.read_text() for file in kernels}
    return sources | {"__init__.py": (ROOT / "torch-ext" / PACKAGE / "__init__.py").read_text()}


def renamed(text: str, namespace: str) -> str:
    """Return a module's text with its own imports relative and its operators in `namespace`."""
    text = re.sub(rf"\bfrom {PACKAGE}\.kernels\.(\w+) import\b", r"from .\1 import", text)
    return re.sub(rf"\b{PACKAGE}\b", namespace, text)


def assemble(output: Path, backend: str) -> Path:
    """Write one build variant into `output`, and return its folder."""
    general = tomllib.loads((ROOT / "build.toml").read_text())["general"]
    sources = read_sources()
    unique = hashlib.sha256("".join(sources.values()).encode()).hexdigest()[:8]
    namespace = f"_{PACKAGE}_{backend}_{unique}"
    variant = output / f"torch-{backend}"
    variant.mkdir(parents=True, exist_ok=True)
    digests = {}
    for name, text in sources.items():
        content = renamed(text, namespace).encode()
        (variant / name).write_bytes(content)
        digests[name] = base64.b64encode(hashlib.sha256(content).digest()).decode()
    metadata = {
        "id": namespace,
        "name": general["name"],
        "version": general["version"],
        "license": general["license"],
        "python-depends": [],
        "backend": {"type": backend},
        "digest": {"algorithm": "sha256", "files": digests},
    }
    (variant / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")
    return variant


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=ROOT / "build")
    parser.add_argument("--backend", default="cuda", choices=("cuda", "cpu"))
    arguments = parser.parse_args()
    assemble(arguments.output, arguments.backend)


if __name__ == "__main__":
    main()
