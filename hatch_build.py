"""Build hook that adds conf/ and the plugins to the wheel.

An editable install reads them in place, so that edits take effect at once.
"""

from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class CustomBuildHook(BuildHookInterface):  # type: ignore[type-arg]
    """Hatchling hook that includes files from outside the package."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Add conf/ as rlhf/conf and every plugin with a conf/ directory; nothing in an editable build."""
        if version == "editable":
            return
        build_data["force_include"]["conf"] = "rlhf/conf"
        for conf in sorted(Path(self.root, "plugins").glob("*/conf")):
            build_data["force_include"][str(conf.parent)] = conf.parent.name
