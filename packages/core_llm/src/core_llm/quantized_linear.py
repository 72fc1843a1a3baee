"""Linear layers that hold int8 or int4 weights; the plain values and scales are what is saved.

Axes: M activation rows, K inputs, N outputs.
"""

from abc import abstractmethod
from collections.abc import Callable
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core_llm.kernels.cpu import ops
from core_llm.kernels.cpu.block import INT4, INT8, Matrix
from core_llm.kernels.steps import KERNEL_ROWS, multiplies_bf16

INT4_GROUP = 64  # inputs that share a scale
_QUANTIZE_ELEMENTS = 1 << 18  # weights quantised at a time: a few temporaries of 1 MiB
_BLOCK_ELEMENTS = 1 << 22  # weights in floating point at a time in a product: 16 MiB in fp32
# Beyond this many rows a product is bound by arithmetic: plain BLAS on widened weights, block by block.
_PACKED_ROWS = 32
# Shares of a group's range: a narrower grid clips the ends and is finer for the rest.
_INT4_RANGES = (1.0, 0.93, 0.86)


class QuantizedLinear(nn.Module):
    """A linear layer without bias whose weight [N, K] is kept in few bits.

    All buffers are part of the state dict. `.to(dtype)` of the whole model moves them to another
    device but leaves their dtypes alone.
    """

    weight: Tensor
    scale: Tensor

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features

    @classmethod
    def from_weight(cls, weight: Tensor) -> Self:
        """Quantise weight [N, K] of any floating dtype in blocks of rows; raises ValueError on NaN or inf."""
        with torch.device(weight.device):
            module = cls(weight.shape[1], weight.shape[0])
        step = max(1, _QUANTIZE_ELEMENTS // weight.shape[1])
        for start in range(0, weight.shape[0], step):
            block = weight[start : start + step].detach().float()
            if not bool(block.isfinite().all()):
                raise ValueError("the weights hold NaN or infinity")
            values, scale = cls._quantize_rows(block)
            module.weight[start : start + step] = values
            module.scale[start : start + step] = scale
        return module

    @classmethod
    def unfit(cls, in_features: int, out_features: int) -> str | None:
        """Why a layer of this shape cannot be held, or None."""
        return None

    @staticmethod
    @abstractmethod
    def _quantize_rows(block: Tensor) -> tuple[Tensor, Tensor]:
        """fp32 rows [n, K] → stored values and scales of these rows."""

    @abstractmethod
    def dequantized(self, rows: slice | Tensor = slice(None)) -> Tensor:
        """fp32 weights [n, K] of some output rows, by a slice or their numbers [n].

        Exactly those that every product multiplies with.
        """

    @abstractmethod
    def torchao_weight(self, dtype: torch.dtype) -> Tensor:
        """The same weight as a torchao tensor for activations of `dtype`; needs torchao."""

    def pack(self, dtype: torch.dtype) -> None:
        """Reorder for the CPU's product with activations of `dtype`, where it wants another order."""

    def saved_bytes(self) -> int:
        """Bytes of the saved form, packed or not."""
        with torch.device("meta"):
            empty = type(self)(self.in_features, self.out_features)
        return sum(tensor.nbytes for tensor in empty.state_dict().values())

    def cpu_matrix(self) -> Matrix | None:
        """The weight for the C kernels, or None where they do not read this kind."""
        return None

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] → [..., N]."""
        y = self._product(x.reshape(-1, self.in_features))
        return y.reshape(*x.shape[:-1], self.out_features)

    @abstractmethod
    def _product(self, x: Tensor) -> Tensor:
        """[M, K] → [M, N]."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        def keep_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor.new_empty(0))
            return fn(tensor) if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(keep_dtype, recurse)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"


