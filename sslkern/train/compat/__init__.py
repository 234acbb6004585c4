"""The losses of other packages, under their names, with their arguments, errors, values and gradients.

Each module stands for one package, and one changed import switches a trainer over:

    from sslkern.train.compat.lightly import VICRegLoss  # before: from lightly.loss import VICRegLoss

No module imports the package that it stands for.
"""
