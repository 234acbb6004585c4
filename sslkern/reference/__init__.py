"""Formulas in plain torch: the truth in tests, the fake kernels, and the fall-back on any other device."""
