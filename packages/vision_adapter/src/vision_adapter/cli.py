"""`vision-adapter`: train eyes for a core, ask about a picture."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

import tyro

from core_llm import cli_tools
from vision_adapter import cli_models, cli_scenes


def train(
    out: Path,
    core: str = "nano",
    data_root: Path | None = None,
    steps: int = 0,
    warm_up_steps: int = -1,
    pictures: int = 0,
    lr: float = 0.0,
    seed: int = 0,
) -> None:
    """Train a vision adapter for a core that stays as it is; the same command continues an interrupted run.

    First the encoder learns to name shapes, colours and words alone, then the adapter learns to answer
    through the core, from easy-VQA and drawn scenes.

    Args:
        out: Folder for the adapter, the metrics of both stages and their resumable states.
        core: nano, or a folder with a core's checkpoint.
        data_root: Folder with local copies of the public datasets; without it only drawn scenes are used.
        steps: Optimizer steps of the adapter (0: the recipe's).
        warm_up_steps: Optimizer steps of the encoder alone (-1: the recipe's).
        pictures: Pictures per step of the adapter (0: the recipe's).
        lr: Peak learning rate of the adapter (0: the recipe's).
        seed: Seed of weights, pictures and data order.
    """
    from dataclasses import replace

    import torch

    from core_llm.checkpoint import load_core
    from core_llm.errors import UserError
    from vision_adapter import train as training
    from vision_adapter.adapter import VisionAdapter
    from vision_adapter.config import VisionConfig

    if steps < 0 or pictures < 0 or lr < 0 or warm_up_steps < -1:
        raise UserError("--steps, --pictures and --lr must not be negative")
    given = {
        "steps": steps or None,
        "warm_up_steps": warm_up_steps if warm_up_steps >= 0 else None,
        "pictures": pictures or None,
        "lr": lr or None,
    }
    recipe = replace(training.Recipe(), **{key: value for key, value in given.items() if value is not None})  # type: ignore[arg-type]
    model, tokenizer = load_core(core)
    if data_root is None:
        print("no --data-root: training on drawn scenes alone, without easy-VQA", flush=True)
    torch.manual_seed(seed)
    adapter = VisionAdapter(VisionConfig(), model.config)
    figures = training.train(model, tokenizer, adapter, out / "state", data_root, seed, recipe)
    command = f"vision-adapter train --out DIR --steps {recipe.steps} --seed {seed}"
    if data_root is not None:
        command += " --data-root DATA"
    adapter.save(out, model, training.card(adapter, figures, command, easy=data_root is not None))
    print(f"adapter saved in {out}")
    for name, value in figures.items():
        print(f"  {name:20} {value:.3f}")


def train_encoder(out: Path, warm_up_steps: int = 0, seed: int = 0) -> None:
    """Teach a new adapter's encoder to see, without a core; `train` with the same --out and --seed goes on.

    So the encoder can learn while the core is still in training.

    Args:
        out: Folder that `train` gets too.
        warm_up_steps: Optimizer steps (0: the recipe's); give `train` the same.
        seed: Seed of weights and pictures.
    """
    from dataclasses import replace

    import torch

    from core_llm.errors import UserError
    from vision_adapter import train as training
    from vision_adapter.config import VisionConfig
    from vision_adapter.encoder import Encoder

    if warm_up_steps < 0:
        raise UserError("--warm-up-steps must not be negative")
    recipe = training.Recipe()
    recipe = replace(recipe, warm_up_steps=warm_up_steps or recipe.warm_up_steps)
    config = VisionConfig()
    torch.manual_seed(seed)
    figures = training.warm_up(Encoder(config), config.image_size, out / "state", seed, recipe)
    for name, value in figures.items():
        print(f"  {name:20} {value:.3f}")


def answer(
    image: Annotated[Path, tyro.conf.Positional],
    question: Annotated[str, tyro.conf.Positional],
    core: str = "nano",
    adapter: str = "nano",
    max_new_tokens: int = 64,
) -> None:
    """Answer a question about a picture.

    Args:
        image: A picture file.
        question: What to ask about it.
        core: nano, or a folder with a core's checkpoint.
        adapter: nano, or a folder with a vision adapter trained on that core.
        max_new_tokens: Length limit of the answer.
    """
    from core_llm.adapters import Assistant
    from core_llm.chat import Image, Message, Text
    from core_llm.checkpoint import load_core
    from core_llm.errors import UserError
    from core_llm.sampling import Sampling
    from vision_adapter.adapter import load

    if not question.strip():
        raise UserError("the question is empty: ask something about the picture")
    model, tokenizer = load_core(core)
    assistant = Assistant(model, tokenizer, [load(adapter, model)])
    conversation = [Message("user", [Image(image), Text(question)])]
    print(assistant.generate([conversation], Sampling(max_new_tokens=max_new_tokens))[0])


def stage(
    name: Annotated[str, tyro.conf.Positional],
    data: Annotated[str, tyro.conf.Positional],
    out: Annotated[Path, tyro.conf.Positional],
    core: str = "nano",
    adapter: str = "new",
    preset: str = "small",
    data_root: Path | None = None,
    steps: int = 0,
    batch: int = 0,
    micro_batch: int = 0,
    lr: float = 0.0,
    image_size: int = 0,
    average_top: int = 0,
    seed: int = 0,
    swap_core: bool = False,
    trainable: str = "",
    lora_rank: int = 8,
    device: Literal["auto", "cpu", "cuda"] = "auto",
) -> None:
    """Train one stage of the paper's recipe; the same command continues an interrupted run.

    contrastive: the encoder alone, on captions. pretrain: the adapter, on captions at a low resolution.
    anneal: at a higher one, with a new warm-up. sft: on instructions. dpo: on preferred answers.

    Args:
        name: contrastive, pretrain, anneal, sft or dpo.
        data: scenes, coco_captions, vqav2, llava_instruct, easy_vqa, a folder with captions.jsonl, a hub id.
        out: Folder for the adapter, metrics and the resumable state.
        core: nano, or a folder with a core's checkpoint.
        adapter: What to start from: new, nano, or a folder of an earlier stage or of `create`.
        preset: small (a laptop's) or paper.
        data_root: Folder with local copies of the public datasets.
        steps: Optimizer steps (0: the preset's).
        batch: Examples per step (0: the preset's).
        micro_batch: Examples per backward pass; sums are fp32 (0: the preset's).
        lr: Peak learning rate (0: the preset's).
        image_size: Pixels of a tile's side (0: the preset's).
        average_top: The result of sft is the mean of so many checkpoints, the best on held-out examples.
        seed: Seed of weights and data order.
        swap_core: Put an adapter that was trained on another core on this one, such as its instruct version.
        trainable: Parts that learn, by default the whole adapter: a list such as projector,cross_attention,
            of encoder, projector, cross_attention and core-lora (low-rank updates beside the core's weights).
        lora_rank: Rank of the core's updates where they begin.
        device: Where core and adapter stand: cpu, cuda, or auto (a GPU where there is one for each process).
    """
    from core_llm.devices import chosen_device
    from vision_adapter.stages.command import train_stage
    from vision_adapter.stages.trainable import chosen_parts

    sizes = {"steps": steps, "batch": batch, "micro_batch": micro_batch, "lr": lr, "image_size": image_size}
    given = {key: value for key, value in {**sizes, "average_top": average_top}.items() if value}
    chosen = {"trained": chosen_parts(trainable, name), "lora_rank": lora_rank}
    where = chosen_device(device)
    train_stage(name, data, out, core, adapter, preset, data_root, given | chosen, seed, swap_core, where)


def average(
    folders: Annotated[list[Path], tyro.conf.Positional],
    out: Path,
) -> None:
    """Write the mean of several adapters, taken in fp32: of runs that differ in seed or settings.

    They must be of one kind, on one core, and of the same shapes.

    Args:
        folders: Folders of adapters, two or more.
        out: Folder of the result.
    """
    from vision_adapter.stages.average import average_folders

    average_folders(folders, out)
    print(f"mean of {len(folders)} adapters saved in {out}")


def curate(
    source: Annotated[str, tyro.conf.Positional],
    out: Annotated[Path, tyro.conf.Positional],
    dedup: float = 0.0,
    clip_score: float = 0.0,
    resample: float = 0.0,
    embed: str = "pixels",
    ngram: int = 2,
    ocr: bool = False,
    data_root: Path | None = None,
    limit: int = 0,
    seed: int = 0,
) -> None:
    """Choose among pictures with captions; the same command continues an interrupted run.

    Writes captions.jsonl, which `stage` reads, dropped.jsonl with a reason for each pair, and report.json.

    Args:
        source: A folder with captions.jsonl or .csv, a folder of `datasets`, a known dataset, or a hub id.
        out: Folder for the result.
        dedup: Cosine from which two pictures are duplicates, such as 0.98 (0: keep them).
        clip_score: Least cosine of a picture and its caption, such as 0.2 (0: keep all); needs --embed.
        resample: Captions an n-gram may have before frequent ones are thinned out by sqrt(T/f) (0: keep all).
        embed: pixels, or an open_clip model and weights such as ViT-B-32:openai.
        ngram: Words of the longest n-gram.
        ocr: Append the text that is read in a picture to its caption; needs the extra `ocr`.
        data_root: Folder with local copies of the public datasets.
        limit: Read only so many pairs (0: all).
        seed: Seed of the resampling.
    """
    from core_llm.errors import UserError
    from vision_adapter.curate_run import CurationConfig
    from vision_adapter.curate_run import curate as run
    from vision_adapter.examples import load_examples

    config = CurationConfig(dedup, clip_score, resample, embed, ngram, seed, ocr)
    if limit < 0:
        raise UserError("--limit must not be negative")
    examples = load_examples(source, data_root, "all")
    report = run(examples[: limit or None], out, config)
    print(f"kept {report['kept']} of {report['read']} pairs; {out / 'report.json'}")
    dropped = report["dropped"]
    assert isinstance(dropped, dict)
    for reason, n in dropped.items():
        print(f"  {reason:16} {n}")
    if ocr:
        print(f"text was read in {report['with_text']} pictures")


def train_video(
    out: Annotated[Path, tyro.conf.Positional],
    core: str = "nano",
    adapter: str = "nano",
    steps: int = 0,
    warm_up_steps: int = -1,
    seed: int = 0,
) -> None:
    """Train video layers for a core and an image adapter that stay as they are, on clips of moving shapes.

    Args:
        out: Folder for the video layers, metrics and resumable states.
        core: nano, or a folder with a core's checkpoint.
        adapter: nano, or a folder with a vision adapter trained on that core.
        steps: Optimizer steps (0: the recipe's).
        warm_up_steps: Optimizer steps of the resampler alone (-1: the recipe's).
        seed: Seed of weights and clips.
    """
    from dataclasses import replace

    import torch

    from core_llm.checkpoint import load_core
    from core_llm.errors import UserError
    from vision_adapter.adapter import load_own
    from vision_adapter.stages import video as training
    from vision_adapter.video_adapter import VideoAdapter, VideoConfig

    if steps < 0:
        raise UserError("--steps must not be negative")
    recipe = training.VideoRecipe()
    recipe = replace(
        recipe,
        steps=steps or recipe.steps,
        warm_up_steps=recipe.warm_up_steps if warm_up_steps < 0 else warm_up_steps,
    )
    model, tokenizer = load_core(core)
    torch.manual_seed(seed)
    layers = VideoAdapter(VideoConfig(), model.config, load_own(adapter, model))
    figures = training.train_video(model, tokenizer, layers, out / "state", seed, recipe)
    layers.save(out, model)
    print(f"video layers saved in {out}")
    for name, value in figures.items():
        print(f"  {name:20} {value:.3f}")


def watch(
    video: Annotated[Path, tyro.conf.Positional],
    question: Annotated[str, tyro.conf.Positional],
    layers: Path,
    core: str = "nano",
    adapter: str = "nano",
    max_new_tokens: int = 64,
) -> None:
    """Answer a question about a video.

    Args:
        video: A video file.
        question: What to ask about it.
        layers: Folder with video layers (see train-video).
        core: nano, or a folder with a core's checkpoint.
        adapter: nano, or a folder with the vision adapter that the layers were trained with.
        max_new_tokens: Length limit of the answer.
    """
    from core_llm.adapters import Assistant
    from core_llm.chat import Message, Text, Video
    from core_llm.checkpoint import load_core
    from core_llm.errors import UserError
    from core_llm.sampling import Sampling
    from vision_adapter.adapter import load_own
    from vision_adapter.video_adapter import load_video

    if not question.strip():
        raise UserError("the question is empty: ask something about the video")
    model, tokenizer = load_core(core)
    vision = load_own(adapter, model)
    assistant = Assistant(model, tokenizer, [load_video(layers, model, vision), vision])
    conversation = [Message("user", [Video(video), Text(question)])]
    print(assistant.generate([conversation], Sampling(max_new_tokens=max_new_tokens))[0])


def explain(
    image: Annotated[Path, tyro.conf.Positional],
    question: Annotated[str, tyro.conf.Positional],
    out: Path = Path("overlay.png"),
    core: str = "nano",
    adapter: str = "nano",
    max_new_tokens: int = 64,
) -> None:
    """Answer a question about a picture and draw where each token of the answer looked.

    Args:
        image: A picture file.
        question: What to ask about it.
        out: The picture to write: its ending says in which format.
        core: nano, or a folder with a core's checkpoint.
        adapter: nano, or a folder with a vision adapter trained on that core.
        max_new_tokens: Length limit of the answer.
    """
    from core_llm.adapters import Assistant
    from core_llm.checkpoint import load_core
    from core_llm.errors import UserError
    from vision_adapter import overlay
    from vision_adapter.adapter import load
    from vision_adapter.explain import explain as explained

    if out.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
        raise UserError(f"--out {out}: the picture must end in .png, .jpg or .webp")
    model, tokenizer = load_core(core)
    assistant = Assistant(model, tokenizer, [load(adapter, model)])
    found = explained(assistant, image, question, max_new_tokens)
    out.parent.mkdir(parents=True, exist_ok=True)
    overlay.draw(found).save(out)
    print(found.answer)
    print(f"overlay saved in {out}")


def main() -> None:
    """Entry point of the console script."""
    commands: dict[str, Callable[..., None]] = {
        "train": train,
        "train-encoder": train_encoder,
        "create": cli_models.create,
        "stage": stage,
        "average": average,
        "train-video": train_video,
        "curate": curate,
        "answer": answer,
        "watch": watch,
        "explain": explain,
        "convert": cli_models.convert,
        "scenes": cli_scenes.scenes,
    }
    cli_tools.run("vision-adapter", "Pictures for a frozen core: train, answer, explain.", commands)
