"""The guard: what the base model can do already, the tuned one must still be able to do."""
