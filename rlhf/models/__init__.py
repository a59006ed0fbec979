"""Models: language models, scalar models, adapters, precision, optimizers and schedules."""

import logging
import warnings

# Logged at import or on every layer call, and nothing a user could act on: a kernel that is not needed is missing, int8
# casts its inputs, peft reads an attribute of transformers by its former name.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
