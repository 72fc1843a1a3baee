"""Readers of pairs, and the steps that choose among them."""

import csv
import json
import math
import random
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image as Pillow

from core_llm.data import sources
from core_llm.errors import DataError, UserError
from vision_adapter import cli, curation
from vision_adapter.curate_run import CurationConfig, curate, embedder
from vision_adapter.embeddings import ClipEmbedder, PixelEmbedder, unit
from vision_adapter.examples import Example, load_examples, scene_examples
from vision_adapter.images import decode


def noise(seed: int, size: int = 40) -> Pillow.Image:
    """Large blocks of random colours: no two seeds look alike."""
    rng = np.random.default_rng(seed)
    return Pillow.fromarray(rng.integers(0, 256, (5, 5, 3), dtype=np.uint8)).resize(
        (size, size), Pillow.Resampling.NEAREST
    )


def folder_of(root: Path, captions: list[str], pictures: list[Pillow.Image] | None = None) -> Path:
    root.mkdir()
    with open(root / "captions.jsonl", "w") as file:
        for i, caption in enumerate(captions):
            (pictures[i] if pictures else noise(i)).save(root / f"{i}.png")
            file.write(json.dumps({"id": f"p{i}", "image": f"{i}.png", "caption": caption}) + "\n")
    return root


def test_near_duplicates_equal_a_brute_force_search() -> None:
    rng = np.random.default_rng(0)
    vectors = unit(rng.normal(size=(60, 8)))
    vectors = unit(np.concatenate([vectors, vectors[:20] + 0.05 * rng.normal(size=(20, 8))]))
    for threshold in (0.8, 0.95, 1.0):
        exact = vectors.astype(np.float64) @ vectors.T.astype(np.float64) >= threshold - 1e-5
        reach = np.linalg.matrix_power(exact.astype(float), 80) > 0  # connected components
        expected = reach.argmax(axis=1)
        assert (curation.near_duplicates(vectors, threshold) == expected).all()
    assert len(set(curation.near_duplicates(vectors, 0.95).tolist())) < 80  # there was something to find
    assert curation.near_duplicates(vectors[:0], 0.9).shape == (0,)


