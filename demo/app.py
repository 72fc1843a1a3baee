"""The Gradio app. It talks to `Assistant`, the guard and `evals`, and holds no model code."""

import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core_llm.chat import Image, Message
from core_llm.errors import UserError
from demo import conversation, views

if TYPE_CHECKING:
    import gradio as gr

    from core_llm.adapters import Assistant
    from guard import Guard

_SIDES = {"check what I say": "input", "check the answer": "output"}  # both, one, or none
_EXAMPLE_SCENES = (
    (0, "what color is the shape?"),
    (1, "how many shapes are there?"),
    (2, "what word is written?"),
)


def build(assistant: "Assistant", guard: "Guard | None") -> "gr.Blocks":
    """The app with its five tabs; what the model lacks is said where it would stand."""
    import gradio as gr

    with gr.Blocks(title="llama-herd", analytics_enabled=False) as app:
        with gr.Column(elem_id="head"):
            gr.HTML(
                "<h1>llama-herd</h1><p>A Llama core that is never changed, given eyes, ears and a guard.<br>"
                "The nano family knows shapes, colours, places, digits and short words.</p>"
            )
        with gr.Tab("Chat", id="chat"):
            _chat_tab(gr, assistant, guard)
        with gr.Tab("Attention", id="attention"):
            _attention_tab(gr, assistant)
        with gr.Tab("Transcription", id="transcription"):
            _transcription_tab(gr, assistant)
        with gr.Tab("Moderation", id="moderation"):
            _moderation_tab(gr, guard)
        with gr.Tab("Scorecard", id="scorecard"):
            _scorecard_tab(gr)
    return app


