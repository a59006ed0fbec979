"""Plugins are discovered without running them."""

import importlib
import importlib.util
import os
import sys
from pathlib import Path

import pytest

from rlhf import discovery
from rlhf.errors import UserError


@pytest.fixture(autouse=True)
def isolated_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RLHF_PLUGINS", raising=False)
    monkeypatch.setattr(sys, "path", list(sys.path))


def plugin(folder: Path, option: str = "objective/mine", code: str = "") -> Path:
    path = folder / "conf" / f"{option}.yaml"
    path.parent.mkdir(parents=True)
    path.write_text("x: 1\n")
    (folder / "__init__.py").write_text(code)
    return folder


def names() -> list[str]:
    return [p.name for p in discovery.discover()[0]]


def test_a_directory_in_plugins_is_discovered_and_not_executed(tmp_path: Path) -> None:
    plugin(tmp_path / "plugins" / "mine", code="raise RuntimeError('run')")
    found = {p.name: p for p in discovery.discover()[0]}
    assert found["mine"].origin == "./plugins"
    assert list(found["mine"].options()) == ["objective/mine"]
    assert "mine" not in sys.modules


def test_the_first_directory_of_rlhf_plugins_takes_precedence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plugin(tmp_path / "a" / "mine", "reward/first")
    plugin(tmp_path / "b" / "mine", "reward/second")
    monkeypatch.setenv("RLHF_PLUGINS", os.pathsep.join(["a", "b", "missing"]))
    (found,) = [p for p in discovery.discover()[0] if p.name == "mine"]
    assert found.folder == tmp_path / "a" / "mine"
    assert sys.path.index(str(tmp_path / "a")) < sys.path.index(str(tmp_path / "b"))


def test_a_copy_of_a_builtin_plugin_replaces_it(tmp_path: Path) -> None:
    before = names()
    plugin(tmp_path / "plugins" / "rlhf_dpo", "objective/dpo")
    (found,) = [p for p in discovery.discover()[0] if p.name == "dpo"]
    assert found.folder == tmp_path / "plugins" / "rlhf_dpo"
    assert names() == before


@pytest.mark.parametrize(("option", "owner"), [("objective/ppo", "plugin ppo"), ("reward/gold", "rlhf itself")])
def test_an_option_offered_twice_names_both_owners(tmp_path: Path, option: str, owner: str) -> None:
    plugin(tmp_path / "plugins" / "mine", option)
    with pytest.raises(UserError, match=f"option {option} is offered twice: by .* and by ") as caught:
        discovery.discover()
    assert owner in str(caught.value) and "plugin mine" in str(caught.value)


class Point:
    """Entry point stand-in."""

    class dist:
        name, version = "some-dist", "1.0"

    def __init__(self, value: str) -> None:
        self.name = self.value = value


def test_a_broken_entry_point_is_reported_and_affects_no_other_plugin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = tmp_path / "site"
    plugin(site / "rlhf_good", "reward/good")
    (site / "rlhf_bare").mkdir()
    (site / "rlhf_bare" / "__init__.py").write_text("")
    sys.path.append(str(site))
    points = [Point("rlhf_gone"), Point("rlhf_good"), Point("rlhf_bare")]
    monkeypatch.setattr(discovery, "entry_points", lambda group: points)
    plugins, broken = discovery.discover()
    assert {p.name: p.origin for p in plugins}["good"] == "some-dist 1.0"
    assert [str(one) for one in broken] == [
        f"plugin rlhf_bare of some-dist 1.0 has no directory conf ({site / 'rlhf_bare' / 'conf'})",
        "plugin rlhf_gone of some-dist 1.0 names rlhf_gone, which is not an importable package",
    ]


def test_user_conf_is_in_the_working_directory_and_not_the_project(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert discovery.user_conf() is None
    (tmp_path / "conf").mkdir()
    assert discovery.user_conf() == tmp_path / "conf"
    monkeypatch.chdir(discovery.conf_dir().parent)
    assert discovery.user_conf() is None


def test_only_plugins_take_precedence_over_installed_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plugin(tmp_path / "plugins" / "rlhf_ppo", "stage/ppo")
    (tmp_path / "plugins" / "torch.py").write_text("raise SystemExit('a stranger runs')\n")
    (tmp_path / "plugins" / "secrets").mkdir()
    (tmp_path / "plugins" / "beside_plugins.py").write_text("value = 7\n")
    (tmp_path / "plugins" / "rlhf_ppo" / "conf").mkdir(exist_ok=True)
    discovery.discover()

    monkeypatch.delitem(sys.modules, "rlhf_ppo", raising=False)
    assert importlib.util.find_spec("rlhf_ppo").origin == str(tmp_path / "plugins" / "rlhf_ppo" / "__init__.py")
    for name in ("torch", "secrets"):
        monkeypatch.delitem(sys.modules, name, raising=False)
        assert "plugins" not in Path(str(importlib.util.find_spec(name).origin)).parts
    assert importlib.import_module("beside_plugins").value == 7  # modules that plugins share can still be imported
    monkeypatch.delitem(sys.modules, "beside_plugins")

    monkeypatch.setenv("RLHF_PLUGINS", str(tmp_path / "nowhere"))
    discovery.discover()
    monkeypatch.delitem(sys.modules, "rlhf_ppo", raising=False)
    spec = importlib.util.find_spec("rlhf_ppo")
    assert spec is None or tmp_path not in Path(str(spec.origin)).parents


@pytest.mark.parametrize("name", ["torch", "json", "yaml", "rlhf", "hydra"])
def test_a_plugin_named_as_an_installed_package_is_refused(tmp_path: Path, name: str) -> None:
    plugin(tmp_path / "plugins" / name, "objective/mine")
    with pytest.raises(UserError, match=f"plugins/{name}: {name} is the name of an installed package.*my_{name}"):
        discovery.discover()