def test_many_pictures_are_searched_in_cells(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    vectors = unit(rng.normal(size=(300, 16)))
    vectors = np.concatenate([vectors, vectors[:100]])
    exact = curation.near_duplicates(vectors, 0.99)
    monkeypatch.setattr(curation, "_EXACT_UP_TO", 100)
    assert (curation.near_duplicates(vectors, 0.99) == exact).all()
    assert (exact[300:] == np.arange(100)).all()


def test_duplicates_need_faiss_and_a_threshold(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="not at 1.5"):
        curation.near_duplicates(np.eye(2, dtype=np.float32), 1.5)
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(UserError, match="faiss-cpu"):
        curation.near_duplicates(np.eye(2, dtype=np.float32), 0.9)


def test_ngrams_are_counted_once_per_caption() -> None:
    assert curation.ngrams("A red, RED dog!") == {"a", "red", "dog", "a red", "red red", "red dog"}
    counts = curation.ngram_counts(["a a a", "a b"])
    assert counts["a"] == 2 and counts["a a"] == 1 and counts["a b"] == 1


def test_rare_captions_stay_and_frequent_ones_follow_the_formula() -> None:
    counts = Counter({"dog": 400, "a": 2500, "a dog": 100, "axolotl": 3})
    assert curation.keep_probability("a dog", counts, rare=25) == pytest.approx(
        1 - (1 - math.sqrt(25 / 400)) * (1 - math.sqrt(25 / 2500)) * (1 - math.sqrt(25 / 100))
    )
    assert curation.keep_probability("axolotl", counts, rare=25) == 1.0
    assert curation.keep_probability("dog", counts, 25, {"dog"}) == pytest.approx(0.25)
    assert curation.keep_probability("a dog", counts, 25, {"dog"}) == pytest.approx(0.25)
    assert curation.keep_probability("a dog", counts, 25, {"cat"}) == 1.0


def test_resampling_keeps_the_share_that_the_formula_promises() -> None:
    captions = ["dog"] * 4000 + [f"rare{i}" for i in range(50)]
    counts = curation.ngram_counts(captions)
    kept = [
        caption
        for i, caption in enumerate(captions)
        if curation.drawn(f"{i}", curation.keep_probability(caption, counts, rare=40))
    ]
    dogs = kept.count("dog")
    assert abs(dogs - 4000 * math.sqrt(40 / 4000)) < 4 * math.sqrt(4000 * 0.1 * 0.9)
    assert len(kept) - dogs == 50


def test_pixel_vectors_find_copies_and_part_other_pictures() -> None:
    picture = noise(0, 200)
    smaller = picture.resize((90, 90))
    vectors = PixelEmbedder().images([picture, smaller, noise(1), noise(2)])
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    assert vectors[0] @ vectors[1] > 0.95 and abs(vectors[0] @ vectors[2]) < 0.6


class Controlled:
    """A model whose truth is known: the red of a picture is its angle, and so is a caption's number."""

    calls = 0

    def images(self, pictures):  # type: ignore[no-untyped-def]
        Controlled.calls += 1
        return self._at([picture.getpixel((0, 0))[0] for picture in pictures])

    def texts(self, captions):  # type: ignore[no-untyped-def]
        return self._at([int(caption.split()[-1]) for caption in captions])

    @staticmethod
    def _at(degrees: list[int]) -> np.ndarray:
        angle = np.radians(np.array(degrees, dtype=np.float64))
        return np.stack([np.cos(angle), np.sin(angle)], axis=1).astype(np.float32)


def reds(values: list[int]) -> list[Pillow.Image]:
    return [Pillow.new("RGB", (4, 4), (value, 0, 0)) for value in values]


def test_captions_that_do_not_fit_are_dropped_and_the_report_says_so(tmp_path: Path) -> None:
    source = folder_of(
        tmp_path / "in", ["at 10", "at 10", "at 100", "at 91", "at 60"], reds([10, 60, 100, 90, 61])
    )
    (source / "4.png").write_bytes(b"no picture")
    config = CurationConfig(clip_score=0.9, dedup=math.cos(math.radians(11)), embed="ViT-B-32")
    report = curate(load_examples(str(source), split="all"), tmp_path / "out", config, Controlled())
    assert report["read"] == 5 and report["kept"] == 2
    assert report["dropped"] == {"clip_score": 1, "duplicate": 1, "unreadable": 1}
    dropped = {line["id"]: line for line in lines(tmp_path / "out" / "dropped.jsonl")}
    assert dropped["p1"]["detail"].startswith("cosine 0.64")  # 50 degrees apart
    assert dropped["p3"] == {"id": "p3", "reason": "duplicate", "detail": "of p2"}
    assert dropped["p4"]["reason"] == "unreadable" and "4.png" in dropped["p4"]["detail"]
    again = load_examples(str(tmp_path / "out"), split="all")
    assert [(e.id, e.caption) for e in again] == [("p0", "at 10"), ("p2", "at 100")]
    assert decode(again[1].image).getpixel((0, 0)) == (100, 0, 0)


def lines(path: Path) -> list[dict]:  # type: ignore[type-arg]
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_an_interrupted_run_embeds_only_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vision_adapter.curate_run.CHUNK", 2)
    examples = [
        Example(f"e{i}", picture, (("", f"at {i}"),)) for i, picture in enumerate(reds(list(range(7))))
    ]
    config = CurationConfig(dedup=1.0, resample=1, embed="ViT-B-32")

    class Broken(Controlled):
        def images(self, pictures):  # type: ignore[no-untyped-def]
            if Controlled.calls == 2:
                raise KeyboardInterrupt
            return super().images(pictures)

    Controlled.calls = 0
    with pytest.raises(KeyboardInterrupt):
        curate(examples, tmp_path / "a", config, Broken())
    assert not (tmp_path / "a" / "captions.jsonl").exists()
    first = curate(examples, tmp_path / "a", config, Controlled())
    assert Controlled.calls == 4  # 7 pairs in chunks of 2, each once
    assert curate(examples, tmp_path / "b", config, Controlled()) == first
    assert lines(tmp_path / "a" / "captions.jsonl") == lines(tmp_path / "b" / "captions.jsonl")
    with pytest.raises(DataError, match="other settings or data"):
        curate(examples, tmp_path / "a", CurationConfig(dedup=0.5, embed="ViT-B-32"), Controlled())
    with pytest.raises(DataError, match="other settings or data"):
        curate(examples[:3], tmp_path / "a", config, Controlled())


def test_clip_scores_are_the_models_own_cosines(tmp_path: Path) -> None:
    import open_clip
    import torch

    small = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "patch_size": 16, "head_width": 16},
        "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
    }
    (tmp_path / "tiny-clip.json").write_text(json.dumps(small))
    open_clip.add_model_config(tmp_path / "tiny-clip.json")
    torch.manual_seed(0)
    clip = ClipEmbedder("tiny-clip", "")
    pictures, captions = [noise(i) for i in range(3)], ["a dog", "two cats", "a red bus"]
    ours = curation.clip_scores(clip.images(pictures), clip.texts(captions))
    with torch.no_grad():
        images = clip.model.encode_image(torch.stack([clip.preprocess(p) for p in pictures]))
        texts = clip.model.encode_text(open_clip.get_tokenizer("tiny-clip")(captions))
        expected = torch.nn.functional.cosine_similarity(images.double(), texts.double())
    assert np.allclose(ours, expected.numpy(), atol=1e-5) and len(set(ours.round(4).tolist())) == 3


