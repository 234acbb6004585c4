"""Analysis of representations and of trained networks."""

__all__: list[str] = []
