"""Models of transformers, tiny with random weights: text, images and sound, against its own calls."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from core_llm.chat import Audio, Image, Message, Text
from core_llm.errors import CheckpointError, UserError
from evals import run, runner
from evals.models import TokenModel, open_model
from evals.models_hf import HfModel
from evals.tasks import Options, find

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>"
    "{% if m.content is string %}{{ m.content }}{% else %}{% for part in m.content %}"
    "{% if part.type == 'text' %}{{ part.text }}{% elif part.type == 'image' %}<image>"
    "{% else %}<|AUDIO|>{% endif %}{% endfor %}{% endif %}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL = ["<s>", "<|end|>", "<pad>", "<image>", "<|AUDIO|>", "<|user|>", "<|assistant|>", "<|system|>"]
SIZES = {
    "vocab_size": 400, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 2048,
    "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2, "initializer_range": 0.3,
}  # fmt: skip


def tokenizer(**more: Any) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    from core_llm.data.phrases import sample_texts

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=380, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    raw.train_from_iterator(sample_texts(seed=0, n=200), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<s>", eos_token="<|end|>", pad_token="<pad>", **more
    )


@pytest.fixture(scope="module")
def text_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("hf") / "text"
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SIZES)).save_pretrained(folder)
    tokenizer(chat_template=TEMPLATE).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def image_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import (
        CLIPImageProcessor,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
    )

    folder = tmp_path_factory.mktemp("hf") / "image"
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
    )
    config = LlavaConfig(
        vision_config=vision, text_config=LlamaConfig(**SIZES), image_token_index=3, vision_feature_layer=-1,
        vision_feature_select_strategy="default",
    )  # fmt: skip
    torch.manual_seed(0)
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    pictures = CLIPImageProcessor(size={"height": 16, "width": 16}, crop_size={"height": 16, "width": 16})
    LlavaProcessor(
        pictures, tokenizer(), patch_size=8, vision_feature_select_strategy="default", chat_template=TEMPLATE,
        num_additional_image_tokens=1,
    ).save_pretrained(folder)  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def audio_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import (
        Qwen2AudioConfig,
        Qwen2AudioEncoderConfig,
        Qwen2AudioForConditionalGeneration,
        Qwen2AudioProcessor,
        Qwen2Config,
        WhisperFeatureExtractor,
    )

    folder = tmp_path_factory.mktemp("hf") / "audio"
    sound = Qwen2AudioEncoderConfig(
        num_mel_bins=16, encoder_layers=1, encoder_attention_heads=2, encoder_ffn_dim=32, d_model=16
    )
    torch.manual_seed(0)
    model = Qwen2AudioForConditionalGeneration(
        Qwen2AudioConfig(audio_config=sound, text_config=Qwen2Config(**SIZES), audio_token_index=4)
    )
    model.save_pretrained(folder)
    words = tokenizer(extra_special_tokens={"audio_bos": "<|user|>"})
    Qwen2AudioProcessor(
        WhisperFeatureExtractor(feature_size=16), words, chat_template=TEMPLATE
    ).save_pretrained(folder)
    return folder


def said(*texts: str) -> list[list[Message]]:
    return [[Message("user", text)] for text in texts]


def test_answers_are_those_of_generate_one_by_one(text_model: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    asked = said("what color is the sky?", "two", "how many circles are there in this long sentence?")
    answers = open_model(f"hf:{text_model}").generate(asked, 12)
    model, words = AutoModelForCausalLM.from_pretrained(text_model), AutoTokenizer.from_pretrained(text_model)
    for conversation, answer in zip(asked, answers, strict=True):
        prompt = f"<s><|user|>{conversation[0].text}<|end|>\n<|assistant|>"
        ids = torch.tensor([words.encode(prompt, add_special_tokens=False)])
        done = model.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
        assert answer == words.decode(done, skip_special_tokens=True).strip()
    assert len(set(answers)) > 1


def reference(model: Any, words: Any, prompt: str, answer: str) -> tuple[float, int]:
    before = words.encode(prompt, add_special_tokens=False)
    after = [*words.encode(answer, add_special_tokens=False), 1]
    with torch.inference_mode():
        logits = model(torch.tensor([[*before, *after]])).logits[0].double().log_softmax(-1)
    return sum(float(logits[len(before) - 1 + i, token]) for i, token in enumerate(after)), len(after)


def test_loglikelihood_covers_the_answer_and_its_end_alone(text_model: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    asked, answers = (
        said("what color?", "a much longer question, so that rows are padded"),
        ["red", "blue and green"],
    )
    found = open_model(f"hf:{text_model}").loglikelihood(asked, answers)
    model, words = AutoModelForCausalLM.from_pretrained(text_model), AutoTokenizer.from_pretrained(text_model)
    for conversation, answer, (logprob, tokens) in zip(asked, answers, found, strict=True):
        prompt = f"<s><|user|>{conversation[0].text}<|end|>\n<|assistant|>"
        expected = reference(model.double(), words, prompt, answer)
        assert logprob == pytest.approx(expected[0], abs=1e-3) and tokens == expected[1]


def test_raw_side_scores_and_continues_token_ids(text_model: Path) -> None:
    model = open_model(f"hf:{text_model}")
    assert isinstance(model, TokenModel) and isinstance(model, HfModel)
    pairs = [(model.encode("one two"), model.encode(" three")), ([0], model.encode("four five six"))]
    found = model.continuations(pairs)
    for (context, continuation), (logprob, greedy) in zip(pairs, found, strict=True):
        with torch.inference_mode():
            logits = model.model(torch.tensor([[*context, *continuation]])).logits[0, len(context) - 1 : -1]
        ids = torch.tensor(continuation)
        expected = logits.log_softmax(-1).gather(-1, ids[:, None]).sum()
        assert logprob == pytest.approx(float(expected), abs=1e-3)
        assert greedy == bool((logits.argmax(-1) == ids).all())
    texts = model.complete([context for context, _ in pairs], 8)
    best = model.encode(texts[0])
    cut = model.complete([pairs[0][0]], 8, stop=[texts[0][2:4]])[0]
    assert cut == texts[0][: texts[0].find(texts[0][2:4])] and len(best) > 0
    assert (model.begin, model.end, model.context) == (None, 1, 2048)


def test_an_image_model_sees(image_model: Path) -> None:
    model = open_model(f"hf:{image_model}")
    model.require(("core", "image"), "easy-vqa")
    pixels = np.random.default_rng(0).integers(0, 255, (2, 20, 30, 3)).astype(np.uint8)
    asked = [[Message("user", (Image(p), Text("what color?")))] for p in pixels]
    answers = model.generate(asked, 6)
    assert answers == [model.generate([one], 6)[0] for one in asked]
    scores = model.loglikelihood([asked[0], asked[1]], ["red", "red"])
    assert scores[0][1] == scores[1][1] and scores[0][0] != pytest.approx(scores[1][0], abs=1e-6)
    with pytest.raises(UserError, match="takes no sound"):
        model.require(("core", "audio"), "fsdd")


def test_an_audio_model_hears(audio_model: Path) -> None:
    model = open_model(f"hf:{audio_model}")
    model.require(("core", "audio"), "fsdd")
    noise = np.random.default_rng(0).normal(0, 0.1, (2, 16_000)).astype(np.float32)
    asked = [
        [Message("user", (Audio(noise[0], 16_000), Text("repeat")))],
        [Message("user", (Audio(noise[1], 8_000),))],
    ]
    answers = model.generate(asked, 6)
    assert answers == [model.generate([one], 6)[0] for one in asked]
    scores = model.loglikelihood(
        [asked[0], [Message("user", (Audio(noise[1], 16_000), Text("repeat")))]], ["a", "a"]
    )
    assert scores[0][0] != pytest.approx(scores[1][0], abs=1e-6)


def test_a_text_model_is_refused_before_any_work(text_model: Path, tmp_path: Path) -> None:
    for task, lack in (
        ("scenes", "takes no images"),
        ("spoken-digits", "takes no sound"),
        ("guard-basics", "no guard"),
    ):
        with pytest.raises(UserError, match=lack):
            run.run_tasks(find([task]), f"hf:{text_model}", Options(limit=2), tmp_path / "records")
    assert not (tmp_path / "records").exists()


def test_a_task_runs_and_its_answers_belong_to_the_weights(text_model: Path, tmp_path: Path) -> None:
    task = find(["text-qa"])[0]
    done = runner.evaluate(task, open_model(f"hf:{text_model}"), Options(limit=3), tmp_path)
    assert len(done.outputs) == 3
    again = runner.evaluate(task, open_model(f"hf:{text_model}"), Options(limit=3), tmp_path)
    assert again.reused >= 3 and again.outputs == done.outputs
    assert len(open_model(f"hf:{text_model}").part_hashes["model"]) == 64


def test_what_is_no_such_model_is_one_line(text_model: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="neither a folder nor a hub id"):
        open_model("hf:nothing")
    with pytest.raises(CheckpointError, match="no config.json"):
        open_model(f"hf:{tmp_path}")
    with pytest.raises(UserError, match="--quantize"):
        open_model(f"hf:{text_model}", quantization="int8")
    bare = tmp_path / "bare"
    bare.mkdir()
    for path in text_model.iterdir():
        if path.name != "chat_template.jinja":
            (bare / path.name).write_bytes(path.read_bytes())
    with pytest.raises(UserError, match="no chat template, which task 'text-qa' needs"):
        open_model(f"hf:{bare}").require(("core",), "text-qa")
    (bare / "model.safetensors").write_bytes((bare / "model.safetensors").read_bytes()[:100])
    with pytest.raises(CheckpointError, match="cannot load it"):
        _ = open_model(f"hf:{bare}").model  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def base_model(text_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that was never taught to talk: no chat template."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("hf") / "base"
    torch.manual_seed(1)
    LlamaForCausalLM(LlamaConfig(**SIZES)).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def test_a_model_without_chat_template_takes_tasks_of_plain_text(base_model: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    text = "the red circle is left of the blue square and the green star is above it " * 12
    (tmp_path / "own.txt").write_text(text)
    name = f"hf:{base_model}"
    (task,) = find([f"memorisation:{tmp_path / 'own.txt'}"])
    run.run_tasks([task], name, Options(), tmp_path / "records", tmp_path / "r.json")
    (line,) = (tmp_path / "r.samples.jsonl").read_text().splitlines()[1:]
    output = json.loads(line)["output"]
    model, words = AutoModelForCausalLM.from_pretrained(base_model), AutoTokenizer.from_pretrained(base_model)
    ids = words.encode(text, add_special_tokens=False)[:100]
    with torch.inference_mode():
        logits = model(torch.tensor([ids])).logits[0, 49:-1].double().log_softmax(-1)
    expected = float(logits.gather(-1, torch.tensor(ids[50:])[:, None]).sum())
    assert output["logprob"] == pytest.approx(expected, abs=1e-2) and output["tokens"] == 50


def test_a_model_without_chat_template_takes_a_task_of_lm_eval(base_model: Path, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    from evals.samples.make_fixtures import FIXTURES

    place = tmp_path / "r.json"
    options = Options(FIXTURES, "all", limit=4)
    run.run_tasks(find(["arc-easy"]), f"hf:{base_model}", options, tmp_path / "records", place)
    (entry,) = json.loads(place.read_text())
    assert entry["n"] == 4 and 0 <= entry["metrics"]["accuracy"]["value"] <= 1


def test_only_a_conversation_needs_a_chat_template(base_model: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no chat template, which task 'text-qa' needs; take an instruction"):
        run.run_tasks(find(["arc-easy", "text-qa"]), f"hf:{base_model}", Options(), tmp_path / "records")
    model = open_model(f"hf:{base_model}")
    for call in (lambda: model.generate(said("hello"), 4), lambda: model.loglikelihood(said("hello"), ["a"])):
        with pytest.raises(UserError, match="no chat template"):
            call()
    with pytest.raises(UserError, match="no chat template"):  # a guard reads and stops conversations
        open_model(f"hf:{base_model}", guard="nano").require(find(["arc-easy"])[0].needs, "arc-easy")
    assert not (tmp_path / "records").exists()


def test_the_end_token_is_the_tokenizers_or_the_configurations(base_model: Path) -> None:
    model = HfModel(str(base_model))
    assert model.end == model.tokenizer.eos_token_id == 1
    model.tokenizer.eos_token = None  # such a tokenizer.json alone stands beside some base models
    assert model.end == 1
    silent = HfModel(str(base_model))
    silent.tokenizer.eos_token = silent.model.generation_config.eos_token_id = None
    with pytest.raises(UserError, match="names an end token"):
        _ = silent.end