def test_models_and_filters_that_cannot_work_are_named() -> None:
    with pytest.raises(UserError, match="no model 'nope'"):
        embedder("nope:openai")
    with pytest.raises(UserError, match="--embed MODEL:WEIGHTS"):
        CurationConfig(clip_score=0.2)
    for wrong in (-0.5, 1.5):
        with pytest.raises(UserError, match="--dedup"):
            CurationConfig(dedup=wrong)
    with pytest.raises(UserError, match="--limit"):
        cli.curate("scenes", Path("nowhere"), limit=-1)


def test_a_chunk_without_a_readable_picture_is_dropped_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vision_adapter.curate_run.CHUNK", 2)
    root = folder_of(tmp_path / "in", ["one", "two", "three", "four", "five"])
    for name in ("2.png", "3.png"):
        (root / name).write_bytes(b"no picture")
    report = curate(load_examples(str(root), split="all"), tmp_path / "out", CurationConfig(dedup=0.9))
    assert report["kept"] == 3 and report["dropped"] == {"unreadable": 2}
    with pytest.raises(UserError, match="ViT-B-32 names no weights"):  # random ones would choose
        few = load_examples(str(root), split="all")
        curate(few, tmp_path / "none", CurationConfig(clip_score=0.2, embed="ViT-B-32"))
    with pytest.raises(DataError, match="no pairs"):
        curate([], tmp_path / "none", CurationConfig())
    assert not (tmp_path / "none").exists()


def test_tables_and_saved_datasets_give_the_same_examples(tmp_path: Path) -> None:
    import datasets

    captions = ["a dog", "two dogs", "a cat"]
    table = load_examples(str(folder_of(tmp_path / "table", captions)), split="all")
    with open(tmp_path / "rows.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerows(
            [("id", "file_name", "text"), *((f"p{i}", f"{i}.png", c) for i, c in enumerate(captions))]
        )
    (tmp_path / "table" / "captions.jsonl").unlink()
    (tmp_path / "rows.csv").rename(tmp_path / "table" / "metadata.csv")
    from_csv = load_examples(str(tmp_path / "table"), split="all")
    assert [(e.id, e.image, e.turns) for e in table] == [(e.id, e.image, e.turns) for e in from_csv]
    saved = datasets.Dataset.from_dict(
        {"image": [str(e.image) for e in table], "caption": [[c, "another"] for c in captions]}
    ).cast_column("image", datasets.Image())
    saved.save_to_disk(str(tmp_path / "saved"))
    from_saved = load_examples(str(tmp_path / "saved"), split="all")
    assert [e.caption for e in from_saved] == captions
    for ours, theirs in zip(table, from_saved, strict=True):
        assert np.array_equal(np.asarray(decode(ours.image)), np.asarray(decode(theirs.image)))


