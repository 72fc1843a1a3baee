"""What an operator decides about the service."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from core_llm.errors import UserError
from guard.windows import EVERY, HOLD_BACK

if TYPE_CHECKING:
    from guard.policy import PolicyStore
    from guard.service.audit import AuditLog
    from guard.service.auth import KeyRing


@dataclass(frozen=True)
class Limits:
    """What one request may ask for.

    body_bytes: of a body without images; each image that may come adds its own bytes. inputs: strings of a
    list, or messages of a conversation. characters, tokens: of all its texts together; tokens are counted
    where the guard's tokenizer is known to the service. image_pixels: of one image, read from its header.
    """

    body_bytes: int = 262_144
    inputs: int = 128
    characters: int = 65_536
    tokens: int | None = None
    images: int = 4
    image_bytes: int = 4_194_304
    image_pixels: int = 16_777_216

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value is not None and value < (0 if name == "images" else 1):
                raise UserError(f"the limit {name} must be positive, got {value}")

    def body(self, sees: bool) -> int:
        """Bytes of a whole body: images come as base64, a third longer than they are."""
        return self.body_bytes + (self.images * (self.image_bytes * 4 // 3 + 256) if sees else 0)


@dataclass(frozen=True)
class Settings:
    """How the service runs.

    keys: who may ask; None lets everybody in. rate: judged inputs per minute and key (or client address,
    without keys), None for no limit; burst: inputs that may come at once. batch, wait_ms, queue: inputs
    judged together, how long the first of them waits for company, and how many may wait at all. timeout:
    seconds that a request may wait for its verdicts; read_timeout: for its body. max_requests: requests in
    the house at once. audit, audit_required: where verdicts are recorded, and whether one that cannot be
    recorded is withheld (503). image_urls: fetch images from public addresses. policies: the policy file
    that is watched; None judges by the guard's own policy. every, hold_back: windows of streams, characters.
    """

    limits: Limits = field(default_factory=Limits)
    keys: "KeyRing | None" = None
    rate: float | None = None
    burst: int | None = None
    batch: int = 32
    wait_ms: float = 2.0
    queue: int = 512
    timeout: float = 30.0
    read_timeout: float = 30.0
    max_requests: int = 1024
    audit: "AuditLog | None" = None
    audit_required: bool = True
    image_urls: bool = False
    policies: "PolicyStore | None" = None
    every: int = EVERY
    hold_back: int = HOLD_BACK

    def __post_init__(self) -> None:
        for name in ("batch", "queue", "timeout", "read_timeout", "max_requests", "every"):
            if getattr(self, name) <= 0:
                raise UserError(f"{name.replace('_', ' ')} must be positive, got {getattr(self, name)}")
        if self.wait_ms < 0 or self.hold_back < 0:
            raise UserError("wait ms and hold back must not be negative")
        if self.rate is not None and self.rate <= 0 or self.burst is not None and self.burst < 1:
            raise UserError("the rate limit and its burst must be positive")
