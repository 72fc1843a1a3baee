"""Generation against transformers' `generate` and against the uncached core."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from core_llm import stepping
from core_llm.cache import KVCache, Prefix
from core_llm.checkpoint import config_to_hf
from core_llm.config import LlamaConfig
from core_llm.errors import UserError
from core_llm.generate import Completion, Request, compute_prefix, generate, prefill, stream
from core_llm.model import Llama
from core_llm.sampling import Sampling
from core_llm.testing import tiny_core

CONFIG = LlamaConfig(64, 2, 4, 2, 96, vocab_size=120, max_positions=256)
CORE = Llama(CONFIG).initialise(0).eval().requires_grad_(False)
CORE.lm_head.weight.mul_(3)  # sharper than random: no near-ties for rounding to decide
RANDOM = torch.Generator().manual_seed(2)
PROMPTS = [torch.randint(0, 120, (n,), generator=RANDOM).tolist() for n in (9, 1, 23, 14)]


@contextmanager
def tokens_through_the_blocks(core: Llama) -> Iterator[list[int]]:
    """How many tokens each pass sends through the first block, all rows together."""
    seen: list[int] = []
    hook = core.layers[0].register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[:2].numel()))
    try:
        yield seen
    finally:
        hook.remove()


def tokens(completions: list[Completion]) -> list[tuple[int, ...]]:
    return [c.tokens for c in completions]


def test_greedy_batch_equals_transformers() -> None:
    from transformers import LlamaConfig as HFConfig
    from transformers import LlamaForCausalLM

    values = config_to_hf(CONFIG, tiny_core()[1])
    ignored = ("architectures", "model_type", "dtype", "bos_token_id", "eos_token_id")
    peer = LlamaForCausalLM(HFConfig(**{k: v for k, v in values.items() if k not in ignored}, pad_token_id=0))
    peer.load_state_dict(
        {k if k.startswith("lm_head") else f"model.{k}": v for k, v in CORE.state_dict().items()}
    )
    width = max(map(len, PROMPTS))
    padded = torch.tensor([[0] * (width - len(p)) + p for p in PROMPTS])
    visible = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in PROMPTS])
    peer.generation_config.eos_token_id = None
    with torch.no_grad():
        theirs = peer.eval().generate(
            padded, attention_mask=visible, max_new_tokens=32, min_new_tokens=32, do_sample=False
        )
    ours = generate(CORE, PROMPTS, Sampling(max_new_tokens=32))
    assert [list(c.tokens) for c in ours] == theirs[:, width:].tolist()
    assert {c.finish_reason for c in ours} == {"length"}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_batch_equals_one_by_one(temperature: float) -> None:
    settings = [Sampling(5 + 9 * i, temperature, top_p=0.95, seed=40 + i) for i in range(4)]
    together = generate(CORE, PROMPTS, settings)
    alone = [generate(CORE, [p], s)[0] for p, s in zip(PROMPTS, settings)]
    assert tokens(together) == tokens(alone)
    assert [len(c.tokens) for c in together] == [5, 14, 23, 32]
    if temperature:
        other = generate(CORE, PROMPTS[:1], Sampling(5, 1.0, top_p=0.95, seed=99))
        assert tokens(other) != tokens(together[:1])


def test_stop_tokens_end_a_row_and_are_counted_but_not_shown() -> None:
    free = generate(CORE, PROMPTS, Sampling(max_new_tokens=20))
    stop = free[2].tokens[6]
    found = generate(CORE, PROMPTS, Sampling(max_new_tokens=20), stop_ids=[stop])
    assert found[2].finish_reason == "stop" and stop not in found[2].tokens
    for before, after in zip(free, found):
        n = before.tokens.index(stop) if stop in before.tokens else 20
        assert after.tokens == before.tokens[:n]
        assert after.finish_reason == ("stop" if n < 20 else "length")
        assert after.usage.completion_tokens == (n + 1 if n < 20 else 20)
    assert [c.usage.prompt_tokens for c in found] == list(map(len, PROMPTS))


def test_logprobs_equal_the_uncached_core_in_float64() -> None:
    settings = Sampling(max_new_tokens=10, temperature=1.0, top_k=3, seed=1)
    for prompt, answer in zip(PROMPTS, generate(CORE, PROMPTS, settings, logprobs=4)):
        with torch.inference_mode():
            logits = CORE(torch.tensor([[*prompt, *answer.tokens]]))[0, len(prompt) - 1 : -1]
        log_p = logits.double().log_softmax(-1)
        assert len(answer.logprobs) == len(answer.tokens) == 10
        for token, row, entry in zip(answer.tokens, log_p, answer.logprobs):
            assert entry.token == token
            assert entry.logprob == pytest.approx(row[token].item(), abs=1e-4)
            assert list(entry.top_logprobs) == row.topk(4).indices.tolist()
            assert list(entry.top_logprobs.values()) == pytest.approx(row.topk(4).values.tolist(), abs=1e-4)
    assert generate(CORE, PROMPTS, settings)[0].logprobs == ()


def test_events_tell_each_row_to_its_end() -> None:
    settings = [Sampling(max_new_tokens=n) for n in (1, 4, 2, 4)]
    events = list(stream(CORE, PROMPTS, settings))
    assert [e.index for e in events] == [0, 1, 2, 3, 1, 2, 3, 1, 3, 1, 3]
    assert [e.index for e in events if e.finish_reason == "length" and e.usage] == [0, 2, 1, 3]


def test_text_and_stop_strings() -> None:
    core, tokenizer = tiny_core()
    whole = generate(core, ["a red circle"], Sampling(max_new_tokens=40), tokenizer)[0]
    ids = [tokenizer.bos_id, *tokenizer.encode("a red circle")]
    assert (
        whole.tokens
        == generate(core, [ids], Sampling(max_new_tokens=40), stop_ids=tokenizer.stop_ids)[0].tokens
    )
    assert whole.text == tokenizer.decode(whole.tokens) and len(whole.text) > 20
    stop = whole.text[9:14]  # crosses a token boundary somewhere, whatever the tokens are
    at = whole.text.index(stop)
    events = list(
        stream(core, ["a red circle"], Sampling(max_new_tokens=40), tokenizer, stop=["\0never", stop])
    )
    assert "".join(e.text for e in events) == whole.text[:at]
    assert events[-1].finish_reason == "stop" and len(events) < 40
    with pytest.raises(ValueError, match="tokenizer"):
        generate(core, [ids], stop=["x"])


def test_shared_prefix_is_computed_once_and_changes_nothing() -> None:
    head = torch.randint(0, 120, (50,), generator=RANDOM).tolist()
    settings = Sampling(max_new_tokens=12)
    plain = generate(CORE, [head + p for p in PROMPTS], settings, logprobs=0)
    with tokens_through_the_blocks(CORE) as seen:
        prefix = compute_prefix(CORE, head)
        assert seen == [50]
        shared = generate(CORE, PROMPTS, settings, prefix=prefix, logprobs=0)
        again = generate(CORE, PROMPTS[::-1], settings, prefix=prefix, chunk=5)
    width = max(map(len, PROMPTS))
    assert sum(seen) == 50 + 2 * 4 * (width + 11)  # the padded prompts and 11 steps, twice; the head once
    assert tokens(shared) == tokens(plain) == tokens(again[::-1])
    for a, b in zip(shared, plain):
        assert [x.logprob for x in a.logprobs] == pytest.approx([x.logprob for x in b.logprobs], abs=1e-4)
        assert a.usage.prompt_tokens == b.usage.prompt_tokens and a.usage.cached_tokens == 50


def test_shared_prefix_is_not_copied_per_row() -> None:
    prefix = compute_prefix(CORE, PROMPTS[2])
    cache = KVCache(CONFIG, 64, 4, prefix=prefix)
    assert cache.prefix is prefix and prefix.keys[0].shape[0] == 1 and cache.keys[0].shape[2] == 4


@pytest.mark.parametrize("chunk", [1, 7, 23])
def test_prefill_in_chunks_equals_one_pass(chunk: int) -> None:
    request = Request.of_tokens(PROMPTS)
    with torch.inference_mode():
        one = prefill(CORE, request, KVCache(CONFIG, 4, 40), chunk=1000)
        cache = KVCache(CONFIG, 4, 40)
        with tokens_through_the_blocks(CORE) as seen:
            parts = prefill(CORE, request, cache, chunk)
        rows = [CORE.hidden(torch.tensor([p]))[0, -1] for p in PROMPTS]
    assert max(seen) <= 4 * chunk and cache.lengths.tolist() == list(map(len, PROMPTS))
    torch.testing.assert_close(parts, one, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(parts, torch.stack(rows), atol=1e-5, rtol=1e-5)
    settings = Sampling(max_new_tokens=8)
    assert tokens(generate(CORE, PROMPTS, settings, chunk=chunk)) == tokens(generate(CORE, PROMPTS, settings))


def long_core(positions: int) -> Llama:
    config = LlamaConfig(32, 2, 2, 1, 64, vocab_size=64, max_positions=positions)
    return Llama(config).initialise(1).eval().requires_grad_(False)


def last_logits(core: Llama, prompt: torch.Tensor, chunk: int) -> torch.Tensor:
    cache = KVCache(core.config, 1, len(prompt))
    with torch.inference_mode():
        return core.logits(prefill(core, Request.of_tokens([prompt.tolist()]), cache, chunk))[0]


def test_some_thousand_positions_in_chunks_equal_one_pass() -> None:
    core = long_core(4096)
    prompt = torch.randint(0, 64, (4096,), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        whole = core(prompt[None])[0, -1]
    torch.testing.assert_close(last_logits(core, prompt, 512), whole, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_131072_positions_pass_through_in_bounded_memory() -> None:
    import resource

    n = 131_072
    core = long_core(n)
    prompt = torch.randint(0, 64, (n,), generator=torch.Generator().manual_seed(0))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    chunked = last_logits(core, prompt, 512)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**20
    assert grown < 2.0, f"{grown:.2f} GiB"  # a mask over all pairs alone would take 16 GiB
    with torch.inference_mode():
        whole = core.logits(core.hidden(prompt[None])[0, -1])
    torch.testing.assert_close(chunked, whole, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("shared", [False, True])
def test_fixed_shapes_equal_growing_ones(shared: bool) -> None:
    prefix: Prefix | None = compute_prefix(CORE, [5, 4, 3]) if shared else None
    settings = [Sampling(6 + 5 * i, 1.0, seed=i) for i in range(4)]
    fixed = generate(CORE, PROMPTS, settings, prefix=prefix, engine="static", chunk=8)
    assert tokens(fixed) == tokens(generate(CORE, PROMPTS, settings, prefix=prefix))


def test_compiled_step_never_recompiles(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._dynamo.utils import counters

    monkeypatch.setattr(stepping, "BACKEND", "aot_eager")
    settings = Sampling(max_new_tokens=24, temperature=1.0)
    torch._dynamo.reset()
    counters.clear()
    with torch._dynamo.config.patch(error_on_recompile=True):
        first = generate(CORE, PROMPTS, settings, engine="compile")
        second = generate(CORE, PROMPTS[::-1], settings, engine="compile")
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]
    assert tokens(first) == tokens(second[::-1]) == tokens(generate(CORE, PROMPTS, settings))


@pytest.mark.slow
def test_step_compiled_by_inductor_equals_the_eager_one() -> None:
    settings = [Sampling(6 + 5 * i, 1.0, seed=i) for i in range(4)]
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        compiled = generate(CORE, PROMPTS, settings, engine="compile")
    assert tokens(compiled) == tokens(generate(CORE, PROMPTS, settings))


def test_growing_shapes_would_recompile() -> None:
    """The control of the test above: its detector does see a cache that grows."""
    torch._dynamo.reset()
    step = stepping.compiled_step("eager")
    cache = KVCache(CONFIG, 1, 8)
    with torch.inference_mode(), torch._dynamo.config.patch(error_on_recompile=True):
        prefill(CORE, Request.of_tokens([[1, 2]]), cache)
        step(CORE, cache, torch.tensor([3]))
        with pytest.raises(Exception, match="[Rr]ecompil"):
            step(CORE, cache, torch.tensor([4]))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="captures a CUDA graph")
def test_captured_step_equals_the_eager_one() -> None:
    core = Llama(CONFIG).initialise(0).eval().requires_grad_(False).cuda()
    settings = [Sampling(6 + 5 * i, 1.0, seed=i) for i in range(4)]
    eager = generate(core, PROMPTS, settings)
    assert tokens(generate(core, PROMPTS, settings, engine="cuda-graph")) == tokens(eager)


def test_wrong_engines_are_refused() -> None:
    with pytest.raises(ValueError, match="known: eager"):
        generate(CORE, PROMPTS, engine="warp")  # type: ignore[arg-type]
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="CUDA"):
            generate(CORE, PROMPTS, engine="cuda-graph")


def test_too_long_a_prompt_says_both_lengths() -> None:
    with pytest.raises(UserError, match=r"300 tokens.*holds 256"):
        generate(CORE, [[1], [1] * 300])
    with pytest.raises(UserError, match=r"250 tokens.*may take 10, together 260.*holds 256"):
        generate(CORE, [[1] * 250], Sampling(max_new_tokens=10))
    with pytest.raises(UserError, match=r"256 tokens.*holds 256"):
        compute_prefix(CORE, [1] * 256)
    prefix = compute_prefix(CORE, [1] * 200)
    with pytest.raises(UserError, match=r"250 tokens.*together 260"):
        generate(CORE, [[1] * 50], Sampling(max_new_tokens=10), prefix=prefix)
    assert len(generate(CORE, [[1] * 46], Sampling(max_new_tokens=10), prefix=prefix)[0].tokens) == 10


@pytest.mark.parametrize("engine", ["eager", "static"])
def test_a_long_prompt_and_a_long_answer_share_a_batch_up_to_the_context(engine: stepping.Engine) -> None:
    prompts = [PROMPTS[2] * 11, PROMPTS[0]]  # 253 and 9 tokens: together with 247 the batch would need 500
    settings = [Sampling(max_new_tokens=3), Sampling(max_new_tokens=247)]
    together = generate(CORE, prompts, settings, engine=engine)
    assert [len(c.tokens) for c in together] == [3, 247]
    assert together[1].tokens == generate(CORE, prompts[1:], settings[1])[0].tokens


def test_empty_prompts_are_refused() -> None:
    for empty in ([], [[]], [[1], []]):
        with pytest.raises(UserError, match="empty"):
            generate(CORE, empty)  # type: ignore[arg-type]