def test_data_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="known: scenes, easy_vqa, coco_captions"):
        load_examples(str(tmp_path / "nowhere"))
    with pytest.raises(DataError, match="neither a table"):
        load_examples(str(tmp_path))
    (tmp_path / "captions.jsonl").write_text('{"caption": "no picture"}\n')
    with pytest.raises(DataError, match="row 1 names no picture"):
        load_examples(str(tmp_path))
    (tmp_path / "captions.jsonl").write_text('{"image": "a.png", "labels": 3}\n')
    with pytest.raises(DataError, match="row 1: no caption.*labels"):
        load_examples(str(tmp_path))
    for field in ('"turns": "what? a dog"', '"turns": [["what?"]]', '"conversations": [{"text": "x"}]'):
        (tmp_path / "captions.jsonl").write_text(f'{{"image": "a.png", {field}}}\n')
        with pytest.raises(DataError, match="row 1: 'turns' are pairs"):
            load_examples(str(tmp_path))
    (tmp_path / "captions.jsonl").write_text("{cut off")
    with pytest.raises(DataError, match="captions.jsonl: cannot be read"):
        load_examples(str(tmp_path))


def test_train_and_held_out_examples_part_and_never_change(tmp_path: Path) -> None:
    root = folder_of(tmp_path / "in", [f"caption {i}" for i in range(60)])
    train, dev, everything = (
        {e.id for e in load_examples(str(root), split=split)} for split in ("train", "dev", "all")
    )
    assert not train & dev and train | dev == everything and 0 < len(dev) < 12
    first, again = scene_examples(4, "x"), scene_examples(4, "x")
    assert [e.turns for e in first] == [e.turns for e in again]
    assert all(e.rejected for e in first)


def coco(root: Path) -> None:
    folder = root / "coco_captions"
    (folder / "annotations").mkdir(parents=True)
    for part, first in (("train2017", 0), ("val2017", 2)):
        (folder / part).mkdir()
        images = [{"id": first + i, "file_name": f"{first + i:012}.jpg"} for i in range(2)]
        for image in images:
            noise(image["id"]).save(folder / part / image["file_name"])
        said = [{"id": 10 + i["id"], "image_id": i["id"], "caption": f" seen {i['id']}.\n"} for i in images]
        content = {"images": images, "annotations": said}
        (folder / "annotations" / f"captions_{part}.json").write_text(json.dumps(content))


def test_coco_captions_are_read_from_their_own_layout(tmp_path: Path) -> None:
    coco(tmp_path)
    assert [e.caption for e in load_examples("coco_captions", tmp_path)] == ["seen 0.", "seen 1."]
    held_out = load_examples("coco_captions", tmp_path, "dev")
    assert [e.caption for e in held_out] == ["seen 2.", "seen 3."]
    assert decode(held_out[0].image).size == (40, 40)
    hub = [{"image": {"bytes": b"x"}, "question_id": "7.jpg", "answer": ["one", "two"]}]
    rows = list(sources.SOURCES["coco_captions"].read_hub(hub, "val"))
    assert [(r.group, r.split, r.fields["caption"]) for r in rows] == [
        ("7.jpg", "dev", "one"),
        ("7.jpg", "dev", "two"),
    ]
    (tmp_path / "coco_captions" / "annotations" / "captions_train2017.json").write_text('{"images": [')
    with pytest.raises(DataError, match="cannot be read as COCO captions"):
        load_examples("coco_captions", tmp_path)


def test_vqav2_is_read_from_its_own_layout(tmp_path: Path) -> None:
    folder = tmp_path / "vqav2"
    (folder / "train2014").mkdir(parents=True)
    noise(9).save(folder / "train2014" / "COCO_train2014_000000000009.jpg")
    asked = {"questions": [{"question_id": 90, "image_id": 9, "question": "What is it?"}]}
    answer = {
        "question_id": 90,
        "image_id": 9,
        "multiple_choice_answer": "dog",
        "answers": [{"answer": "dog"}],
    }
    (folder / "v2_OpenEnded_mscoco_train2014_questions.json").write_text(json.dumps(asked))
    (folder / "v2_mscoco_train2014_annotations.json").write_text(json.dumps({"annotations": [answer]}))
    (example,) = load_examples("vqav2", tmp_path)
    assert example.turns == (("What is it?", "dog"),) and decode(example.image).size == (40, 40)
    row = {**answer, **asked["questions"][0], "image": {"bytes": b"x"}}
    (read,) = sources.SOURCES["vqav2"].read_hub([row, {**row, "multiple_choice_answer": None}], "validation")
    assert read.split == "dev" and read.group == "9" and read.fields["answers"] == ["dog"]


