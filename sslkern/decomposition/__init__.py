"""What self-supervised objectives optimise, in closed form or without a network: scikit-learn estimators."""

__all__: list[str] = []
