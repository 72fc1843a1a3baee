"""Own kernels for decoding on a CPU, in C: compiled once per machine in about a second, kept in the cache."""

from core_llm.kernels.cpu.ops import attend_decode, available, linear_bf16, linear_int4, linear_int8

__all__ = ["attend_decode", "available", "linear_bf16", "linear_int4", "linear_int8"]
