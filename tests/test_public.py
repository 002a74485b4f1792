"""The public surface: what is named is there, and naming it costs nothing until it is used."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import pplr

HEAVY = ("torch", "transformers", "peft", "polars", "sklearn", "scipy", "implicit", "pandas", "numpy")
MODULES = sorted(
    module.name
    for module in pkgutil.walk_packages(pplr.__path__, "pplr.")
    if not module.name.endswith(("__main__", "_pb2"))
)


@pytest.mark.parametrize("name", ["pplr", *MODULES])
def test_public_names_are_all_and_only_what_a_module_defines(name: str):
    module = importlib.import_module(name)
    assert module.__doc__
    if not hasattr(module, "__all__"):
        assert Path(module.__file__).name == "__init__.py", f"{name} names nothing public"
        return
    assert list(module.__all__) == sorted(set(module.__all__), key=module.__all__.index)
    for public in module.__all__:
        assert hasattr(module, public), f"{name}.{public} does not exist"
    if name == "pplr" or name.startswith("pplr.apps"):  # a command is public by its name on the command line
        return
    defined = {
        public
        for public, thing in vars(module).items()
        if not public.startswith("_")
        and (inspect.isclass(thing) or inspect.isfunction(thing))
        and thing.__module__ == name
    }
    assert defined <= set(module.__all__), f"{name} defines {defined - set(module.__all__)} without naming them"


def test_the_package_names_what_it_gives():
    assert dir(pplr) == sorted(pplr.__all__)
    for name in pplr.__all__:
        assert getattr(pplr, name) is not None
    assert set(pplr._HOME) | {"__version__"} == set(pplr.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = pplr.nothing


def test_the_version_is_that_of_the_project():
    project = Path(__file__).parent.parent / "pyproject.toml"
    assert pplr.__version__ == tomllib.loads(project.read_text(encoding="utf-8"))["project"]["version"]


def loaded_after(statement: str) -> set[str]:
    code = f"{statement}\nimport sys\nprint(*sorted({{name.split('.')[0] for name in sys.modules}}))"
    source = str(Path(pplr.__file__).parent.parent)
    told = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {source!r})\n{code}"],
        capture_output=True,
        text=True,
        check=True,
        timeout=240,
    )
    return set(told.stdout.split())


def test_importing_the_package_loads_next_to_nothing():
    loaded = loaded_after("import pplr")
    assert "pplr" in loaded
    assert not loaded & {*HEAVY, "pydantic", "yaml", "typer", "rich"}


@pytest.mark.parametrize(
    "statement",
    [
        "import pplr; pplr.load_config(); pplr.PplrError; pplr.config_template()",
        "import pplr.data.prompts, pplr.data.partition, pplr.data.fetching, pplr.errors, pplr.seeds, pplr.storage",
        "import pplr.apps.cli",
    ],
)
def test_configuration_data_and_command_line_load_no_torch(statement: str):
    assert not loaded_after(statement) & {"torch", "transformers", "peft"}


def test_the_server_of_a_link_loads_no_torch():
    statement = "from pplr.runtimes.flower_settings import load_link; load_link(); import pplr.runtimes.flower_enrolled"
    loaded = loaded_after(statement)
    assert "flwr" in loaded
    assert not loaded & {"torch", "transformers", "peft"}


def test_the_server_of_a_federation_mixes_adapters_without_a_model_library():
    loaded = loaded_after("import pplr.runtimes.flower_federation")
    assert "torch" in loaded
    assert not loaded & {"transformers", "peft"}


def test_what_trackers_need_is_loaded_by_runs_that_have_them_alone():
    assert not loaded_after("import pplr.runtimes.in_process, pplr.runtimes.trackers") & {"tensorboard", "mlflow"}


def test_the_check_sees_what_is_loaded():
    assert "numpy" in loaded_after("import pplr.seeds")
