"""The house rules, as tests: layers, torch-free rooms, sizes, names, forbidden calls, unread options, docstrings, documents.

Every rule is a function `rule(root) -> list of complaints` over a source tree, so that each is also run on a tree with a
planted fault and must turn red there. Try it: `pytest tests/test_house.py -s` prints the size of every room.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# A room may import rooms of lower layers only. Every module of the package has its line here; a new one without a line fails.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("errors", "files", "config", "screen"),
    ("records", "formats", "ratings", "grammar", "losses", "runs", "trackers", "templating", "certainty"),
    ("tokens", "store", "audit"),
    ("batches", "attention", "readout", "exact", "intake"),
    ("models", "adapters", "reference", "parallel", "checkpoints", "objectives"),
    ("engine", "selfcheck"),
    ("endpoints", "judges", "sampling", "rewards", "pairing", "rollouts"),
    ("evaluate", "monitors", "frontier", "estimate", "calibration"),
    ("report", "label"),
    ("pipeline",),
    ("stages", "cli"),
    ("api",),
)
LAYER = {room: number for number, row in enumerate(LAYERS) for room in row}

# Imports inside one layer, each with its reason. Together they must not make a circle.
SIDEWAYS: dict[tuple[str, str], str] = {
    ("files", "errors"): "a full disk becomes a DiskError where it happens",
    ("config", "errors"): "a contradiction between options becomes a UsageError where it is found",
    ("ratings", "records"): "a record's judgements are games between the models that wrote its answers",
    ("formats", "records"): "formats is the one door through which rows become records",
    ("adapters", "models"): "an adapter stands on a model that is loaded there",
    ("store", "tokens"): "the store keeps what the tokeniser's room made, with the names it has there",
    ("attention", "batches"): "the mask is read off a batch's segment table",
    ("readout", "batches"): "a batch says which hidden state predicts which token",
    ("judges", "endpoints"): "what a judge says is read as strictly as any answer of an endpoint, and asked for again where it is none",
    ("rollouts", "sampling"): "a round begins with answers of the policy as it stands",
    ("cli", "stages"): "each verb calls its stage, and imports it only inside the verb",
}
# Imports from one stage to another.
STAGE_TO_STAGE: dict[tuple[str, str], str] = {
    **{("demo", verb): "the demo is the pipeline of the verbs, run in turn" for verb in ("dpo", "reward", "ppo")},
    ("evaluate", "data"): "tokens are shown as data show shows them",
    **{("frontier", verb): "every point of a frontier is a run of its verb" for verb in ("sft", "dpo", "online", "ppo")},
}
ONLY_INSIDE_FUNCTIONS = {("cli", "stages")}

TORCH_FREE = ("errors", "files", "config", "screen", "records", "formats", "ratings", "grammar", "runs", "trackers", "templating", "report",
              "label", "cli", "api")  # fmt: skip
TENSOR_LIBRARIES = ("torch", "transformers", "tokenizers", "safetensors", "peft", "datasets", "accelerate")
SLOW_FOR_HELP = (*TENSOR_LIBRARIES, "numpy", "scipy", "matplotlib", "jinja2")

# Lines of Python per room. Growth past a line here is raised in the same commit, with the reason in its message.
# The design hoped for 8,000 lines of the whole. A quarter of what is here are docstrings with shapes, errors and sources, and every
# input has its refusal; docs/decisions.md says what was measured.
# Raised for reward models (of steps, of classes), ensembles, distillation, token credit, the offline loop, on-policy training, evaluation.
BUDGET_TOTAL = 23300
BUDGET_DEFAULT = 420
BUDGET: dict[str, int] = {
    "pipeline": 800,  # a run from files or from the policy's own answers to report, which every verb that trains shares
    "config": 1300,  # half are the options of two dozen verbs, the rest reads them strictly from words, YAML, runs and the losses' text
    "losses": 1900,  # every loss with its source and three numbers, a file per kind of item
    "stages": 4250,  # a file per verb
    "formats": 1400,  # what rows mean: a function per layout; kinds of files; reading: three files
    "report": 1650,  # numbers into sentences, into curves, into pages and a model card: a file per kind of page
    "ratings": 1600,  # four models of comparisons, whether ratings exist, three kinds of intervals, six kinds of rows: five files
    "engine": 460,  # the one loop; with passes that are cut again where memory runs out
    "exact": 500,  # a testbed per kind of objective
    "models": 620,  # what a model folder from a stranger may hold is read by allow-lists before any library sees it; scalar heads
    "tokens": 540,  # with prompts encoded once; every way in which tokenisers differ, each with its refusal
    "rewards": 500,  # rules, reward models, ensembles, endpoints' judges: one kind of answer
    "rollouts": 620,  # samples of the current policy as steps; what they count for, what the value model begins as
    "evaluate": 420,  # every figure of evidence
}
LONGEST_FUNCTION = 80
LONG_FUNCTIONS: dict[str, str] = {}  # 'room.function': why it is one piece

# The names that a set of options goes by in the house: `options.beta` reads beta, `batch.beta` does not.
OPTIONS_ARE_CALLED = {"options"}
# A room that a stage uses -> rooms that get its options whole.
READ_FOR_STAGES = {"pipeline": ("pipeline", "intake"), "endpoints": ("endpoints",)}
# Functions of config.py that stages call to read options for them.
READERS_IN_CONFIG = {"loss_terms", "scored_terms", "kl_place", "reads_draws", "learns_value"}

FORBIDDEN_NAMES = {"utils", "util", "helpers", "helper", "misc", "common"}
FORBIDDEN_IMPORTS = {"pickle", "cPickle", "dill", "cloudpickle", "shelve", "marshal", "joblib"}
FORBIDDEN_CALLS = {"eval", "exec", "torch.load", "torch.save", "os.system", "os.popen", "yaml.load", "yaml.unsafe_load"}
FORBIDDEN_TRUE = {"trust_remote_code", "shell", "allow_pickle"}

Rule = Callable[[Path], list[str]]
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def sources(root: Path) -> list[Path]:
    return sorted((root / "preftune").rglob("*.py"))


def module(root: Path, path: Path) -> list[str]:
    """preftune/losses/pairs.py -> ['losses', 'pairs']; preftune/__init__.py -> []."""
    parts = list(path.relative_to(root / "preftune").with_suffix("").parts)
    return parts[:-1] if parts[-1] == "__init__" else parts


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def dotted(node: ast.expr) -> str:
    """`torch.load` of the call `torch.load(x)`; '' for anything that is not a chain of names."""
    if isinstance(node, ast.Attribute):
        left = dotted(node.value)
        return f"{left}.{node.attr}" if left else ""
    return node.id if isinstance(node, ast.Name) else ""


def imports(root: Path, path: Path) -> Iterator[tuple[list[str], int, bool]]:
    """Every import of ours as (path below preftune, line, inside a function); those only for type checkers included."""
    here = module(root, path)
    package = here if path.name == "__init__.py" else here[:-1]
    found = tree(path)
    lazy = {id(inner) for outer in ast.walk(found) if isinstance(outer, FUNCTIONS) for inner in ast.walk(outer)}
    for node in ast.walk(found):
        names: list[list[str]] = []
        if isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                base = ["preftune", *package[: len(package) - node.level + 1]]
            else:
                base = []
            base = base + (node.module.split(".") if node.module else [])
            names = [[*base, alias.name] for alias in node.names]
        for name in names:
            if name[0] == "preftune":
                yield name[1:], node.lineno, id(node) in lazy


def exists(root: Path, name: list[str]) -> list[str]:
    """The module part of an imported name: ['losses', 'pairs', 'sigmoid'] -> ['losses', 'pairs']."""
    while name:
        place = root / "preftune" / Path(*name)
        if place.is_dir() or place.with_suffix(".py").exists():
            break
        name = name[:-1]
    return name


def layers(root: Path) -> list[str]:
    """Rooms import strictly downwards; sideways and stage-to-stage imports only where a table says why."""
    wrong = []
    for path in sources(root):
        here = module(root, path)
        if not here or here[0] == "__main__":
            continue
        if here[0] not in LAYER:
            wrong.append(f"{path.relative_to(root)}: the room {here[0]!r} has no layer")
            continue
        for name, line, lazy in imports(root, path):
            there = exists(root, name)
            if not there:  # the package itself: its version
                continue
            where = f"{path.relative_to(root)}:{line}"
            edge = (here[0], there[0])
            if edge[0] == edge[1]:
                other = here[0] == "stages" and len(there) > 1 and here[1:] != there[1:]
                if other and (here[-1], there[1]) not in STAGE_TO_STAGE:
                    wrong.append(f"{where}: stage {here[-1]} imports stage {there[1]}")
            elif there[0] not in LAYER:
                wrong.append(f"{where}: imports {there[0]!r}, which has no layer")
            elif LAYER[there[0]] > LAYER[here[0]] or (LAYER[there[0]] == LAYER[here[0]] and edge not in SIDEWAYS):
                wrong.append(f"{where}: {here[0]} (layer {LAYER[here[0]]}) imports {there[0]} (layer {LAYER[there[0]]})")
            if edge in ONLY_INSIDE_FUNCTIONS and not lazy:
                wrong.append(f"{where}: {here[0]} may import {there[0]} only inside a function")
    return wrong


def torch_free(root: Path) -> list[str]:
    """Each torch-free room is imported in a process where the tensor libraries cannot be; `cli` and `api` without the slow ones too."""
    wrong = []
    for room in TORCH_FREE:
        if not (root / "preftune" / f"{room}.py").exists() and not (root / "preftune" / room).is_dir():
            continue
        blocked = SLOW_FOR_HELP if room in ("cli", "api") else TENSOR_LIBRARIES
        program = (
            "import sys\n"
            "class Door:\n"
            "    def find_spec(self, name, path=None, target=None):\n"
            f"        if name.split('.')[0] in {blocked!r}: raise ImportError(name + ' is blocked here')\n"
            f"sys.meta_path.insert(0, Door()); sys.path.insert(0, {str(root)!r})\n"
            f"import preftune.{room}"
        )
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=root, timeout=60)
        if done.returncode:
            wrong.append(f"{room}: {done.stderr.strip().splitlines()[-1]}")
    return wrong


def sizes(root: Path) -> dict[str, int]:
    """Lines of Python per room."""
    count: dict[str, int] = {}
    for path in sources(root):
        room = (module(root, path) or ["__init__"])[0]
        count[room] = count.get(room, 0) + len(path.read_text(encoding="utf-8").splitlines())
    return count


def budgets(root: Path) -> list[str]:
    """No room, no function and not the whole is longer than the tables above allow."""
    count = sizes(root)
    allowed = {room: BUDGET.get(room, BUDGET_DEFAULT) for room in count}
    wrong = [f"{room}: {n} lines, budget {allowed[room]}" for room, n in count.items() if n > allowed[room]]
    if sum(count.values()) > BUDGET_TOTAL:
        wrong.append(f"all: {sum(count.values())} lines, budget {BUDGET_TOTAL}")
    for path in sources(root):
        for node in ast.walk(tree(path)):
            if isinstance(node, FUNCTIONS):
                length = node.end_lineno - node.lineno + 1
                name = ".".join([*module(root, path), node.name])
                if length > LONGEST_FUNCTION and name not in LONG_FUNCTIONS:
                    where = f"{path.relative_to(root)}:{node.lineno}"
                    wrong.append(f"{where}: {node.name} has {length} lines, {LONGEST_FUNCTION} allowed")
    return wrong


def names(root: Path) -> list[str]:
    """No drawer for what has no place."""
    drawers = [path for path in sources(root) if FORBIDDEN_NAMES & set(module(root, path))]
    return [f"{path.relative_to(root)}: a room is named for what it does" for path in drawers]


def forbidden(root: Path) -> list[str]:
    """No pickle, no remote code, no evaluated strings, no shell, no bare except."""
    wrong = []
    for path in sources(root):
        for node in ast.walk(tree(path)):
            what = ""
            if isinstance(node, ast.Import):
                what = ", ".join(sorted({alias.name.split(".")[0] for alias in node.names} & FORBIDDEN_IMPORTS))
            elif isinstance(node, ast.ImportFrom):
                what = node.module if node.module and node.module.split(".")[0] in FORBIDDEN_IMPORTS else ""
            elif isinstance(node, ast.Call) and dotted(node.func) in FORBIDDEN_CALLS:
                what = f"{dotted(node.func)}()"
            elif isinstance(node, ast.keyword) and node.arg in FORBIDDEN_TRUE:
                what = "" if isinstance(node.value, ast.Constant) and node.value.value is False else f"{node.arg}="
            elif isinstance(node, ast.ExceptHandler) and node.type is None:
                what = "except without a type"
            if what:
                wrong.append(f"{path.relative_to(root)}:{node.lineno}: {what}")
    return wrong


def option_fields(root: Path) -> list[tuple[str, str]]:
    """(verb's class, option) of config.py; an inherited option stands with every verb that has it."""
    classes = {node.name: node for node in tree(root / "preftune" / "config.py").body if isinstance(node, ast.ClassDef)}
    bases = {name: [base.id for base in node.bases if isinstance(base, ast.Name)] for name, node in classes.items()}
    own = {
        name: [field.target.id for field in node.body if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)]
        for name, node in classes.items()
        if any("dataclass" in ast.unparse(mark) for mark in node.decorator_list)
    }

    def fields(name: str) -> list[str]:
        return [option for base in bases.get(name, []) for option in fields(base)] + own.get(name, [])

    inherited = {base for names in bases.values() for base in names}
    return [(name, option) for name in own if name not in inherited for option in fields(name)]


