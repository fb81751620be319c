"""All that knows FLUX.2: its numbers, tokens, encoders, where its weights are and how they come in."""
