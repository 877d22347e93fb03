"""The client of whisper-jobs: specs, command line, storage. Imports no torch, no transformers, nothing from jobs/."""
