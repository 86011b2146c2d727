"""How large the house is, and who imports whom: lines, rooms, arrows, read from the sources.

python -m paralign.tools.house [ROOT]      # of a checkout; for an older commit, of a `git worktree` of it
"""

from __future__ import annotations

import ast
import sys
from collections import defaultdict
from pathlib import Path

PACKAGES = ("engine", "models")


def imports_of(path: Path, root: Path) -> set[str]:
    """Absolute names of everything that a file imports, relative imports resolved."""
    package = ["paralign", *path.relative_to(root).with_suffix("").parts]
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: -node.level] if node.level else []
            module = ".".join([*base, *(node.module or "").split(".")]).strip(".")
            names |= {f"{module}.{alias.name}" for alias in node.names}
    return names


def room_of(name: str) -> str | None:
    """The room of the engine that a dotted name lies in: a file or a folder right in engine/."""
    parts = name.split(".")
    return parts[2] if parts[:2] == ["paralign", "engine"] and len(parts) > 2 else None


def arrows(root: Path) -> dict[str, set[str]]:
    """For each room of the engine the others that it imports."""
    found: dict[str, set[str]] = defaultdict(set)
    for path in sorted((root / "engine").rglob("*.py")):
        here = path.relative_to(root / "engine").with_suffix("").parts[0]
        if here != "__init__":
            rooms = {room_of(name) for name in imports_of(path, root)}
            found[here] |= {room for room in rooms if room and room != here}
    return dict(found)


def main() -> None:
    """Print the numbers, and each room's arrows."""
    root = Path(sys.argv[1] if len(sys.argv) > 1 else ".").resolve()
    found = arrows(root)
    n_lines = sum(
        len(path.read_text(encoding="utf-8").splitlines())
        for package in PACKAGES
        for path in (root / package).rglob("*.py")
    )
    for room in sorted(found):
        print(f"{room:16} → {', '.join(sorted(found[room]))}")
    n_arrows = sum(len(others) for others in found.values())
    print(f"{n_lines:,} lines of {' and '.join(PACKAGES)}, {len(found)} rooms, {n_arrows} arrows")


if __name__ == "__main__":
    main()
