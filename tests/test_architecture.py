"""The rules of the house: who may import whom, how long a script may be, and what must not appear anywhere."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
from runs import ROOT

PACKAGES = ("backlot", "objectives", "pipelines", "data_prep", "evaluation", "trainers")
SOURCES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
SCRIPTS = sorted((ROOT / "trainers").glob("train_*.py"))
EVERYWHERE = sorted([*SOURCES, *(p for folder in ("benchmarks", "demos") for p in (ROOT / folder).rglob("*.py"))])
SYSTEMS = {"train_shape_vae": "shortcut_scene"}  # a part of another system's model
DENSEST = 53.3  # of the first three scripts, measured before there were five systems
MATHEMATICS = {"torch", "numpy", "scipy", "math", "pydantic", "lazy_loader"}
WITHOUT_TORCH = ("backlot.config", "backlot.command_line", "backlot.files", "trainers.common.config")


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def file_of(module: str) -> Path | None:
    """The file of one of our modules; None for anything else."""
    place = ROOT.joinpath(*module.split("."))
    return next((p for p in (place.with_suffix(".py"), place / "__init__.py") if p.exists()), None)


def lazy_attributes(package: str) -> dict[str, str]:
    """What a package loads on first use: name -> module."""
    init = file_of(package)
    if init is None or init.name != "__init__.py":
        return {}
    names = {path.stem: f"{package}.{path.stem}" for path in init.parent.glob("*.py")}
    for node in ast.walk(ast.parse(init.read_text())):
        if isinstance(node, ast.keyword) and node.arg == "submod_attrs":
            for submodule, attributes in ast.literal_eval(node.value).items():
                names |= dict.fromkeys(attributes, f"{package}.{submodule}")
    return names


def follow(module: str, attributes: list[str]) -> str:
    """The module in which `module.a.b...` is found, through packages whose names load on first use."""
    for attribute in attributes:
        if file_of(f"{module}.{attribute}") is not None:
            module = f"{module}.{attribute}"
            continue
        return lazy_attributes(module).get(attribute, module)
    return module


def imports(path: Path, source: str | None = None) -> set[str]:
    """Every module a file needs, in dotted form: imported at its top or in a function, or reached by an attribute."""
    tree = ast.parse(path.read_text() if source is None else source)
    found, bound = set(), {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                found.add(alias.name)
                bound[alias.asname or alias.name.split(".")[0]] = (
                    alias.name if alias.asname else alias.name.split(".")[0]
                )
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            for alias in node.names:
                module = follow(node.module, [alias.name])
                found.add(module)
                if file_of(f"{node.module}.{alias.name}") is not None:
                    bound[alias.asname or alias.name] = module
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "load" and node.args:
            argument = node.args[0]  # lazy_loader.load("torch")
            if getattr(getattr(node.func, "value", None), "id", "") == "lazy_loader":
                found.add(argument.value)
    for node in ast.walk(tree):
        attributes = []
        while isinstance(node, ast.Attribute):
            attributes.insert(0, node.attr)
            node = node.value
        if attributes and isinstance(node, ast.Name) and node.id in bound:
            found.add(follow(bound[node.id], attributes))
    return found


def within(module: str, *allowed: str) -> bool:
    return any(module == name or module.startswith(name + ".") for name in allowed)


def may_import(module: str) -> tuple[str, ...]:
    """Which of our own packages, and which others, a module may need; an empty name allows all that is not ours."""
    parts = module.split(".")
    place = ".".join(parts[:2])
    match parts[0]:
        case "backlot":
            return ("backlot", "")
        case "objectives":
            return ("objectives", "backlot", *MATHEMATICS)
        case "pipelines":
            return ("backlot", place, "")
        case "data_prep":
            return ("backlot", place, "pipelines", "")
        case "evaluation":
            shared = [f"evaluation.{file.stem}" for file in (ROOT / "evaluation").glob("*.py")]
            own = [place, f"pipelines.{parts[1]}"] if len(parts) > 1 and place not in shared else []
            return ("backlot", "objectives", "data_prep", *own, *shared, "")
    if re.fullmatch(r"trainers\.train_\w+", module):
        system = SYSTEMS.get(parts[1], parts[1].removeprefix("train_"))
        shared = [f"evaluation.{file.stem}" for file in (ROOT / "evaluation").glob("*.py")]
        ours = ("trainers.common", "backlot", "objectives", "data_prep", f"pipelines.{system}", f"evaluation.{system}")
        return (*ours, *shared, "")
    return ("trainers.common", "backlot", "")


def forbidden_imports(module: str, needed: set[str]) -> list[str]:
    """What of `needed` the module must not have."""
    allowed = may_import(module)
    is_script = re.fullmatch(r"trainers\.train_\w+", module) is not None

    def is_allowed(name: str) -> bool:
        if name.split(".")[0] in sys.stdlib_module_names:
            return True
        if not within(name, *PACKAGES, "benchmarks", "tests", "demos"):
            return "" in allowed or within(name, *filter(None, allowed))
        if name in ("pipelines", "data_prep", "evaluation", "trainers"):  # a bare package
            return is_script or module == name
        return any(within(name, each) for each in allowed if each)

    return [name for name in sorted(needed) if not is_allowed(name)]


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_who_may_import_whom(path):
    assert forbidden_imports(module_of(path), imports(path)) == []


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("trainers/common/ema.py", "import pipelines"),
        ("trainers/common/ema.py", "import pipelines.shadow_sdxl\nunet = pipelines.shadow_sdxl.ShadowUNet"),
        ("trainers/common/ema.py", "from pipelines import shadow_sdxl\nunet = shadow_sdxl.ShadowUNet"),
        ("trainers/common/ema.py", "def f():\n    from pipelines.shadow_sdxl import ShadowUNet"),
        ("pipelines/shortcut/pipeline.py", "from trainers import common\nrun = common.TrainingRun"),
        ("pipelines/shortcut/pipeline.py", "import data_prep"),
        ("pipelines/shortcut_scene/transformer.py", "from pipelines.shortcut import transformer"),
        ("data_prep/shadows/dataset.py", "from data_prep import images\nopen_images = images.open_images"),
        ("data_prep/shadows/dataset.py", "import trainers"),
        ("evaluation/shortcut/measure.py", "from evaluation import shadow_sdxl\ncast = shadow_sdxl.cast"),
        ("objectives/scene.py", "from diffusers import ModelMixin"),
        ("objectives/scene.py", "import objectives.settings, pipelines"),
        ("backlot/codecs.py", "import objectives\nx = objectives.scene.draw"),
        ("trainers/train_shortcut.py", "from pipelines import shadow_sdxl"),
        ("trainers/preflight.py", "from trainers import train_shortcut"),
    ],
)
def test_an_arrow_against_the_table_is_found(file, line):
    path = ROOT / file
    source = f"{line}\n" + (path.read_text() if path.exists() else "").replace("from __future__ import annotations", "")
    assert forbidden_imports(module_of(path), imports(path, source))


@pytest.mark.parametrize("path", SCRIPTS, ids=name_of)
def test_scripts_never_import_each_other(path):
    assert not [name for name in imports(path) if re.search(r"\btrain_\w+", name)]


def find_circle(graph: dict[str, set[str]]) -> list[str]:
    """The nodes of a circle in a graph of arrows; none if there is none."""
    done: set[str] = set()

    def visit(node: str, above: list[str]) -> list[str]:
        if node in above:
            return [*above[above.index(node) :], node]
        for name in sorted(graph[node] - done):
            if circle := visit(name, [*above, node]):
                return circle
        done.add(node)
        return []

    return next((circle for node in sorted(graph) if (circle := visit(node, []))), [])


def room_of(module: str) -> str:
    """The room of a module: the folder of its system, format or shared part; a file that lies in none is its own."""
    parts = module.split(".")
    depth = 1 if parts[0] in ("backlot", "objectives") else 2
    return ".".join(parts[:depth])


def test_there_are_no_circles():
    # packages' __init__ only name their parts, and load them when asked
    files = {module_of(path): imports(path) for path in SOURCES if path.name != "__init__.py"}
    graph = {module: {name for name in names if name in files and name != module} for module, names in files.items()}
    assert find_circle(graph) == []
    rooms: dict[str, set[str]] = {}
    for module, names in graph.items():
        rooms.setdefault(room_of(module), set()).update(room_of(name) for name in names)
    for room, names in rooms.items():
        names.discard(room)
    assert find_circle(rooms) == []
    assert find_circle({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == ["a", "b", "c", "a"]


@pytest.mark.parametrize("module", WITHOUT_TORCH)
def test_light_modules_load_without_torch(module):
    code = f"import sys, {module}; print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"


@pytest.mark.parametrize("package", ["data_prep", "evaluation", "pipelines", "objectives"])
def test_packages_list_nothing_by_hand(package):
    """A new system adds folders and files and changes no shared one."""
    source = (ROOT / package / "__init__.py").read_text()
    parts = [p.stem for p in (ROOT / package).iterdir() if p.stem not in ("__init__", "__pycache__")]
    assert [part for part in parts if re.search(rf"""["']{part}["']""", source)] == []


@pytest.mark.parametrize("path", SCRIPTS, ids=name_of)
def test_scripts_stay_short(path):
    assert len(path.read_text().splitlines()) <= 250
    functions = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)]
    lengths = {node.name: node.end_lineno - node.lineno + 1 for node in functions}
    assert lengths["main"] <= 80


