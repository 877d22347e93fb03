"""Sizes in words."""


def size_text(size_bytes: int) -> str:
    """`370 kB`, `4.9 MB`, `1.62 GB`."""
    if size_bytes >= 1e9:
        return f"{size_bytes / 1e9:.2f} GB"
    return f"{size_bytes / 1e6:.1f} MB" if size_bytes >= 1e6 else f"{size_bytes / 1e3:.0f} kB"
