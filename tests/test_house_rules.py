"""Which room may import which, and that importing has no side effects."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "jaxclt"

# Prefixes of our own modules that a room may import; itself always included.
ROOMS = {
    "types": (),
    "errors": (),
    "lm": ("types", "errors"),
    "clt": ("types", "errors", "lm.layers", "lm.config"),
    "replacement": ("types", "errors", "lm", "clt"),
    "graph": (
        *("types", "errors", "shapes", "json_text"),
        *("lm", "clt", "replacement"),
    ),
    "patching": ("types", "errors", "lm", "clt"),
    "global_weights": ("types", "errors", "shapes", "lm", "clt"),
    "dashboards": (
        *("types", "errors", "windows", "json_text", "lm", "clt", "global_weights"),
        *("graph.memory", "io.atomic", "io.json_file", "io.npz"),
    ),
    "shapes": (),
    "viewer": ("errors", "json_text", "graph.graph", "graph.shares", "io.json_file"),
    "json_text": (),
}


def modules(room: str) -> list[Path]:
    single = ROOT / f"{room}.py"
    return [single] if single.is_file() else sorted((ROOT / room).rglob("*.py"))


def imports(path: Path) -> set[str]:
    """Full names of everything a file imports, at any depth, except for type checks."""
    tree = ast.parse(path.read_text("utf-8"))
    typing_only = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    found = set()
    for node in ast.walk(tree):
        if node in typing_only:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = path.relative_to(ROOT.parent).with_suffix("").parts
                base = ".".join((*parts[: -node.level], *filter(None, [node.module])))
            # `from jaxclt.lm import run` names a module, `from jaxclt.types import X`
            # a thing in one.
            for alias in node.names:
                full = f"{base}.{alias.name}"
                is_module = (ROOT.parent / full.replace(".", "/")).with_suffix(".py")
                found.add(full if is_module.is_file() else base)
    return found


def within(name: str, allowed: tuple[str, ...]) -> bool:
    return any(
        name == f"jaxclt.{a}" or name.startswith(f"jaxclt.{a}.") for a in allowed
    )


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_what_lies_below_it(room: str) -> None:
    assert modules(room)
    wrong = [
        f"{path.name}: {name}"
        for path in modules(room)
        for name in imports(path)
        if name.split(".")[0] == "jaxclt" and not within(name, (room, *ROOMS[room]))
    ]
    assert not wrong


def test_the_check_sees_a_forbidden_import(tmp_path: Path) -> None:
    """Every spelling of it."""
    file = tmp_path / "bad.py"
    file.write_text(
        "import jaxclt.viewer.page\n"
        "from jaxclt.io import model\n"
        "def f():\n    from jaxclt.lm.run import run\n"
    )
    found = {name for name in imports(file) if not within(name, ("lm",))}
    assert found == {"jaxclt.viewer.page", "jaxclt.io.model"}
    assert "jaxclt.lm.run" in imports(file)


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_know_no_tokenizers(room: str) -> None:
    banned = {"transformers", "torch", "huggingface_hub", "safetensors", "gguf", "tyro"}
    if room == "viewer":
        banned |= {"jax", "flax"}
    for path in modules(room):
        assert not {name.split(".")[0] for name in imports(path)} & banned, path


def test_no_json_of_ours_can_hold_nan() -> None:
    """JSON has no word for it: `to_json` writes null, orjson does so by itself.

    Messages quote single characters of names, which is no JSON of ours.
    """
    for path in {*ROOT.rglob("*.py")} - {ROOT / "errors.py"}:
        calls = [
            node
            for node in ast.walk(ast.parse(path.read_text("utf-8")))
            if isinstance(node, ast.Call)
            and ast.unparse(node.func) in ("json.dumps", "json.dump")
        ]
        said = [
            {word.arg: ast.unparse(word.value) for word in c.keywords} for c in calls
        ]
        assert all(words.get("allow_nan") == "False" for words in said), path


def test_nothing_imports_the_command_line() -> None:
    for path in ROOT.rglob("*.py"):
        if path.relative_to(ROOT).parts[0] not in ("cli", "cli.py", "__main__.py"):
            assert not [n for n in imports(path) if within(n, ("cli",))], path


def run(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_viewer_does_not_need_jax() -> None:
    """Without the package's own front door, which does import jax."""
    code = (
        "import sys, types\n"
        "front = sys.modules['jaxclt'] = types.ModuleType('jaxclt')\n"
        f"front.__path__ = [{str(ROOT)!r}]\n"
        "import jaxclt.viewer.graph_json, jaxclt.viewer.page\n"
        "print([m for m in ('jax', 'flax', 'transformers') if m in sys.modules])"
    )
    assert run(code) == "[]"


def test_importing_starts_no_backend_and_no_tokenizer() -> None:
    """Reading a config or asking for help must not wait for a device."""
    code = (
        "import sys, pkgutil, importlib, jaxclt\n"
        "for room in (\n"
        "    'lm', 'clt', 'replacement', 'graph', 'viewer', 'io',\n"
        "    'patching', 'validation', 'global_weights', 'dashboards',\n"
        "    'evaluation',\n"
        "):\n"
        "    package = importlib.import_module('jaxclt.' + room)\n"
        "    for m in pkgutil.iter_modules(package.__path__):\n"
        "        importlib.import_module(package.__name__ + '.' + m.name)\n"
        "from jax._src import xla_bridge\n"
        "before = xla_bridge.backends_are_initialized()\n"
        "import jax; jax.devices()\n"
        "print(before, xla_bridge.backends_are_initialized(),\n"
        "      'transformers' in sys.modules, 'torch' in sys.modules)"
    )
    assert run(code) == "False True False False"
