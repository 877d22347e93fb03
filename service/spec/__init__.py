"""The job spec: every setting's name, type, range, default and description, once. stdlib and pydantic only."""
