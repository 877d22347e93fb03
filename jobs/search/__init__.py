"""Searches: points of a space, the trials that run them, and the winner that is taken to the end."""
