"""The check of losses that compare the tokens of a student with the same tokens of a teacher."""

from __future__ import annotations

from torch import Tensor

from ..core import checks


def check_tokens(student: Tensor, teacher: Tensor, same_width: bool) -> None:
    """Check that both are (B, N, D) with the same B and N, N >= 1, and the same D if `same_width` is True."""
    for name, z in (("student", student), ("teacher", teacher)):
        checks.matrix_stack(name, z, 1)
        if z.dim() != 3:
            raise ValueError(f"{name} must have shape (B, N, D), got {tuple(z.shape)}.")
    if same_width:
        checks.same_shape("student", student, "teacher", teacher)
    elif student.shape[:2] != teacher.shape[:2]:
        raise ValueError(
            f"student and teacher must have the same images and tokens (B, N), "
            f"got shapes {tuple(student.shape)} and {tuple(teacher.shape)}."
        )
    checks.beside("student", student, "teacher", teacher)
