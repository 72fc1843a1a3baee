"""The guard: one forward pass per batch gives P(unsafe) and every category's probability.

Axes: B prompts, T positions, C model width, V vocabulary.
"""

import json
import os
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from core_llm.adapters import Adapter, Assistant
from core_llm.cache import KVCache, Prefix
from core_llm.chat import Message, Rendered
from core_llm.errors import CheckpointError
from core_llm.generate import compute_prefix, hidden_states
from core_llm.hub import find_model
from core_llm.model import Llama
from core_llm.stored import DType
from core_llm.tokenizer import Tokenizer
from guard import stored
from guard.policy import Policy
from guard.prompt import Row
from guard.prompter import SETTINGS, Format, Prompter
from guard.released import Loader, check_is_core
from guard.verdict import MIN_MASS, Reading, Verdict, worse

__all__ = ["MIN_MASS", "NANO", "SETTINGS", "Guard", "Verdict"]

NANO = Path(__file__).parent / "nano"

# A prefix shorter than this is computed again: keeping it apart would cost more than it saves.
MIN_SHARED = 32
# Keys and values of so many prefixes are kept: of a policy there is one per speaker.
MAX_PREFIXES = 8
# Padded positions in one pass: more gain nothing in speed, and their activations take memory.
MAX_TOKENS = 4096
# Positions that keep a CPU busy: a batch that has them is closed before a twentieth of it would be padding.
BUSY_TOKENS = 256


