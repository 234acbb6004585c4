"""The lowest layer: dtypes, argument checks, autograd, and batches on several ranks. It imports only torch."""
