"""Export a model for other engines: as a GGUF file for llama.cpp and Ollama, or as transformers' own GPT-2.

    python examples/export.py --model runs/assistant --output assistant.gguf
    python examples/export.py --model runs/assistant --output assistant-q8.gguf --dtype q8_0
    python examples/export.py --model runs/assistant --output runs/assistant-gpt2

An output that ends in .gguf is one file with weights, tokenizer and chat template; an Ollama Modelfile is written
next to it. Any other output is a folder that transformers reads as its own GPT-2. Adapters are merged first.
"""

if __name__ == "__main__":  # --help and mistyped options are answered before the imports below, which take seconds
    import os
    import runpy

    runpy.run_path(os.path.join(os.path.dirname(os.path.abspath(__file__)), "_quick.py"))

from dataclasses import dataclass, field
from pathlib import Path

from scratch_gpt2.cli import parse_arguments, run_main
from scratch_gpt2.evaluation.models import load_tokenizer_of
from scratch_gpt2.files import check_outputs
from scratch_gpt2.gguf_export import FILE_TYPES, export_gguf, read_model
from scratch_gpt2.openai_weights import export_gpt2


@dataclass
class Arguments:
    model: str = field(metadata={"help": "Folder or Hub id of a language model or adapter."})
    output: str = field(metadata={"help": "A file that ends in .gguf, or a folder."})
    dtype: str = field(
        default="f16", metadata={"help": "How a GGUF file stores the matrices.", "choices": list(FILE_TYPES)}
    )
    overwrite: bool = field(default=False, metadata={"help": "Replace an export of the same name."})


def main() -> None:
    (arguments,) = parse_arguments(Arguments, description=__doc__)
    output = Path(arguments.output)
    if output.suffix == ".gguf":
        file, modelfile = export_gguf(arguments.model, output, dtype=arguments.dtype, overwrite=arguments.overwrite)
        print(f"{file}\n{modelfile}")
        return
    check_outputs(
        [output / "config.json"], inputs=[Path(arguments.model, "config.json")], overwrite=arguments.overwrite
    )
    tokenizer = load_tokenizer_of(arguments.model)
    export_gpt2(read_model(arguments.model), output, tokenizer=tokenizer)
    print(output)


if __name__ == "__main__":
    run_main(main)
