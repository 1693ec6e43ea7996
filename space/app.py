"""The Space: look inside, complete, chat, sort out spam. Everything runs on this machine.

python space/app.py                                   the models of space/checkpoints, and those below runs/
python space/app.py --models checkpoints --port 8000  others to choose from
python space/app.py --host 0.0.0.0                    for other machines on the network
"""

import argparse
import logging
import os
from pathlib import Path

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
# Gradio summarizes all events after each event, and a client can break that summary with half of an emoji.
os.environ.setdefault("GRADIO_ANALYTICS_CACHE_FREQUENCY", "1000000000")
os.environ.setdefault("GRADIO_ANALYTICS_MAX_EVENTS", "1")

import gradio as gr
import torch
from limits import MAX_FILE_BYTES, without_traceback
from models import EMBEDDED_FOLDER, Checkpoints
from page import build
from transformers.utils import logging as transformers_logging

from scratch_gpt2.cli import run_main

STYLE = Path(__file__).parent / "style.css"
THEME = gr.themes.Default(  # fonts of the visitor's machine: nothing is downloaded
    primary_hue="blue", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
).set(  # texts with a contrast of at least 4.5:1
    body_text_color_subdued="*neutral_600",
    body_text_color_subdued_dark="*neutral_300",
    block_info_text_color="*neutral_600",
    block_info_text_color_dark="*neutral_300",
    block_label_text_color="*neutral_700",
    block_label_text_color_dark="*neutral_200",
    block_title_text_color="*neutral_700",
    block_title_text_color_dark="*neutral_200",
    input_placeholder_color="*neutral_600",
    input_placeholder_color_dark="*neutral_300",
    button_primary_background_fill="*primary_700",
    button_primary_background_fill_hover="*primary_800",
    button_primary_background_fill_dark="*primary_700",
    button_primary_background_fill_hover_dark="*primary_800",
    button_primary_text_color="white",
    button_primary_text_color_dark="white",
    color_accent="*primary_700",
    link_text_color="*primary_700",
    link_text_color_dark="*primary_300",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--host", help="Address to listen on (default: 127.0.0.1, this machine only).")
    parser.add_argument("--port", type=int, help="Port (default: the first free one from 7860 on).")
    parser.add_argument("--share", action="store_true", help="Also open a public address through gradio.live.")
    parser.add_argument("--checkpoints", default=EMBEDDED_FOLDER, help="Folder with base, assistant and spam.")
    parser.add_argument("--models", default="runs", help="Folder below which visitors may choose models.")
    parser.add_argument("--no_optimize", action="store_true", help="Keep the kernels of the models as loaded.")
    options = parser.parse_args()

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("httpx").setLevel(logging.WARNING)
    for name in ("uvicorn.error", "asyncio"):
        logging.getLogger(name).addFilter(without_traceback)
    torch.set_num_threads(1)  # a core for each text
    checkpoints = Checkpoints(options.checkpoints, options.models, optimize=not options.no_optimize)
    if sentence := checkpoints.missing():
        print(sentence, flush=True)
    checkpoints.preload()
    build(checkpoints).launch(
        server_name=options.host, server_port=options.port, share=options.share, **launch_options()
    )


def launch_options() -> dict:
    """Nothing from other servers, nothing recorded, no large uploads."""
    return {
        "theme": THEME,
        "css_paths": STYLE,
        "max_file_size": MAX_FILE_BYTES,
        "run_history": False,
        "enable_monitoring": False,
        "ssr_mode": False,
        "state_session_capacity": 200,
        "footer_links": ["api"],
    }


if __name__ == "__main__":
    run_main(main)
