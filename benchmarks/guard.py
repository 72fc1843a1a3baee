"""Requests per second of the guard against transformers' generate on the same prompts, and what both think.

Random weights in the shape of Llama Guard 3-1B, in bf16 on a CPU. A prompt is a policy that all share, the
text of a user, and the demand behind it; lengths are those of the released template in the released
vocabulary (about 150 tokens of policy with bare names, 60 behind the text). transformers generates a
verdict: 2 tokens say `safe`, 5 say `unsafe` and a category, 20 is the limit in the example of the model's
card; random weights never stop by themselves, so the times after 2, 5 and 20 tokens of one call are told
apart. Its prompts end in the `\\n\\n` that a released guard would have to generate first. Both sides hold
the same weights in memory and take turns, so ratios of one round see the same machine.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from reporting import provenance, save, show  # noqa: E402

# This file has the name of the package that it measures: from here on `guard` must not mean the file.
sys.path[:] = [path for path in sys.path if Path(path or ".").resolve() != HERE]

from core_llm.checkpoint import NANO  # noqa: E402
from core_llm.config import LlamaConfig, preset  # noqa: E402
from core_llm.hf_layout import config_to_hf  # noqa: E402
from core_llm.keys import to_hf  # noqa: E402
from core_llm.model import Llama  # noqa: E402
from core_llm.stored import skeleton  # noqa: E402
from core_llm.tokenizer import Tokenizer  # noqa: E402
from guard.guard import Guard  # noqa: E402
from guard.prompt import Row  # noqa: E402

RESULTS = HERE / "results"
ANSWERS = (2, 5, 20)  # tokens: safe; unsafe with one category; the limit of the published example


def random_core(config: LlamaConfig, seed: int) -> Llama:
    """A core with random bf16 weights, made one by one: there is never an fp32 copy."""
    generator = torch.Generator().manual_seed(seed)
    core = skeleton(config)
    parameters: list[tuple[str, torch.Tensor]] = list(core.named_parameters())
    for name, parameter in parameters:
        owner, _, leaf = name.rpartition(".")
        made = torch.ones(parameter.shape, dtype=torch.bfloat16)
        if parameter.dim() > 1:
            made.normal_(std=config.dim**-0.5, generator=generator)
        setattr(core.get_submodule(owner), leaf, torch.nn.Parameter(made, requires_grad=False))
    if config.tied_embeddings:
        core.lm_head.weight = core.embed_tokens.weight
    return core.eval()


def peer_of(core: Llama) -> Any:
    """transformers' model on the very same tensors."""
    from transformers import LlamaConfig as HFConfig
    from transformers import LlamaForCausalLM
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    values = config_to_hf(core.config)
    config = HFConfig(**{k: v for k, v in values.items() if k not in ("architectures", "model_type")})
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    state: dict[str, torch.Tensor] = {to_hf(name): p for name, p in core.named_parameters()}
    state["lm_head.weight"] = core.lm_head.weight
    model.load_state_dict(state, assign=True)
    model.model.rotary_emb = LlamaRotaryEmbedding(config)
    model.generation_config.eos_token_id = None
    return model.eval()


def requests(count: int, policy: int, behind: int, words: int, seed: int) -> list[Row]:
    """Prompts with user texts of 20 to 200 tokens behind one policy."""
    rng = random.Random(seed)
    head = [rng.randrange(words) for _ in range(policy)]
    tail = [rng.randrange(words) for _ in range(behind)]
    lengths = [20 + round(180 * i / max(1, count - 1)) for i in range(count)]
    rng.shuffle(lengths)
    return [Row([*head, *(rng.randrange(words) for _ in range(n)), *tail], policy) for n in lengths]