def options_read(node: ast.AST) -> set[str]:
    """The x of every `options.x` that is read."""
    found = [n for n in ast.walk(node) if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Load)]
    return {n.attr for n in found if (getattr(n.value, "id", None) or getattr(n.value, "attr", None)) in OPTIONS_ARE_CALLED}


def imported(root: Path, path: Path) -> set[str]:
    """Rooms that a file imports."""
    return {name[0] for name, _, _ in imports(root, path) if name} if path.exists() else set()


def unread_options(root: Path) -> list[str]:
    """An option that its verb's stage does not read (no room, for a verb without a stage) promises what nobody does."""
    config = tree(root / "preftune" / "config.py").body
    for_all = set().union(*(options_read(node) for node in config if getattr(node, "name", "") in READERS_IN_CONFIG))
    anywhere = set().union(*(options_read(tree(path)) for path in sources(root) if path.name != "config.py"))
    wrong, read = [], dict[Path, set[str]]()
    for verb, option in option_fields(root):
        stage = root / "preftune" / "stages" / f"{re.findall('[A-Z][a-z]*', verb)[0].lower()}.py"  # DataCheck: the file of `data`
        if stage not in read:
            rooms = imported(root, stage)
            readers = [stage, *(root / "preftune" / f"{room}.py" for used, more in READ_FOR_STAGES.items() if used in rooms
                                for room in more if (root / "preftune" / f"{room}.py").exists())]  # fmt: skip
            read[stage] = set().union(*(options_read(tree(path)) for path in readers)) if stage.exists() else anywhere
        if option not in read[stage] | for_all:
            wrong.append(f"config.py: {verb}.{option} is read nowhere" + (f" in stages/{stage.name}" if stage.exists() else ""))
    return wrong


