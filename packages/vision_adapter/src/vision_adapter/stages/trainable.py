"""Which parts of adapter and core a stage trains."""

from core_llm.errors import UserError
from core_llm.lora import LoRA, LoRAConfig, has_updates
from core_llm.model import Llama
from vision_adapter.stages.presets import CORE_LORA, PARTS, StageConfig
from vision_adapter.updates import WithUpdates


def chosen_parts(text: str, stage: str) -> tuple[str, ...]:
    """The parts of a list such as "projector,core-lora"; all of the adapter for "".

    The token rows go with the projector: both speak the core's width. Raises `UserError` for a list that the
    stage cannot train; an unknown part is left to `StageConfig`.
    """
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts:
        return PARTS
    if stage == "contrastive" and parts != ["encoder"]:
        raise UserError("contrastive trains the encoder alone: leave --trainable out")
    if "projector" in parts:
        parts.append("token_rows")
    return tuple(dict.fromkeys(parts))


def trained_updates(
    stage: str, adapter: WithUpdates, core: Llama, config: StageConfig, seed: int
) -> LoRA | None:
    """The core's low-rank updates that the stage trains: those of the adapter, or new ones beside it.

    None where the stage does not train them; an adapter's updates then stay attached as they are.
    Raises `UserError` for a stage that cannot, or a core with the updates of another adapter.
    """
    if CORE_LORA not in config.trained:
        if adapter.lora is not None:
            adapter.lora.requires_grad_(False)
        return None
    if stage == "dpo":
        raise UserError(f"dpo does not train {CORE_LORA}: its reference shares the core; train it with sft")
    if config.average_top:
        raise UserError(f"--average-top averages the adapter alone: leave it or {CORE_LORA} out")
    if adapter.lora is None:
        if has_updates(core):
            raise UserError("the core has low-rank updates of another adapter attached; load it anew")
        adapter.hold(LoRA(core, LoRAConfig(config.lora_rank, alpha=2.0 * config.lora_rank), seed))
    assert adapter.lora is not None
    return adapter.lora.requires_grad_(True)
