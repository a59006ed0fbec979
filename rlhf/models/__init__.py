"""Models: language models, scalar models, adapters, precision, optimizers and schedules."""

import logging
import warnings

# Said at import or on every layer call, and nothing a user could act on: a kernel that is not needed is missing, int8
# casts its inputs, a transformers function is called by the name it had before 5.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", message="`(is_)?gradient_checkpointing(_enable)?` is deprecated")
