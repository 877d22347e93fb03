"""A Whisper small enough to train on a laptop, and synthetic speech for it: the project's demo and its tests' model."""
