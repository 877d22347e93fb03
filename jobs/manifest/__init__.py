"""Manifests: CSV files of path, text, language and duration, made from a folder or checked as they are."""
