"""What no linter sees: how JSON is written, and that importing has no side effects.

Which room may import which is said in pyproject.toml (`lint-imports`).
"""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1] / "jaxclt"


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


def test_the_front_door_is_light() -> None:
    """A name imports its room when it is first used; one of a room's name does too.

    One name is a room: `jaxclt.tasks`.
    """
    code = (
        "import sys, jaxclt\n"
        "light = not {'jax', 'numpy'} & set(sys.modules)\n"
        "import jaxclt.global_weights.gather\n"
        "names = [getattr(jaxclt, x) for x in jaxclt.__all__ if x != 'tasks']\n"
        "print(light, sorted(dir(jaxclt)) == sorted(jaxclt.__all__),\n"
        "      any(isinstance(x, type(sys)) for x in names))"
    )
    assert run(code) == "True True False"


def test_importing_starts_no_backend_and_no_tokenizer() -> None:
    """Reading a config or asking for help must not wait for a device."""
    code = (
        "import sys, pkgutil, importlib, jaxclt\n"
        "for m in pkgutil.walk_packages(jaxclt.__path__, 'jaxclt.'):\n"
        "    if not m.name.endswith('__main__'):\n"
        "        importlib.import_module(m.name)\n"
        "from jax._src import xla_bridge\n"
        "before = xla_bridge.backends_are_initialized()\n"
        "import jax; jax.devices()\n"
        "print(before, xla_bridge.backends_are_initialized(), *{'transformers',\n"
        "      'torch', 'huggingface_hub', 'tokenizers'} & set(sys.modules))"
    )
    assert run(code) == "False True"
