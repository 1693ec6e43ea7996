"""Load a pushed model and save its outputs: a script that `check_pushed` runs in its own process.

    python -P load_back.py REPO_ID REVISION TEXT FILE MODEL_CLASS [BASE]

The model is loaded as by a user who has not installed this package. An adapter, given with its BASE model, has no code
of its own and needs the package.
"""

import sys

import torch
import transformers
from safetensors.torch import save_file


def main(repo_id: str, revision: str, text: str, file: str, model_class: str, base: str | None = None) -> None:
    if base is None:
        sys.modules["scratch_gpt2"] = None  # type: ignore[assignment]  # `import scratch_gpt2` fails
        options = {"revision": revision, "code_revision": revision, "trust_remote_code": True}
        model = getattr(transformers, model_class).from_pretrained(repo_id, **options)
    else:
        from peft import PeftModel

        import scratch_gpt2

        adapted = getattr(scratch_gpt2, model_class).from_pretrained(base)
        model = PeftModel.from_pretrained(adapted, repo_id, revision=revision)
    tokenizer = transformers.AutoTokenizer.from_pretrained(repo_id, revision=revision)
    ids = tokenizer(text, return_tensors="pt").input_ids
    with torch.no_grad():
        save_file({"ids": ids, "output": model.eval()(ids)[0].float().contiguous()}, file)


if __name__ == "__main__":
    main(*sys.argv[1:])
