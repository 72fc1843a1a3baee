"""Random weights of one shape, written once in every format that an engine reads."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from core_llm.config import LlamaConfig
from core_llm.errors import UserError

LLAMA_FILES = {"q8_0": "LLAMA_FTYPE_MOSTLY_Q8_0", "q4_0": "LLAMA_FTYPE_MOSTLY_Q4_0"}
OURS = ("int8", "int4")


def write_all(folder: Path, config: LlamaConfig, peers: bool) -> None:
    """folder/bf16 in the Hugging Face layout, folder/int8 and int4 in ours, *.gguf for llama.cpp.

    What is there already is kept; each is written under another name and moved, so that a killed run leaves
    nothing half done.
    """
    folder.mkdir(parents=True, exist_ok=True)
    plain = folder / "bf16"
    if not plain.exists():
        _write(plain, lambda out: _write_plain(out, config))
    for scheme in OURS:
        if not (folder / scheme).exists():
            _write(folder / scheme, lambda out, scheme=scheme: _write_quantised(plain, out, scheme))
    if peers:
        full = folder / "bf16.gguf"
        if not full.exists():
            _write(full, lambda out: _write_gguf(plain, out, config))
        for kind in LLAMA_FILES:
            if not (folder / f"{kind}.gguf").exists():
                _write(folder / f"{kind}.gguf", lambda out, kind=kind: _quantise_gguf(full, out, kind))


def _write(target: Path, make: Any) -> None:
    print(f"writing {target}", flush=True)
    temporary = target.with_name(target.name + ".tmp")
    if temporary.is_dir():
        shutil.rmtree(temporary)
    make(temporary)
    temporary.rename(target)


def random_core(config: LlamaConfig) -> Any:
    """A bf16 core with uniform weights: their values change no engine's speed."""
    from core_llm.model import Llama
    from core_llm.rope import rope_frequencies

    with torch.device("meta"):
        core = Llama(config)
    core = core.to(torch.bfloat16).to_empty(device="cpu")
    if config.tied_embeddings:  # to_empty gives each its own memory
        core.lm_head.weight = core.embed_tokens.weight
    core.frequencies = rope_frequencies(config)
    generator = torch.Generator().manual_seed(0)
    for parameter in core.parameters():
        with torch.no_grad():
            if parameter.dim() < 2:
                parameter.fill_(1)
            else:
                parameter.uniform_(-0.03, 0.03, generator=generator)
    return core.eval().requires_grad_(False)


def _write_plain(out: Path, config: LlamaConfig) -> None:
    from core_llm.checkpoint import load_core, save_core

    _, any_tokenizer = load_core("nano")  # no text is read or written here
    save_core(out, random_core(config), any_tokenizer, dtype="auto")


def _write_quantised(plain: Path, out: Path, scheme: str) -> None:
    from core_llm.quantize import quantize_checkpoint

    print(quantize_checkpoint(str(plain), out, scheme))


def _gguf_name(name: str) -> str:
    """Our name of a tensor → llama.cpp's."""
    table = {
        "embed_tokens": "token_embd",
        "norm": "output_norm",
        "lm_head": "output",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    stem = name.removesuffix(".weight")
    if stem.startswith("layers."):
        _, index, rest = stem.split(".", 2)
        return f"blk.{index}.{table[rest]}.weight"
    return f"{table[stem]}.weight"


def _write_gguf(plain: Path, out: Path, config: LlamaConfig) -> None:
    """The same bytes for llama.cpp; without a vocabulary, which a speed test does not need."""
    import gguf

    from core_llm.checkpoint import open_weights, read_core

    writer = gguf.GGUFWriter(out, "llama")
    writer.add_context_length(config.max_positions)
    writer.add_embedding_length(config.dim)
    writer.add_block_count(config.n_layers)
    writer.add_feed_forward_length(config.ffn_dim)
    writer.add_head_count(config.n_heads)
    writer.add_head_count_kv(config.n_kv_heads)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    for name, tensor in read_core(open_weights(plain)).named_parameters():
        if tensor.dim() < 2:
            writer.add_tensor(_gguf_name(name), tensor.float().numpy())
        else:
            writer.add_tensor(_gguf_name(name), _bytes(tensor), raw_dtype=gguf.GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _bytes(tensor: Tensor) -> "np.ndarray[Any, np.dtype[np.uint8]]":
    return tensor.detach().view(torch.uint8).numpy()


def _quantise_gguf(full: Path, out: Path, kind: str) -> None:
    import llama_cpp

    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype = getattr(llama_cpp, LLAMA_FILES[kind])
    if llama_cpp.llama_model_quantize(str(full).encode(), str(out).encode(), settings):
        raise UserError(f"llama.cpp could not quantise {full} to {kind}")


def weight_bytes(folder: Path, name: str) -> int:
    """Size of the file or files that an engine loads."""
    library, kind = name.split()
    if library == "llama.cpp":
        return (folder / f"{kind}.gguf").stat().st_size
    files = list((folder / ("bf16" if library == "transformers" else kind)).glob("*.safetensors"))
    return sum(file.stat().st_size for file in files)


def bytes_per_token(folder: Path, name: str, config: LlamaConfig) -> int:
    """What one decode step reads of them: not the embedding where the head has weights of its own."""
    beside = name in [f"ours {scheme}" for scheme in OURS] or not config.tied_embeddings
    return weight_bytes(folder, name) - (2 * config.vocab_size * config.dim if beside else 0)