def density(path: Path) -> float:
    """Mean characters per line of code: not blank, no comment, outside docstrings."""
    source = path.read_text()
    lines = source.splitlines()
    silent = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            silent |= set(range(node.lineno, node.end_lineno + 1))
    code = [line for n, line in enumerate(lines, 1) if n not in silent and line.strip() and line.strip()[0] != "#"]
    return sum(len(line.strip()) for line in code) / len(code)


def test_scripts_breathe():
    """Short by ideas, not by dense lines."""
    assert {name_of(path): round(density(path), 1) for path in SCRIPTS if density(path) > DENSEST} == {}


FORBIDDEN = {
    "torch.load without weights_only": r"torch\.load\((?![^)]*weights_only=True)",
    "pickle": r"\b(import|from)\s+(c?pickle|dill|joblib)\b|allow_pickle=True",
    "remote code": r"trust_remote_code|custom_pipeline",
    "extractall": r"\.extractall\(",
    "yaml.load": r"yaml\.(load|unsafe_load|full_load)\(",
    "register_for_checkpointing": r"register_for_checkpointing\(",
    "no limit on pixels": r"MAX_IMAGE_PIXELS\s*=\s*None",
    "except Exception": r"except\s+(Base)?Exception\b|except\s*:",
    "a device by name": r"""\.to\(\s*["']cuda|\.cuda\(\)|device=["']cuda""",
    "a shell": r"shell=True|os\.system\(|(?<![.\w])(eval|exec)\(",
}


