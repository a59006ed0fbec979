"""Records, formats, chat templates, collation and the embedded testbed. The import needs no torch."""

from rlhf.data.data import Data
from rlhf.data.load_report import LoadReport
from rlhf.data.mixture import Mixture
from rlhf.data.split import Split

__all__ = ["Data", "LoadReport", "Mixture", "Split"]