def undocumented(root: Path) -> list[str]:
    """Every module, and every public function and class at its top level, says what it is."""
    wrong = []
    for path in sources(root):
        found = tree(path)
        if ast.get_docstring(found) is None and found.body:
            wrong.append(f"{path.relative_to(root)}: no docstring")
        for node in found.body:
            public = isinstance(node, (*FUNCTIONS, ast.ClassDef)) and not node.name.startswith("_")
            if public and ast.get_docstring(node) is None:
                wrong.append(f"{path.relative_to(root)}:{node.lineno}: {node.name} has no docstring")
    return wrong


def tracked(root: Path) -> list[Path]:
    """The files git would carry away; all files where there is no git."""
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(listing, capture_output=True, text=True, cwd=root)
    if done.returncode or not (root / ".git").exists():
        return [path for path in root.rglob("*") if path.is_file()]
    return [root / name for name in done.stdout.split("\0") if name and (root / name).is_file()]


def machine_paths(root: Path) -> list[str]:
    """A path of somebody's machine means nothing on another."""
    pattern = re.compile(rb"(?<![\w.])/(?:work|root|home|Users|opt/wheels|opt/pypi)/[\w.-]+")
    wrong = []
    for path in tracked(root):
        content = path.read_bytes()
        if b"\0" not in content[:8192]:
            wrong += [f"{path.relative_to(root)}: {match.decode()}" for match in set(pattern.findall(content))]
    return wrong


