"""The tab "Look inside": one sentence on its way through the model, from its text to the next token."""

import gradio as gr
from controls import QUIET, choose_model, clickable
from handlers import LANGUAGE, Handlers
from limits import MAX_EXPLAINED_CHARACTERS
from turns import LONG, SHORT

FIRST_SENTENCE = "Once upon a time there was a little girl. Her name was"
PRESETS = [
    FIRST_SENTENCE,
    "The king said to the queen that the",
    "Tom had a red ball. Lily had a blue ball. Lily's ball was",
    "one two three four one two three",
    "“Where are you going?” asked the",
]
INTRODUCTION = (
    "A GPT-2 computes how probable every token is as the next one. **Type a sentence** and see how it does it."
)
TOKENS = """## 1. A text becomes tokens
GPT-2 reads pieces of words, each with a number from its vocabulary. A space belongs to the word after it (`·`).

*Why? A fixed list of pieces spells every text: frequent words take one token, rare names and emoji several.*"""
VECTORS = """## 2. Tokens become vectors
Each token looks up a vector of numbers, and each position another; their sum enters the first layer. Blue is above 0,
red below.

*Why? Without the second vector, “dog bites man” and “man bites dog” would look the same to the layers.*"""
ATTENTION = """## 3. Tokens look at each other
In each layer several *heads* copy information from earlier tokens to later ones. Choose a head to enlarge it; hover
over a token, or focus it, to see where it looks. The points show how much more likely the model's answer would be
**without** that head.

*Why? It is the only step at which a token learns about others. A head that finds nothing to copy looks at the first
token.*"""
MLP = """## 4. Each token thinks for itself
After attention, a two-layer network (the *MLP*) works on every token alone. Each cell is one of its neurons.

*Why? It holds most of the model's parameters, and much of what it knows about the world.*"""
LENS = """## 5. Layer by layer, a guess takes shape
All layers add to one vector. Reading it as if the network ended there (the *logit lens*) shows what each layer would
say next; the bluer, the surer.

*Why? It shows where the model decides: often early for grammar, late for facts and names.*"""
NEXT = """## 6. A distribution, and a draw
Grey is what the model says, blue what is drawn from. Temperature sharpens or flattens; top-k and top-p drop what is
unlikely.

*Why? Always taking the most likely token produces dull, looping texts; sampling from all tokens produces nonsense.*"""
CACHE = """## 7. What it remembers
All layers keep a key and a value for each position, so that a new token costs one position's work and not the whole
text's.

*Why? It makes writing fast. The price is memory that grows with every token.*"""


def inside_tab(handlers: Handlers, demo: gr.Blocks) -> None:
    gr.Markdown(INTRODUCTION)
    text = gr.Textbox(
        FIRST_SENTENCE, label="Sentence", max_length=MAX_EXPLAINED_CHARACTERS, submit_btn="Look", elem_id="sentence"
    )
    note, overview = gr.HTML(elem_classes="note"), gr.HTML(elem_id="overview")
    presets = gr.Examples(PRESETS, text, label="Try", cache_examples=False)
    with gr.Accordion("Model", open=False):
        model = choose_model(handlers, LANGUAGE, "base")
    looked, head = gr.State(), gr.State()
    with gr.Row():
        with step("tokens", TOKENS):
            tokens = gr.HTML()
        with step("vectors", VECTORS):
            vectors = gr.HTML()
    with step("attention", ATTENTION):
        layer = gr.Radio(handlers.layers(model.value), label="Layer")
        heads = clickable(elem_id="heads")
        with gr.Row():
            with gr.Column(min_width=320):
                arcs = gr.HTML()
            with gr.Column(min_width=320):
                gr.Markdown("**Switch this head off**, and the next token changes:")
                ablation = gr.HTML(elem_id="ablation")
    with step("mlp", MLP):
        neurons, active = gr.HTML(), gr.Markdown()
    with step("lens", LENS):
        lens = gr.HTML()
    with gr.Row():
        with step("next", NEXT):
            settings = [
                gr.Slider(0, 2, value=1, step=0.05, label="Temperature"),
                gr.Slider(0, 100, value=0, step=1, label="Top-k (0: all)"),
                gr.Slider(0, 1, value=1, step=0.01, label="Top-p"),
            ]
            chances, left = gr.HTML(), gr.Markdown(elem_id="left")
        with step("cache", CACHE):
            grow = gr.Button("Write 40 tokens")
            grown = gr.Textbox(label="Text", max_lines=6)
            cache, size = gr.HTML(), gr.Markdown(elem_id="size")

    attention = [heads, arcs, ablation]
    outputs = [looked, note, overview, tokens, vectors, layer, head, *attention, neurons, active, lens, chances, left]
    looking = {"inputs": [model, text, layer, head, *settings], "outputs": [*outputs, grown, cache, size]}
    options = {"trigger_mode": "always_last", **SHORT}
    gr.on([text.submit, model.input], handlers.look, **looking, api_name="look", show_progress_on=note, **options)
    demo.load(handlers.look, **looking, api_visibility="private", **QUIET, **options)
    presets.load_input_event.then(handlers.look, **looking, api_visibility="private", **QUIET, **options)
    options |= {"api_visibility": "private", **QUIET}
    layer.input(handlers.look_at_layer, [looked, layer, head], [*attention, neurons, active], **options)
    heads.select(handlers.look_at_head, [looked, layer], [head, *attention], **options)
    gr.on(
        [slider.change for slider in settings],
        handlers.look_at_next,
        [looked, *settings],
        [chances, left],
        **options,
    )
    grow.click(handlers.grow_cache, looked, [grown, cache, size], api_visibility="private", **QUIET, **LONG)


def step(name: str, text: str) -> gr.Column:
    """A section of the walk, with its heading."""
    section = gr.Column(elem_id=f"step-{name}", elem_classes="step", min_width=320)
    with section:
        gr.Markdown(text)
    return section
