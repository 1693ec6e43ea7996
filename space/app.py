"""The Space: chat, complete, sort out spam, look inside. Everything runs on this machine.

python space/app.py                                   the models of space/checkpoints, and those below runs/
python space/app.py --models checkpoints --port 8000  others to choose from
python space/app.py --host 0.0.0.0                    for everybody in the network
"""

import argparse
import logging
import os

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")

import gradio as gr
import torch
from handlers import CLASSIFIER, LANGUAGE, Handlers
from limits import MAX_CHARACTERS, MAX_EXPLAINED_CHARACTERS, MAX_FILE_BYTES, MAX_NEW_TOKENS, MAX_ROWS, shown_as_text
from models import EMBEDDED_FOLDER, Checkpoints
from transformers.utils import logging as transformers_logging
from views import BANDS

from scratch_gpt2.cli import run_main

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
ONE_A_CORE = {"concurrency_id": "model", "concurrency_limit": CORES}
LONGEST_QUEUE = 64
HOUR = 3600
THEME = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])  # no downloads

CHAT = """The **assistant** has been tuned on instructions and answers. It reads your words inside a fixed frame,
`### Instruction: ... ### Response:`, and writes on until it thinks that the answer is over. It is tiny: expect the
form of an answer rather than truth."""
COMPLETE = """A language model does one thing: from the text so far it computes a probability for every token that
could come next. One of them is drawn, and the game begins again. **Click a token** in the coloured text to see what
else could have stood there."""
SPAM = """The same network, with a **head** of one number per label in place of the next token. It reads the label
off the last token, which alone has seen the whole message."""
TOKENS = """**1. A text becomes tokens.** GPT-2 reads pieces of words, each with a number. Frequent words are one
token, rare ones several; a space belongs to the word behind it (`·`). Try a rare name, or an emoji."""
ATTENTION = """**2. Tokens look at each other.** In every layer several *heads* move information from earlier tokens
to later ones. A row shows where one token looks: always back, or at itself, and all of it sums to 100%. Many heads
look at the first token when they find nothing to do."""
LENS = """**3. Layers refine a guess.** Every layer adds to one running sum. Reading that sum as if the network ended
there (the *logit lens*) shows the next token taking shape from top to bottom. The last row is the model's answer."""
NEXT = """**4. A distribution, and a draw.** Grey is what the model says. Blue is what we draw from: a *temperature*
below 1 sharpens, above 1 flattens; *top-k* keeps the k likeliest tokens; *top-p* the likeliest that together have
that probability. Move the sliders."""
CACHE = """**5. What it keeps.** For each position all layers keep a key and a value, so that a new token costs one
position's work rather than the whole text's. The price is memory that grows with every token."""
SPAM_EXAMPLES = [
    "Congratulations! You have won a free holiday. Call 09061701461 now to claim your prize.",
    "Sorry, I'm running late, could you start dinner without me?",
    "URGENT! Your mobile number was awarded a 2000 pound bonus. Reply WIN to 80086.",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--host", help="Address to listen on (default: 127.0.0.1, this machine only).")
    parser.add_argument("--port", type=int, help="By default the first free one from 7860 on.")
    parser.add_argument("--share", action="store_true", help="Also a public address through gradio.live.")
    parser.add_argument("--checkpoints", default=EMBEDDED_FOLDER, help="Folder with base, assistant and spam.")
    parser.add_argument("--models", default="runs", help="Visitors may choose models below this folder.")
    arguments = parser.parse_args()

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("httpx").setLevel(logging.WARNING)
    torch.set_num_threads(1)  # one text a core
    checkpoints = Checkpoints(arguments.checkpoints, arguments.models)
    if sentence := checkpoints.missing():
        print(sentence, flush=True)
    build(checkpoints).launch(
        server_name=arguments.host, server_port=arguments.port, share=arguments.share, **launch_options()
    )


def launch_options() -> dict:
    """Nothing from other servers, nothing recorded, no large uploads."""
    return {
        "theme": THEME,
        "max_file_size": MAX_FILE_BYTES,
        "run_history": False,
        "enable_monitoring": False,
        "ssr_mode": False,
        "state_session_capacity": 200,
        "footer_links": ["api"],
    }


def build(checkpoints: Checkpoints) -> gr.Blocks:
    handlers = Handlers(checkpoints)
    with gr.Blocks(title="scratch_gpt2", delete_cache=(HOUR, HOUR)) as demo:
        gr.Markdown("# scratch_gpt2\nTalk to a GPT-2 written from scratch, watch it decide, look inside.")
        with gr.Tab("Chat"):
            chat_tab(handlers)
        with gr.Tab("Complete"):
            complete_tab(handlers)
        with gr.Tab("Spam or not"):
            spam_tab(handlers)
        with gr.Tab("Look inside"):
            inside_tab(handlers)
    for function in demo.fns.values():
        if function.queue and function.name == "chat":  # ChatInterface takes a limit, but not for a group
            function.concurrency_id, function.concurrency_limit = ONE_A_CORE.values()
    return demo.queue(default_concurrency_limit=CORES, max_size=LONGEST_QUEUE)


def choose_model(handlers: Handlers, model_class: type, value: str, render: bool = True) -> gr.Dropdown:
    choices = handlers.checkpoints.choices(model_class)
    return gr.Dropdown(
        choices,
        value=value if value in choices else next(iter(choices), None),
        label="Model",
        info="One of the list, or the Hub id of a GPT-2, such as openai-community/gpt2",
        allow_custom_value=True,
        render=render,
    )


def chat_tab(handlers: Handlers) -> None:
    gr.Markdown(CHAT)
    note = gr.Textbox(label="Note", render=False)
    chatbot = gr.Chatbot(
        render_markdown=False,
        latex_delimiters=[],
        height=420,
        label="Conversation",
        buttons=["copy", "copy_all"],
    )
    chatbot.postprocess = shown_as_text(chatbot.postprocess)
    gr.ChatInterface(
        handlers.chat,
        chatbot=chatbot,
        textbox=gr.Textbox(
            placeholder="Ask something", submit_btn=True, stop_btn=True, max_length=MAX_CHARACTERS, show_label=False
        ),
        additional_inputs=[
            # Not rendered here, which is above the conversation, but in the accordion below it.
            choose_model(handlers, LANGUAGE, "assistant", render=False),
            gr.Slider(0, 2, value=0.7, step=0.05, label="Temperature", render=False),
            gr.Slider(0, 1, value=0.9, step=0.05, label="Top-p", render=False),
            gr.Slider(1, MAX_NEW_TOKENS, value=120, step=1, label="Longest answer, in tokens", render=False),
        ],
        additional_outputs=[note],
        additional_inputs_accordion=gr.Accordion("Model and settings", open=False, render=False),
        editable=True,
        flagging_mode="never",
        api_name="chat",
        fill_height=False,
    )
    note.render()


def complete_tab(handlers: Handlers) -> None:
    gr.Markdown(COMPLETE)
    with gr.Row():
        with gr.Column(scale=1):
            model = choose_model(handlers, LANGUAGE, "base")
            prompt = gr.Textbox("Once upon a time", label="Prompt", lines=4, max_length=MAX_CHARACTERS)
            with gr.Row():
                write = gr.Button("Write", variant="primary")
                stop = gr.Button("Stop", variant="stop")
            temperature = gr.Slider(0, 2, value=0.8, step=0.05, label="Temperature", info="0: always the likeliest")
            top_k = gr.Slider(0, 200, value=50, step=1, label="Top-k", info="0: all tokens")
            top_p = gr.Slider(0, 1, value=0.95, step=0.01, label="Top-p", info="1: all tokens")
            penalty = gr.Slider(1, 2, value=1.1, step=0.05, label="Repetition penalty", info="1: none")
            length = gr.Slider(1, MAX_NEW_TOKENS, value=120, step=1, label="Length, in tokens")
            seed = gr.Number(0, label="Seed", precision=0, minimum=0, info="The same seed writes the same text")
            stop_at = gr.Textbox(label="Stop at", max_length=100, info="Ends where the text comes to this")
        with gr.Column(scale=2):
            text = gr.Textbox(label="Text", lines=8, buttons=["copy"], elem_id="completion")
            note = gr.Textbox(label="Note", max_lines=2)
            tokens = gr.HighlightedText(
                label="How sure it was of each token",
                color_map=BANDS,
                show_legend=True,
                show_inline_category=False,
                interactive=False,
            )
            clicked = gr.Textbox("Click a token above.", label="Alternatives", max_lines=1)
            table = gr.Dataframe(
                headers=["token", "the model's probability", "chance to be drawn", ""],
                datatype="str",
                interactive=False,
                show_label=False,
            )
    written = gr.State()
    writing = gr.on(
        [write.click, prompt.submit],
        handlers.complete,
        [model, prompt, temperature, top_k, top_p, penalty, length, seed, stop_at],
        [text, tokens, written, note],
        api_name="complete",
        show_progress="minimal",
        show_progress_on=note,  # over the tokens it sometimes stays after Stop, and takes their clicks
        **ONE_A_CORE,
    )
    stop.click(None, cancels=writing, api_visibility="private")
    tokens.select(handlers.alternatives, written, [clicked, table], api_visibility="private", show_progress="hidden")


def spam_tab(handlers: Handlers) -> None:
    gr.Markdown(SPAM)
    model = choose_model(handlers, CLASSIFIER, "spam")
    with gr.Row():
        with gr.Column():
            text = gr.Textbox(label="Message", lines=4, max_length=MAX_EXPLAINED_CHARACTERS)
            decide = gr.Button("Spam or not?", variant="primary")
            gr.Examples(SPAM_EXAMPLES, text, cache_examples=False)
        with gr.Column():
            label = gr.Label(label="Probabilities")
            words = gr.HighlightedText(label="The words that decided", interactive=False)
            note = gr.Textbox(label="How to read this", max_lines=1)
    gr.on(
        [decide.click, text.submit],
        handlers.classify,
        [model, text],
        [label, words, note],
        api_name="classify",
        **ONE_A_CORE,
    )
    gr.Markdown(
        f"**Many at once:** a CSV file with a column `text`, at most {MAX_ROWS:,} rows and "
        f"{MAX_FILE_BYTES // 1000:,} kB."
    )
    with gr.Row():
        with gr.Column():
            file = gr.File(label="CSV file", file_types=[".csv"], type="filepath")
            run = gr.Button("Sort the file")
        with gr.Column():
            progress = gr.Textbox(label="Result", max_lines=1)
            results = gr.File(label="Results to download", interactive=False)
    preview = gr.Dataframe(
        headers=["text", "label", "probability"], datatype="str", interactive=False, label="First rows", max_chars=200
    )
    run.click(
        handlers.classify_file, [model, file], [progress, preview, results], api_name="classify_file", **ONE_A_CORE
    )


def inside_tab(handlers: Handlers) -> None:
    gr.Markdown("Type a sentence, press **Look**, and click through the steps from left to right.")
    with gr.Row():
        model = choose_model(handlers, LANGUAGE, "base")
        text = gr.Textbox(
            "The king said to the queen that the", label="Sentence", max_length=MAX_EXPLAINED_CHARACTERS, scale=2
        )
    look = gr.Button("Look", variant="primary")
    with gr.Tab("1 Tokens"):
        gr.Markdown(TOKENS)
        count = gr.Textbox(label="Count", max_lines=2)
        pieces = gr.HighlightedText(label="Pieces", interactive=False, show_inline_category=False)
        ids = gr.Dataframe(
            headers=["position", "token", "id"], datatype="str", interactive=False, label="Ids", max_height=300
        )
    with gr.Tab("2 Attention"):
        gr.Markdown(ATTENTION)
        with gr.Row():
            layer = gr.Slider(1, 12, value=1, step=1, label="Layer")
            head = gr.Slider(1, 12, value=1, step=1, label="Head")
        attention = gr.Plot(label="Attention")
    with gr.Tab("3 Layers"):
        gr.Markdown(LENS)
        lens = gr.Dataframe(datatype="str", interactive=False, label="What each layer would say next", wrap=True)
    with gr.Tab("4 Next token"):
        gr.Markdown(NEXT)
        with gr.Row():
            settings = [
                gr.Slider(0, 2, value=1, step=0.05, label="Temperature"),
                gr.Slider(0, 100, value=0, step=1, label="Top-k (0: all)"),
                gr.Slider(0, 1, value=1, step=0.01, label="Top-p"),
            ]
        chances = gr.Plot(label="Next token")
    with gr.Tab("5 Memory"):
        gr.Markdown(CACHE)
        grow = gr.Button("Write 40 tokens")
        grown = gr.Textbox(label="Text", max_lines=6)
        note = gr.Textbox(label="Size", max_lines=2)
        cache = gr.Plot(label="KV cache")

    sentence = [model, text]
    looks = [look.click, text.submit]
    quiet = {"show_progress": "hidden", "trigger_mode": "always_last", **ONE_A_CORE}
    gr.on(looks, handlers.tokens, sentence, [pieces, ids, count], api_name="tokens", **ONE_A_CORE)
    gr.on(looks, handlers.layers_and_heads, model, [layer, head], api_visibility="private", **quiet)
    moved = [*looks, layer.change, head.change]
    gr.on(moved, handlers.attention, [*sentence, layer, head], attention, api_name="attention", **quiet)
    gr.on(looks, handlers.lens, sentence, lens, api_name="lens", **ONE_A_CORE)
    moved = [*looks, *(slider.change for slider in settings)]
    gr.on(moved, handlers.next_token, [*sentence, *settings], chances, api_name="next_token", **quiet)
    grow.click(handlers.cache, sentence, [grown, cache, note], api_name="cache", **ONE_A_CORE)


if __name__ == "__main__":
    run_main(main)
