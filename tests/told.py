"""What is told where Triton leaves a call to another back-end, in part."""

FLOAT64 = "float64 is not among its kernel's dtypes, float32"
MANY_GROUPS = "the pairs of groups, by blocks of rows, are more programs than a grid has"
