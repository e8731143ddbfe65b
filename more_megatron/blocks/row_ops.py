"""Norm and rotary embedding for rows, in few passes over memory.

Both are computed many times in a recurrence. PyTorch's compositions of small operations take two to three times as many
passes on a CPU, most of them in the backward pass.
"""

import torch


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        wide = x.float()
        scale = torch.rsqrt(torch.linalg.vecdot(wide, wide).div_(x.size(-1)).add_(eps)).unsqueeze(-1)
        ctx.save_for_backward(x, weight, scale)
        return (wide * scale).mul_(weight).to(x.dtype)

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        x, weight, scale = ctx.saved_tensors
        normed, grad = x.float() * scale, grad.float()
        grad_weight = grad * normed
        if weight.dim() < x.dim():
            grad_weight = grad_weight.flatten(0, -2).sum(dim=0)
        inner = grad * weight
        projection = torch.linalg.vecdot(inner, normed).div_(-x.size(-1)).unsqueeze(-1)
        grad_x = inner.addcmul_(normed, projection).mul_(scale)
        return grad_x.to(x.dtype), grad_weight.to(weight.dtype), None


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Return `x / sqrt(mean(x^2) + eps) * weight`, computed in float32 (Zhang and Sennrich, arXiv 1910.07467).

    Args:
        x: [rows, h].
        weight: [h], or [rows, h] where rows have norms of their own.
        eps: Added to the mean square.
    """
    if x.is_cuda:
        # PyTorch's kernel takes one weight for all rows.
        is_shared = weight.dim() == 1
        normed = torch.nn.functional.rms_norm(x, x.shape[-1:], weight if is_shared else None, eps)
        return normed if is_shared else normed * weight
    return _RMSNorm.apply(x, weight, eps)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool) -> torch.Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.interleaved = interleaved
        return _turn(x, cos, sin, interleaved)

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        cos, sin = ctx.saved_tensors
        return _turn(grad, cos, -sin, ctx.interleaved), None, None, None


def _turn(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool) -> torch.Tensor:
    result = torch.empty_like(x, memory_format=torch.contiguous_format)
    size = 2 * cos.size(-1)
    (first, second), (new_first, new_second) = (_pairs(part[..., :size], interleaved) for part in (x, result))
    torch.mul(first, cos, out=new_first).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=new_second).addcmul_(first, sin)
    result[..., size:] = x[..., size:]
    return result


def _pairs(x: torch.Tensor, interleaved: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the two coordinates of each plane that is rotated."""
    if interleaved:
        return x[..., 0::2], x[..., 1::2]
    half = x.size(-1) // 2
    return x[..., :half], x[..., half:]


def rotation_of(angles: torch.Tensor, interleaved: bool, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Return cosine and sine of the angle of each plane, [..., planes], as `rotate` takes them.

    Args:
        angles: Of each channel, [..., 2 * planes], as Megatron lists them: the two of a plane share theirs.
        interleaved: Whether a plane is two neighbouring channels.
        dtype: Of the result.
    """
    angles = angles[..., 0::2] if interleaved else angles[..., : angles.size(-1) // 2]
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """Apply the rotary position embedding (Su et al., arXiv 2104.09864) to the leading channels of each head.

    Args:
        x: [rows, heads, d].
        cos: Cosine of the angle of each plane, [rows, 1, planes]; two channels a plane.
        sin: Sine likewise.
        interleaved: Whether a plane is two neighbouring channels, as in Megatron's `--rotary-interleaved`; else the two
            halves of the rotated channels.
    """
    return _Rotate.apply(x, cos, sin, interleaved)
