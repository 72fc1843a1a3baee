"""`core-llm`: pre-train a core, generate text."""

from pathlib import Path
from typing import Literal

from core_llm import cli_tools


def pretrain(
    out: Path,
    preset: str = "nano",
    data_root: Path | None = None,
    steps: int = 1300,
    lr: float = 3e-3,
    seed: int = 0,
    resume: bool = True,
) -> None:
    """Train a tokenizer and a core from scratch; the same command continues an interrupted run.

    Args:
        out: Folder for the checkpoint, metrics.jsonl and the resumable state.
        preset: Shape of the core, such as nano.
        data_root: Folder with local copies of the public datasets; without it they come from the hub.
        steps: Optimizer steps of the general stage; the nano recipe adds a stage on presence.
        lr: Peak learning rate.
        seed: Seed of weights and data order.
        resume: Continue from the state in --out if there is one.
    """
    from core_llm.checkpoint import save_core
    from core_llm.config import preset as find_preset
    from core_llm.train.fit import FitConfig
    from core_llm.train.pretrain import PretrainConfig
    from core_llm.train.pretrain import pretrain as train

    settings = FitConfig(
        out / "state", steps=steps, lr=lr, seed=seed, warmup=100, resume=resume, save_every=250
    )
    model, tokenizer, figures = train(find_preset(preset), data_root, settings, PretrainConfig(seed=seed))
    save_core(out, model, tokenizer)
    print(f"core saved in {out}; held-out loss {figures['held_out_loss']:.3f} nats per token")


def generate(
    prompts: cli_tools.Positional[tuple[str, ...]] = (),
    model: str = "nano",
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    min_p: float = 0.0,
    seed: int = 0,
    stop: tuple[str, ...] = (),
    logprobs: int | None = None,
    system: str | None = None,
    raw: bool = False,
    dtype: Literal["float32", "bfloat16", "auto"] = "float32",
    input: Path | None = None,
    out: Path | None = None,
    verbose: bool = False,
) -> None:
    """Answer prompts: one as plain text while it comes, several or --logprobs as JSON lines.

    Args:
        prompts: What the user says; "-" reads one from standard input.
        model: nano, a folder with a checkpoint, or a hub id.
        max_new_tokens: Length limit of an answer.
        temperature: 0 takes the most probable token; higher values draw more freely.
        top_p: Draw from the smallest set of tokens with this probability mass.
        top_k: Draw from this many tokens at most (0: no limit).
        min_p: Leave out tokens below this share of the most probable one.
        seed: Seed of the draws, the same for every prompt.
        stop: Strings that end an answer and are left out of it.
        logprobs: Report every token's log-probability and those of this many alternatives.
        system: System message before every prompt.
        raw: Continue the prompt as it is, without the chat format; for base models.
        dtype: Of the weights; auto keeps the stored one.
        input: JSONL file with a prompt (a string) or messages (role, content) per line, and an id if wanted.
        out: JSONL file for the answers; run again after an interruption, it does only what is missing.
        verbose: Tell speeds on standard error.
    """
    from core_llm.prompts import Job, answer
    from core_llm.sampling import Sampling

    settings = Sampling(max_new_tokens, temperature, top_p, top_k, min_p, seed)
    answer(Job(model, dtype, settings, system, raw, stop, logprobs), prompts, input, out, verbose)


def needle(
    out: Path,
    model: str = "nano",
    steps: int = 160,
    lr: float = 1e-3,
    seed: int = 0,
    resume: bool = True,
) -> None:
    """Teach a core to look facts up in texts as long as its context; `evals run needle` measures it.

    Args:
        out: Folder; the core goes to its sub-folder core/, metrics and resumable state beside it.
        model: nano, or a folder with a checkpoint to start from.
        steps: Optimizer steps.
        lr: Peak learning rate.
        seed: Seed of the texts.
        resume: Continue from the state in --out if there is one.
    """
    from core_llm.checkpoint import load_core, save_core
    from core_llm.train.fit import FitConfig
    from core_llm.train.needle import NeedleConfig, train_needle

    core, tokenizer = load_core(model, mapped=False)  # training writes to the weights
    settings = FitConfig(
        out / "state", steps=steps, lr=lr, seed=seed, warmup=20, resume=resume, save_every=20
    )
    figures = train_needle(core, tokenizer, settings, NeedleConfig(seed=seed))
    save_core(out / "core", core, tokenizer)
    print(f"core saved in {out / 'core'}; {figures['held_out_right']:.0%} of held-out answers right")


