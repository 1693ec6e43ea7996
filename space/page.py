"""The page: all tabs except "Look inside", and the events of their controls."""

from pathlib import Path

import gradio as gr
from classifier import SPAM as SPAM_LABEL
from controls import QUIET, choose_model, clickable
from handlers import CLASSIFIER, LANGUAGE, Handlers
from limits import (
    MAX_CHARACTERS,
    MAX_EXPLAINED_CHARACTERS,
    MAX_FILE_BYTES,
    MAX_NEW_TOKENS,
    MAX_ROWS,
    quiet_preprocess,
    quiet_requests,
    shown_as_text,
    text_only,
)
from models import Checkpoints
from turns import CORES, LONG, SHORT
from walk import inside_tab

MAX_QUEUE = 64
HOUR = 3600
SAMPLE_FILE = Path(__file__).parent / "sample.csv"

COMPLETE = """From the text so far the model computes a probability for every token that could come next; one of them
is drawn, and so on. **Click a token** to see what else could have stood there, and continue with that instead."""
CHAT = """The **assistant** is a tiny model, tuned on instructions and answers. """
STORY_TELLER = """Its job: short stories on request; say about whom, or with which words. It knows no facts, and cannot
calculate, spell or look anything up."""
BEGINNER = """It has learned the form of an answer and hardly any facts: **most of what it says is wrong**. It cannot
calculate, translate or look anything up."""
STARTERS = ["Tell me a story about a girl named Lily.", "Write a story with the words kite and tree.", "Who are you?"]
MAX_STARTERS = 4
SPAM = """The same network with a **head** of one number per label in place of the next token. It reads the label from
the last token, the only one that has seen the whole message. **Red always means spam.**"""
SPAM_EXAMPLES = [
    "Congratulations! You have won a free holiday. Call 09061701461 now to claim your prize.",
    "Sorry, I'm running late, could you start dinner without me?",
    "URGENT! Your mobile number was awarded a 2000 pound bonus. Reply WIN to 80086.",
]
TRICKY_MESSAGES = [  # of which the first that the shipped filter gets wrong is shown
    ("Hi dad, I lost my phone, this is my new number. Can you send me some money?", SPAM_LABEL),
    ("Dear customer, you won 25 lakh rupees in the KBC lottery. WhatsApp us your bank details.", SPAM_LABEL),
    ("Your parcel is held at customs. Pay the small fee at the link to receive it.", SPAM_LABEL),
    ("Free for lunch? Call me when you have won your match!", "not spam"),
]


def build(checkpoints: Checkpoints) -> gr.Blocks:
    handlers = Handlers(checkpoints)
    handlers.warm_up()
    with gr.Blocks(title="scratch_gpt2", delete_cache=(HOUR, HOUR)) as demo:
        gr.Markdown("# scratch_gpt2\nA GPT-2 written from scratch: look inside, write with it, talk to it.")
        with gr.Tab("Look inside"):
            inside_tab(handlers, demo)
        with gr.Tab("Complete"):
            complete_tab(handlers)
        with gr.Tab("Chat"):
            chat_tab(handlers)
        with gr.Tab("Spam"):
            spam_tab(handlers)
    for block in demo.blocks.values():
        if hasattr(block, "preprocess"):
            quiet_preprocess(block)
    quiet_requests(demo)
    return demo.queue(default_concurrency_limit=CORES, max_size=MAX_QUEUE, api_open=False)


