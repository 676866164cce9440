"""Tests lie where the code lies that they are about."""

from __future__ import annotations

from pathlib import Path

FOLDERS = ("core", "kernels", "plugins")


def misplaced(repository: Path) -> list[str]:
    """Test folders without a folder of the same path, and tests that have a module's name but not its place."""
    found = []
    for top in FOLDERS:
        root = repository / "tests" / top
        modules = {path.relative_to(repository) for path in (repository / top).rglob("*.py")}
        names = {path.stem for path in modules}
        for test in sorted(root.rglob("test_*.py")):
            place = test.parent.relative_to(repository / "tests")
            name = test.stem.removeprefix("test_")
            if not (repository / place).is_dir():
                found.append(f"{place} is no folder of the code")
            elif name in names and place / f"{name}.py" not in modules:
                found.append(f"{place}/{test.name} is named after a module that lies elsewhere")
    return found


def test_tests_mirror_the_tree(repository: Path) -> None:
    assert misplaced(repository) == []


def test_a_misplaced_test_is_found(tmp_path: Path) -> None:
    for file in ("core/a/one.py", "tests/core/test_one.py", "tests/core/b/test_two.py", "tests/core/a/test_three.py"):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).touch()
    assert [line.split()[0] for line in misplaced(tmp_path)] == ["core/b", "core/test_one.py"]
