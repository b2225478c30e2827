"""Rules that hold over the whole tree: which package imports which, and what may stand in a tracked file.

Each rule is a function from source text to its faults, tried first on text that breaks it, then on every tracked file.
"""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# package -> packages of this repository that it may import
MAY_IMPORT = {
    "model": {"model"},
    "data_prep": {"data_prep"},
    "pretrain": {"pretrain", "model", "data_prep"},
    "launchers": {"launchers", "pretrain", "model", "data_prep"},
}
OURS = {*MAY_IMPORT, "tests"}
# wing of pretrain -> modules of pretrain that it may import beside its own: nothing of training
WINGS = {"report": {"config"}, "parallel": {"stop"}}
DISTRIBUTED = {"accelerate", "deepspeed"}
MAY_DISTRIBUTE = tuple(f"pretrain/parallel/{name}.py" for name in ("fsdp2", "zero", "deepspeed_files"))
OPTIONAL = {"wandb", "deepspeed", "webdataset", "datasets", "datatrove"}  # slow to import or absent on some machines
LONGEST_FUNCTION = 80
LARGEST_FILE = 1_000_000


def tracked_files() -> list[Path]:
    """Files of the repository; in a copy without git, everything that is not hidden, generated or installed."""
    if shutil.which("git") and (ROOT / ".git").exists():
        listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
        paths = [ROOT / name for name in listed.stdout.split("\0") if name]
    else:
        roots = [*OURS, "configs", "pyproject.toml", "Makefile", "README.md", "constraints.txt"]
        paths = [path for name in roots for path in (ROOT / name, *(ROOT / name).rglob("*"))]
    return sorted(path for path in paths if path.is_file() and "__pycache__" not in path.parts)


FILES = tracked_files()


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


SOURCES = [path for path in FILES if path.suffix == ".py"]
PACKAGED = [path for path in SOURCES if path.relative_to(ROOT).parts[0] in MAY_IMPORT]


def imports(nodes: Iterator[ast.AST] | list[ast.stmt]) -> Iterator[tuple[int, str, list[str]]]:
    """(line, module, names) of every absolute import among `nodes`; a relative one stays in its package."""
    for node in nodes:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name, []
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.lineno, node.module or "", [alias.name for alias in node.names]


def wrong_direction(name: str, source: str) -> list[str]:
    """Imports, anywhere in the file `name`, of a package that its own may not see."""
    allowed = MAY_IMPORT[name.split("/")[0]]
    found = imports(ast.walk(ast.parse(source)))
    return [f"{name}:{line} imports {module}" for line, module, _ in found if module.split(".")[0] in OURS - allowed]


def out_of_its_wing(name: str, source: str) -> list[str]:
    """Imports, anywhere in a file of a wing of pretrain, of what stands above it or in another wing."""
    wing = name.split("/")[1]
    if not name.startswith("pretrain/") or wing not in WINGS:
        return []
    found = (
        (line, module.split(".")[1] if "." in module else imported)
        for line, module, names in imports(ast.walk(ast.parse(source)))
        for imported in names or [""]
        if module.split(".")[0] == "pretrain"
    )
    wrong = {line: seen for line, seen in found if seen not in WINGS[wing] | {wing}}
    return [f"{name}:{line} imports pretrain.{seen}" for line, seen in wrong.items()]


