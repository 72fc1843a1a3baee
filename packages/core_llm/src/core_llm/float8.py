"""FP8 inference as in the Llama 3 paper: e4m3 weights and activations, one dynamic scale per row.

Source: arXiv 2407.21783, section 6.2. Axes: M activation rows (tokens), K inputs, N outputs.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from core_llm.quantized_linear import QuantizedLinear, widened_product

E4M3 = torch.float8_e4m3fn
E4M3_MAX = torch.finfo(E4M3).max  # 448
# The paper's bound on dynamic scales, read as a bound on the magnitude that is mapped to 448: what lies
# beyond saturates, so that one outlier does not push its row into underflow. (As a bound on the scale itself
# it would never act: no activation reaches 448 x 1200.)
SCALE_BOUND = 1200.0
_SMALLEST = 1e-12  # keeps the scale of a row of zeros above 0


def quantize_rows(x: Tensor, bound: float | None = None) -> tuple[Tensor, Tensor]:
    """x [M, K] → e4m3 values [M, K] and fp32 scales [M]: x ≈ scale · value, rounded to nearest even.

    scale = min(max |x|, bound) / 448 in each row; magnitudes above `bound` become `bound`.
    """
    wide = x.float()
    peak = wide.abs().amax(1).clamp(min=_SMALLEST, max=bound)
    scale = peak / E4M3_MAX
    # A cast to e4m3 turns what lies beyond 448 into NaN.
    return (wide / scale[:, None]).clamp(-E4M3_MAX, E4M3_MAX).to(E4M3), scale


class Float8Linear(QuantizedLinear):
    """e4m3 weights [N, K] with one fp32 scale per output row; activations are quantised per token row.

    On CUDA from compute capability 8.9 the product is torch's scaled one. Elsewhere the quantised
    activations and weights are multiplied in fp32: the same rounding, so the same cost in quality.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features)
        self.register_buffer("weight", torch.zeros(out_features, in_features, dtype=E4M3))
        self.register_buffer("scale", torch.zeros(out_features))

    @staticmethod
    def _quantize_rows(block: Tensor) -> tuple[Tensor, Tensor]:
        return quantize_rows(block)

    def dequantized(self, rows: slice | Tensor = slice(None)) -> Tensor:
        """fp32 weights [n, K] of some output rows."""
        return self.weight[rows].float() * self.scale[rows, None]

    def _product(self, x: Tensor) -> Tensor:
        values, scale = quantize_rows(x, SCALE_BOUND)
        if self._scaled_product_fits(x):
            row_wise = F.ScalingType.RowWise
            y = F.scaled_mm(
                values,
                self.weight.t(),
                scale[:, None],
                row_wise,
                self.scale[None],
                row_wise,
                output_dtype=torch.bfloat16,
                use_fast_accum=True,
            )
            return y.to(x.dtype)
        y = widened_product(values.float(), lambda rows: self.weight[rows].float(), self.out_features)
        return (y * scale[:, None] * self.scale).to(x.dtype)

    def _scaled_product_fits(self, x: Tensor) -> bool:
        if not x.is_cuda or self.in_features % 16 or self.out_features % 16:
            return False
        return torch.cuda.get_device_capability(x.device) >= (8, 9)

    def torchao_weight(self, dtype: torch.dtype) -> Tensor:
        """torchao's tensor over the same memory, with the same bound on the activations' scales."""
        from torchao.float8.inference import Float8MMConfig
        from torchao.quantization import Float8Tensor, PerRow
        from torchao.quantization.quantize_.workflows import QuantizeTensorToFloat8Kwargs

        activations = QuantizeTensorToFloat8Kwargs(
            E4M3, PerRow(), Float8MMConfig(use_fast_accum=True), _SMALLEST, SCALE_BOUND
        )
        return Float8Tensor(
            self.weight,
            self.scale[:, None],
            [1, self.in_features],
            Float8MMConfig(use_fast_accum=True),
            activations,
            dtype=dtype,
        )
