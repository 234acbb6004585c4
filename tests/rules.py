"""What holds for every op, on every back-end and by every route of its products: a test calls it for one op."""

import cases
import torch

from sslkern.ops.covariance import covariance

NAN, INF = float("nan"), float("inf")


def complaints(op_name, case_name, dtype, device, form="auto", forced=False):
    """What in one call, values and gradients, lies outside the rule."""
    op, case = cases.OPS[op_name], cases.CASES[case_name]
    weights, truth, plain, scale = cases.expected(op_name, case_name, dtype, forced)
    inputs = cases.inputs_of(case, op.inputs, dtype, device)
    outputs, grads = cases.value_and_grad(lambda *views: op.call(*views, form), inputs, weights)
    found = []
    for what, *parts in (
        ("output", outputs, truth[0], plain[0], scale[0]),
        ("gradient", grads, truth[1], plain[1], scale[1]),
    ):
        for index, (ours, *rest) in enumerate(zip(*parts, strict=True)):
            reason = cases.outside_rule(ours, *rest, inputs[0].dim() - 2)
            found += [f"{case_name} {form}: {what} {index}: {reason}"] if reason else []
    wanted = [torch.float32] * len(outputs) + [dtype] * len(grads)
    tensors = (*outputs, *grads)
    found += [f"{case_name}: dtype {t.dtype}" for t, w in zip(tensors, wanted, strict=True) if t.dtype != w]
    found += [f"{case_name}: strides {t.stride()}" for t in tensors if not t.is_contiguous()]
    return found


def check_bad_number(op_name, value, backend, device):
    """One bad number gives a NaN loss and a NaN gradient in its column; other columns keep their statistics."""
    op = cases.OPS[op_name]
    for shape, row in (((5, 9), 0), ((9, 5), 3), ((9, 5), 0), ((300, 140), 270))[
        : 2 if cases.interpreted(backend) else 4
    ]:
        views = [torch.randn(shape, device=device) for _ in range(op.inputs)]
        views[0][row, 2] = value
        outputs, grads = cases.value_and_grad(op.call, views)
        assert outputs[-1].isnan(), shape
        assert grads[0][:, 2].isnan().all(), shape
        if len(outputs) == 2:
            assert outputs[0].isnan().nonzero().flatten().tolist() == [2], shape


def check_range_of_fp16(op_name, form, backend, device):
    """Covariances over 256 and Grams over 65504, in fp16, stay finite: the sums are fp32."""
    op = cases.OPS[op_name]
    for n, d in ((40, 24), (24, 40)) if cases.interpreted(backend) else ((96, 24), (24, 256)):
        views = [(60 * torch.randn(n, 1) + 10 * torch.randn(n, d)).half().to(device) for _ in range(op.inputs)]
        assert covariance(views[0].float())[0].min() > 256
        assert (views[0].float() @ views[0].float().T).max() > 65504
        weights = tuple(torch.full_like(out, 1e-3) for out in op.call(*views, form))
        outputs, grads = cases.value_and_grad(lambda *x: op.call(*x, form), views, weights)
        assert all(x.isfinite().all() for x in (*outputs, *grads)), (n, d)