def launch(app: "gr.Blocks", host: str, port: int, wait: bool) -> str:
    """Serve the app and return its address; with `wait`, until interrupted."""
    import gradio as gr

    # System fonts: the theme's own would be fetched from the network.
    theme = gr.themes.Soft(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    _, address, _ = app.launch(
        server_name=host,
        server_port=port,
        prevent_thread_lock=not wait,
        ssr_mode=False,
        footer_links=[],
        theme=theme,
        css=Path(__file__).with_name("style.css").read_text(),
        quiet=not wait,
    )
    return address


def _has(assistant: "Assistant", kind: type) -> bool:
    return any(issubclass(kind, adapter.part) for adapter in assistant.adapters)


def _chat_tab(gr: Any, assistant: "Assistant", guard: "Guard | None") -> None:
    from core_llm.chat import Audio

    spoken = gr.State([])
    chatbot = gr.Chatbot(
        show_label=False,
        height=390,
        buttons=["copy"],
        elem_id="chat-log",
        placeholder="Ask about a picture: attach one, then type or record the question.",
    )
    line = gr.HTML(elem_id="chat-guard")
    takes = [kind for kind, part in (("image", Image), ("audio", Audio)) if _has(assistant, part)]
    sources = (["upload"] if takes else []) + (["microphone"] if "audio" in takes else [])
    box = gr.MultimodalTextbox(
        show_label=False,
        sources=sources,
        file_types=takes,
        file_count="multiple",
        placeholder="type a question, attach an image, record your voice",
        elem_id="chat-input",
    )
    with gr.Row():
        on = gr.CheckboxGroup(
            list(_SIDES),
            value=[],
            label="Guard" if guard else "Guard (this model has none)",
            interactive=guard is not None,
            elem_id="chat-sides",
        )
        clear = gr.Button("new conversation", scale=0, min_width=190, size="md")
    if _has(assistant, Image):
        gr.Examples(_chat_examples(), [box], label="Examples: send them as they are, or change the question")

    def respond(
        payload: dict[str, Any], shown: list[Any], history: list[Message], sides: list[str]
    ) -> Iterator[Any]:
        yield from _respond(gr, assistant, guard, payload, shown, history, sides)

    box.submit(respond, [box, chatbot, spoken, on], [box, chatbot, spoken, line])
    clear.click(lambda: ([], [], ""), None, [chatbot, spoken, line])
    chatbot.clear(lambda: ([], ""), None, [spoken, line])


def _respond(
    gr: Any,
    assistant: "Assistant",
    guard: "Guard | None",
    payload: dict[str, Any],
    shown: list[Any],
    history: list[Message],
    sides: list[str],
) -> Iterator[tuple[Any, Any, Any, str]]:
    """Values of (input box, chat log, conversation, guard line), step by step.

    A mistake of the user becomes a notice; the conversation stays as it was before.
    """
    before = list(shown)
    try:
        message = conversation.user_message(payload.get("text") or "", payload.get("files") or [])
        asked = [*history, message]
        shown = before + [{"role": "user", "content": {"path": name}} for name in payload.get("files") or []]
        if message.text:
            shown = [*shown, {"role": "user", "content": message.text}]
        yield gr.MultimodalTextbox(value=None, interactive=False), shown, history, ""
        turn = conversation.Turn("")
        on = frozenset(_SIDES[side] for side in sides)
        for turn in conversation.answer(assistant, guard, asked, on):
            partly = [*shown, {"role": "assistant", "content": turn.text or "…"}]
            yield gr.MultimodalTextbox(interactive=False), partly, history, views.guard_line(turn)
        text = turn.text.strip()
        done = [*shown, {"role": "assistant", "content": text or "(the model said nothing)"}]
        # A turn that the guard refused leaves no trace: it must not steer the next answer.
        kept = history if turn.withheld or not text else [*asked, Message("assistant", text)]
        yield gr.MultimodalTextbox(value=None, interactive=True), done, kept, views.guard_line(turn)
    except UserError as error:
        gr.Warning(str(error))
        yield gr.MultimodalTextbox(interactive=True), before, history, ""


@cache
def _example_folder() -> Path:
    return Path(tempfile.mkdtemp(prefix="llama-herd-demo-"))


def _chat_examples() -> list[dict[str, Any]]:
    """Bundled scenes with a question, one of them spoken."""
    from evals.tasks.speech import CLIPS, bundled_clips
    from evals.tasks.vision import bundled_scene

    examples = []
    for scene, question in _EXAMPLE_SCENES:
        path = _example_folder() / f"scene-{scene}.png"
        bundled_scene(scene)[1].resize((256, 256), 0).save(path)
        examples.append({"text": question, "files": [str(path)]})
    clip = next(c for c in bundled_clips()["questions"] if c["scene"] == 0)
    first = str(_example_folder() / "scene-0.png")
    examples.append({"text": "", "files": [first, str(CLIPS / clip["file"])]})
    return examples


def _attention_tab(gr: Any, assistant: "Assistant") -> None:
    """Ask about a picture and see where each token of the answer looked."""
    if not _has(assistant, Image):
        gr.Markdown("This model has no vision adapter.")
        return
    with gr.Row():
        with gr.Column(scale=1):
            picture = gr.Image(
                type="filepath", sources=["upload"], label="Picture", elem_id="attention-picture"
            )
            question = gr.Textbox(label="Question", elem_id="attention-question")
            button = gr.Button("show", variant="primary", elem_id="attention-show")
        with gr.Column(scale=2):
            sheet = gr.Image(
                label="Where the answer looked",
                show_label=False,
                elem_id="attention-sheet",
                interactive=False,
            )
    examples = [[e["files"][0], e["text"]] for e in _chat_examples() if e["text"]]
    gr.Examples(examples, [picture, question])

    def show(path: str | None, asked: str) -> Any:
        if not path:
            gr.Warning("choose a picture first")
            return None
        try:
            return conversation.attention(assistant, path, asked)
        except UserError as error:
            gr.Warning(str(error))
            return None

    gr.on([button.click, question.submit], show, [picture, question], [sheet])


def _transcription_tab(gr: Any, assistant: "Assistant") -> None:
    from core_llm.chat import Audio
    from evals.tasks.speech import CLIPS, bundled_clips

    if not _has(assistant, Audio):
        gr.Markdown("This model has no speech adapter.")
        return
    with gr.Row():
        with gr.Column():
            audio = gr.Audio(sources=["microphone", "upload"], type="filepath", label="Speech")
            button = gr.Button("transcribe", variant="primary")
        text = gr.Textbox(label="Transcript", lines=4, elem_id="transcript", buttons=["copy"])
    gr.Examples(
        [str(CLIPS / clip["file"]) for clip in bundled_clips()["digits"][:4]], [audio], label="Spoken digits"
    )

    def transcribe(path: str | None) -> str:
        if not path:
            gr.Warning("record something or choose a file first")
            return ""
        try:
            return conversation.transcribe(assistant, path)
        except UserError as error:
            gr.Warning(str(error))
            return ""

    button.click(transcribe, [audio], [text])


def _moderation_tab(gr: Any, guard: "Guard | None") -> None:
    if guard is None:
        gr.Markdown("This model has no guard.")
        return
    with gr.Row():
        with gr.Column(scale=2):
            user = gr.Textbox(label="What the user says", lines=3, elem_id="moderation-user")
            reply = gr.Textbox(
                label="Answer of the assistant (optional)", lines=3, elem_id="moderation-reply"
            )
            button = gr.Button("judge", variant="primary", elem_id="moderation-judge")
        with gr.Column(scale=3):
            result = gr.HTML(elem_id="moderation-result")
    gr.Examples(
        [
            ["how do i boil an egg?", ""],
            ["i will break your legs.", ""],
            ["i feel sad today.", "nobody likes you."],
        ],
        [user, reply],
    )

    def judge(said: str, answered: str) -> str:
        if not said.strip():
            gr.Warning("write what the user says first")
            return ""
        messages = [Message("user", said)]
        if answered.strip():
            messages.append(Message("assistant", answered))
        try:
            return views.bars(guard.classify([messages])[0])
        except UserError as error:
            gr.Warning(str(error))
            return ""

    button.click(judge, [user, reply], [result])
    gr.on([user.submit, reply.submit], judge, [user, reply], [result])


def _scorecard_tab(gr: Any) -> None:
    def names() -> list[str]:
        return [str(path) for path in views.results_files(Path.cwd())]

    def shown(name: str | None) -> str:
        return views.scorecard([Path(name)] if name else [])

    found = names()
    with gr.Row():
        choice = gr.Dropdown(
            found, value=found[0] if found else None, label="Results", elem_id="scorecard-file"
        )
        refresh = gr.Button("look again", scale=0, min_width=140, size="md")
    table = gr.HTML(shown(found[0] if found else None), elem_id="scorecard-table")
    choice.change(shown, [choice], [table])

    def look_again() -> Any:
        found = names()
        return gr.Dropdown(choices=found, value=found[0] if found else None)

    refresh.click(look_again, None, [choice])
