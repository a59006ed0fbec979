"""Models: language models, scalar models, adapters, precision, optimizers and schedules."""

import logging
import warnings

# These are logged at import or on every layer call and require no action: a missing kernel that is not needed, the
# input cast of int8 layers, PEFT's use of a former attribute name of transformers.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
