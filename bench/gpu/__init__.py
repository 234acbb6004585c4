"""`python -m bench.gpu`: all that a GPU can tell about sslkern, in one run of a few minutes."""