def spread(rows: Sequence[Row], count: int) -> list[int]:
    """Numbers of `count` rows whose lengths are as spread as those of all."""
    ranked = sorted(range(len(rows)), key=lambda i: len(rows[i].ids))
    return [ranked[(2 * i + 1) * len(rows) // (2 * count)] for i in range(count)]


@dataclass
class Peer:
    """transformers' generate. seconds: per round, summed over calls, after each number of new tokens."""

    model: Any
    tokens: tuple[int, int]
    batch: int
    seconds: list[dict[int, float]] = field(default_factory=list)
    found: list[float] = field(default_factory=list)

    def run(self, rows: Sequence[Row], answers: Sequence[int]) -> None:
        """Judge all rows; sorted by length, as ours are, so that little is padded."""
        order = sorted(range(len(rows)), key=lambda i: len(rows[i].ids))
        total = dict.fromkeys(answers, 0.0)
        found: dict[int, float] = {}
        for start in range(0, len(order), self.batch):
            chosen = order[start : start + self.batch]
            marks, logits = self._generate([rows[i].ids for i in chosen], max(answers))
            for count in answers:
                total[count] += marks[count - 1]
            pairs = logits[:, list(self.tokens)].double().softmax(-1)[:, 1].tolist()
            found |= dict(zip(chosen, pairs, strict=True))
        self.seconds.append(total)
        self.found = [found[i] for i in range(len(rows))]

    def _generate(self, prompts: list[list[int]], count: int) -> tuple[list[float], torch.Tensor]:
        """Seconds from the call to each new token, and the logits of the first [B, V]."""
        from transformers import StoppingCriteria

        marks: list[float] = []

        class Clock(StoppingCriteria):
            def __call__(self, ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
                marks.append(time.perf_counter() - began)
                return torch.zeros(ids.shape[0], dtype=torch.bool)

        width = max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
        began = time.perf_counter()
        done = self.model.generate(
            ids, attention_mask=mask, max_new_tokens=count, do_sample=False, pad_token_id=0,
            stopping_criteria=[Clock()], return_dict_in_generate=True, output_logits=True,
        )  # fmt: skip
        return marks, done.logits[0].float()


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """One row per peer and length of its answer."""
    torch.set_num_threads(options.threads)
    config = replace(preset("llama-3.2-1b"), n_layers=options.layers)
    core = random_core(config, options.seed)
    guard = Guard(core, Tokenizer.load(NANO))
    reading = guard.prompter.reading()
    rows = requests(options.requests, options.policy, options.behind, config.vocab_size - 256, options.seed)
    chosen = spread(rows, options.peer_requests or len(rows))
    some = [rows[i] for i in chosen]
    words = (reading.tokens.safe, reading.tokens.unsafe)
    model = peer_of(core)
    peers = [Peer(model, words, batch) for batch in options.peer_batch]
    guard.judge_prompts(rows[:2], reading, 2)  # the policy's keys and values; libraries warm up
    ours: list[float] = []
    verdicts: list[float] = []
    with torch.inference_mode():
        for _ in range(options.rounds):
            began = time.perf_counter()
            verdicts = [v.probability for v in guard.judge_prompts(rows, reading, options.batch)]
            ours.append(time.perf_counter() - began)
            for peer in peers:
                peer.run(some, ANSWERS)
    table = []
    for peer in peers:
        gap = max(abs(a - b) for a, b in zip((verdicts[i] for i in chosen), peer.found, strict=True))
        noise = max(abs(a - b) for a, b in zip(peers[0].found, peers[-1].found, strict=True))
        for count in ANSWERS:
            theirs = [seconds[count] for seconds in peer.seconds]
            ratios = [len(rows) / a / (len(some) / b) for a, b in zip(ours, theirs, strict=True)]
            table.append(
                {
                    "policy tokens": options.policy,
                    "prompt tokens": round(statistics.mean(len(row.ids) for row in rows)),
                    "transformers": f"batch {peer.batch}, {count} tokens",
                    "ours/s": f"{len(rows) / statistics.median(ours):.2f}",
                    "transformers/s": f"{len(some) / statistics.median(theirs):.2f}",
                    "ratio": f"{statistics.median(ratios):.1f}",
                    "P(unsafe) differs by": f"{gap:.4f}",
                    "transformers from itself": f"{noise:.4f}",
                }
            )
    return table


def main() -> None:
    """Measure, print, and save unless told otherwise."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch", type=int, default=8, help="of our guard")
    parser.add_argument("--peer-batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument(
        "--peer-requests", type=int, help="give transformers only so many of the prompts, for a short run"
    )
    parser.add_argument("--policy", type=int, default=150, help="tokens of the policy")
    parser.add_argument("--behind", type=int, default=60, help="tokens behind the user's text")
    parser.add_argument("--layers", type=int, default=16, help="fewer for a trial")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-save", action="store_true")
    options = parser.parse_args()
    table = measure(options)
    show(table)
    if not options.no_save:
        save(RESULTS / f"guard-{options.policy}.csv", table, provenance(("torch", "transformers")))


if __name__ == "__main__":
    main()