def complete_tab(handlers: Handlers) -> None:
    gr.Markdown(COMPLETE)
    prompt = gr.Textbox("Once upon a time", label="Prompt", max_lines=8, max_length=MAX_CHARACTERS)
    with gr.Row():
        write = gr.Button("Write", variant="primary", min_width=100)
        again = gr.Button("Another seed", min_width=100)
        stop = gr.Button("Stop", min_width=100)
    note = gr.HTML(elem_classes="note")
    tokens = clickable(elem_id="completion")
    text = gr.Textbox(label="Plain text", visible="hidden")
    copy = gr.Button("Copy the text", size="sm")
    with gr.Accordion("Model and settings", open=False):
        model = choose_model(handlers, LANGUAGE, "base")
        with gr.Row():
            temperature = gr.Slider(
                0, 2, value=0.8, step=0.05, label="Temperature", info="0: always the most likely token"
            )
            top_k = gr.Slider(0, 200, value=50, step=1, label="Top-k", info="0: all tokens")
            top_p = gr.Slider(0, 1, value=0.95, step=0.01, label="Top-p", info="1: all tokens")
        with gr.Row():
            penalty = gr.Slider(1, 2, value=1.1, step=0.05, label="Repetition penalty", info="1: none")
            length = gr.Slider(1, MAX_NEW_TOKENS, value=200, step=1, label="Length, in tokens")
        with gr.Row():
            seed = gr.Number(0, label="Seed", precision=0, minimum=0, info="The same seed writes the same text")
            stop_at = gr.Textbox(label="Stop at", max_length=100, info="Ends where the text comes to this")
    written = gr.State()
    settings = [temperature, top_k, top_p, penalty, length, seed, stop_at]
    outputs = [text, tokens, written, note]
    options = {"show_progress": "minimal", "show_progress_on": note, **LONG}
    complete = {"fn": handlers.complete, "inputs": [model, prompt, *settings], "outputs": outputs}
    writing = gr.on([write.click, prompt.submit], **complete, api_name="complete", **options)
    reseeded = again.click(handlers.another_seed, None, seed, api_visibility="private", queue=False)
    rewriting = reseeded.then(**complete, api_visibility="private", **options)
    continuing = tokens.submit(
        handlers.continue_with, [written, *settings], outputs, api_visibility="private", **options
    )
    running = [writing, rewriting, continuing]
    stop.click(None, cancels=running, api_visibility="private")
    tokens.select(
        handlers.open_token, written, tokens, cancels=running, queue=False, api_visibility="private", **QUIET
    )
    copy.click(None, text, js="text => { navigator.clipboard.writeText(text); }", api_visibility="private")


def chat_tab(handlers: Handlers) -> None:
    facts = handlers.checkpoints.facts("assistant")
    tells_stories = any("stories" in name for name in facts.get("metrics", {}))
    asked = [question for question, _ in facts.get("samples", []) if "\n" not in question]
    gr.Markdown(CHAT + (STORY_TELLER if tells_stories else BEGINNER))
    chatbot = gr.Chatbot(
        render_markdown=False,
        latex_delimiters=[],
        height=400,
        label="Conversation",
        buttons=["copy", "copy_all"],
        editable="user",
        placeholder="Ask something, or try one of the examples.",
    )
    chatbot.preprocess = text_only(chatbot.preprocess)
    chatbot.postprocess = shown_as_text(chatbot.postprocess)
    with gr.Row(equal_height=True):
        message = gr.Textbox(
            label="Message", placeholder="Ask something", submit_btn="Send", max_length=MAX_CHARACTERS, scale=8
        )
        stop = gr.Button("Stop", min_width=80, scale=0)
    note = gr.HTML(elem_classes="note")
    starters = gr.Examples((asked or STARTERS)[:MAX_STARTERS], message, label="Try", cache_examples=False)
    with gr.Accordion("Model and settings", open=False):
        settings = [
            choose_model(handlers, LANGUAGE, "assistant"),
            gr.Slider(0, 2, value=0.7, step=0.05, label="Temperature"),
            gr.Slider(0, 1, value=0.9, step=0.05, label="Top-p"),
            gr.Slider(1, MAX_NEW_TOKENS, value=200, step=1, label="Longest answer, in tokens"),
        ]
    outputs = [message, chatbot, note]
    options = {"outputs": outputs, "show_progress": "minimal", "show_progress_on": note, **LONG}
    running = [
        message.submit(handlers.chat, [message, chatbot, *settings], api_name="chat", **options),
        chatbot.retry(handlers.retry, [chatbot, *settings], api_visibility="private", **options),
        chatbot.edit(handlers.edit, [chatbot, *settings], api_visibility="private", **options),
        starters.load_input_event.then(
            handlers.chat, [message, chatbot, *settings], api_visibility="private", **options
        ),
    ]
    stop.click(None, cancels=running, api_visibility="private")


