"""The demonstration: two diffusion transformers of real shape, streamed and checked bit for bit."""
