"""The ground floor: dtypes, checks, autograd, and the ranks of a joint batch. It imports torch alone."""
