"""The public names: there, in order, documented, and light until they are used."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import difflex

ROOT = Path(__file__).parent.parent
INIT = Path(difflex.__file__).read_text(encoding="utf-8")

EXPECTED = [
    "ITDA",
    "Activations",
    "Codes",
    "Dictionary",
    "DifflexError",
    "Edit",
    "LanguageModel",
    "LiveActivations",
    "Model",
    "Neurons",
    "Pipeline",
    "Scenes",
    "Shot",
    "Site",
    "Store",
    "Study",
    "draw",
    "evaluate",
    "fit",
    "grow_itda",
    "load",
    "load_language_model",
    "open_study",
    "record",
    "run_study",
    "steer",
    "train_sae",
]


def disagreements(init: str, expected: list[str]) -> list[str]:
    """Where the three lists in the source `init` (table, `__all__`, imports for type checkers) are not the `expected` names."""
    body = ast.parse(init).body
    assigned = {
        target.id: ast.literal_eval(node.value)
        for node in body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    typed = {
        alias.name: line.module
        for block in body
        if isinstance(block, ast.If)
        for line in block.body
        if isinstance(line, ast.ImportFrom)
        for alias in line.names
    }
    found = [] if sorted(assigned["__all__"]) == sorted(expected) else [f"__all__ is {assigned['__all__']}"]
    found += [] if sorted(assigned["HOMES"]) == sorted(expected) else [f"HOMES has {sorted(assigned['HOMES'])}"]
    found += [] if typed == assigned["HOMES"] else [f"type checkers see {typed}"]
    return found


def undocumented(names: list[str], text: str) -> list[str]:
    """Those of `names` that `text` does not hold as `difflex.NAME`."""
    return [name for name in names if f"`difflex.{name}`" not in text]


def test_all_lists_of_public_names_agree():
    assert disagreements(INIT, EXPECTED) == []


@pytest.mark.parametrize("name", EXPECTED)
def test_every_public_name_can_be_imported(name: str):
    value = getattr(difflex, name)
    assert value.__module__.startswith(difflex.HOMES[name])
    assert name in dir(difflex)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'lod'"):
        getattr(difflex, "lod")  # noqa: B009 (type checkers know that it is not there)


def test_every_public_name_is_in_the_readme():
    assert undocumented(EXPECTED, (ROOT / "README.md").read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("code", ["import difflex", "import difflex.records", "from difflex.cli import main; main(['--help'])"])
def test_a_light_import_brings_neither_torch_nor_tyro(code: str):
    heavy = f"import sys; {code}; print(sorted({{'torch', 'diffusers', 'tyro', 'PIL', 'numpy'}} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", heavy], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_a_planted_name_is_found_wherever_it_is_missing():
    assert disagreements(INIT, [*EXPECTED, "fly"])
    assert disagreements(INIT.replace('    "load": "difflex.explore.model",\n', ""), EXPECTED)
    assert disagreements(INIT.replace("import Model, load, open_study", "import Model, open_study"), EXPECTED)
    assert disagreements(INIT.replace('    "load",\n', ""), EXPECTED)
    assert undocumented(["load", "steer"], "`difflex.load` loads, `steer` does not stand for itself") == ["steer"]


def test_the_help_of_no_command_imports_torch():
    code = (
        "import sys, contextlib, io\n"
        "from difflex.cli import main\n"
        "from difflex.commands import VERBS\n"
        "for verb in VERBS:\n"
        "    with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):\n"
        "        main([verb, '--help'])\n"
        "    heavy = {'torch', 'diffusers', 'transformers'} & sys.modules.keys()\n"
        "    assert not heavy, (verb, heavy)\n"
        "print('all light')"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.splitlines()[-1:] == ["all light"], result.stderr


def test_help_of_a_command_is_also_asked_for_by_help_first():
    words = [sys.executable, "-m", "difflex"]
    shown = [
        subprocess.run([*words, *ask], capture_output=True, text=True).stdout
        for ask in (["help", "verify"], ["verify", "--help"])
    ]
    assert shown[0] == shown[1] and "STUDY" in shown[0]