def documents(root: Path) -> list[Path]:
    return [*sorted(root.glob("README*.md")), *sorted((root / "docs").rglob("*.md"))]


def commands(path: Path) -> list[list[str]]:
    """The `$ ...` lines of a document's console blocks (also of those headed `console refused`), split into words."""
    found = []
    for block in re.findall(r"```console(?: refused)?\n(.*?)```", path.read_text(encoding="utf-8"), re.DOTALL):
        found += [line[2:].split() for line in block.replace("\\\n", " ").splitlines() if line.startswith("$ ")]
    return found


def verbs(root: Path) -> set[str]:
    """The keys of the table VERBS in cli.py."""
    for node in tree(root / "preftune" / "cli.py").body:
        target = node.target if isinstance(node, ast.AnnAssign) else node.targets[0] if isinstance(node, ast.Assign) else None
        if isinstance(target, ast.Name) and target.id == "VERBS" and isinstance(node.value, ast.Dict):
            return {ast.literal_eval(key).split()[0] for key in node.value.keys}
    return set()


def documented_commands(root: Path) -> list[str]:
    """Every command that a document shows is a target of the Makefile or a verb of the program."""
    targets = set(re.findall(r"^([a-z]+):", (root / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    known = verbs(root)
    wrong = []
    for path in documents(root):
        for words in commands(path):
            program, first = [*words, "--help"][:2]
            if program == "make" and first not in targets:
                wrong.append(f"{path.relative_to(root)}: make {first}: no such target")
            if program.endswith("preftune") and not first.startswith("-") and first not in known:
                wrong.append(f"{path.relative_to(root)}: preftune {first}: no such verb")
    return wrong


def dead_links(root: Path) -> list[str]:
    """A relative link of a document leads to a file that is there."""
    wrong = []
    for path in documents(root):
        for link in re.findall(r"\]\(([^)\s#]+)(?:#[^)]*)?\)", path.read_text(encoding="utf-8")):
            if "://" not in link and not (path.parent / link).exists():
                wrong.append(f"{path.relative_to(root)}: {link} is not there")
    return wrong


RULES: tuple[Rule, ...] = (
    layers, torch_free, budgets, names, forbidden, unread_options, undocumented, machine_paths, documented_commands, dead_links,
)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_house_keeps(rule):
    complaints = rule(ROOT)
    assert not complaints, f"{rule.__doc__.splitlines()[0]}\n" + "\n".join(complaints)


def test_size_of_every_room(capsys):
    count = sizes(ROOT)
    with capsys.disabled():
        if "-s" in sys.argv:
            print()
            for number, row in enumerate(LAYERS):
                print(f"{number}  " + "  ".join(f"{room} {count[room]}" for room in row if room in count))
            print(f"   all {sum(count.values())} of {BUDGET_TOTAL}")
    assert sum(count.values()) > 1000


def test_the_sweeps_swept():
    """A rule that looked at nothing would be green for ever."""
    assert len(sources(ROOT)) >= 20
    assert len(option_fields(ROOT)) >= 80
    assert {verb for verb, _ in option_fields(ROOT)} >= {"Dpo", "Logprobs", "Sample", "Chat", "Report", "Demo"}
    assert sum(len(list(imports(ROOT, path))) for path in sources(ROOT)) >= 30
    assert sum((ROOT / "preftune" / f"{room}.py").exists() for room in TORCH_FREE) >= 6
    assert len(tracked(ROOT)) >= 40
    assert sum(len(commands(path)) for path in documents(ROOT)) >= 8
    assert set(TORCH_FREE) <= set(LAYER) and len(LAYER) == sum(map(len, LAYERS))


def test_sideways_imports_make_no_circle():
    left = set(SIDEWAYS)
    while left:
        loose = {edge for edge in left if edge[1] not in {source for source, _ in left}}
        assert loose, f"a circle in {left}"
        left -= loose


# --- the tests of the tests: a small sound house, and one planted fault at a time --------------------------------------------

SOUND = {
    "preftune/__init__.py": '"""A house."""\n__version__ = "0"\n',
    "preftune/errors.py": '"""Faults."""\n\n\nclass UsageError(ValueError):\n    """A fault."""\n',
    "preftune/config.py": '"""Options."""\nfrom dataclasses import dataclass\n'
                          '@dataclass(frozen=True)\nclass Texts:\n    """Shared options."""\n    beta: float = 0.1\n'
                          '@dataclass(frozen=True)\nclass Dpo(Texts):\n    """Options of dpo."""\n    lr: float = 0.1\n',
    "preftune/records.py": '"""Nouns."""\n',
    "preftune/engine.py": '"""The loop."""\nfrom . import records\nfrom preftune.errors import UsageError\n',
    "preftune/cli.py": '"""The door."""\nVERBS = {"dpo": 1}\n\n\n'
                       'def main():\n    """Run."""\n    from .stages import dpo\n    dpo.run(None)\n',
    "preftune/stages/__init__.py": '"""Verbs."""\n',
    "preftune/stages/dpo.py": '"""dpo."""\nfrom .. import engine\n\n'
                              'def run(options):\n    """Run."""\n    return options.beta, options.lr\n',
    "preftune/stages/chat.py": '"""chat."""\n',
    "README.md": "```console\n$ make test\n$ preftune dpo --model m\n```\n[errors](docs/errors.md)\n",
    "docs/errors.md": "codes\n",
    "Makefile": "test:\n\ttrue\n",
}


def build(root: Path, files: dict[str, str]) -> Path:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content, encoding="utf-8")
    return root


INHERITED = "@dataclass(frozen=True)\nclass Chat(Texts):\n    pass\n"

PLANTED: list[tuple[Rule, str, str, str]] = [  # rule, file, what is appended, what the complaint must say
    (layers, "preftune/records.py", "from . import engine\n", "records (layer 1) imports engine"),
    (layers, "preftune/records.py", "def f():\n    from preftune import engine\n", "records (layer 1) imports engine"),
    (layers, "preftune/records.py", "from .engine import train\n", "records (layer 1) imports engine"),
    (layers, "preftune/records.py", "import preftune.stages.dpo\n", "imports stages"),
    (layers, "preftune/errors.py", "from . import config\n", "errors (layer 0) imports config"),
    (layers, "preftune/attic.py", '"""New."""\n', "'attic' has no layer"),
    (layers, "preftune/stages/chat.py", "from . import dpo\n", "stage chat imports stage dpo"),
    (layers, "preftune/stages/chat.py", "from .dpo import run\n", "stage chat imports stage dpo"),
    (layers, "preftune/cli.py", "from .stages import dpo\n", "only inside a function"),
    (torch_free, "preftune/records.py", "import torch\n", "torch is blocked"),
    (torch_free, "preftune/errors.py", "from torch import nn\n", "torch is blocked"),
    (torch_free, "preftune/cli.py", "import numpy\n", "numpy is blocked"),
    (budgets, "preftune/engine.py", "x = 1\n" * 500, "engine: 503 lines"),
    (budgets, "preftune/engine.py", "def train():\n" + "    x = 1\n" * 81, "train has 82 lines"),
    (names, "preftune/utils.py", '"""Things."""\n', "named for what it does"),
    (names, "preftune/losses/helpers.py", '"""Things."""\n', "named for what it does"),
    (forbidden, "preftune/engine.py", "import pickle\n", "pickle"),
    (forbidden, "preftune/engine.py", "from pickle import loads\n", "pickle"),
    (forbidden, "preftune/engine.py", "import torch\ntorch.load('x')\n", "torch.load()"),
    (forbidden, "preftune/engine.py", "eval('1')\n", "eval()"),
    (forbidden, "preftune/engine.py", "exec('1')\n", "exec()"),
    (forbidden, "preftune/engine.py", "f(trust_remote_code=True)\n", "trust_remote_code"),
    (forbidden, "preftune/engine.py", "f(trust_remote_code=flag)\n", "trust_remote_code"),
    (forbidden, "preftune/engine.py", "import subprocess\nsubprocess.run('ls', shell=True)\n", "shell"),
    (forbidden, "preftune/engine.py", "try:\n    pass\nexcept:\n    pass\n", "except without a type"),
    (unread_options, "preftune/config.py", "    gamma: float = 0.5\n", "Dpo.gamma is read nowhere"),
    (unread_options, "preftune/config.py", "    gamma: float = 0.5\ndef check(options):\n    return options.gamma\n", "gamma"),
    (unread_options, "preftune/config.py", INHERITED, "Chat.beta is read nowhere in stages/chat.py"),
    (undocumented, "preftune/engine.py", "def train():\n    pass\n", "train has no docstring"),
    (undocumented, "preftune/engine.py", "class Step:\n    pass\n", "Step has no docstring"),
    (undocumented, "preftune/audit.py", "x = 1\n", "no docstring"),
    (machine_paths, "docs/errors.md", "see /" + "home/me/runs\n", "me"),
    (machine_paths, "preftune/engine.py", "DATA = '/" + "root/data'\n", "data"),
    (documented_commands, "README.md", "```console\n$ make tea\n```\n", "make tea"),
    (documented_commands, "docs/errors.md", "```console\n$ preftune brew --model m\n```\n", "preftune brew"),
    (dead_links, "README.md", "[gone](docs/gone.md)\n", "docs/gone.md is not there"),
]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_a_sound_house_passes(rule, tmp_path):
    assert rule(build(tmp_path, SOUND)) == []


@pytest.mark.parametrize(("rule", "file", "fault", "message"), PLANTED, ids=lambda value: getattr(value, "__name__", None))
def test_a_planted_fault_is_found(rule, file, fault, message, tmp_path):
    root = build(tmp_path, SOUND)
    (root / file).parent.mkdir(parents=True, exist_ok=True)
    with (root / file).open("a", encoding="utf-8") as out:
        out.write(fault)
    complaints = rule(root)
    assert len(complaints) == 1 and message in complaints[0], complaints


def test_every_rule_has_a_planted_fault():
    assert {rule for rule, *_ in PLANTED} == set(RULES)


def test_every_sideways_import_is_used():
    """An exception that nobody needs any more is a hole."""
    used = {(module(ROOT, path)[0], exists(ROOT, name)[0]) for path in sources(ROOT) if module(ROOT, path)
            for name, _, _ in imports(ROOT, path) if exists(ROOT, name)}
    assert {edge for edge in SIDEWAYS if edge not in used} == set()
