"""Parts that several tabs share."""

from functools import partial

import gradio as gr
import markup
from handlers import Handlers
from turns import LOADING

QUIET = {"show_progress": "hidden"}


def choose_model(handlers: Handlers, model_class: type, value: str) -> gr.Dropdown:
    """A list of models, and a line that says when another one is loaded."""
    choices = handlers.checkpoints.choices(model_class)
    model = gr.Dropdown(
        choices,
        value=value if value in choices else next(iter(choices), None),
        label="Model",
        info="One of the list, or the Hub id of a GPT-2, such as openai-community/gpt2",
        allow_custom_value=True,
    )
    loaded = gr.HTML(elem_classes="note")
    prepare = partial(handlers.prepare, model_class=model_class)
    model.input(prepare, model, loaded, api_visibility="private", trigger_mode="always_last", **LOADING)
    return model


def clickable(**options) -> gr.HTML:
    """A picture whose parts can be clicked: `select` and `submit` carry `pick`."""
    return gr.HTML(js_on_load=markup.PICK, apply_default_css=False, **options)