@pytest.mark.parametrize("rule", FORBIDDEN)
def test_what_must_not_appear_does_not(rule):
    pattern = re.compile(FORBIDDEN[rule])
    found = []
    for path in EVERYWHERE:
        for match in pattern.finditer(path.read_text()):
            found.append(f"{name_of(path)}:{path.read_text()[: match.start()].count(chr(10)) + 1}")
    assert found == []


def test_the_rules_catch_what_they_should():
    bad = {
        "torch.load without weights_only": "torch.load(path)",
        "pickle": "import pickle",
        "remote code": "trust_remote_code=True",
        "extractall": "tar.extractall(x)",
        "yaml.load": "yaml.load(f)",
        "register_for_checkpointing": "accelerator.register_for_checkpointing(ema)",
        "no limit on pixels": "Image.MAX_IMAGE_PIXELS = None",
        "except Exception": "except Exception as e:",
        "a device by name": 'model.to("cuda")',
        "a shell": "os.system('ls')",
    }
    assert bad.keys() == FORBIDDEN.keys()
    for rule, text in bad.items():
        assert re.search(FORBIDDEN[rule], text), rule
    assert not re.search(
        FORBIDDEN["torch.load without weights_only"], "torch.load(p, map_location=d, weights_only=True)"
    )


def test_no_folder_or_file_shadows_somebody_elses():
    import diffusers.pipelines

    theirs = {path.name for path in Path(diffusers.pipelines.__file__).parent.iterdir() if path.is_dir()}
    ours = {path.name for path in (ROOT / "pipelines").iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert not ours & theirs
    assert not {path.stem for path in (ROOT / "trainers").rglob("*.py")} & (sys.stdlib_module_names - {"__init__"})
    assert not (ROOT / "datasets").exists()


def test_a_stored_pipeline_names_the_modules_of_its_parts(tmp_path):
    """diffusers shortens module paths that look like its own folders; the pipeline could then not be loaded."""
    import json

    from pipelines.shortcut import ShortcutDiT, ShortcutPipeline, ShortcutScheduler

    network = ShortcutDiT(8, 1, 2, hidden_size=16, num_layers=1, num_attention_heads=2, num_classes=10)
    ShortcutPipeline(network, ShortcutScheduler()).save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    for name, part in {"transformer": ShortcutDiT, "scheduler": ShortcutScheduler}.items():
        assert index[name] == [part.__module__, part.__name__]


def test_packages_load_nothing_heavy():
    code = "import sys, trainers.common, objectives, pipelines, pipelines.shortcut, data_prep;"
    code += "print('torch' in sys.modules or 'diffusers' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"
