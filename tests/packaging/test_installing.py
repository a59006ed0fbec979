"""rlhf works equally in a bare checkout, an editable install, a wheel, and a user's own directory."""

import shutil
import tomllib
import zipfile
from pathlib import Path

import pytest

from .conftest import ROOT, SAMPLE, Environment

pytestmark = pytest.mark.slow  # fresh interpreters, which import torch

BUILT_IN = ["collect", "dpo", "grpo", "ppo", "pretrain", "rejection_sampling", "reward_model", "rloo", "sft"]


def assert_works(environment: Environment, cwd: Path, **variables: str) -> None:
    """Assert that the built-in stages are listed and composed."""
    page = environment.rlhf("--help", cwd=cwd, **variables)
    for name in BUILT_IN:
        assert f"{name} [{name}]" in page, page
    config = environment.rlhf("stage=dpo", "--cfg", "job", cwd=cwd, **variables)
    assert "_target_: rlhf_dpo.stage.DPOStage" in config
    assert "beta: 0.1" in config


def test_a_bare_checkout_works(environment: Environment, checkout: Path, empty: Path) -> None:
    assert_works(environment, checkout)
    # From another directory too, as long as Python finds the package.
    assert_works(environment, empty, PYTHONPATH=str(checkout))


def test_an_editable_install_reflects_edits(environment: Environment, checkout: Path, empty: Path) -> None:
    environment.pip_install("--editable", str(checkout))
    assert_works(environment, empty)
    option = checkout / "plugins" / "rlhf_dpo" / "conf" / "objective" / "dpo.yaml"
    option.write_text(option.read_text().replace("beta: 0.1", "beta: 0.7"))
    (checkout / "conf" / "precision" / "mine.yaml").write_text((checkout / "conf/precision/fp32.yaml").read_text())
    (checkout / "rlhf" / "__init__.py").write_text('__version__ = "0.1.0+edited"\n')
    config = environment.rlhf("stage=dpo", "precision=mine", "--cfg", "job", cwd=empty)
    assert "beta: 0.7" in config
    assert "edited" in environment.rlhf("--version", cwd=empty)


def test_the_wheel_works_in_a_clean_environment(installed: Environment, empty: Path) -> None:
    environment = installed
    assert_works(environment, empty)
    assert "rlhf 0.1.0" in environment.rlhf("plugins", "list", cwd=empty)
    words = [
        "stage=pretrain",
        "recipe=testbed",
        "debug=smoke",
        "data.size=300",
        "data.validation=20",
        "model.vocab_size=300",
    ]
    said = environment.rlhf(*words, cwd=empty, OMP_NUM_THREADS="1")
    assert "finished" in said
    (model,) = empty.glob("outputs/pretrain/*/model")
    assert (model / "config.json").exists()
    assert (model.parent / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in empty.iterdir()] == ["outputs"], "nothing else is left behind"


def test_the_wheel_has_the_expected_files(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    top = {name.split("/")[0] for name in names}
    assert top == {"rlhf", "rlhf-0.1.0.dist-info", *(f"rlhf_{name}" for name in BUILT_IN)}
    expected = {f"rlhf/conf/{path.relative_to(ROOT / 'conf')}" for path in (ROOT / "conf").rglob("*.yaml")}
    expected |= {str(path.relative_to(ROOT / "plugins")) for path in (ROOT / "plugins").rglob("conf/**/*.yaml")}
    expected |= {str(path.relative_to(ROOT)) for path in (ROOT / "rlhf").rglob("*.tmpl")}
    assert expected | {"rlhf/py.typed"} <= set(names)
    assert not [name for name in names if "__pycache__" in name]


def test_every_plugin_folder_is_an_entry_point() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    folders = sorted(conf.parent.name for conf in (ROOT / "plugins").glob("*/conf"))
    assert sorted(project["entry-points"]["rlhf.plugins"].values()) == folders == [f"rlhf_{name}" for name in BUILT_IN]


@pytest.mark.parametrize("way", ["folder", "variable", "installed"])
def test_a_third_party_plugin_works(
    installed: Environment, empty: Path, way: str, request: pytest.FixtureRequest
) -> None:
    """In ./plugins, named by RLHF_PLUGINS, or pip-installed: its options are available like built-in ones."""
    environment, variables = installed, {}
    if way == "folder":
        shutil.copytree(SAMPLE / "rlhf_sample", empty / "plugins" / "rlhf_sample")
    elif way == "variable":
        variables["RLHF_PLUGINS"] = str(SAMPLE)
    else:
        environment = request.getfixturevalue("environment")
        environment.pip_install(str(request.getfixturevalue("wheel")), str(SAMPLE))
    page = environment.rlhf("--help", cwd=empty, **variables)
    assert "cubic [sample]" in page and "brevity [sample]" in page
    config = environment.rlhf("stage=dpo", "objective=cubic", "--cfg", "job", cwd=empty, **variables)
    assert "_target_: rlhf_sample.objective.Cubic" in config
    assert "sample" in environment.rlhf("plugins", "list", cwd=empty, **variables)
    if way != "folder":
        return
    # Its code is found, and its ranges are validated like those of built-in options.
    words = ["stage=dpo", "objective=cubic", "objective.target=-1"]
    said = environment.rlhf(*words, cwd=empty, ok=False, OMP_NUM_THREADS="1", **variables)
    assert "objective.target=-1: should be greater than 0" in said
    assert "inputs.policy" in said and "Traceback" not in said