def test_llava_instructions_keep_their_turns_and_lose_the_image_mark(tmp_path: Path) -> None:
    folder = tmp_path / "llava_instruct"
    (folder / "train2017").mkdir(parents=True)
    noise(3).save(folder / "train2017" / "3.jpg")
    said = ["<image>\nWhat is it?", "A dog.", "Which colour?", "Red."]
    turns = [{"from": "human" if i % 2 == 0 else "gpt", "value": text} for i, text in enumerate(said)]
    entries = [{"id": "a", "image": "3.jpg", "conversations": turns}, {"id": "b", "conversations": turns}]
    (folder / "llava_instruct_150k.json").write_text(json.dumps(entries))
    (example,) = load_examples("llava_instruct", tmp_path, "all")
    assert example.turns == (("What is it?", "A dog."), ("Which colour?", "Red."))
    assert decode(example.image).size == (40, 40)
    texts = [
        {"role": r, "content": [{"type": "text", "text": t}]}
        for r, t in (("user", "What?"), ("assistant", "Dog"))
    ]
    rows = [{"images": [{"bytes": b"x"}], "messages": texts}]
    (read,) = sources.SOURCES["llava_instruct"].read_hub(rows, "train")
    assert read.fields == {"image": b"x", "turns": [("What?", "Dog")]} and read.split == "train"


def test_llava_pictures_of_the_hub_stay_encoded(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    part = {
        "index": datasets.Value("int64"),
        "text": datasets.Value("string"),
        "type": datasets.Value("string"),
    }
    said = {"content": datasets.List(part), "role": datasets.Value("string")}
    features = {
        "messages": datasets.List(said),
        "images": datasets.List(datasets.Image()),
    }  # as its card says
    question = {"index": None, "text": "What is it?", "type": "text"}
    picture = {"index": 0, "text": None, "type": "image"}
    answer = {"index": None, "text": "A dog.", "type": "text"}
    messages = [
        {"role": "user", "content": [question, picture]},
        {"role": "assistant", "content": [answer]},
    ]
    table = datasets.Dataset.from_list(
        [{"messages": messages, "images": [noise(3)]}], features=datasets.Features(features)
    )
    loaded = datasets.DatasetDict({"train": table})
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: loaded)
    (row,) = sources.load("llava_instruct", split="train")
    assert isinstance(row.fields["image"], bytes) and decode(row.fields["image"]).size == (40, 40)
    assert row.fields["turns"] == [("What is it?", "A dog.")]


def test_command_curates_a_folder_and_prints_what_was_dropped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rng = random.Random(0)
    pictures = [noise(i) for i in range(6)] + [noise(0), noise(1)]
    captions = [rng.choice(["a dog", "a dog runs"]) for _ in pictures]
    root = folder_of(tmp_path / "in", captions, pictures)
    cli.curate(str(root), tmp_path / "out", dedup=0.98)
    said = capsys.readouterr().out
    assert "kept 6 of 8" in said and "duplicate" in said
    assert json.loads((tmp_path / "out" / "report.json").read_text())["dropped"] == {"duplicate": 2}


def test_a_split_that_rows_declare_is_kept_and_test_rows_are_not_trained_on(tmp_path: Path) -> None:
    Pillow.new("RGB", (8, 8), "red").save(tmp_path / "red.png")
    splits = ["train", "train", "validation", "test"]
    rows = [
        {"file_name": "red.png", "text": name, "split": name, "id": str(i)} for i, name in enumerate(splits)
    ]
    (tmp_path / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    found = {
        split: [e.caption for e in load_examples(str(tmp_path), split=split)]
        for split in ("train", "dev", "all")
    }
    assert found == {"train": ["train", "train"], "dev": ["validation", "test"], "all": splits}
