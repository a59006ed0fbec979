"""Step of a pipeline, and the plan of a command: its steps in the order in which they run."""

from dataclasses import dataclass, field
from pathlib import Path

from rlhf.storage.plain import Plain


@dataclass(frozen=True)
class Step:
    """Step of a plan: one run, to be computed or reused.

    Attributes:
        name: its name in the pipeline; in a single run the name of the stage.
        stage: the name of the stage.
        config: the resolved config, its own root; `round` in it counts the runs of this stage in its lineage, `branch`
            (from 2 on) distinguishes it from steps of the same stage that are not in its lineage.
        fingerprint: digest of all that determines its results, 64 hex letters.
        folder: its run directory, which need not exist yet.
        inputs: role -> the identities of the inputs that it reads in that role.
        parents: fingerprint -> run directory of the runs that it reads.
        headline: the metric that a sweep optimises, "" for a stage that names none.
        own: values that the pipeline sets on the step itself, whose keys are typed with the step's name as prefix;
            empty in a single run.
    """

    name: str
    stage: str
    config: Plain
    fingerprint: str
    folder: Path
    inputs: dict[str, list[str]]
    parents: dict[str, Path]
    headline: str
    own: Plain = field(default_factory=dict)


@dataclass(frozen=True)
class Plan:
    """Plan of a command, as `rlhf.planning.plan.plan` returns it.

    Attributes:
        steps: the steps to run, in order.
        skipped: step of the pipeline that is left out -> reason.
        compare: which two policies to compare at the end, and how; None if one of them is not made.
        notes: notes for the user, one line each.
    """

    steps: list[Step]
    skipped: dict[str, str]
    compare: Plain | None
    notes: list[str]

    def get(self, name: str | None) -> Step | None:
        """Return the step of that name; None if the plan does not run it."""
        return next((step for step in self.steps if step.name == name), None)
