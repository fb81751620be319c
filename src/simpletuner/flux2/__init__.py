"""All that knows FLUX.2: its numbers, tokens, encoders, where its weights are and how they come in."""

import logging

# diffusers imports bitsandbytes wherever it is installed, and on some processors that warns of a missing kernel for
# quantized weights. Nothing here uses it, and a user could do nothing about it.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