def widened_product(x: Tensor, rows: Callable[[slice], Tensor], n: int) -> Tensor:
    """x [M, K] times weights [N, K] that `rows` gives in fp32, some rows at a time → [M, N] in x's dtype."""
    if x.is_cuda:
        return F.linear(x, rows(slice(None)).to(x.dtype))
    wide = x.dtype if multiplies_bf16("cpu") else torch.promote_types(x.dtype, torch.float32)
    step = max(1, _BLOCK_ELEMENTS // x.shape[1])
    x_wide = x.to(wide)
    blocks = [
        F.linear(x_wide, rows(slice(i, min(i + step, n))).to(wide)).to(x.dtype) for i in range(0, n, step)
    ]
    return blocks[0] if len(blocks) == 1 else torch.cat(blocks, dim=1)


def _suits_kernel(x: Tensor) -> bool:
    """Whether the own CPU kernels take these activations [M, K]: few rows, which is decoding."""
    return x.shape[0] <= KERNEL_ROWS and x.shape[1] % ops.GROUP == 0 and ops.usable(x)


class Int8Linear(QuantizedLinear):
    """int8 weights [N, K] and one fp32 scale per output row [N]: w = scale · q, q in -127..127.

    Scales are rounded to values that bf16 holds, so that products which take their scales in bf16
    multiply with the very same weights. Error of a weight: at most half a scale.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features)
        self.register_buffer("weight", torch.zeros(out_features, in_features, dtype=torch.int8))
        self.register_buffer("scale", torch.zeros(out_features))

    @staticmethod
    def _quantize_rows(block: Tensor) -> tuple[Tensor, Tensor]:
        scale = (block.abs().amax(1) / 127).bfloat16().float()
        values = block / torch.where(scale == 0, 1, scale)[:, None]
        return values.round_().clamp_(-127, 127).to(torch.int8), scale

    def dequantized(self, rows: slice | Tensor = slice(None)) -> Tensor:
        """fp32 weights [n, K] of some output rows."""
        return self.weight[rows].float() * self.scale[rows][:, None]

    def cpu_matrix(self) -> Matrix | None:
        """The weight for the C kernels."""
        return Matrix(INT8, self.out_features, self.in_features, self.weight, self.scale)

    def _product(self, x: Tensor) -> Tensor:
        if _suits_kernel(x):
            return ops.linear_int8(x, self.weight, self.scale)
        if x.device.type == "cpu" and x.shape[0] <= _PACKED_ROWS:
            return torch._weight_int8pack_mm(x.contiguous(), self.weight, self.scale.to(x.dtype))
        if x.is_cuda:  # whole numbers up to 127 are exact in bf16; the compiler fuses the conversion
            return F.linear(x, self.weight.to(x.dtype)) * self.scale.to(x.dtype)
        return widened_product(x, self.dequantized, self.out_features)

    def torchao_weight(self, dtype: torch.dtype) -> Tensor:
        """torchao's tensor over the same memory."""
        from torchao.quantization import Int8Tensor

        return Int8Tensor(self.weight, self.scale[:, None], [1, self.in_features], dtype)


class Int4Linear(QuantizedLinear):
    """int4 weights in groups of 64 inputs: w = scale · q + minimum, q in 0..15; 4.5 bits per weight.

    Saved form: bf16 scale and minimum side by side [N, K/64, 2]; uint8 [N, K/2], in which 32 bytes hold a
    group as 16 little-endian words, with q of the group's input 16 j + i in nibble j of word i. `pack`
    exchanges the saved form for the order of torch's CPU product; a packed layer has no state to save.
    """

    packed: Tensor | None
    packed_scales: Tensor | None

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features)
        groups = in_features // INT4_GROUP
        self.register_buffer("weight", torch.zeros(out_features, in_features // 2, dtype=torch.uint8))
        self.register_buffer("scale", torch.zeros(out_features, groups, 2, dtype=torch.bfloat16))
        self.register_buffer("packed", None, persistent=False)
        self.register_buffer("packed_scales", None, persistent=False)

    @classmethod
    def unfit(cls, in_features: int, out_features: int) -> str | None:
        """Groups must divide the inputs."""
        if in_features % INT4_GROUP:
            return f"its {in_features} inputs are not divisible by the group of {INT4_GROUP}"
        return None

    @staticmethod
    def _quantize_rows(block: Tensor) -> tuple[Tensor, Tensor]:
        groups = block.unflatten(1, (-1, INT4_GROUP))
        scale, minimum = _best_grid(groups)
        q = _to_grid(groups, scale, minimum).to(torch.uint8)
        words = q.unflatten(2, (2, 2, 16))  # [n, groups, byte of the word, half of the byte, word]
        bytes_ = words[:, :, :, 0] | words[:, :, :, 1] << 4
        return bytes_.transpose(2, 3).flatten(1), torch.cat((scale, minimum), dim=2).bfloat16()

    def _nibbles(self, rows: slice | Tensor = slice(None)) -> Tensor:
        """q as uint8 [n, K]."""
        bytes_ = self.weight[rows].unflatten(1, (-1, 16, 2)).transpose(2, 3)
        return torch.stack((bytes_ & 15, bytes_ >> 4), dim=3).flatten(1)

    def dequantized(self, rows: slice | Tensor = slice(None)) -> Tensor:
        """fp32 weights [n, K] of some output rows; from the saved form, so not of a packed layer."""
        q = self._nibbles(rows).float().unflatten(1, (-1, INT4_GROUP))
        scale, minimum = self.scale[rows].float().split(1, dim=2)
        return (q * scale + minimum).flatten(1)

    def pack(self, dtype: torch.dtype) -> None:
        """Exchange the saved form for the one of torch's product, unless the own kernel reads it as it is.

        A number of outputs that torch's product cannot take leaves the layer unpacked.
        """
        if ops.available():
            return
        if self.packed is not None or self.weight.device.type != "cpu" or self.out_features % 16:
            return
        self.packed = torch._convert_weight_to_int4pack_for_cpu(self._nibbles().int(), 1)
        self.packed_scales = self._scale_and_middle(dtype)
        del self.weight, self.scale

    def _scale_and_middle(self, dtype: torch.dtype) -> Tensor:
        """[K/64, N, 2] as torch's products want it: scale, and the weight that q = 8 stands for."""
        scale, minimum = self.scale.float().unbind(2)
        return torch.stack((scale, minimum + 8 * scale), dim=2).transpose(0, 1).to(dtype).contiguous()

    def cpu_matrix(self) -> Matrix | None:
        """The weight for the C kernels, unless torch's order has replaced theirs."""
        if self.packed is not None:
            return None
        return Matrix(INT4, self.out_features, self.in_features, self.weight, self.scale)

    def _product(self, x: Tensor) -> Tensor:
        if self.packed is None or self.packed_scales is None:
            if _suits_kernel(x):
                return ops.linear_int4(x, self.weight, self.scale)
            return widened_product(x, self.dequantized, self.out_features)
        scales = self.packed_scales.to(x.dtype)
        return torch._weight_int4pack_mm_for_cpu(x.contiguous(), self.packed, INT4_GROUP, scales)

    def torchao_weight(self, dtype: torch.dtype) -> Tensor:
        """torchao's tile-packed tensor (bf16 activations, CUDA), padded as its product expects."""
        from torchao.quantization import Int4TilePackedTo4dTensor

        more_inputs, more_outputs = -self.in_features % 1024, -self.out_features % 8
        q = F.pad(self._nibbles(), (0, more_inputs, 0, more_outputs))
        # Where inputs are padded, activations are 0 and scales are too.
        scales = F.pad(
            self._scale_and_middle(torch.bfloat16), (0, 0, 0, more_outputs, 0, more_inputs // INT4_GROUP)
        )
        packed = torch.ops.aten._convert_weight_to_int4pack(q[:, ::2] << 4 | q[:, 1::2], 8)
        shape = torch.Size((self.out_features, self.in_features))
        return Int4TilePackedTo4dTensor(packed, scales, [1, INT4_GROUP], shape)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """What is saved; raises ValueError for a packed layer, whose saved form is gone."""
        if self.packed is not None:
            raise ValueError("a packed int4 layer cannot be saved: save before pack()")
        return super().state_dict(*args, **kwargs)


def _best_grid(groups: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and minimum [n, groups, 1] of groups [n, groups, 64], as values that bf16 holds.

    Candidates: the group's range, two narrower ones around the same middle, and for each the line that
    fits its rounded values best. The one with the least squared error wins, group by group.
    """
    low, high = groups.amin(2, keepdim=True), groups.amax(2, keepdim=True)
    mean = groups.mean(2, keepdim=True)
    centred = groups - mean
    best = torch.full_like(mean, float("inf"))
    scale, minimum = torch.zeros_like(mean), torch.zeros_like(mean)
    for share in _INT4_RANGES:
        step = (high - low) * (share / 15)
        first = (high + low) / 2 - 7.5 * step
        for _ in range(2):
            step, first = step.bfloat16().float(), first.bfloat16().float()
            q = _to_grid(groups, step, first)
            error = (q * step).add_(first).sub_(groups).pow_(2).sum(2, keepdim=True)
            scale, minimum = torch.where(error < best, step, scale), torch.where(error < best, first, minimum)
            best = torch.minimum(error, best)
            q_mean = q.mean(2, keepdim=True)
            q -= q_mean
            step = (q * centred).sum(2, keepdim=True) / q.pow_(2).sum(2, keepdim=True).clamp(min=1e-9)
            first = mean - step * q_mean
    return scale, minimum


def _to_grid(groups: Tensor, scale: Tensor, minimum: Tensor) -> Tensor:
    """Nearest whole numbers 0..15, as floats."""
    return ((groups - minimum) / torch.where(scale == 0, 1, scale)).round_().clamp_(0, 15)