class Guard:
    """A core fine-tuned to judge conversations.

    adapters: what reads images and sounds. form: how it is asked, by default in the project's own wording.
    temperature: of a calibration, see `verdict.Reading`.
    """

    def __init__(
        self, core: Llama, tokenizer: Tokenizer, policy: Policy | None = None, threshold: float = 0.5,
        *, adapters: Sequence[Adapter] = (), temperature: float = 1.0, form: Format | None = None,
    ) -> None:  # fmt: skip
        self.prompter = Prompter(tokenizer, policy, threshold, temperature, form)
        self._take(core, adapters)
        self.name = "guard"

    def _take(self, core: Llama, adapters: Sequence[Adapter]) -> None:
        self.core, self.tokenizer = core, self.prompter.tokenizer
        self.tokens = self.prompter.reading().tokens
        self._assistant = Assistant(core, self.tokenizer, adapters)
        self._prefixes: OrderedDict[tuple[int, ...], Prefix] = OrderedDict()

    @property
    def policy(self) -> Policy:
        """What it judges by of itself."""
        return self.prompter.policy

    @property
    def threshold(self) -> float:
        """P(unsafe) that is unsafe where a policy names none."""
        return self.prompter.threshold

    @threshold.setter
    def threshold(self, value: float) -> None:
        self.calibrate(threshold=value)

    @property
    def temperature(self) -> float:
        """Divides the difference of the logits of `unsafe` and `safe`."""
        return self.prompter.temperature

    @temperature.setter
    def temperature(self, value: float) -> None:
        self.calibrate(temperature=value)

    def calibrate(self, temperature: float | None = None, threshold: float | None = None) -> None:
        """Read verdicts with another temperature or threshold from now on; None keeps the present one."""
        self.prompter = Prompter(
            self.tokenizer,
            self.policy,
            self.prompter.threshold if threshold is None else threshold,
            self.prompter.temperature if temperature is None else temperature,
            self.prompter.form,
        )

    @property
    def adapters(self) -> tuple[Adapter, ...]:
        """What reads images and sounds."""
        return self._assistant.adapters

    @classmethod
    def load(
        cls, where: str | Path = "nano", dtype: DType | None = None, loader: Loader | None = None
    ) -> "Guard":
        """The bundled guard ("nano"), one in a folder, or one by its hub id.

        A folder holds a guard that this project saved, or a released Llama Guard with its chat template.
        dtype: by default fp32 for our own, the stored one for a released guard. loader: reads a checkpoint
        that is more than a core, such as Llama Guard 3-11B-Vision; `lambda folder: (core, tokenizer,
        [adapter])` around `vision_adapter.mllama_checkpoint.load_fused`.
        Raises `CheckpointError` for a missing, truncated or mismatched checkpoint.
        """
        folder = find_guard(where)
        own = (folder / SETTINGS).is_file()
        kept: DType = dtype if dtype is not None else (torch.float32 if own else "auto")
        if not own:
            Prompter.of_folder(folder)  # before gigabytes are read
        adapters: Sequence[Adapter] = ()
        if loader is not None:
            core, tokenizer, adapters = loader(folder)
        else:
            check_is_core(folder)
            core, tokenizer = stored.load(folder, kept)
        guard = cls.__new__(cls)
        guard.prompter = Prompter.of_folder(folder, tokenizer)
        guard._take(core, adapters)
        guard.name = f"guard-{where}" if str(where) == "nano" else folder.resolve().name
        return guard

    def save(self, folder: Path, card: str | None = None) -> None:
        """Write the checkpoint: a core in the Hugging Face layout, and the guard's settings."""
        stored.save(folder, self.core, self.tokenizer, card)
        temporary = folder / f"{SETTINGS}.tmp"
        temporary.write_text(json.dumps(self.prompter.settings(), indent=2) + "\n")
        os.replace(temporary, folder / SETTINGS)

    def classify(
        self,
        conversations: Sequence[Sequence[Message]],
        batch_size: int = 32,
        policy: Policy | None = None,
    ) -> list[Verdict]:
        """Judge the last message of each conversation, in order; by the guard's own policy, or by another.

        Raises `UserError` for an empty conversation, an empty last message, media without an adapter, and a
        policy that this guard cannot follow.
        """
        reading = self.prompter.reading(policy)
        rows: list[Row] = []
        owners: list[int] = []
        for owner, messages in enumerate(conversations):
            windows = self.prompter.rows(messages, reading)
            rows += windows
            owners += [owner] * len(windows)
        verdicts: list[Verdict | None] = [None] * len(conversations)
        for owner, verdict in zip(owners, self.judge_prompts(rows, reading, batch_size), strict=True):
            verdicts[owner] = worse(verdicts[owner], verdict)
        return [v for v in verdicts if v is not None]

    def judge_prompts(self, rows: Sequence[Row], reading: Reading, batch_size: int = 32) -> list[Verdict]:
        """A verdict for each prompt, in order, like ones in one forward pass."""
        found: dict[int, Verdict] = {}
        for chosen in self._batches(rows, batch_size):
            found.update(zip(chosen, self.judge_rows([rows[i] for i in chosen], reading), strict=True))
        return [found[index] for index in range(len(rows))]

    def _batches(self, rows: Sequence[Row], batch_size: int) -> list[list[int]]:
        """Numbers of the rows that pass together: of one prefix and of like lengths, for little padding."""
        groups: dict[tuple[int, ...], list[int]] = {}
        for index, row in enumerate(rows):
            groups.setdefault(_prefix_of(row), []).append(index)
        batches: list[list[int]] = []
        for prefix, members in groups.items():
            members.sort(key=lambda i: len(rows[i].ids))
            batch: list[int] = []
            real = 0  # positions of the batch that are no padding
            for index in members:
                width = len(rows[index].ids) - len(prefix)
                if batch and (
                    len(batch) == batch_size or (prefix and self._is_full(len(batch), real, width))
                ):
                    batches.append(batch)
                    batch = []
                real = width + (real if batch else 0)
                batch.append(index)
            batches.append(batch)
        return batches

    def _is_full(self, count: int, real: int, width: int) -> bool:
        """Whether a batch of `count` rows should end before one of `width`, by which all would be padded."""
        padded = (count + 1) * width
        if padded > MAX_TOKENS:
            return True
        on_cpu = self.core.embed_tokens.weight.device.type == "cpu"
        return on_cpu and real >= BUSY_TOKENS and real + width < 0.95 * padded

    def judge_rows(self, rows: Sequence[Row], reading: Reading) -> list[Verdict]:
        """A verdict for each prompt, in one forward pass; they begin with the same prefix, if any."""
        verdict, category = self.scores(rows, reading)
        pairs = verdict[:, [reading.tokens.safe, reading.tokens.unsafe]]
        return reading.verdicts(pairs, category[:, list(reading.tokens.codes.values())])

    @torch.inference_mode()
    def scores(self, rows: Sequence[Row], reading: Reading | None = None) -> tuple[Tensor, Tensor]:
        """Log-probabilities at the verdict position and behind the forced `unsafe\\nS`, both [B, V].

        Attention is causal, so what is forced behind the verdict position, and the padding behind that,
        cannot change the verdict.
        """
        forced = list((reading or self.prompter.reading()).tokens.forced)
        shared = _prefix_of(rows[0])
        if any(row.parts for row in rows):
            hidden, ends = self._hidden_with_media(rows, forced)
        else:
            hidden, ends = self._hidden_of_text([row.ids[len(shared) :] + forced for row in rows], shared)
        at = torch.arange(len(rows), device=hidden.device)
        picked = torch.stack([hidden[at, ends - len(forced)], hidden[at, ends]])
        verdict, category = self.core.logits(picked).float().log_softmax(-1)
        return verdict.cpu(), category.cpu()

    def _hidden_of_text(self, rows: Sequence[list[int]], shared: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """Hidden states [B, T, C] behind the shared prefix, and the last real position of each row."""
        width, pad = max(map(len, rows)), self.tokenizer.pad_id
        device = self.core.embed_tokens.weight.device
        tokens = torch.tensor([[*row, *[pad] * (width - len(row))] for row in rows], device=device)
        cache = None
        if shared:
            weight = self.core.embed_tokens.weight
            cache = KVCache(self.core.config, len(rows), width, weight.dtype, device, self._prefix(shared))
        hidden = self.core.hidden(tokens, cache=cache)
        return hidden, torch.tensor([len(row) - 1 for row in rows], device=device)

    def _hidden_with_media(self, rows: Sequence[Row], forced: list[int]) -> tuple[Tensor, Tensor]:
        """The same of whole prompts with media; a sound takes as many positions as it has vectors."""
        rendered = [
            Rendered(
                [*row.ids, *forced], [False] * (len(row.ids) + len(forced)), list(row.parts), len(row.ids)
            )
            for row in rows
        ]
        request = self._assistant.prepare_rendered(rendered)
        return hidden_states(self.core, request), request.lengths - 1

    def _prefix(self, ids: tuple[int, ...]) -> Prefix:
        """Keys and values of a prefix, computed the first time that it is asked for."""
        if ids in self._prefixes:
            self._prefixes.move_to_end(ids)
        else:
            self._prefixes[ids] = compute_prefix(self.core, ids)
            if len(self._prefixes) > MAX_PREFIXES:
                self._prefixes.popitem(last=False)
        return self._prefixes[ids]

    def forget_prefixes(self) -> None:
        """Drop the kept keys and values: needed after the core's weights changed."""
        self._prefixes.clear()


def _prefix_of(row: Row) -> tuple[int, ...]:
    """The ids that a row shares with others, () where they are too few to be kept apart."""
    return tuple(row.ids[: row.shared]) if row.shared >= MIN_SHARED and not row.parts else ()


def find_guard(where: str | Path) -> Path:
    """The folder of a guard: "nano", a folder, or a hub id; raises `CheckpointError` for anything else."""
    try:
        return find_model(where, NANO)
    except CheckpointError as error:
        if "unknown model" not in str(error):
            raise
        raise CheckpointError(
            f"unknown guard '{where}'; known: nano, a folder with a checkpoint, or a hub id such as "
            "meta-llama/Llama-Guard-3-1B"
        ) from None