def convert(
    source: cli_tools.Positional[str],
    target: cli_tools.Positional[Path],
    to: Literal["hf", "original"] = "hf",
    dtype: Literal["keep", "float32", "bfloat16"] = "keep",
    max_shard_size: str = "5GB",
    shards: int = 1,
    rope_factor: float | None = None,
    overwrite: bool = False,
) -> None:
    """Rewrite a checkpoint in another layout, dtype or number of files, e.g. `core-llm convert ORIGINAL HF`.

    Args:
        source: Folder in the Hugging Face or the original layout, a hub id, or nano.
        target: Folder to write; it appears when all of it is there.
        to: Layout: hf (config.json, safetensors) or original (params.json, consolidated.NN.pth).
        dtype: Of the written weights; keep leaves every bit as it is.
        max_shard_size: Largest safetensors file, such as 5GB or 500MB.
        shards: Number of consolidated files, for model parallelism in the original code.
        rope_factor: RoPE scaling of an original checkpoint whose params.json does not say it (8 for 3.1,
            32 for 3.2); by default that of the preset with the same shape.
        overwrite: Replace the checkpoint in a target that is not empty.
    """
    import torch

    from core_llm.convert import convert_checkpoint
    from core_llm.stored import DType

    dtypes: dict[str, DType] = {"keep": "auto", "float32": torch.float32, "bfloat16": torch.bfloat16}
    convert_checkpoint(source, target, to, dtypes[dtype], max_shard_size, shards, rope_factor, overwrite)
    print(f"{source} written to {target} ({to} layout)")


def quantize(
    source: cli_tools.Positional[str],
    target: cli_tools.Positional[Path],
    scheme: Literal["int8", "int4", "fp8"],
    overwrite: bool = False,
) -> None:
    """Write a core with its linear layers in fewer bits; `--model` takes the result wherever it takes a core.

    Args:
        source: nano, a folder with a checkpoint, or a hub id.
        target: Folder to write; it appears when all of it is there.
        scheme: int8 or int4 weights, or fp8 weights and activations in the feed-forward layers.
        overwrite: Replace the checkpoint in a target that is not empty.
    """
    from core_llm.quantize import quantize_checkpoint

    print(quantize_checkpoint(source, target, scheme, overwrite))
    print(f"quantised core saved in {target}")


def lora_merge(
    core: cli_tools.Positional[str], adapter: cli_tools.Positional[Path], out: cli_tools.Positional[Path]
) -> None:
    """Write a core with the updates of a LoRA adapter in its weights.

    Args:
        core: The core that the adapter was trained on: nano, or a folder with a checkpoint.
        adapter: Folder with the adapter's config.json and weights.
        out: Folder for the merged core, in the Hugging Face layout.
    """
    from core_llm.checkpoint import load_core, save_core
    from core_llm.lora import LoRA

    model, tokenizer = load_core(core, "auto")
    LoRA.load(adapter, model).merge()
    save_core(out, model, tokenizer, dtype="auto")
    print(f"merged core saved in {out}")


def main() -> None:
    """Entry point of the console script."""
    cli_tools.run(
        "core-llm",
        "The Llama core: pre-train, generate.",
        {
            "pretrain": pretrain,
            "generate": generate,
            "lora-merge": lora_merge,
            "needle": needle,
            "convert": convert,
            "quantize": quantize,
        },
    )
