"""For tests of every package: a tiny random core (real code, no weights to ship), and torchrun."""

import os
import subprocess
import sys
from pathlib import Path

from core_llm.config import LlamaConfig
from core_llm.data.phrases import sample_texts
from core_llm.model import Llama
from core_llm.tokenizer import Tokenizer


def tiny_core(seed: int = 0, vocab_size: int = 768) -> tuple[Llama, Tokenizer]:
    """A random core (dim 64, 2 layers, 4 heads over 2 K/V heads) and a tokenizer that fits it."""
    tokenizer = Tokenizer.train(sample_texts(seed=0, n=400), vocab_size)
    config = LlamaConfig(64, 2, 4, 2, 128, vocab_size=vocab_size, max_positions=512, tied_embeddings=True)
    core = Llama(config).initialise(seed).eval().requires_grad_(False)
    return core, tokenizer


def torchrun(script: Path, *arguments: object, count: int = 2) -> str:
    """Run a script in `count` processes, as a user starts them; what they print. Raises where one fails."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    command = [sys.executable, *launcher, str(script), *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    if done.returncode:
        raise RuntimeError(f"torchrun ended with {done.returncode}: {done.stderr[-3000:]}")
    return done.stdout
