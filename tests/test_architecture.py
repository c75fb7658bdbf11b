"""The rules of the house: who may import whom, how long a script may be, and what must not appear anywhere."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

import pytest
from runs import ROOT

PACKAGES = ("trainers", "pipelines", "data_prep")
SOURCES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
SCRIPTS = sorted((ROOT / "trainers").glob("train_*.py"))
EVERYWHERE = sorted([*SOURCES, *(p for folder in ("benchmarks", "demos") for p in (ROOT / folder).rglob("*.py"))])
SYSTEMS = {"train_shape_vae": "shortcut_scene"}  # a part of another system's model
MATHEMATICS = {"torch", "numpy", "scipy", "math"}
TYPED = {"pydantic", "trainers.common.config"}


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports(path: Path) -> set[str]:
    """Every module a file imports, at its top or inside a function, in dotted form."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            for alias in node.names:
                submodule = ROOT.joinpath(*node.module.split("."), alias.name)
                is_module = submodule.is_dir() or submodule.with_suffix(".py").exists()
                found.add(f"{node.module}.{alias.name}" if is_module else node.module)
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "load" and node.args:
            argument = node.args[0]  # lazy_loader.load("torch")
            if getattr(getattr(node.func, "value", None), "id", "") == "lazy_loader":
                found.add(argument.value)
    return found


def within(module: str, *allowed: str) -> bool:
    return any(module == name or module.startswith(name + ".") for name in allowed)


def may_import(path: Path) -> tuple[str, ...]:
    """Which of our own packages, and which others, a file may import; an empty name allows all that is not ours."""
    module = module_of(path)
    parts = module.split(".")
    if re.fullmatch(r"trainers\.train_\w+", module):
        system = SYSTEMS.get(parts[1], parts[1].removeprefix("train_"))
        ours = ["trainers.common", "trainers.objectives", f"pipelines.{system}", "data_prep"]
        # what systems share lies in files of pipelines itself
        ours += [f"pipelines.{file.stem}" for file in (ROOT / "pipelines").glob("*.py") if file.stem != "__init__"]
        return (*ours, "")
    if within(module, "trainers.common"):
        return ("trainers.common", "")
    if module == "trainers.objectives.settings":
        return ("trainers.common.config", "pydantic")
    if within(module, "trainers.objectives"):
        return ("trainers.objectives", "pipelines", *MATHEMATICS, "lazy_loader")
    if within(module, "pipelines") and parts[-1] in ("evaluate", "evaluation"):
        return ("pipelines", "data_prep", "trainers.objectives", "trainers.common.data", "")
    if within(module, "pipelines"):
        return ("pipelines", "")
    if within(module, "data_prep"):
        return ("data_prep", "pipelines", "")
    return ("",)


def is_allowed(imported: str, allowed: tuple[str, ...]) -> bool:
    if imported.split(".")[0] in sys.stdlib_module_names:
        return True
    ours = within(imported, *PACKAGES, "benchmarks", "tests", "demos")
    if not ours:
        return "" in allowed or within(imported, *filter(None, allowed))
    # the bare package, whose names load on first use
    return imported in PACKAGES or any(within(imported, name) for name in allowed if name)


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_who_may_import_whom(path):
    allowed = may_import(path)
    assert [name for name in sorted(imports(path)) if not is_allowed(name, allowed)] == []


@pytest.mark.parametrize("path", SCRIPTS, ids=name_of)
def test_scripts_never_import_each_other(path):
    assert not [name for name in imports(path) if re.search(r"\btrain_\w+", name)]


def test_there_are_no_circles():
    graph = {module_of(path): imports(path) for path in SOURCES}
    graph = {module: {name for name in names if name in graph and name != module} for module, names in graph.items()}

    def visit(module: str, above: tuple[str, ...]) -> None:
        assert module not in above, f"circle: {' -> '.join([*above, module])}"
        for name in graph[module] - done:
            visit(name, (*above, module))
        done.add(module)

    done: set[str] = set()
    for module in graph:
        if "." in module:  # the packages themselves only name their parts
            visit(module, ())


@pytest.mark.parametrize("path", SCRIPTS, ids=name_of)
def test_scripts_stay_short(path):
    assert len(path.read_text().splitlines()) <= 250
    functions = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)]
    lengths = {node.name: node.end_lineno - node.lineno + 1 for node in functions}
    assert lengths["main"] <= 80


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
    import subprocess

    code = "import sys, trainers.common, trainers.objectives, pipelines, pipelines.shortcut, data_prep;"
    code += "print('torch' in sys.modules or 'diffusers' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"