def imported_modules(name: str, source: str) -> set[str]:
    """What the file `name` imports, wherever it does but for types alone: modules, or names in them, as paths."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            node.body = []
    folder, found = name.split("/")[:-1], set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.replace(".", "/") for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = folder[: len(folder) + 1 - node.level] if node.level else []
            module = [*above, *(node.module or "").split(".")] if node.module else above
            found |= {"/".join([*module, alias.name]) for alias in node.names}
    return found


def above_the_methods(name: str, source: str) -> list[str]:
    """Imports of a way of spending depth that are not of its folder, of the record or of the map of layers."""
    if not name.startswith("model/depth/"):
        return []
    may = ("model/depth", "model/record", "model/sharing")
    found = sorted(imported_modules(name, source))
    return [f"{name} imports {path}" for path in found if path.split("/")[0] in OURS and not path.startswith(may)]


def circles(sources: dict[str, str]) -> list[str]:
    """Modules that import themselves by way of others; `sources`: path -> text of every file of the packages."""
    modules = {name.removesuffix(".py").removesuffix("/__init__"): name for name in sources}
    needs = {}
    for module, name in modules.items():
        found = imported_modules(name, sources[name])
        known = {path if path in modules else path.rpartition("/")[0] for path in found}
        needs[module] = known & modules.keys() - {module}
    while free := {module for module, others in needs.items() if not others & needs.keys()}:
        needs = {module: others for module, others in needs.items() if module not in free}
    # what is left needs a circle; it is in one where something left needs it
    while unneeded := needs.keys() - set().union(*needs.values()):
        needs = {module: others for module, others in needs.items() if module not in unneeded}
    return sorted(needs)


def distributed(name: str, source: str) -> list[str]:
    """Uses of accelerate, deepspeed or fully_shard outside the two strategies that cut a model up, and launchers."""
    if name in MAY_DISTRIBUTE or name.startswith("launchers/"):
        return []
    tree = ast.parse(source)
    faults = [
        f"{name}:{line} imports {module}"
        for line, module, names in imports(ast.walk(tree))
        if module.split(".")[0] in DISTRIBUTED or "fully_shard" in names
    ]
    uses = (node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and node.attr == "fully_shard")
    return faults + [f"{name}:{node.lineno} uses fully_shard" for node in uses]


def eager(name: str, source: str) -> list[str]:
    """Imports of an optional library that run when the file is imported."""
    found = imports(ast.parse(source).body)
    return [f"{name}:{line} imports {module}" for line, module, _ in found if module.split(".")[0] in OPTIONAL]


def too_long(name: str, source: str) -> list[str]:
    """Functions of more than LONGEST_FUNCTION lines."""
    functions = (n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef))
    lengths = ((n, (n.end_lineno or n.lineno) - n.lineno + 1) for n in functions)
    return [f"{name}:{n.lineno} {n.name}: {length} lines" for n, length in lengths if length > LONGEST_FUNCTION]


def unsafe_load(name: str, source: str) -> list[str]:
    """`torch.load` that could run code from the file it reads."""
    faults = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
            options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            if options.get("weights_only") != "True":
                faults.append(f"{name}:{node.lineno} torch.load without weights_only=True")
    return faults


# Files that may know a method by its name, or by how its keys are shared: its own, the settings, and conversions.
KNOWS_METHODS = ("model/depth/", "model/config.py", "model/convert/")
METHODS = {"expert_choice", "token_choice", "mixture_of_depths", "early_exit"}  # not "universal", a folder of DeepSpeed
ASKED = {"kv_strategy", "selection", "balancing"}  # and `routing`, of a configuration: a pass has one too, its record


def names_a_method(name: str, source: str) -> list[str]:
    """Where a package asks for a method's name; a layout or a rule of the method answers it (model/depth)."""
    if name.startswith(KNOWS_METHODS):
        return []
    faults = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute):
            of_config = node.attr == "routing" and ast.unparse(node.value).endswith("config")
            asked = of_config or node.attr in ASKED
        elif isinstance(node, ast.keyword):
            asked = node.arg in ASKED
        else:
            asked = isinstance(node, ast.Constant) and node.value in METHODS | ASKED | {"routing"}
        if asked:
            faults.append(f"{name}:{node.lineno} {ast.unparse(node)}")  # type: ignore[attr-defined]
    return faults


MACHINE_TEXT = re.compile(
    r"(?<![\w.$}])/(?:work|root|home)/"  # a folder of one machine
    r"|https?://(?:10\.|192\.168\.|172\.(?:1[6-9]|2\d|3[01])\.)"  # a host of one network
    r"|https?://[^\s/@]+:[^\s/@]+@"  # a password in an address
)


def machine_text(name: str, source: str) -> list[str]:
    """Paths and addresses that mean something on one machine or network only."""
    return [
        f"{name}:{source.count(chr(10), 0, match.start()) + 1} holds {match.group()}"
        for match in MACHINE_TEXT.finditer(source)
    ]


def package_sources() -> set[str]:
    """Where pip on this machine finds packages, if not where pip finds them everywhere."""
    command = [sys.executable, "-m", "pip", "config", "list"]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    public = ("pypi.org", "download.pytorch.org")
    addresses = set(re.findall(r"(?:https?|file)://[^\s'\"]+", listed))
    return {address for address in addresses if not any(host in address for host in public)}


