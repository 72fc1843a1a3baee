"""Running tasks: controls, resuming, what makes two answers the same answer."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import PIL.Image
import pytest

from core_llm import digests
from core_llm.chat import Audio, Image, Message, Text
from core_llm.errors import DataError, MediaError, UserError
from evals import records, runner
from evals.tasks import Options, find, registry
from evals.tasks.base import Sample
from evals.tasks.controls import swap_parts


def looks_at_the_image(messages: tuple[Message, ...]) -> str:
    """Answers easy-VQA colour questions from the pixels."""
    image, question = messages[-1].parts
    assert isinstance(image, Image) and isinstance(question, Text)
    pixel = PIL.Image.open(image.data).getpixel((10, 10))  # type: ignore[arg-type]
    names = {(255, 0, 0): "red", (0, 0, 255): "blue", (0, 255, 0): "green", (0, 0, 0): "black"}
    color = names[pixel]  # type: ignore[index]
    if question.text.startswith("what"):
        return color
    return "yes" if color in question.text else "no"


def test_model_that_sees_beats_shuffled_images(fake: Any, data_root: Path, tmp_path: Path) -> None:
    task = find(["easy-vqa"])[0]
    done = runner.evaluate(task, fake(looks_at_the_image), Options(data_root, "all"), tmp_path)
    assert done.scored.estimates["accuracy"].value == 1.0
    shuffled = next(c for c in done.controls if c.name == "shuffled images")
    assert shuffled.estimates["accuracy"].value < 0.7
    assert done.without_evidence == []


def test_model_that_guesses_is_marked_no_evidence(fake: Any, data_root: Path, tmp_path: Path) -> None:
    task = find(["easy-vqa"])[0]
    done = runner.evaluate(task, fake(lambda m: "yes"), Options(data_root, "all"), tmp_path)
    assert "shuffled images" in done.without_evidence
    assert "majority answer" in done.without_evidence


def test_second_run_asks_nothing_and_gives_the_same_scores(
    fake: Any, data_root: Path, tmp_path: Path
) -> None:
    task, options = find(["easy-vqa"])[0], Options(data_root, "all")
    first = fake(looks_at_the_image)
    a = runner.evaluate(task, first, options, tmp_path)
    again = fake(lambda messages: pytest.fail("asked again"))
    b = runner.evaluate(task, again, options, tmp_path)
    assert first.asked > 0
    assert again.asked == 0
    assert a.scored.estimates == b.scored.estimates


def test_run_killed_in_the_middle_loses_no_answered_batch(fake: Any, data_root: Path, tmp_path: Path) -> None:
    task = replace(find(["easy-vqa"])[0], batch_size=8, controls=())
    options = Options(data_root, "all")

    class Dies(fake):  # type: ignore[valid-type, misc]
        def generate(self, conversations, max_new_tokens):  # type: ignore[no-untyped-def]
            if self.asked >= 16:
                raise KeyboardInterrupt
            return super().generate(conversations, max_new_tokens)

    with pytest.raises(KeyboardInterrupt):
        runner.evaluate(task, Dies(), options, tmp_path)
    path = tmp_path / "easy-vqa.jsonl"
    path.write_text(path.read_text() + '{"key": "half a li')
    rest = fake()
    runner.evaluate(task, rest, options, tmp_path)
    assert rest.asked == 48 - 16
    assert all(json.loads(line) for line in path.read_text().splitlines())


def test_another_checkpoint_is_asked_anew(fake: Any, data_root: Path, tmp_path: Path) -> None:
    task, options = replace(find(["easy-vqa"])[0], controls=()), Options(data_root, "all")
    runner.evaluate(task, fake(checkpoint="a"), options, tmp_path)
    other = fake(checkpoint="b")
    runner.evaluate(task, other, options, tmp_path)
    assert other.asked == 48


def test_key_follows_the_bytes_of_the_image_and_not_its_path(tmp_path: Path) -> None:
    task = find(["easy-vqa"])[0]
    for name, color in (("a", "red"), ("b", "red"), ("c", "blue")):
        PIL.Image.new("RGB", (8, 8), color).save(tmp_path / f"{name}.png")

    def key(name: str) -> str:
        messages = (Message("user", (Image(tmp_path / f"{name}.png"), Text("what?"))),)
        return records.record_key(task, Sample("1", "1", messages, "red"), "checkpoint")

    assert key("a") == key("b")
    assert key("a") != key("c")


def test_missing_image_is_named(tmp_path: Path) -> None:
    with pytest.raises(MediaError, match=r"nothing\.png"):
        digests.part_digest(Image(tmp_path / "nothing.png"))


def test_shuffled_images_keep_rows_of_one_image_together_and_move_every_image() -> None:
    images = [Image(bytes([i])) for i in range(5)]
    samples = [
        Sample(f"{i}-{j}", str(i), (Message("user", (images[i], Text("?"))),), "x")
        for i in range(5)
        for j in range(3)
    ]
    swapped = swap_parts(samples, Image, seed=0)
    given = [sample.messages[-1].parts[0].data for sample in swapped]  # type: ignore[union-attr]
    assert all(given[3 * i] == given[3 * i + 1] == given[3 * i + 2] != bytes([i]) for i in range(5))
    assert len(set(given)) == 5


def test_shuffled_audio_moves_every_clip_of_a_single_speaker() -> None:
    samples = [Sample(str(i), "ann", (Message("user", Audio(bytes([i]))),), "x") for i in range(6)]
    swapped = swap_parts(samples, Audio, seed=0)
    given = [sample.messages[-1].parts[0].data for sample in swapped]  # type: ignore[union-attr]
    assert all(data != bytes([i]) for i, data in enumerate(given))
    assert len(set(given)) == 6


def test_guard_task_prints_tfidf_and_base_rate_beside(fake: Any, data_root: Path, tmp_path: Path) -> None:
    subject = fake(judge=lambda messages: 0.9 if "idiot" in messages[-1].text else 0.2)
    done = runner.evaluate(find(["guard-diasafety"])[0], subject, Options(data_root), tmp_path)
    assert done.scored.n == 30
    assert done.scored.estimates["auprc"].value == 1.0
    assert done.scored.estimates["ece"].value == pytest.approx((10 * 0.1 + 20 * 0.2) / 30)
    values = {c.name: c.estimates["auprc"].value for c in done.controls}
    assert values["base rate"] == pytest.approx(1 / 3)
    assert values["TF-IDF logistic regression"] == 1.0


def test_baseline_is_left_out_where_its_training_rows_are_evaluated(
    fake: Any, data_root: Path, tmp_path: Path
) -> None:
    done = runner.evaluate(find(["guard-diasafety"])[0], fake(), Options(data_root, "all"), tmp_path)
    assert [c.name for c in done.controls] == ["base rate"]


def test_perplexity_pools_tokens_over_rows(fake: Any, data_root: Path, tmp_path: Path) -> None:
    done = runner.evaluate(find(["text-perplexity"])[0], fake(), Options(data_root), tmp_path)
    assert done.scored.n == 8
    assert done.scored.estimates["perplexity"].value == pytest.approx(2.718281828**2)
    assert done.extra["bits_per_byte"] > 0


def test_limit_takes_the_same_rows_every_time(data_root: Path) -> None:
    task = registry()["easy-vqa"]
    a = [sample.id for sample in task.load(Options(data_root, "all", limit=7))]
    b = [sample.id for sample in task.load(Options(data_root, "all", limit=7))]
    assert a == b
    assert len(a) == 7
    assert a != [sample.id for sample in task.load(Options(data_root, "all", limit=7, seed=1))]


def test_unknown_task_lists_the_known_ones() -> None:
    with pytest.raises(UserError, match="easy-vqa, .*guard-diasafety"):
        find(["easy-vqq"])


def test_data_root_without_the_dataset_says_which_folder_is_missing(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="easy_vqa"):
        registry()["easy-vqa"].load(Options(tmp_path))
