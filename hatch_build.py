"""Adds conf/ and the plugins to the wheel. An editable install reads them where they are, so edits count at once."""

from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class CustomBuildHook(BuildHookInterface):  # type: ignore[type-arg]
    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if version == "editable":
            return
        build_data["force_include"]["conf"] = "rlhf/conf"
        for conf in sorted(Path(self.root, "plugins").glob("*/conf")):
            build_data["force_include"][str(conf.parent)] = conf.parent.name