def spam_tab(handlers: Handlers) -> None:
    first = handlers.first_verdict("spam", SPAM_EXAMPLES[0])
    gr.Markdown(SPAM)
    gr.Markdown(honest_words(handlers))
    with gr.Row():
        with gr.Column():
            text = gr.Textbox(first.text, label="Text message", max_lines=8, max_length=MAX_EXPLAINED_CHARACTERS)
            decide = gr.Button("Spam or not?", variant="primary")
            gr.Examples(SPAM_EXAMPLES, text, label="Try", cache_examples=False)
        with gr.Column():
            note = gr.HTML(first.note, elem_classes="note")
            label = gr.Label(first.probabilities, label="Probabilities", show_heading=False)
            words = gr.HTML(first.words, elem_id="words")
    with gr.Accordion("Model", open=False):
        model = choose_model(handlers, CLASSIFIER, "spam")
    with gr.Accordion("Many at once: a CSV file", open=False):
        file_part(handlers, model)
    sentence = [model, text]
    decided = gr.on(
        [decide.click, text.submit], handlers.classify, sentence, [label, note, words], api_name="classify", **SHORT
    )
    weighing = decided.success(
        handlers.words, sentence, words, api_name="words", trigger_mode="multiple", **QUIET, **LONG
    )
    gr.on([decide.click, text.submit, text.input], None, cancels=weighing, api_visibility="private")


def honest_words(handlers: Handlers) -> str:
    """The quality of the embedded spam filter according to its card, and a message that it gets wrong."""
    metrics = handlers.checkpoints.facts("spam").get("metrics", {})
    found = [metrics.get(f"{corpus}_recall_at_1%") for corpus in ("sms", "india")]
    sentences = []
    if None not in found:
        sentences.append(
            f"Of test messages that it had not seen, it finds {found[0]:.0%} of the spam sent in Britain and "
            f"Singapore and {found[1]:.0%} of that sent in India, with one false alarm in a hundred other messages."
        )
    try:
        threshold, wrong = handlers.known_limits("spam", TRICKY_MESSAGES)
    except (ValueError, OSError):
        return " ".join(sentences)
    sentences += [f"It gets this one wrong: “{wrong}”"] * bool(wrong)
    sentences.append(f"Below {threshold:.0%} it is **unsure**.")
    return " ".join(sentences)


def file_part(handlers: Handlers, model: gr.Dropdown) -> None:
    gr.Markdown(f"At most {MAX_ROWS:,} rows and {MAX_FILE_BYTES // 1000:,} kB; every row is kept and gets a label.")
    file = gr.File(label="CSV file", file_types=[".csv", ".tsv", ".txt"], type="filepath", height=120)
    gr.Examples([[str(SAMPLE_FILE)]], file, label="Try", example_labels=["A sample file"], cache_examples=False)
    with gr.Row():
        column = gr.Dropdown([], label="Column of the texts", allow_custom_value=True)
        has_header = gr.Checkbox(True, label="The first row names the columns")
    run = gr.Button("Sort the file")
    note = gr.HTML(elem_classes="note")
    with gr.Column(visible=False) as found:
        results = gr.DownloadButton("Download the results")
        preview = gr.Dataframe(
            datatype="str",
            interactive=False,
            label="First rows",
            max_chars=200,
            wrap=True,
            column_widths=["40%", "20%", "22%", "18%"],
        )
    gr.on(
        [file.change, has_header.input],
        handlers.columns,
        [file, has_header],
        column,
        api_visibility="private",
        **SHORT,
    )
    sorting = run.click(
        handlers.classify_file,
        [model, file, column, has_header],
        [note, preview, results],
        api_name="classify_file",
        show_progress_on=note,
        **LONG,
    )
    sorting.success(lambda: gr.Column(visible=True), None, found, api_visibility="private", queue=False)
