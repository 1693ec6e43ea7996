"""Three rows in HellaSwag's original form, of ActivityNet's kind and of WikiHow's."""

import json

ROW = {
    "ind": 24,
    "activity_label": "Cat care",
    "ctx_a": "The cat sat on the mat.",
    "ctx_b": "the cat",
    "ctx": "The cat sat on the mat. the cat",
    "split": "val",
    "label": 2,
    "endings": ["sat on the hat.", ", under the rat, is where it sat.", "is.", "[substeps] The rat  is a cat's."],
    "source_id": "activitynet~v_1",
}
WIKIHOW = ROW | {
    "ind": 25,
    "activity_label": "Pets and Animals",
    "ctx_a": "[header] How to sit on a mat [title] Find the mat. [step] A mat is under the cat. [substeps]",
    "ctx_b": "",
    "ctx": "[header] How to sit on a mat [title] Find the mat. [step] A mat is under the cat. [substeps]",
    "label": "0",
    "endings": ["The cat is on it.", "Sit. [title] Sit on the hat. [step] It is the cat's.", "a", "b c"],
}
RATS = ROW | {
    "ind": 26,
    "activity_label": "Rats",
    "ctx_a": "The rat.",
    "ctx_b": "it",
    "ctx": "The rat. it",
    "label": 1,
}
ROWS = [ROW, WIKIHOW, RATS]


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
