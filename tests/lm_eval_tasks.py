"""HellaSwag and perplexity of local files, as tasks of lm-evaluation-harness."""

import json
import os
from pathlib import Path

from hellaswag_rows import write_rows

HELLASWAG = """\
include: {hellaswag}
task: local_hellaswag
dataset_path: json
dataset_kwargs:
  data_files:
    validation: {rows}
training_split: null
"""
PERPLEXITY = """\
task: local_perplexity
dataset_path: json
dataset_kwargs:
  data_files:
    test: {texts}
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list:
  - metric: byte_perplexity
  - metric: bits_per_byte
"""


def run_harness(run, folder: Path, rows: list[dict], texts: list[str], *options: str) -> tuple[dict, dict, Path]:
    """The harness' results and samples, by task, and the file of the HellaSwag rows. All files are in `folder`.

    `run(*arguments, env)` runs `lm_eval` with these arguments as `subprocess.run` would."""
    import lm_eval

    tasks = folder / "tasks"
    tasks.mkdir()
    rows_file = write_rows(folder / "rows.jsonl", rows)
    texts_file = write_rows(folder / "texts.jsonl", [{"text": text} for text in texts])
    original = Path(lm_eval.__file__).parent / "tasks" / "hellaswag" / "hellaswag.yaml"
    (tasks / "local_hellaswag.yaml").write_text(HELLASWAG.format(hellaswag=original, rows=rows_file))
    (tasks / "local_perplexity.yaml").write_text(PERPLEXITY.format(texts=texts_file))
    command = ["run", "--tasks", "local_hellaswag,local_perplexity", "--include_path", str(tasks)]
    command += ["--output_path", str(folder / "out"), "--log_samples", *options]
    caches = {"HF_HOME": str(folder / "home"), "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = run(*command, env=os.environ | caches)
    assert done.returncode == 0, (done.returncode, done.stderr[-2000:])
    (results,) = (folder / "out").rglob("results_*.json")
    samples = {}
    for task in ("local_hellaswag", "local_perplexity"):
        (file,) = (folder / "out").rglob(f"samples_{task}_*.jsonl")
        samples[task] = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        samples[task].sort(key=lambda sample: sample["doc_id"])
    return json.loads(results.read_text())["results"], samples, rows_file
