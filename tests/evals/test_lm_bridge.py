"""lm_eval through our adapter and through its own class for transformers: same requests, same scores."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from core_llm.errors import UserError
from evals import runner
from evals.samples.make_fixtures import FIXTURES
from evals.tasks import Options, find, lm_harness

pytest.importorskip("lm_eval")
pytest.importorskip("accelerate")  # of lm_eval's own model

CONTEXT = 640
TEXTS = ["Question: which of these can fly? Answer: a sparrow", "the rain falls, 12 apples are there #### 12"]


def _tokenizer(begins: bool) -> Any:
    """Byte pairs, learnt on the spot; `begins`: texts open with <s>, as a Llama's do."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    bare = Tokenizer(models.BPE())
    bare.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bare.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bare.train_from_iterator(TEXTS, trainer)
    if begins:
        bare.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    made = PreTrainedTokenizerFast(
        tokenizer_object=bare, bos_token="<s>" if begins else None, eos_token="</s>", pad_token="</s>"
    )
    made.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    return made


@pytest.fixture(scope="module", params=[True, False], ids=["with <s>", "without <s>"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama of transformers and its tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = _tokenizer(request.param)
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        initializer_range=0.5,  # so that its likelihoods differ by more than rounding
        bos_token_id=0,
        eos_token_id=1,
    )
    path = tmp_path_factory.mktemp("tiny")
    LlamaForCausalLM(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def theirs(folder: Path) -> Any:
    from lm_eval.models.huggingface import HFLM

    lm = HFLM(pretrained=str(folder), batch_size=4, device="cpu", dtype="float32")
    lm.get_model_info = dict  # type: ignore[method-assign]  # it asks the hub for the model's revision
    return lm


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    from evals.models import open_model

    return open_model(f"hf:{folder}", device="cpu")


@pytest.fixture(scope="module")
def ours(model: Any) -> Any:
    from evals.lm_bridge import BridgeLM

    return BridgeLM(model, batch_size=5)


def evaluated(lm: Any, name: str) -> dict[str, Any]:
    """lm_eval's own evaluation of one of its tasks, over the fixture's rows."""
    from lm_eval import simple_evaluate

    harness = {"arc_easy": "ai2_arc", "hellaswag": "hellaswag", "gsm8k": "gsm8k", "mmlu": "mmlu"}
    where = {"arc_easy": "arc", "mmlu": "mmlu/default"}.get(name, name)
    shots = {"gsm8k": 5, "mmlu": 5}.get(name)
    tasks = lm_harness._open(lm_harness._Harness(name, harness[name], where, shots), FIXTURES)
    manager = lm_harness._manager(where)  # its default reads every task that lm_eval has
    found = simple_evaluate(model=lm, tasks=tasks, bootstrap_iters=0, task_manager=manager)
    assert found is not None
    return dict(found)


@pytest.mark.parametrize("name", ["arc_easy", "hellaswag", "gsm8k", "mmlu"])
def test_scores_equal_those_of_lm_evals_own_model(name: str, ours: Any, theirs: Any) -> None:
    left, right = evaluated(ours, name), evaluated(theirs, name)
    for task, scores in right["results"].items():
        for metric, value in scores.items():
            if isinstance(value, float):
                assert left["results"][task][metric] == value, (task, metric)
    for task, rows in right["samples"].items():
        for a, b in zip(left["samples"][task], rows, strict=True):
            assert a["arguments"] == b["arguments"]
            for (mine,), (its,) in zip(a["resps"], b["resps"], strict=True):
                if isinstance(its, str):
                    assert mine == its
                else:
                    assert mine[0] == pytest.approx(its[0], abs=1e-3) and mine[1] == its[1]


@pytest.mark.parametrize(
    ("ourname", "name"), [("arc-easy", "arc_easy"), ("gsm8k", "gsm8k"), ("mmlu", "mmlu")]
)
def test_evals_run_gives_lm_evals_score(
    ourname: str, name: str, model: Any, theirs: Any, tmp_path: Path
) -> None:
    done = runner.evaluate(find([ourname])[0], model, Options(FIXTURES), tmp_path)
    scores = evaluated(theirs, name)["results"]
    values = {
        "arc-easy": [("accuracy", "arc_easy", "acc,none"), ("accuracy_norm", "arc_easy", "acc_norm,none")],
        "gsm8k": [("exact_match", "gsm8k", "exact_match,strict-match")],
        "mmlu": [],
    }[ourname]
    for metric, task, key in values:
        assert done.scored.estimates[metric].value == pytest.approx(scores[task][key])
    if ourname == "mmlu":  # two subjects of four rows each
        parts = [scores[f"mmlu_{subject}"]["acc,none"] for subject in ("anatomy", "astronomy")]
        assert done.scored.estimates["accuracy"].value == pytest.approx(sum(parts) / 2)
        assert {kind.name for kind in done.kinds} == {"anatomy", "astronomy"}


def requests_of(kind: str, *arguments: tuple[Any, ...]) -> list[Any]:
    from lm_eval.api.instance import Instance

    return [
        Instance(kind, {}, each, i, metadata=("t", i, 1))  # type: ignore[arg-type]
        for i, each in enumerate(arguments)
    ]


def test_long_empty_and_rolling_texts_are_cut_as_lm_eval_cuts_them(ours: Any, theirs: Any) -> None:
    long = "the rain falls on 12 apples. " * 90
    assert len(ours.tok_encode(long)) > CONTEXT
    pairs = [(long, " a sparrow"), ("", "a sparrow"), ("Answer: ", "a stone"), ("fly", "?" * 40)]
    asked = requests_of("loglikelihood", *pairs)
    for mine, its in zip(ours.loglikelihood(asked), theirs.loglikelihood(asked), strict=True):
        assert mine[0] == pytest.approx(its[0], abs=2e-3) and mine[1] == its[1]
    texts = requests_of("loglikelihood_rolling", (long,), ("a sparrow",))
    for mine, its in zip(ours.loglikelihood_rolling(texts), theirs.loglikelihood_rolling(texts), strict=True):
        assert mine == pytest.approx(its, rel=1e-5)
    settings = {"until": ["a"], "max_gen_toks": 12, "do_sample": False}
    generating = requests_of("generate_until", (long, settings), ("Question:", settings))
    assert ours.generate_until(generating) == theirs.generate_until(generating)


def test_sampling_and_models_without_likelihoods_are_refused(ours: Any, fake: Any) -> None:
    from evals.lm_bridge import BridgeLM

    with pytest.raises(UserError, match="samples its answers"):
        ours.generate_until(requests_of("generate_until", ("x", {"do_sample": True, "temperature": 1.0})))
    server = BridgeLM(fake(lambda messages: "4 Question: more"))
    assert server.generate_until(requests_of("generate_until", ("2 + 2?", {"until": ["Question:"]}))) == [
        "4 "
    ]
    with pytest.raises(UserError, match="model 'fake' gives no log-likelihoods"):
        server.loglikelihood(requests_of("loglikelihood", ("a", "b")))


@pytest.fixture
def nano() -> Iterator[Any]:
    from evals.models import open_model

    yield open_model("nano")


def test_nano_is_asked_by_its_own_tokens(nano: Any) -> None:
    """Through the bridge and by the logits of its core."""
    import torch

    from evals.lm_bridge import BridgeLM

    (found,) = BridgeLM(nano).loglikelihood(
        requests_of("loglikelihood", ("the color of the", " square is red"))
    )
    tokenizer, core = nano.assistant.tokenizer, nano.assistant.core
    context = [tokenizer.bos_id, *tokenizer.encode("the color of the")]
    whole = [tokenizer.bos_id, *tokenizer.encode("the color of the square is red")]
    with torch.inference_mode():
        logprobs = core(torch.tensor([whole])).double().log_softmax(-1)[0]
    expected = sum(float(logprobs[i - 1, whole[i]]) for i in range(len(context), len(whole)))
    assert found[0] == pytest.approx(expected, abs=1e-3)
    # What is longer than its context is cut, not refused.
    bridge, long = BridgeLM(nano), "a red square and " * core.config.max_positions
    (cut,) = bridge.loglikelihood(requests_of("loglikelihood", (long, " a blue circle")))
    (rolled,) = bridge.loglikelihood_rolling(requests_of("loglikelihood_rolling", (long,)))
    assert rolled < cut[0] < 0


def test_any_other_task_of_lm_eval_has_a_name_and_unknown_ones_are_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    few = lm_harness._manager("arc")
    monkeypatch.setattr(lm_harness, "_manager", lambda where: few)
    with pytest.raises(UserError, match="lm_eval has no task 'nothing'"):
        find(["lm:nothing"])
    (task,) = find(["lm:arc_easy"])
    assert task.metrics == ("accuracy", "accuracy_norm")
