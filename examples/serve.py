"""Serve a language model to OpenAI clients with transformers' server.

    python examples/serve.py --model runs/assistant
    python examples/serve.py --model space/checkpoints/base --port 8001

The server implements /v1/chat/completions and /v1/completions, with and without streaming. Requests must use the
model name given here. Answers are sampled if the request has a temperature above 0, and decoded greedily otherwise.
To serve an adapter, merge it with examples/export.py first.
"""

if __name__ == "__main__":  # --help and mistyped options are answered before the imports below, which take seconds
    import os
    import runpy

    runpy.run_path(os.path.join(os.path.dirname(os.path.abspath(__file__)), "_quick.py"))

import json
from dataclasses import dataclass, field

import torch
import transformers
from transformers.cli.serve import Serve
from transformers.cli.serving import server

from scratch_gpt2 import ScratchGPT2ForCausalLM
from scratch_gpt2.cli import parse_arguments, run_main
from scratch_gpt2.evaluation.models import adapter_config, find_revision, is_classifier
from scratch_gpt2.hardware import cpu_computes_bfloat16
from scratch_gpt2.tokenization import load_tokenizer


@dataclass
class Arguments:
    model: str = field(metadata={"help": "Folder or Hub id of a language model."})
    host: str = field(default="127.0.0.1", metadata={"help": "Address to listen on; 0.0.0.0: all of this machine."})
    port: int = field(default=8000, metadata={"help": "Port to listen on."})


class ServedGPT2(ScratchGPT2ForCausalLM):
    """Our model as the server calls it: an answer ends where the context does, because the server asks for at least
    1,024 tokens unless the client names a number; and it is sampled where the client names a temperature."""

    def generate(self, **kwargs):
        config, length = kwargs["generation_config"], kwargs["input_ids"].shape[1]
        room = self.config.n_positions - length
        if room < 1:
            raise ValueError(f"The prompt has {length} tokens, but the model's context is {self.config.n_positions}.")
        config.max_new_tokens = room if config.max_new_tokens is None else min(config.max_new_tokens, room)
        config.do_sample = config.do_sample or bool(config.temperature)
        return super().generate(**kwargs)


def build_openai_server(build_server, model: str):
    """The server's own, except that it lists the one model that it serves, and says in JSON what went wrong, where
    it would answer in plain text, which OpenAI clients do not show."""

    def build(model_manager, *args, **kwargs):
        from fastapi.responses import JSONResponse
        from jinja2 import TemplateError

        model_manager.get_gen_models = lambda: [{"id": model, "object": "model", "created": 0, "owned_by": "you"}]
        app = build_server(model_manager, *args, **kwargs)

        @app.middleware("http")
        async def answer_in_json(request, call_next):
            try:
                response = await call_next(request)
            except Exception as error:
                status = 400 if isinstance(error, ValueError | TypeError | KeyError | TemplateError) else 500
                content = {"message": str(error) or type(error).__name__, "type": type(error).__name__}
                return JSONResponse({"error": content}, status_code=status)
            if response.headers.get("content-type", "").startswith("text/event-stream"):
                response.body_iterator = errors_as_objects(response.body_iterator)
            return response

        return app

    return build


async def errors_as_objects(events):
    """The server's events. One that tells an error becomes the JSON object that OpenAI's clients read: the server puts
    the message between quotes as it is. Text of an answer cannot look like such an event, because it is escaped."""
    start, end = b'data: {"error": "', b'"}\n\n'
    async for chunk in events:
        before, mark, message = chunk.partition(start)
        if mark:
            error = {"error": {"message": message.removesuffix(end).decode()}}
            chunk = before + f"data: {json.dumps(error)}\n\n".encode()
        yield chunk


def check_model(name: str) -> None:
    hub = find_revision(name)
    if adapter_config(name, hub) is not None:
        raise ValueError(f"{name} is an adapter; merge it by examples/export.py, and serve the folder that it writes.")
    if is_classifier(name, hub):
        raise ValueError(f"{name} is a classifier; give a language model.")
    load_tokenizer(name)  # raises for one that is missing or damaged, as the server would at the first request


def main() -> None:
    (arguments,) = parse_arguments(Arguments, description=__doc__)
    check_model(arguments.model)
    setattr(transformers, ScratchGPT2ForCausalLM.__name__, ServedGPT2)  # where the server looks for architectures
    server.build_server = build_openai_server(server.build_server, arguments.model)
    dtype = "auto" if torch.cuda.is_available() or cpu_computes_bfloat16() else "float32"
    print(f"Serving {arguments.model} at http://{arguments.host}:{arguments.port}/v1", flush=True)
    Serve(arguments.model, host=arguments.host, port=arguments.port, dtype=dtype)


if __name__ == "__main__":
    run_main(main)