BROKEN = [
    (wrong_direction, "model/x.py", "from data_prep.settings import UserError"),
    (wrong_direction, "model/x.py", "def f():\n    import pretrain.data"),
    (wrong_direction, "data_prep/x.py", "import model"),
    (wrong_direction, "pretrain/x.py", "from launchers import compare"),
    (wrong_direction, "launchers/x.py", "from tests.helpers import corpus"),
    (out_of_its_wing, "pretrain/report/x.py", "def f():\n    from pretrain.checkpoint import committed"),
    (out_of_its_wing, "pretrain/report/x.py", "from pretrain import metrics"),
    (out_of_its_wing, "pretrain/report/x.py", "import pretrain.parallel.settings"),
    (out_of_its_wing, "pretrain/parallel/x.py", "from pretrain.config import read_settings"),
    (above_the_methods, "model/depth/x.py", "from ..config import MoRConfig"),
    (above_the_methods, "model/depth/x.py", "def f():\n    from model import layers"),
    (distributed, "pretrain/x.py", "def f():\n    from accelerate import Accelerator"),
    (distributed, "model/x.py", "import deepspeed.checkpoint"),
    (distributed, "pretrain/x.py", "from torch.distributed.fsdp import fully_shard"),
    (distributed, "pretrain/parallel/x.py", "import deepspeed"),
    (distributed, "pretrain/x.py", "import torch\ntorch.distributed.fsdp.fully_shard(model)"),
    (eager, "pretrain/x.py", "import wandb"),
    (eager, "data_prep/x.py", "from datasets import load_dataset"),
    (too_long, "model/x.py", "def f():\n" + "    pass\n" * LONGEST_FUNCTION),
    (unsafe_load, "pretrain/x.py", "import torch\ntorch.load('x')"),
    (unsafe_load, "pretrain/x.py", "import torch\ntorch.load('x', weights_only=False)"),
    (names_a_method, "model/cache.py", "if self.config.routing == 'none': pass"),
    (names_a_method, "pretrain/x.py", "config.kv_strategy"),
    (names_a_method, "pretrain/x.py", "name = 'expert_choice'"),
    (names_a_method, "pretrain/x.py", "facts['model'].get('selection')"),
    (names_a_method, "launchers/x.py", "getattr(settings, 'routing', None)"),
    (names_a_method, "data_prep/x.py", "replace(one, balancing=None)"),
    (machine_text, "README.md", "cd /" + "work/main"),
    (machine_text, "README.md", "a\npip install -i http:" + "//192.168.0.1/simple"),
    (machine_text, "README.md", "https:" + "//user:password@example.org"),
]
SOUND = [
    (wrong_direction, "pretrain/x.py", "from model.config import MoRConfig\nfrom . import data\nimport torch"),
    (
        out_of_its_wing,
        "pretrain/report/x.py",
        "from pretrain.report import runs\nimport pretrain.config",
    ),
    (out_of_its_wing, "pretrain/x.py", "from pretrain.report import runs\nimport pretrain.metrics"),
    (above_the_methods, "model/depth/x.py", "import torch\nfrom ..record import entropy\nfrom .base import Setting"),
    (above_the_methods, "model/depth/x.py", "if TYPE_CHECKING:\n    from ..config import MoRConfig"),
    (distributed, MAY_DISTRIBUTE[0], "from torch.distributed.fsdp import fully_shard"),
    (eager, "pretrain/x.py", "def f():\n    import wandb"),
    (too_long, "model/x.py", "def f():\n" + "    pass\n" * (LONGEST_FUNCTION - 1)),
    (unsafe_load, "pretrain/x.py", "import torch\ntorch.load('x', weights_only=True)"),
    (names_a_method, "model/depth/x.py", "config.selection"),
    (names_a_method, "pretrain/x.py", "'by routing', config.routing_mode, random.choice, output.routing"),
    (machine_text, "README.md", "https:" + "//example.org/home/, $HOME/" + "work/x, runs/" + "work/x"),
]
Rule = Callable[[str, str], list[str]]


@pytest.mark.parametrize(("rule", "name", "source"), BROKEN)
def test_rule_finds_the_fault(rule: Rule, name: str, source: str) -> None:
    assert len(rule(name, source)) == 1


@pytest.mark.parametrize(("rule", "name", "source"), SOUND)
def test_rule_passes_what_is_sound(rule: Rule, name: str, source: str) -> None:
    assert rule(name, source) == []


@pytest.mark.parametrize(
    "rule",
    [wrong_direction, out_of_its_wing, above_the_methods, distributed, eager, names_a_method],
    ids=lambda rule: rule.__name__,
)
def test_packages_keep(rule: Rule) -> None:
    assert len({name_of(path).split("/")[0] for path in PACKAGED}) == len(MAY_IMPORT)
    assert [fault for path in PACKAGED for fault in rule(name_of(path), path.read_text(encoding="utf-8"))] == []


def test_circles_are_found() -> None:
    sources = {
        "model/a.py": "from . import b",
        "model/b.py": "def f():\n    from model.depth.c import x",
        "model/depth/__init__.py": "",
        "model/depth/c.py": "from ..a import y",
        "model/above.py": "import model.a",
        "model/below.py": "if TYPE_CHECKING:\n    from model.below2 import z",
        "model/below2.py": "from model import below",
    }
    assert circles(sources) == ["model/a", "model/b", "model/depth/c"]


def test_no_module_imports_itself_by_way_of_others() -> None:
    assert circles({name_of(path): path.read_text(encoding="utf-8") for path in PACKAGED}) == []


@pytest.mark.parametrize("rule", [too_long, unsafe_load], ids=lambda rule: rule.__name__)
def test_sources_keep(rule: Rule) -> None:
    assert [fault for path in SOURCES for fault in rule(name_of(path), path.read_text(encoding="utf-8"))] == []


def test_no_file_is_large() -> None:
    sizes = {name_of(path): path.stat().st_size for path in FILES}
    assert {name: size for name, size in sizes.items() if size > LARGEST_FILE} == {}


def test_no_file_names_a_machine() -> None:
    sources = package_sources()
    faults = []
    for path in FILES:
        text = path.read_bytes().decode("utf-8", errors="replace")
        faults += machine_text(name_of(path), text)
        faults += [f"{name_of(path)} holds {address}" for address in sources if address in text]
    assert faults == []
