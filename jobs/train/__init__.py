"""The training engine. Knows nothing of Ray: a Session connects it to whatever runs it."""
