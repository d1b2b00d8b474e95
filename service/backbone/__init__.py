"""The frozen BLIP: architecture, weights, forward pass, decoding."""
