"""FLUX.2: architecture, tokens, text encoders, VAE, and how weights are located, loaded and saved."""

import logging

# diffusers imports bitsandbytes if it is installed. On some CPUs that import warns of a missing kernel for quantized
# weights. This package never uses bitsandbytes, and users cannot act on the warning.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
