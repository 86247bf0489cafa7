"""Processes that train one model: what they say to each other, which of them keeps what, and their checkpoints."""
