"""Records, formats, chat templates, collation, and the embedded testbed. Importing this costs no torch."""

from rlhf.data.data import Data, LoadReport, Split
from rlhf.data.mixture import Mixture

__all__ = ["Data", "LoadReport", "Mixture", "Split"]
