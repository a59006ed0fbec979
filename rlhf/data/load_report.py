"""Report of loading a data source."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class BadRow:
    """Row that cannot be used: its place ("file, row 3") and the reason."""

    place: str
    reason: str

    def __str__(self) -> str:
        return f"{self.place}: {self.reason}"


@dataclass
class LoadReport:
    """Counts of the rows of a source that were read, kept and dropped."""

    source: str
    read: int = 0
    kept: int = 0
    ties: int = 0  # comparisons and labels without a preference
    unwanted: int = 0  # responses marked bad, where demonstrations are read
    bad: list[BadRow] = field(default_factory=list)
    train: int = 0
    validation: int = 0
    split: str = ""  # why another number of records is held out than requested

    def __str__(self) -> str:
        """Return one line for the terminal."""
        parts = [f"{self.source}: {self.read} read, {self.train} to train on, {self.validation} held out"]
        if self.ties:
            parts.append(f"{self.ties} dropped as ties (no preference, or the same text twice)")
        if self.unwanted:
            parts.append(f"{self.unwanted} left out as responses marked bad (label false)")
        if self.bad:
            parts.append(f"{len(self.bad)} dropped as unusable (first: {self.bad[0]})")
        if self.split:
            parts.append(self.split)
        return ", ".join(parts)
